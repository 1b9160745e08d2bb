"""Text to token ids and back.

`Tokenizer` drives the `tokenizers` library (imported on first use), which encodes; decoding is ours (decoder.py).

**Special tokens never come from user text.** The library would turn the text "<|im_end|>" into that token. When text from
outside holds such a string, it is encoded by a second tokenizer, the *guarded* one: the same in every respect, but its special
tokens are spelled with an unguessable prefix, so only what we spell that way ourselves can become one (`encode_marked`).
"Special" is what the tokenizer file says: added tokens that it marks as ordinary (runs of spaces, "<think>") stay text.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Any

from pyengine import fork
from pyengine.errors import InvalidArgumentError, ModelFormatError, UnsupportedModelError
from pyengine.text.decoder import ByteSpelling, IncrementalDecoder
from pyengine.text.special import Spellings
from pyengine.text.tokenizer_json import MAX_TOKEN, Effect, check_affixes, check_components
from pyengine.text.tokenizer_json import check as tokenizer_json_check

if TYPE_CHECKING:
    import tokenizers

LONG_TEXT = 1 << 15  # characters; a millisecond or two
MAX_SQUARES = 1 << 28  # of the lengths of runs of white space, for the patterns that cost as much
_NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}
_WHITE_SPACE = re.compile(r"\s+")


def _token_text(value: object) -> str | None:
    """tokenizer_config.json spells a token as a string or as {"content": string, ...}."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


