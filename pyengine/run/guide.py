"""Guides: which tokens may come next, by a grammar.

A guide follows the sampler's list of outputs, which is what happened: it accepts what it has not seen of it and says which
tokens may follow, and which would follow a guess. If an exception tore that, it begins anew and reads the whole list, with the
same result.

The grammars are llguidance's (the extra pyengine-lm[guide]), which is imported when the first one is asked for.
"""

from __future__ import annotations

import json
import threading
from array import array
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any

from pyengine import fork
from pyengine.errors import BusyError, InvalidArgumentError
from pyengine.run.gbnf import is_gbnf, to_lark
from pyengine.run.in_time import in_time
from pyengine.run.speculation import until_end

if TYPE_CHECKING:
    from pyengine.sampling import StructuredOutputs
    from pyengine.text.tokenizer import Tokenizer

# Models know JSON with one space in its places; free to choose, a weak one writes spaces for ever. A schema may say otherwise in
# its "x-guidance".
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
MAX_GRAMMAR = 1 << 18  # characters of a schema, regex or grammar
# For what becomes of one before its first token: milliseconds, as a rule. llguidance bounds much of it, but not regular
# expressions that must all match: a schema with twenty patterns in "allOf" takes minutes.
COMPILE_SECONDS = 20.0


class Guide:
    """Of one output. A mask: uint32 ((vocab_size + 31) // 32), bit i % 32 of word i // 32 is 1 if token i may come."""

    def __init__(self, new_matcher: Callable[[], Any], vocab_size: int, end_ids: Sequence[int]) -> None:
        self._new_matcher = new_matcher
        self._matcher = new_matcher()
        self._ends = frozenset(end_ids)
        self._n_words = (vocab_size + 31) // 32
        self._masks: list[array[int]] = []  # [i]: after i guesses
        self._n_read = 0
        self._is_torn = False

    def fork(self) -> Guide:
        """Another one that goes on from the same text, which leaves this one as it is."""
        twin = copy(self)
        twin._matcher, twin._masks = self._matcher.deep_copy(), []
        return twin

    def check(self) -> None:
        """Raises InvalidArgumentError for a grammar that is none, or too costly."""
        if self._matcher.is_error():
            raise InvalidArgumentError(f"structured_outputs: {_reason(self._matcher.get_error())}")

    def masks(self, outputs: Sequence[int], draft: Sequence[int] = ()) -> list[array[int]]:
        """Which tokens may follow `outputs`, and which would after each guess of `draft`; valid until the next call. (After a
        guess that may not come, which no sampler will choose, or that ends the text, the last mask again.) Fewer, where the
        grammar becomes too complex to follow along the guesses. Raises InvalidArgumentError if it has become so already."""
        n_allowed = len(self.allowed(outputs, draft))
        self._is_torn = True
        self._compute_mask(0)
        for i in range(1, n_allowed + 1):
            self._matcher.consume_token(draft[i - 1])
            try:
                self._compute_mask(i)
            except InvalidArgumentError:  # of a guess: what is known of the text stays as it was
                return self._masks[:i]
        if n_allowed > 0:
            self._matcher.rollback(n_allowed)
        self._is_torn = False
        return self._masks[: n_allowed + 1] + [self._masks[n_allowed]] * (len(draft) - n_allowed)

    def forced(self, outputs: Sequence[int]) -> tuple[int, ...]:
        """Tokens that will come next, as far as the grammar alone says so: names of a schema's properties, and the like."""
        self._read(outputs)
        return tuple(self._matcher.compute_ff_tokens())

    def allowed(self, outputs: Sequence[int], draft: Sequence[int]) -> tuple[int, ...]:
        """The beginning of `draft` that may follow `outputs`, without an end of the text: a matcher that has read one cannot be
        rolled back over it."""
        self._read(outputs)
        draft = until_end(tuple(draft), self._ends)
        return draft[: self._matcher.validate_tokens(list(draft))] if draft else ()

    def _read(self, outputs: Sequence[int]) -> None:
        if self._is_torn:
            self._matcher.reset()
            if self._matcher.is_error():  # there is no way back from that
                self._matcher = self._new_matcher()
            self._n_read = 0
        self._is_torn = True
        new = list(outputs[self._n_read :])
        if new:
            self._matcher.consume_tokens(new)
        self._n_read = len(outputs)
        self._is_torn = False

    def _compute_mask(self, i: int) -> None:
        if i == len(self._masks):
            self._masks.append(array("I", bytes(4 * self._n_words)))
        address, n_words = self._masks[i].buffer_info()
        self._matcher.unsafe_compute_mask_ptr(address, 4 * n_words)
        if self._matcher.is_error():
            raise InvalidArgumentError(
                f"structured_outputs cannot be followed: {_reason(self._matcher.get_error())}"
            )


