"""What cannot be frozen is refused by name: settings and tensors without a place, damaged and hostile checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import (
    LLAMA,
    MISTRAL,
    QWEN2,
    frozen_hf,
    random_tensors,
    safetensors_bytes,
    write_gguf,
    write_hf,
)

from pyengine.errors import ModelFormatError, UnsupportedModelError
from pyengine.freeze import freeze


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "architecture 'FalconForCausalLM'"),
        ({"architectures": None, "model_type": "gpt2"}, "architecture 'gpt2' is not implemented: it needs learned positions"),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
        (QWEN2 | {"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "unnamed method"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "RoPE type 'longrope'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "RoPE type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "between layers"),
        (
            QWEN2 | {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention", "chunked"]},
            "layer of type 'chunked'",
        ),
    ],
)
def test_unsupported_is_named(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        frozen_hf(tmp_path, LLAMA | config, tensors=random_tensors(LLAMA))


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": 128}, r"'model\.embed_tokens\.weight' has shape \[300, 64\]"),
        ({"num_hidden_layers": 3}, r"'model\.layers\.2\..*' is missing"),
        ({"num_attention_heads": 0}, "0 heads"),
        ({"num_attention_heads": "4"}, "num_attention_heads must be an integer"),
        ({"num_key_value_heads": 3}, "n_kv_heads 3|shape"),
        ({"vocab_size": 1 << 30}, "vocab_size"),
        ({"vocab_size": -1}, "vocab_size must be a positive integer"),
        ({"rms_norm_eps": None}, "norm_eps"),
        ({"rope_theta": "x"}, "rope_theta must be a number"),
        ({"rope_theta": -1.0}, "RoPE base"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a number"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "out of range"),
        ({"rope_scaling": [1]}, "not an object"),
        ({"eos_token_id": 300}, "eos_token_ids"),
        (MISTRAL | {"num_hidden_layers": 1 << 60, "sliding_window": 8}, "num_hidden_layers"),
        ({"architectures": ["A", "B"]}, "must name one"),
        ({"architectures": None, "model_type": None}, "config.json names no architecture"),
        ({"attention_bias": True}, r"q_proj\.bias' is missing"),
    ],
)
def test_damaged_configs(tmp_path: Path, config: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelFormatError, match=match):
        frozen_hf(tmp_path, LLAMA | config, tensors=random_tensors(LLAMA))


def test_unknown_and_missing_tensors_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    extra = tensors | {"model.layers.0.self_attn.sinks": np.zeros(4, np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"'model\.layers\.0\.self_attn\.sinks'"):
        frozen_hf(tmp_path, LLAMA, tensors=extra)
    del tensors["model.norm.weight"]
    with pytest.raises(ModelFormatError, match=r"'model\.norm\.weight' is missing"):
        frozen_hf(tmp_path, LLAMA, tensors=tensors)


def test_old_checkpoints_may_store_their_frequencies(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    frozen_hf(tmp_path, LLAMA, tensors=random_tensors(LLAMA) | {name: np.zeros(8, np.float32)})


@pytest.mark.parametrize("place", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_named_and_leave_no_file(tmp_path: Path, place: str) -> None:
    tensors = random_tensors(LLAMA)
    tensors[place].flat[5] = np.nan
    with pytest.raises(ModelFormatError, match=r"norm'|up_proj"):
        frozen_hf(tmp_path, LLAMA, tensors=tensors)
    assert not (tmp_path / "m.safetensors").exists()


def test_hostile_index_files(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", shards=2)
    index = source / "model.safetensors.index.json"
    for name in ("../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 5):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(ModelFormatError, match="names the file"):
            freeze(source, tmp_path / "m")
    index.write_text("{}")
    with pytest.raises(ModelFormatError, match="no weight_map"):
        freeze(source, tmp_path / "m")


def test_the_same_tensor_in_two_shards(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", shards=2)
    tensors = random_tensors(LLAMA)
    shard = source / "model-00002-of-00002.safetensors"
    shard.write_bytes(safetensors_bytes(tensors))
    with pytest.raises(ModelFormatError, match="in another shard too"):
        freeze(source, tmp_path / "m")


def test_pickles_are_never_read(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match="pickled weights"):
        freeze(source, tmp_path / "m")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf")
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"dtype": "F32"', b'"dtype": "I32"'))
    with pytest.raises(UnsupportedModelError, match="dtype I32"):
        freeze(source, tmp_path / "m")


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"llama.attention.causal": False}, "not causal"),
        ({"llama.logit_scale": 2.0}, r"'llama\.logit_scale'"),
        ({"llama.rope.dimension_count": 8}, "part of the head"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "'longrope'"),
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_attn_factor": 2.0}, "another amplitude than YaRN's own"),
        ({"llama.attention.value_length": 8}, "value heads"),
    ],
)
def test_unsupported_gguf_is_named(tmp_path: Path, extra: dict[str, Any], match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        freeze(write_gguf(tmp_path / "m.gguf", extra=extra), tmp_path / "m")


def test_experts_where_they_are_not_known(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "m.gguf", LLAMA | {"model_type": "qwen2"}, extra={"qwen2.expert_count": 8})
    with pytest.raises(UnsupportedModelError, match="'qwen2' with experts is not implemented"):
        freeze(source, tmp_path / "m")
    with pytest.raises(ModelFormatError, match=r"llama\.expert_used_count is missing"):
        freeze(write_gguf(tmp_path / "n.gguf", extra={"llama.expert_count": 8}), tmp_path / "n")


def test_gguf_tensors_without_a_place(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    with pytest.raises(UnsupportedModelError, match=r"'blk\.0\.ffn_gate_inp\.weight'"):
        freeze(write_gguf(tmp_path / "m.gguf", extra_tensors=extra), tmp_path / "m")
    extra = {"rope_freqs.weight": np.zeros(8, np.float32)}
    with pytest.raises(ModelFormatError, match="positive"):
        freeze(write_gguf(tmp_path / "n.gguf", extra_tensors=extra), tmp_path / "m")


def test_gguf_of_another_architecture(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", LLAMA | {"model_type": "deepseek2"})
    with pytest.raises(UnsupportedModelError, match="architecture 'deepseek2' is not implemented: it needs keys and values from"):
        freeze(path, tmp_path / "m")


def test_things_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello, this is not a model file at all")
    with pytest.raises(ModelFormatError):
        freeze(tmp_path / "text.txt", tmp_path / "m")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(ModelFormatError, match="0 bytes"):
        freeze(tmp_path / "empty", tmp_path / "m")
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(random_tensors(LLAMA)))
    with pytest.raises(ModelFormatError, match="give the directory"):
        freeze(tmp_path / "x.safetensors", tmp_path / "m")
    with pytest.raises(FileNotFoundError):
        freeze(tmp_path / "nothing", tmp_path / "m")
    (tmp_path / "dir").mkdir()
    with pytest.raises(ModelFormatError, match=r"no config\.json"):
        freeze(tmp_path / "dir", tmp_path / "m")
