"""What a caller gives as a prompt -> token ids: text or ids, checked before work is done on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from pyengine.arguments import shown
from pyengine.errors import ContextFullError, InvalidArgumentError

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer

Prompt = str | Sequence[int]  # text, or token ids

# Below this many characters a position, a text is tokenized without a look at the vocabulary's longest token.
_CHARACTERS_PER_POSITION = 16


def is_batch(prompt: object) -> bool:
    """Whether `prompt` is a list of prompts: of texts, or of lists (or the rows of a 2-D array) of token ids.

    Raises InvalidArgumentError for what is neither a prompt nor a list."""
    if isinstance(prompt, str):
        return False
    items = _sequence(prompt)
    if len(items) == 0:
        raise InvalidArgumentError("the prompt is empty")
    return not _is_id(items[0])


def prompt_ids(
    tokenizer: Callable[[], Tokenizer] | None,
    prompt: object,
    *,
    vocab_size: int,
    n_ctx: int,
    parse_special: bool = False,
) -> list[int]:
    """Token ids of one prompt.

    prompt       text, or token ids: a list, tuple or array of integers (NumPy's too; no bool, float, string or bytes)
    tokenizer    returns the tokenizer; called for text only. None: the prompt must be ids
    vocab_size   ids are below it
    n_ctx        positions of the context

    Raises InvalidArgumentError for anything else, for ids out of range and for a prompt without tokens, ContextFullError for a
    text that cannot fit, before it is tokenized, and for more tokens than n_ctx."""
    if isinstance(prompt, str) and tokenizer is not None:
        encoder = tokenizer()
        check_length(encoder, prompt, n_ctx)
        ids = encoder.encode(prompt, parse_special=parse_special)
        if not ids:
            raise InvalidArgumentError("the prompt is empty and the model has no begin-of-text token to start from")
    else:
        ids = token_ids(prompt, vocab_size)
        if not ids:
            raise InvalidArgumentError("the prompt has no tokens")
    if len(ids) > n_ctx:
        raise ContextFullError(f"the prompt has {len(ids)} tokens, the context holds {n_ctx}")
    return ids


def token_ids(values: object, vocab_size: int) -> list[int]:
    """`values` as a list of token ids. Raises InvalidArgumentError for what is no sequence of integers in [0, vocab_size)."""
    ids = []
    for value in _sequence(values):
        if not _is_id(value):
            raise InvalidArgumentError(f"a prompt is text or a list of token ids (integers), {shown(value)} is neither")
        id_ = int(value)
        if not 0 <= id_ < vocab_size:
            raise InvalidArgumentError(f"token id {shown(id_)} is outside the vocabulary of {vocab_size}")
        ids.append(id_)
    return ids


def check_length(tokenizer: Tokenizer, text: str, n_ctx: int) -> None:
    """Refuse a text that cannot fit n_ctx positions however it is tokenized: tokenizing takes long (seconds for megabytes), and
    this only a look. Raises ContextFullError with the numbers."""
    if len(text) <= _CHARACTERS_PER_POSITION * n_ctx:
        return
    least = tokenizer.least_tokens(text)
    if least > n_ctx:
        raise ContextFullError(
            f"the text has {len(text)} characters, which are at least {least} tokens; the context holds {n_ctx}"
        )


def _is_id(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _sequence(values: object) -> Any:
    """`values`, if it has a length and an order and is no bytes: something to take token ids (or prompts) from."""
    if isinstance(values, (bytes, bytearray, memoryview)):
        raise InvalidArgumentError(
            f"a prompt is text or a list of token ids, not {type(values).__name__}; decode it first"
        )
    unordered = isinstance(values, (str, Mapping, set, frozenset)) or not isinstance(values, Iterable)
    if unordered or not hasattr(values, "__getitem__") or not hasattr(values, "__len__"):
        raise InvalidArgumentError(f"a prompt is text or a list of token ids, not {shown(values)}")
    if hasattr(values, "tolist"):  # an array: its items as plain numbers (or rows), at once
        items = values.tolist()
        if not isinstance(items, list):
            raise InvalidArgumentError(f"a prompt is text or a list of token ids, not {shown(values)}")
        return items
    return values
