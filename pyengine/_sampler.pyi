"""Types of the compiled module; csrc/sampler/sampler.h has the specification."""

from collections.abc import Iterable, Sequence

from typing_extensions import Buffer

from pyengine.sampling import ResolvedParams

MAX_TOP_LOGPROBS: int

class Sequences:
    def __init__(self, sequences: Sequence[Sequence[int]]) -> None: ...

class Sampler:
    sample_index: int
    outputs: list[int]
    logprobs: list[tuple[int, float, tuple[tuple[int, float], ...]] | None] | None
    def __init__(
        self,
        params: ResolvedParams,
        vocab_size: int,
        *,
        end_ids: Iterable[int] = (),
        bad_sequences: Sequences | Sequence[Sequence[int]] = (),
        breakers: Sequences | Sequence[Sequence[int]] = (),
        sample_index: int = 0,
    ) -> None: ...
    def accept_prompt(self, tokens: Buffer) -> None: ...
    def accept(self, token: int) -> None: ...
    def reset(self) -> None: ...
    def sample(
        self, logits: Buffer, position: int, mask: Buffer | None = None
    ) -> tuple[int, float | None, list[tuple[int, float]] | None]: ...
    def random(self, position: int) -> float: ...
    def guess(
        self,
        logits: Buffer,
        position: int,
        mask: Buffer | None = None,
        ids: Buffer | None = None,
        *,
        likeliest: bool = False,
    ) -> tuple[int, float]: ...

def sample_many(
    logits: Buffer,
    rows: Sequence[int],
    samplers: Sequence[Sampler],
    positions: Sequence[int],
    masks: Sequence[Sequence[Buffer | None] | None] | None = None,
    n_threads: int = 1,
    drafts: Sequence[Sequence[int]] | None = None,
    edited: Sequence[Buffer | None] | None = None,
) -> list[Exception | None]: ...
def logprobs(
    logits: Buffer, token: int, n_top: int = 0, mask: Buffer | None = None
) -> tuple[float, list[tuple[int, float]]]: ...
def _philox4x32_10(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, int, int, int]: ...
def exp(x: float) -> float: ...
def _log(x: float) -> float: ...
