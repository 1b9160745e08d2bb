"""The engine against what it did not write: the file against the specification, its bits against the specification in
NumPy, its blocks against the float64 oracle, its logits against transformers in float32."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference import fixtures, frozen_reader, gguf_weights
from reference.oracle import Oracle, kl_divergence, log_softmax, quantize_weight
from reference.spec_f32 import Spec
from reference.spec_ops import Matrix
from tokenizers import Tokenizer

from pyengine import _core
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze

f32 = np.float32
NAMES = fixtures.names()
ISAS = _core.available_isas()


@pytest.fixture(scope="module")
def frozen_paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every fixture, frozen from a Hugging Face directory."""
    root = tmp_path_factory.mktemp("frozen")
    paths = {}
    for name in NAMES:
        fixture = fixtures.load(name)
        hf_dir = fixtures.write_hf_dir(fixture, root / name)
        paths[name] = root / f"{name}.safetensors"
        freeze(hf_dir, paths[name], n_ctx=fixtures.n_ctx(fixture))
    return paths


@cache
def plain_logits(name: str) -> Any:
    """float32 logits at every position: the oracle's, which test_oracle.py holds to
    transformers'."""
    fixture = fixtures.load(name)
    config, weights = fixtures.canonical_config(fixture), fixtures.canonical_weights(fixture)
    return Oracle(config, weights, quantized=False).logits(fixture.token_ids)


@cache
def spec_logits(name: str, path: Path, kv_dtype: str) -> Any:
    spec = Spec(*frozen_reader.read(path), kv_dtype=kv_dtype)
    return spec.logits(fixtures.load(name).token_ids)


def open_model(path: Path) -> tuple[FrozenFile, Any]:
    frozen = FrozenFile.open(path)
    return frozen, _core.Model(frozen.config, frozen.buffer, frozen.weights)


def engine_logits(model: Any, token_ids: Any, kv_dtype: str = "int8") -> Any:
    """One prefill -> logits (n_tokens, vocab_size) float32, a copy."""
    context = _core.Context(model, kv_dtype=kv_dtype)
    sequence, n = context.sequence_new(), len(token_ids)
    context.forward([int(t) for t in token_ids], [sequence] * n, bytes([1] * n))
    return np.stack([np.array(context.logits(row), dtype=f32) for row in range(n)])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Any:
    """Every kernel table that this CPU runs, then the default one again."""
    _core.select_isa(request.param)
    yield request.param
    _core.select_isa(None)


# ---------------------------------------------------------------------- the file


@pytest.mark.parametrize("name", NAMES)
def test_frozen_file_holds_the_specification(name: str, frozen_paths: dict[str, Path]) -> None:
    """What the file holds, read by the letter of FORMAT.md, is what the oracle's quantizer says."""
    fixture = fixtures.load(name)
    config, weights = frozen_reader.read(frozen_paths[name])
    assert config == fixtures.canonical_config(fixture)
    wanted = fixtures.canonical_weights(fixture)
    assert weights.keys() == wanted.keys()
    for key, w in wanted.items():
        got = weights[key]
        if isinstance(got, Matrix):
            codes, scales = quantize_weight(w)
            assert np.array_equal(got.codes, codes), key
            assert np.array_equal(got.scales, scales), key
        elif key.startswith("rope."):  # a power in float32 there: the last bits are anybody's
            assert np.allclose(got, w, rtol=1e-6, atol=0)
        else:
            assert np.array_equal(got, w), key


def test_precision_of_the_source_does_not_matter(tmp_path: Path, frozen_paths: dict[str, Path]) -> None:
    """Float16 values stored as float32 give the same weights, byte for byte."""
    hf_dir = fixtures.write_hf_dir(fixtures.load("qwen2"), tmp_path / "hf", dtype="F32")
    wide = FrozenFile.open(freeze(hf_dir, tmp_path / "wide.safetensors"))
    narrow = FrozenFile.open(frozen_paths["qwen2"])
    assert wide.tensors == narrow.tensors
    for key, (offset, size) in wide.tensors.items():
        if key.endswith((".codes", ".scales")):
            assert wide.buffer[offset : offset + size] == narrow.buffer[offset : offset + size], key


