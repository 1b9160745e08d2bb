"""Text to token ids and back.

`Tokenizer` drives the `tokenizers` library (imported on first use), which encodes; decoding is ours, so that text can be
streamed: every vocabulary we accept turns a token into bytes independently of its neighbours, and bytes into text is UTF-8.

**Special tokens never come from user text.** The library would turn the text "<|im_end|>" into that token. When text from
outside holds such a string, it is encoded by a second tokenizer, the *guarded* one: the same in every respect, but its special
tokens are spelled with an unguessable prefix, so only what we spell that way ourselves can become one (`encode_marked`).
"Special" is what the tokenizer file says: added tokens that it marks as ordinary (runs of spaces, "<think>") stay text.
"""

from __future__ import annotations

import codecs
import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyengine.errors import InvalidArgumentError, ModelFormatError, UnsupportedModelError

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


class _ByteSpelling:
    """How a vocabulary spells bytes, from the `decoder` of its tokenizer.json."""

    def __init__(self, decoder: Mapping[str, Any] | None) -> None:
        self.byte_level = self.byte_fallback = False
        self.space: str | None = None  # what a space is spelled as
        self.strip_first_token = False  # Metaspace: the first token's spaces are dropped
        self.strip_left = 0  # leading spaces to drop from the whole text
        self._alphabet = _byte_level_alphabet()
        if decoder is None:
            raise UnsupportedModelError("the tokenizer has no decoder: what its tokens spell is unknown")
        parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        for part in parts:
            self._add(part)

    def _add(self, part: Mapping[str, Any]) -> None:
        kind = part.get("type")
        if kind == "ByteLevel":
            self.byte_level = True
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "Metaspace":
            self.space = part["replacement"]
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            self.strip_first_token = scheme != "never"
        elif kind == "Replace" and part.get("content") == " " and "String" in part.get("pattern", {}):
            self.space = part["pattern"]["String"]
        elif kind == "Strip" and part.get("content") == " " and part.get("stop") == 0:
            self.strip_left = int(part["start"])
        elif kind != "Fuse":
            raise UnsupportedModelError(f"tokenizer decoder {kind!r} is not supported")

    def bytes_of(self, token: str) -> bytes:
        if self.byte_level:
            try:
                return bytes([self._alphabet[character] for character in token])
            except KeyError:  # an added token outside the alphabet stands for itself
                return token.encode("utf-8", "replace")
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        if self.space is not None:
            token = token.replace(self.space, " ")
        return token.encode("utf-8", "replace")