class Tokenizer:
    """A model's tokenizer; every method may be called from any thread.

    tokenizer_json    the bytes of a tokenizer.json, which is checked (tokenizer_json.py) before it is believed
    config            tokenizer_config.json as parsed, or None
    bos_token_id, eos_token_ids   the model's, when its config names them; otherwise those of `config`
    vocab_size        the model's: every id must be below it; None = any

    Attributes: `bos_id` (or None), `eos_ids`, `adds_bos` (whether texts begin with it), `vocab_size` (ids that mean
    something; a model may have more), `special_ids`, `special_tokens` ({text: id}), `end_id` (what the file's post-processor, or
    `add_eos_token` of `config`, puts behind a text, mostly nothing: None; models that make embeddings count on it, prompts go
    without).
    Raises ModelFormatError for a damaged file, UnsupportedModelError for a decoder or other component that we do not know.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        config: Mapping[str, Any] | None = None,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
        vocab_size: int | None = None,
    ) -> None:
        config = config or {}
        self._json = bytes(tokenizer_json)
        self._account = tokenizer_json_check(self._json, vocab_size)
        self.spelling = ByteSpelling(self._account.decoder)
        self._tokenizer = _load(self._json, self._account.effect)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id_ for id_, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.special = Spellings(self.special_tokens)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._unknown_id = self._account.unknown_id
        if isinstance(unknown := getattr(self._tokenizer.model, "unk_token", None), str):
            self._unknown_id = self._tokenizer.token_to_id(unknown)
        self._id_limit = 1 << 32 if vocab_size is None else vocab_size
        self._check_ids(added)
        self.bos_id = bos_token_id if bos_token_id is not None else self._id_of(config.get("bos_token"))
        named = (self._id_of(config.get("eos_token")),)
        self.eos_ids = tuple(id_ for id_ in (named if eos_token_ids is None else eos_token_ids) if id_ is not None)
        self.adds_bos = self.bos_id is not None and self._wants_bos(config.get("add_bos_token"))
        last = self._account.last_id
        self.end_id = last if last is None or 0 <= last < self.vocab_size else None
        if self.end_id is None and config.get("add_eos_token") is True:
            self.end_id = named[0]
        self._bytes: dict[int, bytes] = {}
        self._lock = threading.RLock()
        fork.register(self._lock, fork.PART)
        self._guard = ""
        self._guarded: dict[tuple[frozenset[str], bool], tokenizers.Tokenizer] = {}
        self._space: bool | None = None
        self._longest: int | None = None
        self._unspelled = b""

    def vocabulary(self) -> dict[str, int]:
        """Every token's spelling and id, added tokens too."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        return vocabulary

    def token_id(self, spelling: str) -> int | None:
        """The token that the vocabulary spells so, None if there is none."""
        id_: int | None = self._tokenizer.token_to_id(_without_surrogates(spelling))
        return id_

    def _id_of(self, value: object) -> int | None:
        text = _token_text(value)
        return None if text is None else self.token_id(text)

    def _wants_bos(self, configured: object) -> bool:
        """tokenizer_config.json decides; if it is silent, what the file's post-processor puts before a text."""
        return configured if isinstance(configured, bool) else self._account.first_id == self.bos_id

    def _check_ids(self, ids: Iterable[int]) -> None:
        if (highest := max(ids, default=0)) >= self._id_limit:
            raise ModelFormatError(f"tokenizer.json has token id {highest}, the model only {self._id_limit} embeddings")

    # ---------------------------------------------------------------- text -> ids

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, beginning with BOS exactly once if the model wants one and `add_bos`.

        Only with `parse_special` do the spellings of special tokens in `text` become those tokens."""
        if not isinstance(text, str):
            raise InvalidArgumentError(f"text must be a string, not {type(text).__name__}")
        text = _without_surrogates(text)
        if parse_special or not self.special.occur_in(text):
            ids = self._ids(self._tokenizer, text)
        else:
            ids = self._ids(self._guarded_tokenizer(), text)
        if not parse_special and not self.special_ids.isdisjoint(ids):
            # The library saw a spelling that the pattern did not (it may normalize before it looks).
            ids = self._ids(self._guarded_tokenizer(), text)
            if not (self.special_ids - {self._unknown_id}).isdisjoint(ids):
                raise ModelFormatError("tokenizer.json gives a piece of text the id of a special token")
        if add_bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of `text`, without BOS added, where special tokens are parsed unless they hold the character `mark`,
        which breaks their spelling and is removed: how chat templates keep content from becoming a special token."""
        guarded = self._guarded_tokenizer()
        spelled = self.special.replace(_without_surrogates(text), lambda token: self._guard + token)
        return self._ids(guarded, spelled.replace(mark, ""))

    def encode_inside(self, text: str, *, apart: Set[int] = frozenset(), goes_on: bool = False) -> list[int]:
        """Token ids of a text that stands inside a prompt, without BOS. Neither special tokens nor those of `apart`, which the
        file may mark as ordinary, come of it. goes_on: without the space that some vocabularies put before a text."""
        text = _without_surrogates(text)
        goes_on = goes_on and self._puts_space()
        if not goes_on:
            ids = self.encode(text, add_bos=False)
            if apart.isdisjoint(ids):
                return ids
        ids = self._ids(self._guarded_tokenizer(frozenset(filter(None, map(self.token_text, apart))), goes_on), text)
        if not (self.special_ids.union(apart) - {self._unknown_id}).isdisjoint(ids):
            raise ModelFormatError("tokenizer.json gives a piece of text the id of a special token")
        return ids

    def _puts_space(self) -> bool:
        """Whether a text begins with a space that is not its own."""
        if self._space is None:
            parts = (self._tokenizer.normalizer, self._tokenizer.pre_tokenizer)
            components = [json.loads(part.__getstate__()) for part in parts if part is not None]
            self._space = any(_without_space(one) != one for one in components)
        return self._space

    def _ids(self, tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        if self._account.effect.is_quadratic:
            squares = sum((run.end() - run.start()) ** 2 for run in _WHITE_SPACE.finditer(text))
            if squares > MAX_SQUARES:
                raise InvalidArgumentError("this model's tokenizer would take too long for such runs of white space")
        if len(text) < LONG_TEXT:
            ids: list[int] = _library(tokenizer.encode, text, add_special_tokens=False).ids
        else:  # a batch of one is encoded without the interpreter's lock
            ids = _library(tokenizer.encode_batch_fast, [text], add_special_tokens=False)[0].ids
        self._check_ids(ids)
        return ids

    def least_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, without tokenizing it: its bytes by those of the longest token. 0 where nothing
        can be said, as for a tokenizer that drops characters."""
        if self._longest is None:
            longest, self._unspelled = self._find_longest()
            self._longest = longest  # last: threads take it for the sign that both are there
        if not self._longest:
            return 0
        return -(-len(text.encode("utf-8", "replace").translate(None, self._unspelled)) // self._longest)

    def beginning_beyond(self, text: str, n_tokens: int) -> str:
        """A beginning of `text` that has more tokens than that, without tokenizing it; all of it where that cannot be said."""
        self.least_tokens("")
        most = (n_tokens + 1) * (self._longest or len(text))
        while most < len(text) and self.least_tokens(text[:most]) <= n_tokens:
            most *= 2  # part of it disappears
        return text[:most]

    def _find_longest(self) -> tuple[int, bytes]:
        """The most bytes of a text that one token can stand for, 0 if there is no bound; and the bytes that no token spells: they
        may be left out, or share an unknown token."""
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        letters, shrinks_to = self.spelling.byte_tokens(), self._account.effect.shrinks_to
        unspelled = bytes(byte for byte, letter in enumerate(letters) if letter not in vocabulary)
        partly = not self.spelling.byte_level and not set(unspelled) <= _NEVER_IN_UTF8
        if shrinks_to is None or self._account.tokens_strip or not letters or partly:
            return 0, b""
        return shrinks_to * max(len(token.encode("utf-8", "replace")) for token in vocabulary), unspelled

    def _guarded_tokenizer(self, apart: frozenset[str] = frozenset(), goes_on: bool = False) -> tokenizers.Tokenizer:
        """apart: spellings of tokens that are guarded, too. goes_on: without a space before a text. Built when first needed: most
        texts never do."""
        with self._lock:
            if not self._guard:
                import secrets

                self._guard = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(4))
            guarded = self._guarded.get((apart, goes_on))
            if guarded is None:
                guarded = _load(_respell_special(self._json, self._guard, apart, goes_on), self._account.effect)
                self._guarded[apart, goes_on] = guarded
            return guarded

    # ---------------------------------------------------------------- ids -> text

    def token_text(self, id_: int) -> str | None:
        """The token as the vocabulary spells it ("Ġworld", "▁world", "<0x0A>"), None if there is no such id."""
        return self._tokenizer.id_to_token(id_) if 0 <= id_ < 2**32 else None

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that a token stands for inside a text; empty for ids without a token."""
        data = self._bytes.get(id_)
        if data is None:
            token = self.token_text(id_)
            if token is not None and len(token) > MAX_TOKEN:
                raise ModelFormatError(f"tokenizer.json: token {id_} has {len(token)} characters, at most {MAX_TOKEN}")
            data = b"" if token is None else self.spelling.bytes_of(token)
            self._bytes[id_] = data
        return data

    def token_bytes_first(self, id_: int) -> bytes:
        """The bytes of a text's first token where a vocabulary drops the space that it spells there."""
        token, spelling = self.token_text(id_), self.spelling
        if token is None or spelling.space is None or not spelling.strip_first_token:
            return self.token_bytes(id_)
        return spelling.bytes_of(token.replace(spelling.space, ""))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `continuation`: see `IncrementalDecoder`."""
        decoder = IncrementalDecoder(self, skip_special_tokens=skip_special_tokens, continuation=continuation)
        return "".join([*map(decoder.push, ids), decoder.finish()])


# -------------------------------------------------------------------- helpers


def _library(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of the library, whatever it raises as ModelFormatError: bare Exception, and panics, which are BaseException."""
    try:
        return call(*args, **kwargs)
    except MemoryError:
        raise
    except Exception as error:
        raise ModelFormatError(f"tokenizer.json: {error}") from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ModelFormatError(f"tokenizer.json: the tokenizers library gave up: {error}") from None


def _load(tokenizer_json: bytes, effect: Effect) -> tokenizers.Tokenizer:
    """The library's tokenizer of a file that `tokenizer_json.check` has passed with `effect`, reduced to what we ask it for."""
    with fork.importing:
        import tokenizers

    tokenizer: tokenizers.Tokenizer = _library(tokenizers.Tokenizer.from_buffer, tokenizer_json)
    tokenizer.no_truncation()  # a file saved for training may cut or pad: silently, and nobody asked for it
    tokenizer.no_padding()
    tokenizer.post_processor = None
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer)
    if check_components(*(None if part is None else json.loads(part.__getstate__()) for part in parts)) != effect:
        raise ModelFormatError("tokenizer.json names its components twice")
    model = tokenizer.model
    if isinstance(model, tokenizers.models.BPE):
        check_affixes(model.continuing_subword_prefix, model.end_of_word_suffix)
        model.dropout = None  # for training: ids would be drawn
    elif not isinstance(model, tokenizers.models.Unigram):
        raise UnsupportedModelError(f"tokenizer model {type(model).__name__} is not supported")
    return tokenizer


