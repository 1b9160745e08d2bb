"""The file of a draft model: opened beside the model for which it guesses."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from pyengine import _core
from pyengine.errors import InvalidArgumentError
from pyengine.format.reader import FrozenFile

if TYPE_CHECKING:
    from pyengine.format.config import FrozenConfig


class DraftFile:
    """A frozen file that guesses for `model`. Raises what FrozenFile.open raises, and InvalidArgumentError if it has another
    vocabulary or is larger."""

    def __init__(self, path: str, model: FrozenFile, n_ctx: int, *, use_mmap: bool) -> None:
        self._file = FrozenFile.open(path, use_mmap=use_mmap)
        self._model: _core.Model | None = None
        tokenizers = [file.attachment("tokenizer.json") for file in (self._file, model)]
        if self._file.config.vocab_size != model.config.vocab_size or tokenizers[0] != tokenizers[1]:
            raise InvalidArgumentError(f"{path} has another vocabulary than {model.path}, for which it is to guess")
        if self.weights_bytes > model.weights_bytes:
            raise InvalidArgumentError(f"{path} is larger than {model.path}, for which it is to guess")
        self.path = path
        self.n_ctx = min(n_ctx, self._file.config.max_seq_len)

    @property
    def weights_bytes(self) -> int:
        """Bytes of its weights."""
        return self._file.weights_bytes

    def context(self, kv_dtype: Literal["int8", "f32"], n_threads: int) -> _core.Context:
        """A context of the model, whose weights are checked now."""
        config: FrozenConfig = replace(self._file.config, max_seq_len=self.n_ctx)
        self._model = _core.Model(config, self._file.buffer, self._file.weights, n_threads)
        return _core.Context(self._model, kv_dtype=kv_dtype, n_threads=n_threads)

    def close(self) -> None:
        """Let go of the file; its context must be gone."""
        self._model = None
        self._file.close()
