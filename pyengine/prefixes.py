"""Keys and values of a prompt's beginning, to a file and back into the cache: for `Engine.save_prefix` and `load_prefix`."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

from pyengine.errors import OutOfMemoryError
from pyengine.format.prefix import read_prefix, write_prefix

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine.engine import Engine


def save_prefix(engine: Engine, tokens: list[int], path: str | os.PathLike[str]) -> int:
    """See `Engine.save_prefix`."""
    engine.generate(tokens, max_tokens=1, temperature=0)  # the way of all work: in slices, beside others, until Ctrl-C

    def snapshot(context: _core.Context) -> tuple[array[int], bytearray]:
        sequence = context.sequence_match(tokens)
        try:
            return sequence.tokens(), sequence.save()
        finally:
            sequence.close()

    kept, keys_values = engine.exclusively(snapshot)
    if len(kept) < len(tokens):
        raise OutOfMemoryError(
            f"the cache has kept {len(kept)} of {len(tokens)} tokens: other work needed the room (max_kv_bytes, max_sequences)"
        )
    write_prefix(path, engine.prefix_key(), kept, keys_values)
    return len(kept)


def load_prefix(engine: Engine, path: str | os.PathLike[str], salt: bytes) -> list[int]:
    """See `Engine.load_prefix`."""
    with read_prefix(path, engine.prefix_key()) as prefix:
        engine.exclusively(lambda context: context.restore(prefix.tokens, prefix.keys_values, salt).close())
        return prefix.tokens.tolist()
