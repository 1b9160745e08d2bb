"""The frozen model that a draft head guesses for, run by the engine itself: the only door of this folder to the package pyengine.

The engine is imported here only, when a model is opened. What it refuses is a DataError of the trainer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, MissingLibraryError

Array = NDArray[Any]
ROWS = 256  # positions of a forward: what the engine takes through its layers together
PANEL = 16  # rows of a matrix that lie together in the file
PANELS = 256  # that are read at a time
BOTH = 3  # logits (1) and final hidden state (2) of a position


@contextmanager
def _refusals() -> Iterator[None]:
    """The engine's errors, as the trainer's."""
    from pyengine.errors import PyEngineError

    try:
        yield
    except PyEngineError as error:
        raise DataError(str(error)) from error


class Target:
    """An opened frozen file. threads: of the engine, 0 = what the machine allows."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        try:
            import pyengine
        except ImportError as error:
            raise MissingLibraryError(
                "a draft head is trained with the package pyengine, which is not installed: pip install pyengine-lm"
            ) from error
        _require_frozen(path)
        with _refusals():
            self._engine = pyengine.Engine(path, n_threads=threads or None)
        self.path = path
        config = self._engine.config
        self.vocab_size, self.dim = int(config["vocab_size"]), int(config["dim"])
        self.hidden_dim, self.norm_eps = int(config["hidden_dim"]), float(config["norm_eps"])
        self.tied = bool(config["tie_embeddings"])
        self.end_ids: tuple[int, ...] = self._engine.eos_token_ids
        self.context = int(self._engine.n_ctx)
        self.is_chat = self._has_template()

    def _has_template(self) -> bool:
        from pyengine.errors import PyEngineError

        try:
            return self._engine.chat_template is not None
        except PyEngineError:
            return False

    def close(self) -> None:
        self._engine.close()

    # ---- tokens ------------------------------------------------------------------------------------------------------

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text, with what the tokenizer puts before it."""
        with _refusals():
            return self._engine.tokenize(text)

    def chat_ids(self, messages: Sequence[dict[str, str]], *, answer: bool) -> list[int]:
        """Token ids of a conversation under the model's template; answer: with the words that an answer follows."""
        with _refusals():
            return self._engine.chat_ids(messages, add_generation_prompt=answer)

    def outputs(
        self, prompts: Sequence[list[int]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[list[int]]:
        """What the model says after each of the prompts, computed together; a token that ends the text is part of it."""
        with _refusals():
            found = self._engine.generate(prompts, max_tokens=max_tokens, temperature=temperature, seed=seed)
        return [result.tokens for result in found]

    # ---- numbers -----------------------------------------------------------------------------------------------------

    def read(
        self, sequences: Sequence[Array], first: Sequence[int], take: Callable[[int, int, Array, Array], None]
    ) -> None:
        """One forward over token sequences, each at most `context` long.

        take(sequence, position, hidden (n, dim), logits (n, vocab_size)) gets float32 rows of consecutive positions, from
        position first[sequence] on. The rows are valid during the call only.
        """
        with _refusals():
            self._engine.exclusively(lambda context: _read(context, sequences, first, take))

    def rows(self, name: str, ids: Array) -> Array:
        """float32 (n, dim): rows ids (n,), ascending, of "tok_embeddings" or "output" (the same where they are tied), as their
        codes stand for them."""
        from pyengine.format.quantize import dequantize
        from pyengine.format.reader import FrozenFile

        name = "tok_embeddings" if self.tied else name
        n_panels, n_groups = -(-self.vocab_size // PANEL), -(-self.dim // 64)
        found = np.zeros((len(ids), self.dim), np.float32)
        with _refusals(), FrozenFile.open(self.path) as file:
            shape = n_panels, n_groups, 16, PANEL, 4
            codes = np.ndarray(shape, np.int8, file.buffer, file.tensors[f"{name}.codes"][0])
            scales = np.ndarray((n_panels, n_groups, PANEL), np.float16, file.buffer, file.tensors[f"{name}.scales"][0])
            for first in range(0, n_panels, PANELS):
                part = slice(first, min(n_panels, first + PANELS))
                begin, end = np.searchsorted(ids, [part.start * PANEL, part.stop * PANEL])
                if begin < end:
                    n_rows = (part.stop - part.start) * PANEL
                    values = dequantize(codes[part].copy(), scales[part].copy(), n_rows, self.dim)
                    found[begin:end] = values[ids[begin:end] - part.start * PANEL]
            del codes, scales  # before the map is closed
        return found


def _require_frozen(path: Path) -> None:
    """The engine opens other files, too, by freezing them elsewhere; the head has to go into the file itself."""
    from pyengine.errors import PyEngineError
    from pyengine.format.reader import FrozenFile

    wanted = "pyengine freeze makes one of a model's folder or a GGUF file"
    if path.is_dir() or not path.exists():
        raise DataError(f"{path}: no frozen file ({wanted})")
    try:
        FrozenFile.open(path).close()
    except PyEngineError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise DataError(f"{path}: no frozen file that can be used ({wanted}): {why}") from error


def attach(model: Path, output: Path, head: dict[str, Array], *, overwrite: bool) -> None:
    """Write a frozen file once more with a draft head in it, quantized as its other weights are."""
    from pyengine.format.draft_head import attach_draft

    with _refusals():
        attach_draft(model, output, head, overwrite=overwrite)


def _read(
    context: Any, sequences: Sequence[Array], first: Sequence[int], take: Callable[[int, int, Array, Array], None]
) -> None:
    """Forwards of ROWS positions: pieces of the sequences, one after the other."""
    open_: dict[int, Any] = {}  # sequences that a forward has begun and not ended
    batch: list[tuple[int, int, int]] = []  # (sequence, begin, end)
    room = ROWS

    def forward() -> None:
        tokens: list[int] = []
        owners: list[Any] = []
        wants = bytearray()
        for index, begin, end in batch:
            tokens += sequences[index][begin:end].tolist()
            owners += [open_[index]] * (end - begin)
            wants += bytes(BOTH if position >= first[index] else 0 for position in range(begin, end))
        if context.forward(tokens, owners, wants):
            raise DataError("an infinity or NaN appeared in the model's forward")
        row = 0
        for index, begin, end in batch:
            begin = max(begin, first[index])
            rows = range(row, row + max(0, end - begin))
            if rows:
                views = [(np.asarray(context.hidden(r)).copy(), np.asarray(context.logits(r)).copy()) for r in rows]
                take(index, begin, np.stack([h for h, _ in views]), np.stack([x for _, x in views]))
            row += len(rows)
            if end == len(sequences[index]):
                open_.pop(index).close()

    for index, sequence in enumerate(sequences):
        open_[index] = context.sequence_new()
        begin = 0
        while begin < len(sequence):
            end = min(len(sequence), begin + room)
            batch.append((index, begin, end))
            room -= end - begin
            begin = end
            if room == 0:
                forward()
                batch, room = [], ROWS
    if batch:
        forward()
