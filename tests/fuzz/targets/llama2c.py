"""llama2.c checkpoints and their tokenizer.bin: valid ones of many shapes, and damaged ones."""

from __future__ import annotations

import random
import struct
from pathlib import Path

from fuzz import mutations
from fuzz.cases import Case
from fuzz.targets import seeds
from fuzz.targets.use import use

from pyengine.freeze import freeze

_SIZES = [
    0,
    1,
    -1,
    2,
    3,
    4,
    5,
    8,
    16,
    31,
    32,
    48,
    64,
    128,
    258,
    259,
    260,
    300,
    -300,
    4096,
    65_536,
    2**20,
    2**24,
    2**31 - 1,
    -(2**31),
]
_MOST_FLOATS = 200_000
_PIECES = [
    b"",
    b" ",
    b"a",
    b"ab",
    b"\xff",
    b"\xed\xa0\x80",
    b"<unk>",
    b"<0x41>",
    "▁".encode(),
    b"\0",
    b"x" * 300,
    b" a",
    b"aa",
    b"aaa",
]
_SCORES = [0.0, -1.0, 1e30, float("inf"), float("-inf"), float("nan")]


class Llama2cTarget:
    name = "llama2c"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""
        self._model, self._tokenizer = scratch / "m.bin", scratch / "tokenizer.bin"
        self._output = scratch / "m.safetensors"
        self._weights = seeds.llama2c_weights(_MOST_FLOATS)

    def make(self, rng: random.Random) -> Case:
        sizes = self._sizes(rng)
        try:
            n = seeds.llama2c_floats(sizes)
        except (ZeroDivisionError, ValueError):
            n = 1000
        data = seeds.llama2c_bytes(sizes, self._weights[: 4 * max(0, min(n, _MOST_FLOATS))])
        tokens = seeds.llama2c_tokens(min(abs(sizes["vocab_size"]), 1000))
        for _ in range(rng.choice([0, 0, 1, 5])):
            if tokens:
                at = rng.randrange(len(tokens))
                tokens[at] = (
                    (rng.choice(_SCORES), tokens[at][1]) if rng.random() < 0.3 else (tokens[at][0], rng.choice(_PIECES))
                )
        spelled = seeds.llama2c_tokenizer(tokens)
        if rng.random() < 0.15:
            data = mutations.mutated_bytes(rng, data, 28) if rng.random() < 0.5 else self._odd_weights(rng, data)
        if rng.random() < 0.15:
            spelled = mutations.mutated_bytes(rng, spelled)
        return Case({"m.bin": data, "tokenizer.bin": spelled}, rng.random())

    def _sizes(self, rng: random.Random) -> dict[str, int]:
        """Half of them fit together."""
        if rng.random() < 0.5:
            n_kv_heads = rng.choice([1, 2, 3])
            n_heads = n_kv_heads * rng.choice([1, 2, 3])
            dim = n_heads * rng.choice([2, 4, 8, 16])
            vocab_size = rng.choice([259, 260, 300, 512]) * rng.choice([1, -1])
            return seeds.llama2c_header(
                dim=dim, hidden_dim=rng.choice([1, 16, 48, 65]), n_layers=rng.choice([1, 2, 3]), n_heads=n_heads,
                n_kv_heads=n_kv_heads, vocab_size=vocab_size, seq_len=rng.choice([1, 2, 16, 300]),
            )  # fmt: skip
        sizes = seeds.llama2c_header()
        for _ in range(rng.randint(1, 3)):
            sizes[rng.choice(list(sizes))] = rng.choice(_SIZES)
        return sizes

    def _odd_weights(self, rng: random.Random, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 30])):
            at = 28 + 4 * rng.randrange(max(1, (len(data) - 28) // 4))
            changed[at : at + 4] = struct.pack("<f", rng.choice([0.0, -0.0, 1e-45, 1e30, 3e38, *mutations.NOT_JSON]))
        return bytes(changed)

    def run(self, case: Case) -> None:
        self._model.write_bytes(case.files["m.bin"])
        self._tokenizer.write_bytes(case.files["tokenizer.bin"])
        self.stage = "freeze"
        freeze(self._model, self._output, tokenizer=self._tokenizer, overwrite=True)
        use(self, self._output, random.Random(case.arguments))
