"""Ids to text: what bytes a token spells, and text in whole code points while tokens still come.

Decoding is ours, so that text can be streamed: every vocabulary we accept turns a token into bytes independently of its
neighbours, and bytes into text is UTF-8.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from pyengine.arguments import shown
from pyengine.errors import ModelFormatError, UnsupportedModelError

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for code points from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


class ByteSpelling:
    """How a vocabulary spells bytes, from the `decoder` of its tokenizer.json."""

    def __init__(self, decoder: Mapping[str, Any] | None) -> None:
        self.byte_level = self.byte_fallback = False
        self.space: str | None = None  # what a space is spelled as
        self.strip_first_token = False  # Metaspace: the first token's spaces are dropped
        self.strip_left = 0  # leading spaces to drop from the whole text
        self._alphabet = _byte_level_alphabet()
        if decoder is None:
            raise UnsupportedModelError("the tokenizer has no decoder: what its tokens spell is unknown")
        parts = decoder.get("decoders") if decoder.get("type") == "Sequence" else [decoder]
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise ModelFormatError("tokenizer.json: decoders is no list of decoders")
        for part in parts:
            self._add(part)

    def _add(self, part: Mapping[str, Any]) -> None:
        kind, pattern = part.get("type"), part.get("pattern")
        if kind == "ByteLevel":
            self.byte_level = True
        elif kind == "ByteFallback":
            self.byte_fallback = True
        elif kind == "Metaspace":
            self.space = _text(part.get("replacement"))
            scheme = part.get("prepend_scheme", "always" if part.get("add_prefix_space", True) else "never")
            self.strip_first_token = scheme != "never"
        elif kind == "Replace" and part.get("content") == " " and isinstance(pattern, Mapping) and "String" in pattern:
            self.space = _text(pattern["String"])
        elif (
            kind == "Strip" and part.get("content") == " " and part.get("stop") == 0 and type(part.get("start")) is int
        ):
            self.strip_left = part["start"]
        elif kind != "Fuse":
            raise UnsupportedModelError(f"tokenizer decoder {shown(kind)} is not supported")

    def byte_tokens(self) -> list[str]:
        """The 256 tokens that spell a byte each; none if the vocabulary has no such."""
        if self.byte_level:
            return sorted(self._alphabet, key=self._alphabet.__getitem__)
        return [f"<0x{byte:02X}>" for byte in range(256)] if self.byte_fallback else []

    def bytes_of(self, token: str) -> bytes:
        """The bytes that a token of this spelling stands for inside a text."""
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


def _text(value: object) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 16:
        raise ModelFormatError(f"tokenizer.json: the decoder's space is {shown(value)}")
    return value


class IncrementalDecoder:
    """Text from ids, one at a time: `push` returns what is certain, always whole code points, `finish` the rest.

    Vocabularies that spell a space before the first word drop it at the beginning of a text; with `continuation` the ids go on
    from an earlier text and nothing is dropped but the first `n_healed` bytes, which that text has. The pieces joined are
    `Tokenizer.decode` of all ids, which is built on this.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continuation: bool = False, n_healed: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped: frozenset[int] = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        spelling = tokenizer.spelling
        self._first = spelling.strip_first_token and not continuation
        self._strip_left = 0 if continuation else spelling.strip_left
        self._n_healed = n_healed

    def copy(self) -> IncrementalDecoder:
        """Another one that goes on from the same text."""
        twin = copy(self)
        twin._utf8 = copy(self._utf8)
        return twin

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
        if self._n_healed:
            n_said = min(self._n_healed, len(data))
            self._n_healed -= n_said
            data = data[n_said:]
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back: U+FFFD for a code point that never became whole."""
        return self._utf8.decode(b"", final=True)