# ---------------------------------------------------------------------- bits


@pytest.mark.parametrize("kv_dtype", ["int8", "f32"])
@pytest.mark.parametrize("name", NAMES)
def test_engine_equals_the_specification_bit_for_bit(name: str, kv_dtype: str, isa: str, frozen_paths: dict[str, Path]) -> None:
    _, model = open_model(frozen_paths[name])
    got = engine_logits(model, fixtures.load(name).token_ids, kv_dtype)
    wanted = spec_logits(name, frozen_paths[name], kv_dtype)
    assert got.shape == wanted.shape
    differing = np.flatnonzero((got.view(np.uint32) != wanted.view(np.uint32)).any(axis=1))
    assert differing.size == 0, f"{isa}: rows {differing[:5]} of {len(got)} differ"


@pytest.mark.parametrize("kv_dtype", ["int8", "f32"])
@pytest.mark.parametrize("name", NAMES)
def test_rows_that_want_nothing_move_no_bit(name: str, kv_dtype: str, frozen_paths: dict[str, Path]) -> None:
    """They leave in the middle of the last layer. Of two sequences, row by row in turn, one wants every third row, the other
    its last."""
    token_ids = [int(t) for t in fixtures.load(name).token_ids]
    _, model = open_model(frozen_paths[name])
    context = _core.Context(model, kv_dtype=kv_dtype)
    pair = [context.sequence_new(), context.sequence_new()]
    n = len(token_ids)
    wants = [(t % 3 == 1, t == n - 1) for t in range(n)]
    context.forward([t for t in token_ids for _ in pair], pair * n, bytes(want for row in wants for want in row))
    positions = [t for t in range(n) for want in wants[t] if want]
    got = np.stack([np.array(context.logits(row), dtype=f32) for row in range(context.n_logits)])
    wanted = spec_logits(name, frozen_paths[name], kv_dtype)[positions]
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


def test_smollm2_equals_the_specification_bit_for_bit(smollm2_frozen: Path, isa: str) -> None:
    """A real model: 30 layers, 9 query heads on 3 kv heads, real weights with real outliers."""
    spec = Spec(*frozen_reader.read(smollm2_frozen))
    token_ids = np.random.default_rng(0).integers(0, spec.config["vocab_size"], 12)
    _, model = open_model(smollm2_frozen)
    got, wanted = engine_logits(model, token_ids), spec.logits(token_ids)
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


# ---------------------------------------------------------------------- blocks


@pytest.mark.parametrize("name", NAMES)
def test_blocks_agree_with_the_oracle(name: str, frozen_paths: dict[str, Path]) -> None:
    """Each block, fed the oracle's own input through the test hook: the specification's bits, and 1e-5 of the
    row's norm from the oracle with the same codes (test_oracle_spec.py says which may differ)."""
    fixture = fixtures.load(name)
    config, weights = frozen_reader.read(frozen_paths[name])
    spec = Spec(config, weights)
    # the file's own inv_freq: a last bit there, times a position, is more than 1e-5
    tables = {key: table for key, table in spec.vectors.items() if key.startswith("rope.")}
    wanted = {**fixtures.canonical_weights(fixture), **tables}
    oracle = Oracle(config, wanted, quantized=True)
    _, model = open_model(frozen_paths[name])
    context = _core.Context(model)
    for layer, x in enumerate(oracle.hidden_states(fixture.token_ids)[:-1]):
        x = x.astype(f32)
        spec_trace = spec.block(layer, x)
        trace = oracle.block(layer, x.astype(np.float64), spec_trace)
        out = x.copy()
        context.debug_block(layer, out)
        assert np.array_equal(out.view(np.uint32), spec_trace["out"].view(np.uint32))
        norm = np.linalg.norm(trace["out"], axis=1)
        error = np.linalg.norm(out - trace["out"], axis=1) / norm
        assert error.max() < 1e-5


