"""Directories as transformers 5 writes them mean what it computes: names of tensors and keys, RoPE by kind of layer, ties, models
that see; and architectures that other ones' folds are enough for.

The float32 forward of the source is compared, which reads what freezing reads."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import weight_bytes
from reference import fixtures, gguf_fixtures
from reference.transformers5 import LOGIT_STEP, TOKENS, Case, case_weights, cases, write_case

from pyengine.errors import ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze, open_source
from pyengine.freeze.arch import ARCHITECTURES
from pyengine.freeze.arch.not_implemented import what_it_needs
from pyengine.freeze.float_forward import FloatForward


@pytest.mark.parametrize("name", cases())
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    with contextlib.closing(open_source(write_case(case, tmp_path / "hf"))) as source:
        forward = FloatForward(source)
        logits = forward.logits(forward.states(np.array([TOKENS]))[0, -2:])[:, ::LOGIT_STEP]
    assert np.abs(logits - case.logits).max() < 1e-4 * case.logits.std()


def text_model(case: Case) -> fixtures.Fixture:
    """The case without what sees, for the writer of GGUF files."""
    config = {**case.config, **case.config.get("text_config", {})}
    names = {name: name.replace("model.language_model.", "model.") for name in case.shapes if "visual" not in name}
    weights = {names[name]: w for name, w in case_weights(case.shapes).items() if name in names}
    nothing = np.zeros(0)
    return fixtures.Fixture(case.name, config, weights, *[nothing.astype(t) for t in (np.int32,) * 2 + (np.float32,) * 3])


@pytest.mark.parametrize("name", ["gemma", "exaone", "hunyuan_moe", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_gguf_and_hf_freeze_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Judge of the names and of what converters do: the format's own package."""
    case = cases()[name]
    if name == "exaone":  # Llama 3's scaling is a tensor there, which test_freeze_gguf.py has
        case = replace(case, config=case.config | {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}})
    from_hf = freeze(write_case(case, tmp_path / "hf"), tmp_path / "hf.safetensors")
    from_gguf = freeze(gguf_fixtures.write(text_model(case), tmp_path / "m.gguf"), tmp_path / "gguf.safetensors")
    with FrozenFile.open(from_hf) as one, FrozenFile.open(from_gguf) as other:
        assert replace(other.config, architecture=one.config.architecture) == one.config
    assert weight_bytes(from_gguf) == weight_bytes(from_hf)


def test_the_older_spellings_of_a_model_that_sees(tmp_path: Path) -> None:
    """Qwen2.5-VL as it was published: the text model's keys among the others, an older name of its RoPE, other tensors' names."""
    case = cases()["qwen2_5_vl"]
    wanted = freeze(write_case(case, tmp_path / "new"), tmp_path / "a")
    text = {key: value for key, value in case.config["text_config"].items() if key not in ("model_type", "rope_parameters")}
    yarn = case.config["text_config"]["rope_parameters"]
    flat = {**text, **{key: value for key, value in case.config.items() if key != "text_config"}, "rope_scaling": yarn}
    again = write_case(replace(case, config=flat), tmp_path / "old")
    assert weight_bytes(freeze(again, tmp_path / "b")) == weight_bytes(wanted)
    (again / "config.json").write_text(json.dumps({**flat, "rope_theta": 5.0, "rope_scaling": {"type": "mrope"}}))
    with contextlib.closing(open_source(again)) as source:
        assert np.allclose(source.vectors["rope.0.inv_freq"](), 5.0 ** -np.arange(0, 1, 0.25))


def test_experts_as_version_4_writes_them(tmp_path: Path) -> None:
    """Qwen3-VL's, of which all of a layer are one tensor: (inputs, outputs), as published."""
    case = cases()["qwen3_vl_moe"]
    wanted = freeze(write_case(case, tmp_path / "new"), tmp_path / "a")
    older = replace(case, config=case.config | {"transformers_version": "4.57.0"})
    directory = write_case(older, tmp_path / "old")
    weights = case_weights(case.shapes)
    weights |= {name: w.swapaxes(1, 2).copy() for name, w in weights.items() if ".experts." in name}
    fixtures.write_safetensors(directory / "model.safetensors", weights)
    assert weight_bytes(freeze(directory, tmp_path / "b")) == weight_bytes(wanted)
    (directory / "config.json").write_text(json.dumps(case.config))
    with pytest.raises(ModelFormatError, match=r"experts.*shape"):
        open_source(directory)


