from collections.abc import Sequence

MAX_DRAFT: int
FORCED_CHANCE: float
MAX_ROWS: int

class Ngrams:
    def __init__(self, n_tokens: int) -> None: ...

class DraftStats:
    def note_step(self, n_rows: int, seconds: float) -> None: ...
    def seconds(self, n_rows: int) -> float: ...
    def step_costs(self) -> list[float]: ...

class Drafter:
    def __init__(
        self, stats: DraftStats, prompt: Sequence[int], others: Ngrams | None = None, *, n_tokens: int = 0
    ) -> None: ...
    def read(self, outputs: list[int]) -> None: ...
    def propose(self, most: int, behind: list[int] = ...) -> list[tuple[int, float]]: ...

def plan(
    stats: DraftStats,
    drafters: list[Drafter],
    mosts: list[int],
    n_rows: int,
    forced: list[tuple[int, ...]] | None = None,
) -> list[tuple[int, ...]]: ...

def choose(stats: DraftStats, chances: list[list[float]], n_rows: int) -> tuple[float, list[int]]: ...
