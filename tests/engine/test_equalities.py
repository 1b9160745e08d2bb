"""Bytes, not tolerances: one model, one answer, on every instruction set, thread count, chunking and
batch mixture. SHA-256 of logits and KV pages; the golden hashes notice any change of the specification."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyengine import _core
from pyengine.format.config import FrozenConfig, same_layers

N_TOKENS = 300  # two chunks of attention
GOLDEN_LOGITS = "ec71350b3042eeb8f320880216ddd8b73e1f18795f378c1f93ad0f164d22947b"
GOLDEN_KV = "9e2ea2053423e08899ac6b52fbcc2d7219c161ab68604cbe95650e3bbf8dc1df"

CONFIG = FrozenConfig(
    architecture="LlamaForCausalLM", dim=72, hidden_dim=100, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=20,
    vocab_size=90, max_seq_len=400, norm_eps=2.0**-17, tie_embeddings=True, qkv_bias=True, o_bias=False, qk_norm=True,
    layers=same_layers(2), bos_token_id=None, eos_token_ids=(),
)  # fmt: skip


def pad(n: int, k: int) -> int:
    return (n + k - 1) // k * k


class Integers:
    """Random integers from the raw stream of PCG64, which NumPy promises never to change."""

    def __init__(self, seed: int) -> None:
        self.bits = np.random.PCG64(seed)

    def integers(self, low: int, high: int, shape: int | tuple[int, ...]) -> NDArray[np.int64]:
        raw = self.bits.random_raw(int(np.prod(shape))) >> np.uint64(11)
        return (raw % np.uint64(high - low)).astype(np.int64).reshape(shape) + low


def tiny_tensors(rng: Integers, c: FrozenConfig = CONFIG) -> Iterator[tuple[str, NDArray[Any]]]:
    """Tensors of FORMAT.md section 2, in file order, from random integers alone. `c` has the flags of CONFIG."""
    q_dim, kv_dim = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim

    def matrix(name: str, rows: int, columns: int, exponent: int = 6) -> Iterator[Any]:
        panels, groups = pad(rows, 16) // 16, pad(columns, 64) // 64
        codes = rng.integers(-127, 128, (panels, groups, 16, 16, 4)).astype(np.int8)
        column = np.arange(groups * 64).reshape(groups, 16, 1, 4)
        row = np.arange(panels * 16).reshape(panels, 1, 1, 16, 1)
        codes[np.broadcast_to((column >= columns) | (row >= rows), codes.shape)] = 0
        scales = rng.integers(exponent << 10, exponent + 1 << 10, (panels, groups, 16))
        scales[np.broadcast_to(row.reshape(panels, 1, 16) >= rows, scales.shape)] = 0
        yield f"{name}.codes", codes
        yield f"{name}.scales", scales.astype(np.uint16)

    def vector(name: str, n: int, offset: float) -> Iterator[Any]:
        yield name, (rng.integers(0, 256, n) / 512 + offset).astype(np.float32)

    yield from matrix("tok_embeddings", c.vocab_size, c.dim, 8)
    for i in range(c.n_layers):
        yield from vector(f"layers.{i}.attention_norm", c.dim, 0.75)
        yield from matrix(f"layers.{i}.wqkv", q_dim + 2 * kv_dim, c.dim)
        yield from vector(f"layers.{i}.wqkv.bias", q_dim + 2 * kv_dim, -0.25)
        yield from vector(f"layers.{i}.q_norm", c.head_dim, 0.75)
        yield from vector(f"layers.{i}.k_norm", c.head_dim, 0.75)
        yield from matrix(f"layers.{i}.wo", c.dim, q_dim, 5)
        yield from vector(f"layers.{i}.ffn_norm", c.dim, 0.75)
        yield from matrix(f"layers.{i}.w_gate_up", 2 * pad(c.hidden_dim, 16), c.dim)
        yield from matrix(f"layers.{i}.w_down", c.dim, c.hidden_dim, 5)
    yield from vector("norm", c.dim, 0.75)
    yield "rope.0.inv_freq", np.array([1 / 3**i for i in range(c.head_dim // 2)], np.float32)


def make_model(seed: int = 1, config: FrozenConfig = CONFIG) -> _core.Model:
    """The tensors in one 64-byte aligned buffer, as a mapped file would hold them."""
    pieces, table, offset = [], {}, 0
    for name, array in tiny_tensors(Integers(seed), config):
        data = array.tobytes()
        data += bytes(pad(len(data), 64) - len(data))
        table[name] = (offset, len(data), "f32" if array.dtype == np.float32 else "int8_g64")
        pieces.append(data)
        offset += len(data)
    memory = np.zeros(offset + 64, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + offset] = np.frombuffer(b"".join(pieces), np.uint8)
    return _core.Model(config, memory[start : start + offset], table)


TOKENS = [int(t) for t in Integers(2).integers(0, 90, N_TOKENS)]


@pytest.fixture(scope="module")
def model() -> _core.Model:
    return make_model()


def rows_of(context: _core.Context, n: int) -> list[bytes]:
    rows = []
    for row in range(n):
        with memoryview(context.logits(row)) as view:
            rows.append(bytes(view))
    return rows


def kv_hash(context: _core.Context, sequence: int) -> str:
    """Pages of a sequence that was only ever appended to: what is behind its end is still zero."""
    digest = hashlib.sha256()
    for layer in range(CONFIG.n_layers):
        for head in range(CONFIG.n_kv_heads):
            for page in range(2):
                digest.update(context.debug_kv_page(sequence, layer, head, page))
    return digest.hexdigest()


def run_chunks(context: _core.Context, size: int) -> tuple[list[bytes], str]:
    sequence, rows = context.sequence_new(), []
    for begin in range(0, N_TOKENS, size):
        chunk = TOKENS[begin : begin + size]
        context.forward(chunk, [sequence] * len(chunk), bytes([1] * len(chunk)))
        rows += rows_of(context, context.n_logits)
    return rows, kv_hash(context, sequence)


@pytest.fixture(scope="module")
def reference(model: _core.Model) -> tuple[list[bytes], str]:
    """Scalar, one thread, one token at a time."""
    _core.select_isa("scalar")
    try:
        return run_chunks(_core.Context(model, n_threads=1), 1)
    finally:
        _core.select_isa(None)


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.select_isa(request.param)
    yield request.param
    _core.select_isa(None)


every_isa = pytest.mark.parametrize("isa", _core.available_isas(), indirect=True)


def test_golden_hashes(reference: tuple[list[bytes], str]) -> None:
    """A change here is a change of the specification (csrc/FORMAT.md section 9): a new format_version. test_oracle_spec.py
    has the same logits from NumPy."""
    rows, kv = reference
    assert hashlib.sha256(b"".join(rows)).hexdigest() == GOLDEN_LOGITS
    assert kv == GOLDEN_KV


@every_isa
@pytest.mark.parametrize("n_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 5, 16, 255, 256, 300])
def test_chunked_prefill_equals_one_token_at_a_time(
    model: _core.Model, reference: tuple[list[bytes], str], isa: str, n_threads: int, size: int
) -> None:
    context = _core.Context(model, n_threads=n_threads)
    assert (context.isa, context.n_threads) == (isa, n_threads)
    assert run_chunks(context, size) == reference


@every_isa
@pytest.mark.parametrize("n_threads", [1, 2, 4])
def test_batch_mixtures_equal_single_sequences(
    model: _core.Model, reference: tuple[list[bytes], str], isa: str, n_threads: int
) -> None:
    """Prefill and decode of several sequences in the same calls, forks and truncations between."""
    rng = np.random.Generator(np.random.PCG64(3))
    context = _core.Context(model, n_threads=n_threads)
    lengths = {context.sequence_new(): 0 for _ in range(3)}
    for _ in range(40):
        tokens, sequences, positions = [], [], []
        for sequence in [list(lengths)[i] for i in rng.permutation(len(lengths))]:
            n = min(int(rng.choice([0, 1, 1, 7, 30])), N_TOKENS - lengths[sequence])
            positions += range(lengths[sequence], lengths[sequence] + n)
            tokens += TOKENS[lengths[sequence] : lengths[sequence] + n]
            sequences += [sequence] * n
            lengths[sequence] += n
        if tokens:
            context.forward(tokens, sequences, bytes([1] * len(tokens)))
            assert rows_of(context, len(tokens)) == [reference[0][p] for p in positions]
        victim = list(lengths)[rng.integers(len(lengths))]
        keep = int(rng.integers(0, lengths[victim] + 1))
        fork = victim.fork(keep)
        del lengths[victim]
        victim.close()
        fork.truncate(keep // 4 * 3)
        lengths[fork] = keep // 4 * 3


def test_only_the_wanted_rows_are_computed(model: _core.Model, reference: tuple[list[bytes], str]) -> None:
    context = _core.Context(model)
    sequence = context.sequence_new()
    want = [i % 7 == 3 for i in range(N_TOKENS)]
    context.forward(TOKENS, [sequence] * N_TOKENS, bytes(want))
    expected = [row for row, wanted in zip(reference[0], want, strict=True) if wanted]
    assert rows_of(context, context.n_logits) == expected