@pytest.mark.parametrize(
    ("name", "changes", "error", "match"),
    [
        ("iquestcoder", {"architectures": ["IQuestCoderForCausalLM"], "clip_qkv": 8.0}, UnsupportedModelError, "clip_qkv"),
        ("granite_swa", {"layer_rope_theta": [1e4]}, ModelFormatError, "layer_rope_theta must be a list"),
        ("granite_swa", {"layer_rope_theta": [1e4, "x", 0]}, ModelFormatError, "layer_rope_theta must be a list"),
        ("granite_swa", {"layer_rope_theta": [1e4, -1.0, 0]}, ModelFormatError, "layer_rope_theta must be a list"),
        ("hunyuan_moe", {"moe_topk": [2, 1, 2]}, ModelFormatError, "moe_topk must be an integer"),
        ("mellum", {"mlp_layer_types": ["dense", "sparse", "sparse"]}, UnsupportedModelError, "layers without experts"),
        ("flex_olmo", {"clip_qkv": 8.0}, UnsupportedModelError, "clip_qkv"),
        ("gemma", {"hidden_act": "relu"}, UnsupportedModelError, "activation 'relu'"),
        ("llava", {"text_config": {"model_type": "gemma2"}}, UnsupportedModelError, r"text model 'gemma2'.*known are llama"),
        ("llava", {"text_config": {}, "architectures": ...}, ModelFormatError, "text_config of Llava.* has no model_type"),
        ("llama", {"architectures": ["Qwen3NextForCausalLM"]}, UnsupportedModelError, "'Qwen3Next.*it needs gated delta nets"),
        ("llama", {"architectures": ["Qwen3_5MoeForConditionalGeneration"]}, UnsupportedModelError, "it needs gated delta nets"),
        ("llama", {"architectures": ["DeepseekV3ForCausalLM"]}, UnsupportedModelError, r"it needs .*\(MLA\)"),
        ("llama", {"architectures": ["Gemma3nForConditionalGeneration"]}, UnsupportedModelError, "it needs embeddings for each"),
        ("llama", {"architectures": ..., "model_type": "falcon_h1"}, UnsupportedModelError, "it needs state-space layers"),
        ("llama", {"architectures": ["XLMRobertaForSequenceClassification"]}, UnsupportedModelError, "it needs attention to"),
    ],
)  # fmt: skip
def test_what_is_wrong_or_not_known_is_named(
    tmp_path: Path, name: str, changes: dict[str, Any], error: type[PyEngineError], match: str
) -> None:
    case = cases()[name]
    config = {key: value for key, value in (case.config | changes).items() if value is not ...}
    with pytest.raises(error, match=match):
        open_source(write_case(replace(case, config=config), tmp_path / "hf"))


def test_what_is_implemented_needs_nothing() -> None:
    names = {name for one in ARCHITECTURES for name in (one.hf, one.model_type, one.gguf or "")}
    assert not {name: needs for name in sorted(names) if (needs := what_it_needs(name)) is not None}


VALUES = [None, True, 0, -1, 10**400, 0.5, 1e308, "", "x", [], [10**400] * 3, [0, 1], {}, {"a": {}}, {"full_attention": 1}]
OWN_KEYS = {
    "granite_swa": ["layer_rope_theta", "sliding_window", "layer_types"],
    "mellum": ["mlp_layer_types", "layer_types", "rope_parameters", "num_local_experts"],
    "hunyuan_moe": ["moe_topk", "num_experts", "rope_parameters"],
    "qwen3_vl_moe": ["text_config", "tie_word_embeddings", "transformers_version"],
    "llava": ["text_config", "tie_word_embeddings"],
    "exaone": ["num_layers", "layer_norm_epsilon", "activation_function", "model_type"],
    "hyperclovax": ["use_post_norm", "logits_scaling", "attention_multiplier"],
    "olmo3": ["rope_parameters", "rope_scaling", "rope_theta"],
    "iquestcoder": ["clip_qkv", "use_sliding_window", "architectures"],
    "cwm": ["sliding_window", "layer_types", "rope_parameters"],
    "gemma": ["hidden_act", "tie_word_embeddings"],
}


@pytest.mark.parametrize("name", OWN_KEYS)
def test_any_value_of_the_keys_of_their_own_is_read_or_refused(tmp_path: Path, name: str) -> None:
    case = cases()[name]
    directory = write_case(case, tmp_path / "hf")
    for key in OWN_KEYS[name]:
        for value in VALUES:
            (directory / "config.json").write_text(json.dumps(case.config | {key: value}))
            with contextlib.suppress(PyEngineError):
                open_source(directory).close()
