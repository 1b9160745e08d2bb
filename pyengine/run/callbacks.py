"""A caller's own functions between a row of logits and its token: logits processors and stopping criteria.

They are given a copy of the row: the row itself belongs to the context until the next forward replaces it, and a function may
keep what it is given. The copy takes microseconds, and what the model computed is still there for the log-probabilities.

The functions come first, before penalties, bias and filters, as in llama-cpp-python and vLLM; what a grammar forbids stays
forbidden. A logit of -infinity bans its token; the sampler takes finite logits only, so a ban becomes a bit of its mask.

What a function raises is its own request's error, be it no Exception; but in the main thread that (SystemExit, say) may be a
signal's handler as well as the function, so there it ends the call of the thread, like Ctrl-C, and the function is asked again.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from pyengine._step_lock import call_guest
from pyengine.errors import InvalidArgumentError, NotFiniteError

if TYPE_CHECKING:
    import numpy.typing as npt

    from pyengine.sampling import LogitsProcessor, ResolvedParams, StoppingCriteria

T = TypeVar("T")


class Edited(NamedTuple):
    """What the functions made of a row.

    logits  (vocab_size) float32, finite; None = as the model computed them
    mask    which tokens may come, uint32 words as of `Guide.masks`; None = all
    """

    logits: npt.NDArray[np.float32] | None
    mask: array[int] | npt.NDArray[np.uint32] | None


class Callbacks:
    """Of one output, under the step lock. What is kept is derived from the prompt and the outputs, so an exception may fall
    anywhere; then the functions are called once more for the same token."""

    def __init__(self, prompt: Sequence[int], params: ResolvedParams) -> None:
        self._processors = params.logits_processor
        self._criteria = params.stopping_criteria
        self._tokens = np.array(prompt, dtype=np.int32)  # the prompt and, with room for more, the outputs that were read
        self._n_tokens = self._n_prompt = len(prompt)

    def edit(self, outputs: Sequence[int], row: Any, allowed: array[int] | None) -> Edited | None:
        """What comes of a row of logits (vocab_size) after `outputs`; None: the output ends here. allowed: the mask of a grammar.
        Raises what the functions raise, NotFiniteError for a NaN or +infinity, InvalidArgumentError for what is no row."""
        logits = np.array(row, dtype=np.float32)
        tokens = self._read(outputs)
        if any(_called(_is_met, criterion, tokens, logits) for criterion in self._criteria):
            return None
        if not self._processors:
            return Edited(None, allowed)
        for processor in self._processors:
            _called(_process, processor, tokens, logits)
        return _with_bans(logits, allowed)

    def _read(self, outputs: Sequence[int]) -> npt.NDArray[np.int32]:
        """Prompt and outputs, read-only. Costs what is new."""
        n = self._n_prompt + len(outputs)
        if n > len(self._tokens):
            grown = np.empty(2 * n, dtype=np.int32)
            grown[: self._n_tokens] = self._tokens[: self._n_tokens]
            self._tokens = grown
        self._tokens[self._n_tokens : n] = outputs[self._n_tokens - self._n_prompt :]
        self._n_tokens = n
        tokens = self._tokens[:n]
        tokens.flags.writeable = False
        return tokens


def _called(function: Callable[..., T], *args: Any) -> T:
    """function(*args), which calls a caller's own. What would end a loop over the outputs, with nobody the wiser, is told as of a
    generator that raises it."""
    try:
        return call_guest(function, *args)
    except (StopIteration, StopAsyncIteration) as error:
        raise RuntimeError(f"a logits_processor or stopping_criteria raised {type(error).__name__}") from error


def _is_met(criterion: StoppingCriteria, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> bool:
    seen = logits.view()
    seen.flags.writeable = False
    return bool(criterion(tokens, seen))


def _process(processor: LogitsProcessor, tokens: npt.NDArray[np.int32], logits: npt.NDArray[np.float32]) -> None:
    """Make of logits what a processor does: it changes what it is given, or returns others."""
    given = logits.view()  # whose shape is its own
    result = processor(tokens, given)
    if result is None or result is given:
        return
    returned = np.asarray(result)
    if returned.shape != logits.shape or returned.dtype.kind not in "fiu":
        raise InvalidArgumentError(
            f"a logits_processor must return None or {len(logits)} logits, one a token, not {returned.dtype} {returned.shape}"
        )
    with np.errstate(over="ignore"):  # an infinity, of which we tell
        logits[:] = returned


def _with_bans(logits: npt.NDArray[np.float32], allowed: array[int] | None) -> Edited:
    """The row that the processors leave, with its bans in a mask."""
    is_finite = np.isfinite(logits)
    if is_finite.all():
        return Edited(logits, allowed)
    is_wrong = ~is_finite & ~np.isneginf(logits)
    if is_wrong.any():
        token = int(np.argmax(is_wrong))
        raise NotFiniteError(
            f"a logits_processor made the logit of token {token} {logits[token]}: beside numbers it may be -inf, a ban"
        )
    if not is_finite.any():
        raise InvalidArgumentError("a logits_processor made every logit -inf: no token could come")
    mask = np.zeros((len(logits) + 31) // 32, dtype="<u4")
    bits = np.packbits(is_finite, bitorder="little")
    mask.view(np.uint8)[: len(bits)] = bits
    words = mask.astype(np.uint32)  # in this machine's order
    finite = np.where(is_finite, logits, np.float32(0.0))  # theirs may be kept
    return Edited(finite, words if allowed is None else words & np.frombuffer(allowed, dtype=np.uint32))