def _without_surrogates(text: str) -> str:
    """Lone surrogates (from files read with surrogateescape) are no characters: U+FFFD, as any decoder would have it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _respell_special(tokenizer_json: bytes, guard: str, apart: frozenset[str], goes_on: bool) -> bytes:
    """The same tokenizer.json, ids and all, with `guard` before the spelling of every special token and of those of `apart`; with
    `goes_on` it puts no space before a text."""
    data = json.loads(tokenizer_json)
    model, added = data["model"], data.get("added_tokens") or []
    guarded = apart.union(token["content"] for token in added if token.get("special"))
    for token in added:
        if token["content"] in guarded:
            token["content"] = guard + token["content"]
            token["normalized"] = False  # a normalizer must not touch the guard

    def respell(text: Any) -> Any:
        return guard + text if text in guarded else text

    if isinstance(model["vocab"], dict):
        model["vocab"] = {respell(token): id_ for token, id_ in model["vocab"].items()}
    else:  # Unigram: [[token, score], ...]
        model["vocab"] = [[respell(token), score] for token, score in model["vocab"]]
    if apart and model.get("merges"):  # which may make an ordinary token
        model["merges"] = [pair for pair in model["merges"] if _merged(pair) not in apart]
    if model.get("unk_token") is not None:
        model["unk_token"] = respell(model["unk_token"])
    data["post_processor"] = None  # it may name special tokens, and we never ask for it
    if goes_on:
        data |= {part: _without_space(data.get(part)) for part in ("normalizer", "pre_tokenizer")}
    return json.dumps(data, ensure_ascii=False).encode("utf-8")


def _merged(pair: Any) -> str:
    """What a merge makes; the file has it as "left right" or as a list of the two."""
    return pair.replace(" ", "", 1) if isinstance(pair, str) else "".join(map(str, pair))


def _without_space(component: Any) -> Any:
    """A normalizer or pre-tokenizer as it is in the file, but without the space that it puts before a text."""
    if not isinstance(component, dict):
        return component
    if component.get("type") == "Prepend":
        return {"type": "Sequence", "normalizers": []}
    edited = dict(component)
    for children in ("normalizers", "pretokenizers"):
        if children in edited:
            edited[children] = [_without_space(child) for child in edited[children]]
    if edited.get("add_prefix_space"):
        edited["add_prefix_space"] = False
    if "prepend_scheme" in edited:
        edited["prepend_scheme"] = "never"
    return edited
