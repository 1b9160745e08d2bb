"""Every kind of checkpoint and every architecture flag, against tensors that the test made itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    VOCAB,
    frozen_hf,
    random_tensors,
    stored_matrix,
    stored_panels,
    stored_vector,
    tokenizer_json,
    weight_bytes,
    write_gguf,
    write_hf,
)

from pyengine.errors import ModelFormatError
from pyengine.format.config import LayerSpec
from pyengine.format.quantize import dequantize
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze
from pyengine.freeze.rope import rope_inv_freq

TIED = LLAMA | {"tie_word_embeddings": True}
BIASED = LLAMA | {"attention_bias": True}
ALL = {
    "llama": LLAMA, "tied": TIED, "biased": BIASED, "mistral": MISTRAL, "qwen2": QWEN2,
    "qwen3": QWEN3, "qwen3-biased": QWEN3 | {"attention_bias": True},
}  # fmt: skip


def close_to(stored: np.ndarray, weights: np.ndarray) -> None:
    """Half a quantization step of a group whose largest transformed weight is below 6: the way back keeps the mean square."""
    assert np.sqrt(np.square(stored - weights).mean(axis=1)).max() <= 6 / 127 / 2


# ---------------------------------------------------------------------------- contents


@pytest.mark.parametrize("name", ALL)
def test_every_tensor_is_where_it_belongs(tmp_path: Path, name: str) -> None:
    config = ALL[name]
    tensors = random_tensors(config)
    frozen = frozen_hf(tmp_path, config, tensors=tensors)
    c = frozen.config
    assert (c.dim, c.hidden_dim, c.n_layers, c.vocab_size) == (64, 88, 2, VOCAB)
    assert c.qkv_bias == (name in ("biased", "qwen2", "qwen3-biased"))
    assert c.key_bias == (name in ("biased", "qwen2"))
    assert c.o_bias == ("biased" in name) and c.qk_norm == ("qwen3" in name)
    assert c.tie_embeddings == (name == "tied") and c.head_dim == config.get("head_dim", 16)
    assert c.bos_token_id == 256 and c.eos_token_ids == (257,)
    close_to(stored_matrix(frozen, "tok_embeddings", VOCAB, 64), tensors["model.embed_tokens.weight"])
    if name != "tied":
        close_to(stored_matrix(frozen, "output", VOCAB, 64), tensors["lm_head.weight"])
    assert np.array_equal(stored_vector(frozen, "norm", 64), tensors["model.norm.weight"])
    for i in range(2):
        layer, source = f"layers.{i}", f"model.layers.{i}."
        attention = source + "self_attn."
        rows = c.q_dim + 2 * c.kv_dim
        qkv = [tensors[f"{attention}{p}_proj.weight"] for p in "qkv"]
        close_to(stored_matrix(frozen, f"{layer}.wqkv", rows, 64), np.concatenate(qkv))
        wo = stored_matrix(frozen, f"{layer}.wo", 64, c.q_dim)
        close_to(wo, tensors[attention + "o_proj.weight"])
        codes, scales = stored_panels(frozen, f"{layer}.w_gate_up")
        for side, part in enumerate(("gate", "up")):
            half = dequantize(codes[side::2], scales[side::2], 88, 64)
            close_to(half, tensors[f"{source}mlp.{part}_proj.weight"])
        down = stored_matrix(frozen, f"{layer}.w_down", 64, 88)
        close_to(down, tensors[source + "mlp.down_proj.weight"])
        vectors = {
            f"{layer}.attention_norm": [source + "input_layernorm.weight"],
            f"{layer}.ffn_norm": [source + "post_attention_layernorm.weight"],
            f"{layer}.wqkv.bias": [f"{attention}{p}_proj.bias" for p in "qkv"] * c.qkv_bias,
            f"{layer}.key_bias": [attention + "k_proj.bias"] * c.key_bias,
            f"{layer}.wo.bias": [attention + "o_proj.bias"] * c.o_bias,
            f"{layer}.q_norm": [attention + "q_norm.weight"] * c.qk_norm,
            f"{layer}.k_norm": [attention + "k_norm.weight"] * c.qk_norm,
        }
        for target, sources in vectors.items():
            assert (target in frozen.tensors) == bool(sources)
            if sources and target.endswith("key_bias"):  # no large ones here: all of it is in wqkv.bias
                assert not stored_vector(frozen, target, c.kv_dim).any()
            elif sources:
                whole = np.concatenate([tensors[s] for s in sources])
                assert np.array_equal(stored_vector(frozen, target, len(whole)), whole)


@pytest.mark.parametrize("name", ["biased", "qwen2"])
def test_large_key_biases_leave_by_pairs(tmp_path: Path, name: str) -> None:
    """By whole pairs of RoPE, from Hugging Face's order of rows and from GGUF's interleaved one."""
    tensors = random_tensors(ALL[name])
    bias = tensors["model.layers.1.self_attn.k_proj.bias"]
    bias[[2, 16 + 7, 16 + 15]] = 211.0, -3.999, -4.0
    apart = np.zeros_like(bias)
    moved = [2, 2 + 8, 16 + 7, 16 + 15]
    apart[moved] = bias[moved]
    hf = freeze(write_hf(tmp_path / "hf", ALL[name], tensors), tmp_path / "hf.safetensors")
    gguf = freeze(write_gguf(tmp_path / "m.gguf", ALL[name], tensors), tmp_path / "gguf.safetensors")
    assert weight_bytes(hf) == weight_bytes(gguf)
    with FrozenFile.open(hf) as frozen:
        q_dim, kv_dim = frozen.config.q_dim, frozen.config.kv_dim
        assert not stored_vector(frozen, "layers.0.key_bias", kv_dim).any()
        assert np.array_equal(stored_vector(frozen, "layers.1.key_bias", kv_dim), apart)
        inside = stored_vector(frozen, "layers.1.wqkv.bias", q_dim + 2 * kv_dim)[q_dim : q_dim + kv_dim]
        assert np.array_equal(inside, bias - apart) and not inside[moved].any()


@pytest.mark.parametrize("name", ["llama", "tied", "biased", "qwen2", "qwen3"])
def test_gguf_freezes_to_the_same_bytes(tmp_path: Path, name: str) -> None:
    """q and k rows (and biases) of architecture "llama" are interleaved in GGUF: undone exactly."""
    tensors = random_tensors(ALL[name])
    hf = freeze(write_hf(tmp_path / "hf", ALL[name], tensors), tmp_path / "hf.safetensors")
    gguf = freeze(write_gguf(tmp_path / "m.gguf", ALL[name], tensors), tmp_path / "gguf.safetensors")
    assert weight_bytes(hf) == weight_bytes(gguf)
    with FrozenFile.open(hf) as a, FrozenFile.open(gguf) as b:
        assert a.config == b.config
        assert b.attachment("chat_template.jinja") == b"{{ messages[0].content }}\n{# #}"


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_checkpoints(tmp_path: Path, dtype: str) -> None:
    tensors = random_tensors(LLAMA)
    if dtype == "F16":
        rounded = {n: a.astype(np.float16).astype(np.float32) for n, a in tensors.items()}
    else:
        rounded = {n: (a.view("u4") & 0xFFFF0000).view("f4") for n, a in tensors.items()}
    half = freeze(write_hf(tmp_path / "half", LLAMA, tensors, dtype), tmp_path / "half.safetensors")
    full = freeze(write_hf(tmp_path / "full", LLAMA, rounded), tmp_path / "full.safetensors")
    assert weight_bytes(half) == weight_bytes(full)


def test_shards_equal_one_file(tmp_path: Path) -> None:
    one = freeze(write_hf(tmp_path / "one"), tmp_path / "one.safetensors")
    many = freeze(write_hf(tmp_path / "many", shards=3), tmp_path / "many.safetensors")
    assert weight_bytes(one) == weight_bytes(many)


def test_freezing_twice_gives_the_same_file(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    a, b = freeze(source, tmp_path / "a"), freeze(source, tmp_path / "b")
    assert a.read_bytes() == b.read_bytes()


def test_progress_counts_to_the_weights_end(tmp_path: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    freeze(write_hf(tmp_path / "hf"), tmp_path / "m", progress=lambda *a: calls.append(a))
    assert calls[0][2] == "tok_embeddings.codes" and calls[-1][2] == "rope.0.inv_freq"
    assert [c[0] for c in calls] == sorted(c[0] for c in calls)
    assert {c[1] for c in calls} == {(tmp_path / "m").stat().st_size}


def test_the_package_is_the_function_too(tmp_path: Path) -> None:
    import pyengine.freeze.hf  # binds the name pyengine.freeze to the package

    assert pyengine.freeze(write_hf(tmp_path / "hf"), tmp_path / "m") == tmp_path / "m"
    assert inspect.signature(pyengine.freeze) == inspect.signature(pyengine.freeze.freeze)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantized_gguf_equals_its_dequantized_weights(tmp_path: Path, kind: str) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize as unpack
    from gguf.quants import quantize

    config = LLAMA | {"intermediate_size": 96}
    tensors = random_tensors(config)
    block = GGMLQuantizationType[kind]
    plain = {n: a if a.ndim == 1 else unpack(quantize(a, block), block).astype(np.float32) for n, a in tensors.items()}
    quantized = write_gguf(tmp_path / "q.gguf", config, tensors, quantization=kind)
    a = freeze(quantized, tmp_path / "a")
    b = freeze(write_gguf(tmp_path / "p.gguf", config, plain), tmp_path / "b")
    assert weight_bytes(a) == weight_bytes(b)


# ---------------------------------------------------------------------------- RoPE and windows

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def inv_freq(frozen: FrozenFile) -> np.ndarray:
    return stored_vector(frozen, "rope.0.inv_freq", frozen.config.head_dim // 2)


def test_default_frequencies(tmp_path: Path) -> None:
    exact = 10000.0 ** -(np.arange(8) / 8)
    assert np.abs(inv_freq(frozen_hf(tmp_path, LLAMA)) / exact - 1).max() < 2e-7


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ],
)
def test_linear_scaling_in_every_spelling(tmp_path: Path, spelling: dict[str, Any]) -> None:
    frozen = frozen_hf(tmp_path, LLAMA | spelling)
    assert np.array_equal(inv_freq(frozen), rope_inv_freq(16, 10000.0, None) / np.float32(4))


def test_rope_parameters_carry_theta(tmp_path: Path) -> None:
    spelling = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
    frozen = frozen_hf(tmp_path, LLAMA | spelling)
    assert np.array_equal(inv_freq(frozen), rope_inv_freq(16, 500.0, None))


def test_llama3_scaling(tmp_path: Path) -> None:
    """Worked in double from the definition: kept, interpolated, divided."""
    base = 10000.0 ** -(np.arange(8) / 8)
    wavelength = 2 * np.pi / base
    smooth = (64 / wavelength - 1) / (4 - 1)
    expected = np.where(wavelength < 16, base, np.where(wavelength > 64, base / 8, 0))
    between = expected == 0
    expected[between] = ((1 - smooth) * base / 8 + smooth * base)[between]
    assert between.any() and (expected == base).any()
    frozen = frozen_hf(tmp_path, LLAMA | {"rope_scaling": LLAMA3})
    assert np.abs(inv_freq(frozen) / expected - 1).max() < 1e-6


def test_gguf_rope_freqs_and_linear_scaling(tmp_path: Path) -> None:
    divisors = np.array([1, 1, 1, 2, 4, 8, 8, 8], np.float32)
    extra = {"rope_freqs.weight": divisors}
    path = write_gguf(tmp_path / "a.gguf", extra_tensors=extra)
    frozen = FrozenFile.open(freeze(path, tmp_path / "a"))
    base = rope_inv_freq(16, 10000.0, None)
    assert np.array_equal(inv_freq(frozen), base / divisors)
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "b.gguf", extra=scaling)
    assert np.array_equal(inv_freq(FrozenFile.open(freeze(path, tmp_path / "b"))), base / 4)


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MISTRAL | {"sliding_window": 32}, 32),
        (MISTRAL | {"sliding_window": None}, 0),
        (MISTRAL, 4096),  # transformers' default where the key is absent
        (QWEN2 | {"use_sliding_window": True}, 0),  # the first 28 layers have none
        (LLAMA | {"sliding_window": 32}, 0),  # transformers' Llama does not look at it
        (QWEN2 | {"sliding_window": 32, "use_sliding_window": False}, 0),
        (QWEN2 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 2}, 0),
        (QWEN2 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, 32),
        (
            QWEN3
            | {
                "sliding_window": 8,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention"] * 2,
            },
            8,
        ),
    ],
)
def test_sliding_windows(tmp_path: Path, config: dict[str, Any], window: int) -> None:
    assert frozen_hf(tmp_path, config).config.layers == (LayerSpec(window=window),) * 2


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (QWEN2 | {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, [0, 8]),
        (MISTRAL | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, [8, 0]),
    ],
)
def test_windows_by_layer(tmp_path: Path, config: dict[str, Any], windows: list[int]) -> None:
    assert [layer.window for layer in frozen_hf(tmp_path, config).config.layers] == windows


# ---------------------------------------------------------------------------- attachments


def test_hf_attachments(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    generation = {"eos_token_id": [257, 258], "temperature": 0.6}
    (source / "generation_config.json").write_text(json.dumps(generation))
    settings = {"bos_token": "<|bos|>", "chat_template": "{{ one }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with FrozenFile.open(freeze(source, tmp_path / "a")) as frozen:
        assert frozen.config.eos_token_ids == (257, 258)
        assert json.loads(frozen.attachment("generation_config.json") or b"") == generation
        assert frozen.attachment("chat_template.jinja") == b"{{ one }}"
        assert json.loads(frozen.attachment("tokenizer_config.json") or b"") == {"bos_token": "<|bos|>"}
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    with FrozenFile.open(freeze(source, tmp_path / "b")) as frozen:
        assert frozen.attachment("chat_template.jinja") == b"d"
        assert json.loads(frozen.attachment("tokenizer_config.json") or b"")["chat_template"] == named
    (source / "chat_template.jinja").write_text("file")
    with FrozenFile.open(freeze(source, tmp_path / "c")) as frozen:
        assert frozen.attachment("chat_template.jinja") == b"file"


def test_attachments_that_are_not_unicode(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    (source / "tokenizer_config.json").write_text('{"bos_token": "\\ud800"}')
    with FrozenFile.open(freeze(source, tmp_path / "m")) as frozen:
        assert frozen.attachment("tokenizer_config.json") == b'{"bos_token": "\\ud800"}'
    (source / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ModelFormatError, match=r"chat_template\.jinja is not UTF-8"):
        freeze(source, tmp_path / "n")


def test_truncation_settings_of_a_training_run_do_not_ride_along(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    document = json.loads(tokenizer_json())
    document["truncation"] = {
        "direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0,
    }  # fmt: skip
    (source / "tokenizer.json").write_text(json.dumps(document))
    with FrozenFile.open(freeze(source, tmp_path / "m")) as frozen:
        assert json.loads(frozen.attachment("tokenizer.json") or b"")["truncation"] is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.update(model={"type": "Nonsense"}), "no vocabulary"),
        (lambda t: t["model"]["vocab"].update(extra=VOCAB), "token id 300"),
    ],
)
def test_tokenizers_that_do_not_fit(tmp_path: Path, change: Callable[[dict[str, Any]], None], match: str) -> None:
    source = write_hf(tmp_path / "hf")
    document = json.loads(tokenizer_json())
    change(document)
    (source / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ModelFormatError, match=match):
        freeze(source, tmp_path / "m")