# ---------------------------------------------------------------------- statistics


@pytest.mark.parametrize("name", NAMES)
def test_logits_stay_near_transformers(name: str, frozen_paths: dict[str, Path]) -> None:
    """KL(float32 || engine) per position, and the same winner wherever float32 has a clear one.

    The quantization error of a logit is about the specification's noise (KL of some 0.003 nats in the mean,
    0.03 at worst, see test_oracle.py); 0.01 and 0.06 leave a factor of two to three to other weights
    and no room for a wrong operation. A row whose experts are nearly tied may take others, which costs up to 0.07 here."""
    fixture = fixtures.load(name)
    frozen, model = open_model(frozen_paths[name])
    got = engine_logits(model, fixture.token_ids)
    from_transformers = kl_divergence(fixture.logits, got[fixture.rows])
    assert from_transformers.max() < (0.12 if frozen.config.n_experts else 0.06)
    wanted = plain_logits(name)
    assert kl_divergence(wanted, got).mean() < 0.01
    top_two = np.sort(wanted, axis=1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > 0.5
    assert clear.sum() >= 5
    assert np.array_equal(wanted.argmax(axis=1)[clear], got.argmax(axis=1)[clear])


@pytest.mark.slow
def test_smollm2_stays_near_float32(smollm2_gguf: Path, smollm2_frozen: Path, shared_data: Path) -> None:
    """The quality that a user gets: 4 windows of 512 tokens of WikiText-2, int8 KV included.

    float32 is the plain oracle over the weights as GGUF's own authors read them. Bounds: mean KL
    0.0040 nats, negative log-likelihood 0.5 % plus two paired standard errors, and the same winner
    at 99.8 % of positions whose top two are more than 0.5 apart."""
    frozen, model = open_model(smollm2_frozen)
    tokenizer = Tokenizer.from_str((frozen.attachment("tokenizer.json") or b"").decode())
    text = (shared_data / "wikitext2_valid_tokenized.txt").read_text(encoding="utf-8")
    token_ids = np.array(tokenizer.encode(text[:30_000], add_special_tokens=False).ids)
    assert len(token_ids) >= 2048
    oracle = Oracle(*gguf_weights.read(smollm2_gguf), quantized=False)
    kl, differences, losses, agrees = [], [], [], []
    for window in token_ids[:2048].reshape(4, 512):
        wanted, got = oracle.logits(window), engine_logits(model, window)
        kl.append(kl_divergence(wanted, got))
        nll = [-log_softmax(side)[np.arange(511), window[1:]] for side in (wanted, got)]
        losses.append(nll[0])
        differences.append(nll[1] - nll[0])
        top_two = np.partition(wanted, -2, axis=1)[:, -2:]
        agrees.append((wanted.argmax(1) == got.argmax(1))[top_two[:, 1] - top_two[:, 0] > 0.5])
    difference = np.concatenate(differences)
    standard_error = difference.std(ddof=1) / np.sqrt(difference.size)
    assert np.mean(kl) <= 0.0040
    assert abs(difference.mean()) <= 0.005 * np.mean(losses) + 2 * standard_error
    assert np.concatenate(agrees).mean() >= 0.998


@pytest.mark.parametrize("name", ["llama_tied", "qwen3"])
def test_engine_class_gives_the_same_logits(name: str, frozen_paths: dict[str, Path]) -> None:
    """Engine.logits, all positions and some, is the core's forward and nothing more."""
    import pyengine

    fixture = fixtures.load(name)
    token_ids = [int(t) for t in fixture.token_ids]
    _, model = open_model(frozen_paths[name])
    wanted = engine_logits(model, token_ids)
    with pyengine.Engine(frozen_paths[name]) as engine:
        got = np.asarray(engine.logits(token_ids))
        some = np.asarray(engine.logits(token_ids, positions=[3, 17]))
    assert got.dtype == f32
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))
    assert np.array_equal(some.view(np.uint32), wanted[[3, 17]].view(np.uint32))
