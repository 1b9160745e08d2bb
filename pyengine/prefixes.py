"""Keys and values of a prompt's beginning, to a file and back into the cache."""

from __future__ import annotations

import os
from array import array
from typing import TYPE_CHECKING

from pyengine import fork
from pyengine.engine_base import EngineBase
from pyengine.errors import OutOfMemoryError
from pyengine.format.kv import KvLayout
from pyengine.run.request import Caller, check_salt
from pyengine.run.stream import run_all
from pyengine.text.prompts import Prompt

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine.format.prefix import PrefixKey


class Prefixes(EngineBase):
    """The part of an `Engine` that keeps beginnings of prompts in files."""

    def save_prefix(self, prompt: Prompt, path: str | os.PathLike[str], *, parse_special: bool = False) -> int:
        """Compute a prompt (text or token ids), without an adapter, and keep its keys and values in a file: prompts that begin
        with the same tokens, the system prompt of many conversations for example, then begin there, in another process or on
        another machine. The number of tokens. See `load_prefix`.

        A file that is there is replaced. It has 2 head_dim + 8 bytes a token for each layer and kv head. Raises what generate
        raises, OutOfMemoryError if other work has taken the room meanwhile, and OSError."""
        with fork.importing:
            from pyengine.format.prefix import write_prefix
            from pyengine.sampling import SamplingParams

        tokens = self.prompt_ids(prompt, parse_special=parse_special)
        params, caller = self.resolve(SamplingParams(max_tokens=1, temperature=0)), Caller()
        run_all(self._scheduler, self.requests(caller, [tokens], params))  # as all work: in slices, beside others, until Ctrl-C

        def snapshot(context: _core.Context) -> tuple[array[int], bytearray]:
            sequence = context.sequence_match(tokens)
            try:
                return sequence.tokens(), sequence.save()
            finally:
                sequence.close()

        kept, keys_values = self.exclusively(snapshot)
        if len(kept) < len(tokens):
            raise OutOfMemoryError(
                f"the cache has kept {len(kept)} of {len(tokens)} tokens: other work needed the room (max_kv_bytes)"
            )
        write_prefix(path, self.prefix_key(), kept, keys_values)
        return len(kept)

    def load_prefix(self, path: str | os.PathLike[str], *, cache_salt: str | None = None) -> list[int]:
        """Put what `save_prefix` wrote into the cache, as if its prompt had been asked just now: prompts that begin with it have
        their first token sooner, and no byte of any output changes. Its tokens.

        Such a file says what the model has read, so take it from whom you would take the model. It makes room like everything
        cached. Raises InvalidArgumentError for a file of another model, kv_dtype or n_ctx, ModelFormatError for what is no such
        file, OutOfMemoryError if max_kv_bytes has no room for it, ContextFullError, FileNotFoundError."""
        from pyengine.format.prefix import read_prefix

        salt = check_salt(cache_salt)
        with read_prefix(path, self.prefix_key()) as prefix:
            self.exclusively(lambda context: context.restore(prefix.tokens, prefix.keys_values, salt).close())
            return prefix.tokens.tolist()

    def prefix_key(self) -> PrefixKey:
        """What files of keys and values have to belong to."""
        from pyengine.format.prefix import PrefixKey, model_digest

        layout = KvLayout.of_stats(self.exclusively(lambda context: context.cache_stats()))
        return PrefixKey(model_digest(self._file), self._options.kv_dtype, layout)