class Guides:
    """Makes guides for one model; its tokens are told to llguidance once, when the first guide is made."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._end_ids = list(end_ids)
        self._lock = threading.RLock()
        fork.register(self._lock, fork.ENGINE)
        self._table: Any = None

    def new(self, wanted: StructuredOutputs) -> Guide:
        """Raises InvalidArgumentError for what is no grammar, no schema that is understood, or too costly; with a TimeoutError as
        its cause if it takes too long. Raises BusyError while others do that took too long."""
        try:
            with fork.importing:
                import llguidance
        except ImportError:
            raise InvalidArgumentError("structured_outputs needs llguidance: pip install 'pyengine-lm[guide]'") from None
        if not self._end_ids:
            raise InvalidArgumentError("structured_outputs needs a model that has an end-of-text token")
        with self._lock:
            if self._table is None:
                self._table = self._make_table(llguidance)
        new_matcher = partial(llguidance.LLMatcher, self._table, _grammar(llguidance, wanted), log_level=0)

        def make() -> Guide:
            guide = Guide(new_matcher, self._vocab_size, self._end_ids)
            guide.check()
            guide.masks(())  # what is too complex to begin with shows here, and not in a step
            return guide

        try:
            return in_time(make, COMPILE_SECONDS)
        except BusyError as error:
            raise BusyError(f"structured_outputs: other grammars are at work: {error}") from None
        except TimeoutError as error:
            raise InvalidArgumentError(f"structured_outputs: too costly: {error}") from error

    def _make_table(self, llguidance: Any) -> Any:
        wrapper = llguidance.TokenizerWrapper(_Tokens(self._tokenizer, self._vocab_size, self._end_ids[0]))
        return llguidance.LLTokenizer(wrapper, n_vocab=self._vocab_size, eos_token=self._end_ids)


class _Tokens:
    """A tokenizer as llguidance asks about one: the bytes of each id, and a function from bytes to ids."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_id: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = end_id
        self.bos_token_id = tokenizer.bos_id
        known = range(min(vocab_size, tokenizer.vocab_size))
        self.special_token_ids = sorted(tokenizer.special_ids.intersection(known))
        self.tokens = [tokenizer.token_bytes(token) for token in known]
        for token in self.special_token_ids:  # names that no text spells: 0xff is in no UTF-8
            self.tokens[token] = b"\xff" + (tokenizer.token_text(token) or "").encode("utf-8")

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), add_bos=False)


def _grammar(llguidance: Any, wanted: StructuredOutputs) -> str:
    matcher = llguidance.LLMatcher
    from_schema = partial(matcher.grammar_from_json_schema, defaults=JSON_STYLE)
    if wanted.json is not None:
        text = json.dumps(wanted.json) if not isinstance(wanted.json, str) else wanted.json
        source, make = text, from_schema
    elif wanted.json_object:
        source, make = '{"type": "object"}', from_schema
    elif wanted.regex is not None:
        source, make = wanted.regex, matcher.grammar_from_regex
    elif wanted.choice is not None:
        source = "start: " + " | ".join(json.dumps(one) for one in wanted.choice)
        make = matcher.grammar_from_lark
    else:
        source, make = wanted.grammar or "", partial(_from_grammar, matcher)
    if len(source) > MAX_GRAMMAR:
        raise InvalidArgumentError(f"structured_outputs: {len(source)} characters, at most {MAX_GRAMMAR}")
    try:
        grammar: str = make(source)
    except ValueError as error:  # an InvalidArgumentError is one
        raise InvalidArgumentError(f"structured_outputs: {_reason(str(error))}") from None
    return grammar


def _from_grammar(matcher: Any, text: str) -> str:
    if is_gbnf(text):
        text = to_lark(text)  # up to twice as long
        if len(text) > MAX_GRAMMAR:
            raise InvalidArgumentError(f"{len(text)} characters in Lark's notation, at most {MAX_GRAMMAR}")
    grammar: str = matcher.grammar_from_lark(text)
    return grammar


def _reason(text: str) -> str:
    """What llguidance's error says, in a line: its first one, and where that leads to a regular expression, the one that says
    what is wrong with that."""
    first, *rest = text.strip().split("\n")
    if first == "NoExtensionBias":
        return "there is no text that it allows"
    why = next((line.removeprefix("error:") for line in rest if line.startswith("error:")), "")
    return (first[:500] + why)[:1000]
