from collections.abc import Iterable

from typing_extensions import Buffer

from pyengine.sampling import ResolvedParams

MAX_TOP_LOGPROBS: int

class Sampler:
    def __init__(
        self, params: ResolvedParams, vocab_size: int, *, end_ids: Iterable[int] = (), sample_index: int = 0
    ) -> None: ...
    def accept_prompt(self, tokens: Buffer) -> None: ...
    def accept(self, token: int) -> None: ...
    def reset(self) -> None: ...
    def sample(
        self, logits: Buffer, position: int
    ) -> tuple[int, float | None, list[tuple[int, float]] | None]: ...

def logprobs(logits: Buffer, token: int, n_top: int = 0) -> tuple[float, list[tuple[int, float]]]: ...