def _token_text(value: object) -> str | None:
    """tokenizer_config.json spells a token as a string or as {"content": string, ...}."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


class Tokenizer:
    """A model's tokenizer; every method may be called from any thread.

    tokenizer_json    the bytes of a tokenizer.json
    config            tokenizer_config.json as parsed, or None
    bos_token_id, eos_token_ids   the model's, when its config names them; otherwise those of `config`

    Attributes: `bos_id` (or None), `eos_ids`, `adds_bos` (whether texts begin with it), `vocab_size` (ids that mean
    something; a model may have more), `special_ids`, `special_tokens` ({text: id}).
    Raises ModelFormatError for a file that the library refuses, UnsupportedModelError for a decoder that we do not know.
    """

    def __init__(
        self,
        tokenizer_json: bytes,
        config: Mapping[str, Any] | None = None,
        *,
        bos_token_id: int | None = None,
        eos_token_ids: Iterable[int] | None = None,
    ) -> None:
        config = config or {}
        self._json = bytes(tokenizer_json)
        self._tokenizer = _load(self._json)
        state = self._tokenizer.decoder.__getstate__() if self._tokenizer.decoder is not None else b"null"
        self._spelling = _ByteSpelling(json.loads(state))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: id_ for id_, token in added.items() if token.special}
        self.special_ids = frozenset(self.special_tokens.values())
        self.special_pattern = _any_of(self.special_tokens)
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = bos_token_id if bos_token_id is not None else self._id_of(config.get("bos_token"))
        named = (self._id_of(config.get("eos_token")),)
        self.eos_ids = tuple(id_ for id_ in (named if eos_token_ids is None else eos_token_ids) if id_ is not None)
        self.adds_bos = self.bos_id is not None and self._wants_bos(config.get("add_bos_token"))
        self._bytes: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._guard = ""
        self._guarded: tokenizers.Tokenizer | None = None

    def _id_of(self, value: object) -> int | None:
        text = _token_text(value)
        return None if text is None else self._tokenizer.token_to_id(text)

    def _wants_bos(self, configured: object) -> bool:
        """tokenizer_config.json decides; if it is silent, what the file's post-processor does with an empty text."""
        if isinstance(configured, bool):
            return configured
        return bool(self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [self.bos_id])

    # ---------------------------------------------------------------- text -> ids

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, beginning with BOS exactly once if the model wants one and `add_bos`.

        Only with `parse_special` do the spellings of special tokens in `text` become those tokens."""
        if not isinstance(text, str):
            raise InvalidArgumentError(f"text must be a string, not {type(text).__name__}")
        text = _without_surrogates(text)
        if parse_special or not self.special_pattern.search(text):
            ids = self._ids(self._tokenizer, text)
        else:
            ids = self._ids(self._guarded_tokenizer(), text)
        if not parse_special and not self.special_ids.isdisjoint(ids):
            # The library saw a spelling that the pattern did not (it may normalize before it looks).
            ids = self._ids(self._guarded_tokenizer(), text)
        if add_bos and self.adds_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_marked(self, text: str, mark: str) -> list[int]:
        """Token ids of `text`, without BOS added, where special tokens are parsed unless they hold the character `mark`,
        which breaks their spelling and is removed: how chat templates keep content from becoming a special token."""
        guarded = self._guarded_tokenizer()
        spelled = self.special_pattern.sub(lambda match: self._guard + match[0], _without_surrogates(text))
        return self._ids(guarded, spelled.replace(mark, ""))

    @staticmethod
    def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    def _guarded_tokenizer(self) -> tokenizers.Tokenizer:
        """Built when first needed: most texts never do."""
        with self._lock:
            if self._guarded is None:
                import secrets

                self._guard = "".join(chr(0xF0000 + secrets.randbelow(0xFFFE)) for _ in range(4))
                self._guarded = _load(_respell_special(self._json, self._guard))
            return self._guarded

    # ---------------------------------------------------------------- ids -> text

    def token_text(self, id_: int) -> str | None:
        """The token as the vocabulary spells it ("Ġworld", "▁world", "<0x0A>"), None if there is no such id."""
        return self._tokenizer.id_to_token(id_) if 0 <= id_ < 2**32 else None

    def token_bytes(self, id_: int) -> bytes:
        """The bytes that a token stands for inside a text; empty for ids without a token."""
        data = self._bytes.get(id_)
        if data is None:
            token = self.token_text(id_)
            data = b"" if token is None else self._spelling.bytes_of(token)
            self._bytes[id_] = data
        return data

    def token_bytes_first(self, id_: int) -> bytes:
        """The bytes of a text's first token where a vocabulary drops the space that it spells there."""
        token, spelling = self.token_text(id_), self._spelling
        if token is None or spelling.space is None or not spelling.strip_first_token:
            return self.token_bytes(id_)
        return spelling.bytes_of(token.replace(spelling.space, ""))

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True, continuation: bool = False) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD. `continuation`: see `IncrementalDecoder`."""
        decoder = IncrementalDecoder(self, skip_special_tokens=skip_special_tokens, continuation=continuation)
        return "".join([*map(decoder.push, ids), decoder.finish()])


class IncrementalDecoder:
    """Text from ids, one at a time: `push` returns what is certain, always whole code points, `finish` the rest.

    Vocabularies that spell a space before the first word drop it at the beginning of a text; with `continuation` the ids go on
    from an earlier text and nothing is dropped. The pieces joined are `Tokenizer.decode` of all ids, which is built on this.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continuation: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        spelling = tokenizer._spelling
        self._first = spelling.strip_first_token and not continuation
        self._strip_left = 0 if continuation else spelling.strip_left

    def push(self, id_: int) -> str:
        """The text that became certain with this token; often empty inside an emoji."""
        if id_ in self._skipped:
            return ""
        data = self._tokenizer.token_bytes(id_)
        if self._first:
            self._first = False
            data = self._tokenizer.token_bytes_first(id_)
        while self._strip_left and data:
            if data.startswith(b" "):
                data = data[1:]
                self._strip_left -= 1
            else:
                self._strip_left = 0
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back: U+FFFD for a code point that never became whole."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Finds stop strings in a text that arrives in pieces and keeps every part of them out of the stream.

    The stop string that ends first wins, of those that end together the longest; how the text was cut into pieces does not
    matter. `push` returns text that can no longer belong to a stop string; `matched` is the string found, or None.
    (An Aho-Corasick automaton over characters: its depth is the length of what must be held back.)
    """

    def __init__(self, stop: Sequence[str], *, include_stop_str: bool = False) -> None:
        if any(not string for string in stop):
            raise InvalidArgumentError("a stop string must not be empty")
        self.matched: str | None = None
        self._include = include_stop_str
        self._held = ""
        self._state = 0
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._found: list[str | None] = [None]
        self._fail = [0]
        for string in stop:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            if character not in self._next[state]:
                self._next[state][character] = len(self._next)
                self._next.append({})
                self._depth.append(self._depth[state] + 1)
                self._found.append(None)
                self._fail.append(0)
            state = self._next[state][character]
        self._found[state] = string

    def _link(self) -> None:
        """Failure links, breadth first: each state's longest proper suffix that is also a state."""
        queue = list(self._next[0].values())
        for state in queue:
            for character, child in self._next[state].items():
                self._fail[child] = self._step(self._fail[state], character)
                if self._found[child] is None:
                    self._found[child] = self._found[self._fail[child]]
                queue.append(child)

    def _step(self, state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(character, 0)

    def push(self, text: str) -> str:
        """Text that may be shown now. After a match: nothing more."""
        if self.matched is not None:
            return ""
        held = self._held + text
        for end, character in enumerate(text, len(self._held) + 1):
            self._state = self._step(self._state, character)
            found = self._found[self._state]
            if found is not None:
                self.matched, self._held = found, ""
                return held[:end] if self._include else held[: end - len(found)]
        certain = len(held) - self._depth[self._state]
        self._held = held[certain:]
        return held[:certain]

    def finish(self) -> str:
        """The end of the text, once it is clear that no stop string completes it."""
        rest, self._held, self._state = self._held, "", 0
        return rest


# -------------------------------------------------------------------- helpers


def _load(tokenizer_json: bytes) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
    except Exception as error:  # the library raises bare Exception
        raise ModelFormatError(f"tokenizer.json: {error}") from None
    tokenizer.no_truncation()  # a file saved for training may cut or pad: silently, and nobody asked for it
    tokenizer.no_padding()
    return tokenizer


def _any_of(strings: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the strings, the longest first as the library does; nothing if there are none."""
    longest_first = sorted((s for s in strings if s), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _without_surrogates(text: str) -> str:
    """Lone surrogates (from files read with surrogateescape) are no characters: U+FFFD, as any decoder would have it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _respell_special(tokenizer_json: bytes, guard: str) -> bytes:
    """The same tokenizer.json, ids and all, with `guard` before the spelling of every special token."""
    data = json.loads(tokenizer_json)
    model = data["model"]
    special = {token["content"] for token in data["added_tokens"] if token["special"]}
    for token in data["added_tokens"]:
        if token["special"]:
            token["content"] = guard + token["content"]
            token["normalized"] = False  # a normalizer must not touch the guard

    def respell(text: Any) -> Any:
        return guard + text if text in special else text

    if isinstance(model["vocab"], dict):
        model["vocab"] = {respell(token): id_ for token, id_ in model["vocab"].items()}
    else:  # Unigram: [[token, score], ...]
        model["vocab"] = [[respell(token), score] for token, score in model["vocab"]]
    if model.get("unk_token") is not None:
        model["unk_token"] = respell(model["unk_token"])
    data["post_processor"] = None  # it may name special tokens, and we never ask for it
    return json.dumps(data, ensure_ascii=False).encode("utf-8")
