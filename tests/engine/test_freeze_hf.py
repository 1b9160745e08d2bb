"""Hugging Face directories of strangers: what is said in several places means what transformers makes of it, and whatever is
wrong leaves as one of our errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import LLAMA, random_tensors, stored_vector, weight_bytes, write_hf

import pyengine
from pyengine.errors import ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze, open_source

# What transformers makes of them: reference/make_resolved_configs.py.
RESOLVED = json.loads((Path(__file__).parents[1] / "reference" / "data" / "resolved_configs.json").read_text())


def directory(
    path: Path,
    config: dict[str, Any] | None = None,
    *,
    drop: tuple[str, ...] = (),
    **documents: Any,
) -> Path:
    """A checkpoint with keys of config.json changed or dropped, and further documents (a name without .json -> its content)."""
    merged = {key: value for key, value in (LLAMA | (config or {})).items() if key not in drop}
    write_hf(path, LLAMA)
    (path / "config.json").write_text(json.dumps(merged))
    for name, content in documents.items():
        if content is not None:
            (path / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def frozen(source: Path) -> FrozenFile:
    return FrozenFile.open(freeze(source, source.with_suffix(".safetensors")))


# ---------------------------------------------------------------------------- special tokens


@pytest.mark.parametrize("case", RESOLVED["tokens"], ids=range(len(RESOLVED["tokens"])))
def test_special_tokens_are_those_of_transformers(tmp_path: Path, case: dict[str, Any]) -> None:
    stale = {"bos_token_id": 5, "eos_token_id": 6}
    documents = {name: case[name] for name in ("tokenizer_config", "special_tokens_map")}
    with frozen(directory(tmp_path / "hf", stale, **documents)) as file:
        assert file.config.bos_token_id == case["bos"]
        assert file.config.eos_token_ids == ((6,) if case["eos"] is None else (case["eos"], 6))


@pytest.mark.parametrize(
    ("config", "settings", "generation", "bos", "eos"),
    [
        ({}, None, None, 256, (257,)),  # only the config says anything
        ({}, {}, None, 256, (257,)),
        ({"eos_token_id": [257, 258]}, None, None, 256, (257, 258)),
        ({}, {"eos_token": "ab"}, None, 256, (258, 257)),
        ({}, {"eos_token": "ab"}, {"eos_token_id": [7, 258, 8]}, 256, (258, 7, 8)),  # the config's is stale
        ({}, {"eos_token": "ab"}, {"eos_token_id": None}, 256, (258, 257)),
        ({}, {"bos_token": "nowhere", "eos_token": "nowhere"}, None, 256, (257,)),
        ({"bos_token_id": -1, "eos_token_id": -1, "pad_token_id": -1}, None, None, None, ()),
        ({"eos_token_id": 300}, {"eos_token": "ab"}, None, 256, (258,)),  # 300 can never come
        ({"eos_token_id": 257}, None, {"eos_token_id": [257, 100_000]}, 256, (257,)),
        ({"bos_token_id": 9999}, {"bos_token": "ab"}, None, 258, (257,)),
    ],
)
def test_ids_of_config_and_generation_config(
    tmp_path: Path, config: Any, settings: Any, generation: Any, bos: int | None, eos: tuple[int, ...]
) -> None:
    source = directory(tmp_path / "hf", config, tokenizer_config=settings, generation_config=generation)
    with frozen(source) as file:
        assert (file.config.bos_token_id, file.config.eos_token_ids) == (bos, eos)


def test_the_template_has_the_tokenizers_tokens(tmp_path: Path) -> None:
    source = directory(
        tmp_path / "hf", {"bos_token_id": 257, "eos_token_id": 258},
        tokenizer_config={"bos_token": "<|bos|>", "eos_token": "<|end|>", "add_bos_token": True},
    )  # fmt: skip
    (source / "chat_template.jinja").write_text("{{ bos_token }}|{{ eos_token }}")
    with pyengine.Engine(freeze(source, tmp_path / "m")) as engine:
        assert engine.chat_template.render([{"role": "user", "content": "x"}]) == "<|bos|>|<|end|>"
        assert engine.tokenize("hi")[0] == 256


# ---------------------------------------------------------------------------- RoPE


def frequencies(path: Path, config: dict[str, Any]) -> Any:
    drop = ("rope_theta",) if "rope_theta" not in config else ()
    with frozen(directory(path, config, drop=drop)) as file:
        return stored_vector(file, "rope.0.inv_freq", 8)


@pytest.mark.parametrize("case", RESOLVED["rope"], ids=range(len(RESOLVED["rope"])))
def test_rope_settings_are_those_of_transformers(tmp_path: Path, case: dict[str, Any]) -> None:
    said = frequencies(tmp_path / "a", case["config"])
    resolved = frequencies(tmp_path / "b", {"rope_parameters": case["resolved"]})
    np.testing.assert_array_equal(said, resolved)


def test_a_scaling_beside_rope_parameters_is_applied_or_refused_by_name(tmp_path: Path) -> None:
    parameters = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    plain = frequencies(tmp_path / "a", parameters)
    linear = frequencies(tmp_path / "b", parameters | {"rope_scaling": {"type": "linear", "factor": 4.0}})
    np.testing.assert_array_equal(linear, plain / np.float32(4))
    with pytest.raises(UnsupportedModelError, match="'dynamic'"):
        frequencies(tmp_path / "c", parameters | {"rope_scaling": {"type": "dynamic", "factor": 4.0}})


# ---------------------------------------------------------------------------- one kind of exception

HUGE = 10**400
# Values of every type that JSON has, and some that Python trips over.
VALUES = [None, True, 0, -1, 2**63, HUGE, 0.5, 1e308, "", "x", "\ud800", "\0", [], [{}], [HUGE], {}, {"a": {}}, [[1]]]


def outcome(source: Path) -> str:
    """ "opened", or the sentence of one of our errors; every other exception fails the test."""
    try:
        open_source(source).close()
    except PyEngineError as error:
        return str(error)
    return "opened"


def spoilt(document: dict[str, Any], key: str, value: Any) -> str:
    return json.dumps(document | {key: value})


CONFIG_KEYS = sorted(
    {*LLAMA, "attention_bias", "head_dim", "layer_types", "max_window_layers", "mlp_bias", "partial_rotary_factor",
     "quantization_config", "rope_parameters", "rope_scaling", "sliding_window", "use_sliding_window"}
)  # fmt: skip


@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_any_value_of_any_key_of_the_config(tmp_path: Path, kind: str, key: str) -> None:
    source = directory(tmp_path / "hf")
    base = LLAMA | {"architectures": [kind], "use_sliding_window": True}
    for value in VALUES:
        (source / "config.json").write_text(spoilt(base, key, value))
        assert outcome(source)


@pytest.mark.parametrize("rope_type", ["default", "linear", "llama3"])
@pytest.mark.parametrize("outer", ["rope_scaling", "rope_parameters"])
def test_any_value_inside_the_rope_settings(tmp_path: Path, outer: str, rope_type: str) -> None:
    source = directory(tmp_path / "hf")
    base = {"rope_type": rope_type, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 1e4}
    base["original_max_position_embeddings"] = 64
    for key in [*base, "type", "partial_rotary_factor"]:
        for value in VALUES:
            (source / "config.json").write_text(spoilt(LLAMA, outer, base | {key: value}))
            assert outcome(source)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("generation_config", ["eos_token_id", "temperature"]),
        ("tokenizer_config", ["bos_token", "eos_token", "chat_template", "tokenizer_class", "added_tokens_decoder"]),
        ("special_tokens_map", ["bos_token", "pad_token"]),
    ],
)
def test_any_value_in_the_documents_beside(tmp_path: Path, name: str, keys: list[str]) -> None:
    source = directory(tmp_path / "hf")
    templates = [[{"name": value, "template": "x"}] for value in VALUES]
    templates += [[{"name": "default", "template": value}] for value in VALUES]
    for key in keys:
        for value in [*VALUES, {"content": None}, {"content": {}}, *templates]:
            (source / f"{name}.json").write_text(json.dumps({key: value}))
            assert outcome(source)
    for value in VALUES:
        (source / f"{name}.json").write_text(json.dumps(value))
        assert outcome(source)


@pytest.mark.parametrize(
    "value", [v for v in VALUES if v not in ({}, [], {"a": {}})] + ["../x.safetensors", "/x.safetensors"]
)
def test_any_file_name_in_the_index(tmp_path: Path, value: Any) -> None:
    source = directory(tmp_path / "hf")
    (source / "model.safetensors").unlink()
    names = [value, f"{value}.safetensors", "x" * 300 + ".safetensors"] if isinstance(value, str) else [value]
    for name in names:
        (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(PyEngineError):
            open_source(source)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelFormatError, match=r"has no model-00002-of-00003\.safetensors"):
        open_source(source)


NO_OBJECTS = ["", "[]", "null", "{" * 5000, '{"a":' * 5000, "[" * 100_000, "NaN", '{"a": 1, "a": 2}', "\ufeff{}"]


@pytest.mark.parametrize("content", NO_OBJECTS, ids=range(len(NO_OBJECTS)))
@pytest.mark.parametrize("name", ["config", "tokenizer", "tokenizer_config", "generation_config", "special_tokens_map"])
def test_documents_that_are_no_object(tmp_path: Path, name: str, content: str) -> None:
    source = directory(tmp_path / "hf")
    (source / f"{name}.json").write_text(content)
    with pytest.raises(ModelFormatError, match=rf"{name}\.json"):
        open_source(source)


def test_deep_documents_that_can_just_be_read(tmp_path: Path) -> None:
    """What the parser took must not overflow the stack of whoever writes it again."""
    source = directory(tmp_path / "hf")
    for depth in range(100, 1000, 30):
        (source / "tokenizer_config.json").write_text('{"a":' * depth + "1" + "}" * depth)
        (source / "tokenizer.json").write_text(
            (write_hf(tmp_path / "other") / "tokenizer.json").read_text()[:-1]
            + ', "x": '
            + "[" * depth
            + "]" * depth
            + "}"
        )
        try:
            freeze(source, tmp_path / "m", overwrite=True)
        except PyEngineError as error:
            assert "tokenizer" in str(error)


def test_tied_output_and_unknown_flags_still_freeze(tmp_path: Path) -> None:
    """The refusals above are of wrong types only: null means absent."""
    config = LLAMA | {"attention_bias": None, "mlp_bias": None, "rope_scaling": None, "tie_word_embeddings": True}
    tensors = random_tensors(LLAMA | {"tie_word_embeddings": True})
    with frozen(write_hf(tmp_path / "hf", config, tensors)) as file:
        assert file.config.tie_embeddings


def test_an_output_matrix_that_is_said_to_be_the_embeddings(tmp_path: Path) -> None:
    """Twice the same is one; another one counts, as in transformers 5."""
    tied, tensors = LLAMA | {"tie_word_embeddings": True}, random_tensors(LLAMA)
    with frozen(write_hf(tmp_path / "twice", tied, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]})) as file:
        assert file.config.tie_embeddings
    wanted = weight_bytes(freeze(write_hf(tmp_path / "untied", LLAMA, tensors), tmp_path / "a.safetensors"))
    assert weight_bytes(freeze(write_hf(tmp_path / "other", tied, tensors), tmp_path / "b.safetensors")) == wanted


# ---------------------------------------------------------------------------- models for embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["LlamaForCausalLM", "LlamaModel"])
def test_what_is_inside_of_the_class_with_an_output_matrix(tmp_path: Path, kind: str, tied: bool) -> None:
    """Saved alone, as Qwen3-Embedding is, its names lack a beginning; without an output matrix it is as if it were tied."""
    whole = LLAMA | {"tie_word_embeddings": True}
    tensors = random_tensors(whole)
    wanted = weight_bytes(freeze(write_hf(tmp_path / "whole", whole, tensors), tmp_path / "w.safetensors"))
    inside = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    config = LLAMA | {"architectures": [kind], "tie_word_embeddings": tied}
    assert weight_bytes(freeze(write_hf(tmp_path / "inside", config, inside), tmp_path / "i.safetensors")) == wanted


def test_an_output_matrix_beside_what_is_inside(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    wanted = weight_bytes(freeze(write_hf(tmp_path / "whole", LLAMA, tensors), tmp_path / "w.safetensors"))
    inside = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    assert weight_bytes(freeze(write_hf(tmp_path / "inside", LLAMA, inside), tmp_path / "i.safetensors")) == wanted


@pytest.mark.parametrize("key", ["is_causal", "use_bidirectional_attention"])
def test_attention_that_is_not_causal_is_refused(tmp_path: Path, key: str) -> None:
    frozen(directory(tmp_path / "a", {key: key == "is_causal"})).close()
    with pytest.raises(UnsupportedModelError, match=f"not causal.*{key}"):
        frozen(directory(tmp_path / "b", {key: key != "is_causal"}))
