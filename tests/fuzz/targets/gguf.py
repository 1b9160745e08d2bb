"""GGUF files: keys and tensors changed one by one, written as the format says or not, in one file or in parts."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path
from typing import Any

from engine import gguf_bytes as g
from fuzz import mutations
from fuzz.cases import Case
from fuzz.mutations import words
from fuzz.targets.use import remove, use

from pyengine.freeze import freeze, open_source
from pyengine.freeze.arch import ARCHITECTURES
from pyengine.freeze.gguf import GGUFFile

_KINDS = [g.U8, g.I8, g.U16, g.I16, g.U32, g.I32, g.F32, g.BOOL, g.STRING, g.ARRAY, g.U64, g.I64, g.F64]
_INTEGER_BITS = {g.U8: 8, g.I8: 8, g.U16: 16, g.I16: 16, g.U32: 32, g.I32: 32, g.U64: 64, g.I64: 64}
_SIGNED = (g.I8, g.I16, g.I32, g.I64)
_FLOATS = [*mutations.FLOATS[:10], *mutations.NOT_JSON, 10_000.0]  # all of them fit float32
_STRINGS = [
    *(text for text in mutations.STRINGS if text.isascii()),
    "llama",
    "gpt2",
    "qwen2",
    "smollm",
    "none",
    "yarn",
    "default",
    "a b",
    "é",
]
_ARCHITECTURES = sorted({one.gguf for one in ARCHITECTURES if one.gguf})
_MORE_KEYS = words("""
general.alignment split.no split.count split.tensors.count llama.attention.head_count_kv llama.attention.key_length
llama.attention.value_length llama.attention.causal llama.attention.sliding_window llama.rope.dimension_count
llama.rope.freq_base llama.rope.scale_linear llama.rope.scaling.type llama.rope.scaling.factor llama.vocab_size
llama.expert_count llama.expert_used_count llama.expert_feed_forward_length llama.expert_shared_feed_forward_length
llama.logit_scale llama.attention.layer_norm_epsilon llama.use_parallel_residual llama.embedding_scale
llama.attention.sliding_window_pattern xielu.alpha_p xielu.alpha_n xielu.beta
tokenizer.ggml.add_bos_token tokenizer.ggml.add_eos_token tokenizer.ggml.add_space_prefix
tokenizer.ggml.unknown_token_id tokenizer.ggml.eot_token_id tokenizer.ggml.eom_token_id tokenizer.ggml.scores
tokenizer.ggml.merges
""")

Tensors = list[tuple[str, list[int], int, int]]


def content(rng: random.Random, kind: int, depth: int = 0) -> Any:
    """Any content of a kind of value."""
    if kind in (g.F32, g.F64):
        return rng.choice(_FLOATS)
    if kind == g.BOOL:
        return rng.random() < 0.5
    if kind == g.STRING:
        return rng.choice(_STRINGS) if rng.random() < 0.9 else rng.randbytes(rng.randrange(9))
    if kind == g.ARRAY:
        inner = rng.choice(_KINDS) if depth < 3 else g.U32
        length = rng.choice([0, 1, 2, 3, g.N_TOKENS - 1, g.N_TOKENS]) if depth == 0 else rng.randrange(3)
        return inner, [content(rng, inner, depth + 1) for _ in range(length)]
    bits = _INTEGER_BITS[kind]
    number = rng.choice(mutations.BORDERS) & ((1 << bits) - 1)
    return number - (1 << bits) if kind in _SIGNED and number >> (bits - 1) else number


class GGUFTarget:
    name = "gguf"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""
        self._scratch = scratch
        self._output = scratch / "m.safetensors"
        self._weights: dict[int, bytes] = {}

    # ------------------------------------------------------------ making

    def make(self, rng: random.Random) -> Case:
        keys = [[name, *value] for name, value in g.model_keys(rng.choice([g.bpe_keys, g.spm_keys])()).items()]
        tensors, size = self._placed(list(g.model_tensors().items()))
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.7:
                self._change_keys(rng, keys)
            else:
                self._change_tensors(rng, tensors)
        if rng.random() < 0.3:
            self._rename(keys, rng.choice(_ARCHITECTURES))
        counts = None
        if rng.random() < 0.05:
            counts = rng.choice(mutations.BORDERS[:-1]), rng.choice([len(keys), 0, 2**16 + 1, 2**63])
        version = rng.choice([0, 1, 2, 4, 0x03000000]) if rng.random() < 0.03 else 3
        written = [g.key(name, kind, g.value(kind, value)) for name, kind, value in keys]
        data = g.gguf_bytes(written, tensors, self._data(size), version=version, counts=counts)
        if rng.random() < 0.15:
            data = mutations.mutated_bytes(rng, data, len(data) - size)
        files = {"m.gguf": data}
        if rng.random() < 0.05:
            files = self._split(rng)
        return Case(files, rng.random())

    def _placed(self, items: list[tuple[str, list[int]]]) -> tuple[Tensors, int]:
        tensors, offset = [], 0
        for name, dims in items:
            tensors.append((name, list(dims), 0, offset))
            offset += -(-4 * math.prod(dims) // 32) * 32
        return tensors, offset

    def _data(self, size: int) -> bytes:
        if size not in self._weights:
            self._weights[size] = b"".join(struct.pack("<f", i * 37 % 101 / 100 - 0.5) for i in range(size // 4))
        return self._weights[size]

    def _change_keys(self, rng: random.Random, keys: list[list[Any]]) -> None:
        kind = rng.randrange(10)
        entry = rng.choice(keys) if keys else None
        if kind < 3 and entry:  # the same kind, or another
            entry[1] = entry[1] if rng.random() < 0.5 else rng.choice(_KINDS)
            entry[2] = content(rng, entry[1])
        elif kind < 5 and entry and entry[1] == g.ARRAY and entry[2][1]:
            inner, items = entry[2]
            items = list(items)
            items[rng.randrange(len(items))] = content(rng, inner, 1)
            entry[2] = inner, items
        elif kind < 8:
            name, value_kind = rng.choice([*_MORE_KEYS, *(key[0] for key in keys)]), rng.choice(_KINDS)
            keys[:] = [key for key in keys if key[0] != name]
            keys.append([name, value_kind, content(rng, value_kind)])
        elif kind == 8 and entry:
            keys.remove(entry)
        elif entry:
            keys.append(list(entry))

    def _rename(self, keys: list[list[Any]], architecture: str) -> None:
        """The same sizes, and whatever changed, of another architecture; of Apertus with numbers of its own."""
        for key in keys:
            key[0] = key[0].replace("llama.", f"{architecture}.", 1) if key[0].startswith("llama.") else key[0]
            if key[0] == "general.architecture":
                key[1:] = g.STRING, architecture
        names = {key[0] for key in keys}
        if architecture == "apertus":
            wanted = ("xielu.alpha_p", "xielu.alpha_n", "xielu.beta")
            keys += [[name, g.ARRAY, (g.F32, [0.5])] for name in wanted if name not in names]
        if f"{architecture}.attention.layer_norm_epsilon" not in names:
            keys.append([f"{architecture}.attention.layer_norm_epsilon", g.F32, 1e-5])

    def _change_tensors(self, rng: random.Random, tensors: Tensors) -> None:
        if not tensors:
            return
        i = rng.randrange(len(tensors))
        name, dims, kind, offset = tensors[i]
        choice = rng.randrange(7)
        if choice == 0:
            dims = [rng.choice(mutations.BORDERS[:-1]) for _ in range(rng.choice([0, 1, 2, 3, 4, 5, 8]))]
        elif choice == 1 and dims:
            dims = [rng.choice([*dims, 0, 1, 31, 33, 64]), *dims[1:]]
        elif choice == 2:
            kind = rng.choice([*range(40), 2**31, 2**32 - 1])
        elif choice == 3:
            offset = rng.choice([*mutations.BORDERS[:-1], *(tensor[3] for tensor in tensors)])
        elif choice == 4:
            name = rng.choice(
                [
                    *(tensor[0] for tensor in tensors),
                    "rope_freqs.weight",
                    "output.weight",
                    "",
                    "x" * 300,
                    "blk.1.attn_q.weight",
                ]
            )
        elif choice == 5:
            del tensors[i]
            return
        tensors[i if choice < 6 else len(tensors) - 1] = name, dims, kind, offset

    def _split(self, rng: random.Random) -> dict[str, bytes]:
        n, items = rng.randint(2, 4), list(g.model_tensors().items())
        files = {}
        for i in range(n):
            number, count = (rng.choice([i, i, i, i, rng.randrange(6)]), rng.choice([n, n, n, n, rng.randrange(6)]))
            split: dict[str, g.Value | None] = {"split.no": (g.U16, number), "split.count": (g.U16, count)}
            dropped: dict[str, g.Value | None] = dict.fromkeys(g.model_keys() if i else ())
            files[f"m-{i + 1:05d}-of-{n:05d}.gguf"] = g.model_bytes(dropped | split, dict(items[i::n]))
        if rng.random() < 0.5:
            del files[rng.choice(list(files))]
        return files or {"m.gguf": b""}

    # ------------------------------------------------------------ running

    def run(self, case: Case) -> None:
        rng = random.Random(case.arguments)
        paths = [self._scratch / name for name in case.files]
        try:
            for path, data in zip(paths, case.files.values(), strict=True):
                path.write_bytes(data)
            self.stage = "parse"
            file = GGUFFile(paths[0])
            size = len(case.files[paths[0].name])
            assert all(0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size for tensor in file.tensors.values())
            file.close()
            self.stage = "source"
            open_source(paths[0]).close()
            if rng.random() < 0.5:
                self.stage = "freeze"
                freeze(paths[0], self._output, overwrite=True)
                use(self, self._output, rng)
        finally:
            for path in paths:
                remove(path)
