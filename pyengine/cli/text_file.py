"""A text file on its way to token ids, read and tokenized only as far as it is needed."""

from __future__ import annotations

import codecs
from collections.abc import Callable
from typing import BinaryIO

from pyengine.errors import InvalidArgumentError

SPARE_TOKENS = 64


class Text:
    """A UTF-8 text in a binary file, read as far as it is needed."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self.name = name
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._n_decoded = 0  # bytes
        self.text = ""
        self.is_whole = False

    def read(self, n_bytes: int = -1) -> None:
        """Add n_bytes more (all that is left if negative) to `text`. Raises InvalidArgumentError for what is no UTF-8."""
        data = self._file.read(n_bytes)
        self.is_whole = n_bytes < 0 or len(data) < n_bytes
        pending = len(self._decoder.getstate()[0])
        try:
            self.text += self._decoder.decode(data, final=self.is_whole)
        except UnicodeDecodeError as error:
            at = self._n_decoded - pending + error.start
            raise InvalidArgumentError(f"{self.name} is no UTF-8 text: byte {at} is {error.object[error.start]:#04x}") from None
        self._n_decoded += len(data)


def first_tokens(encode: Callable[[str], list[int]], text: Text, limit: int | None) -> list[int]:
    """What `encode` makes of the text, or the first `limit` ids: then only as much is read and tokenized as they take."""
    if limit is None:
        text.read()
        return encode(text.text)
    while True:
        text.read(max(len(text.text), 16 * limit, 1 << 16))
        # What comes behind the part may change its last tokens: it ends with a word, and there must be tokens to spare.
        end = len(text.text) if text.is_whole else text.text.rstrip().rfind(" ") + 1
        tokens = encode(text.text[: end or None])
        if text.is_whole or len(tokens) >= limit + SPARE_TOKENS:
            return tokens[:limit]
