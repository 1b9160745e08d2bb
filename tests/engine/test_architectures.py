"""What the architectures beyond Llama's have of their own: GGUF and Hugging Face sources freeze to the same bytes, and settings
mean what transformers makes of them. What is refused is in test_architectures_refused.py.

That they compute what transformers computes is in test_oracle.py and test_against_transformers.py."""

from __future__ import annotations

import contextlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from engine.freeze_models import hf_dir, stored_vector, weight_bytes
from reference import fixtures, gguf_fixtures

from pyengine import _core
from pyengine.errors import InvalidArgumentError, ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze, open_source
from pyengine.freeze.arch import gguf_keys
from pyengine.freeze.arch.base import Shape
from pyengine.freeze.fields import Fields
from pyengine.freeze.gguf_model import WithNumbers
from pyengine.freeze.rope import yarn

NAMES = [name for name in fixtures.names() if gguf_fixtures.architecture_of(fixtures.load(name))]


@pytest.mark.parametrize("name", NAMES)
def test_gguf_and_hf_freeze_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    """Judge of the names and of what converters do: the format's own package."""
    fixture = gguf_fixtures.expressible(fixtures.load(name))
    n_ctx = fixtures.n_ctx(fixture)
    from_hf = freeze(fixtures.write_hf_dir(fixture, tmp_path / "hf"), tmp_path / "hf.safetensors", n_ctx=n_ctx)
    source = gguf_fixtures.write(fixture, tmp_path / "m.gguf")
    from_gguf = freeze(source, tmp_path / "gguf.safetensors", n_ctx=n_ctx)
    with FrozenFile.open(from_hf) as one, FrozenFile.open(from_gguf) as other:
        assert other.config == one.config
    assert weight_bytes(from_gguf) == weight_bytes(from_hf)


def rows_of(context: Any, n: int) -> list[bytes]:
    return [np.array(context.logits(row), np.float32).tobytes() for row in range(n)]


@pytest.mark.parametrize("name", [*NAMES, "nanochat"])
def test_one_token_at_a_time_in_pieces_and_beside_others(name: str, tmp_path: Path) -> None:
    """Prefill is decodes, and a batch changes nothing: the bytes of logits."""
    fixture = fixtures.load(name)
    path = freeze(fixtures.write_hf_dir(fixture, tmp_path / "hf"), tmp_path / "m", n_ctx=fixtures.n_ctx(fixture))
    tokens = [int(token) for token in fixture.token_ids[:60]]
    with FrozenFile.open(path) as file:
        model = _core.Model(file.config, file.buffer, file.weights)
        context = _core.Context(model, n_threads=2)
        whole, apart, left, right = (context.sequence_new() for _ in range(4))
        context.forward(tokens, [whole] * len(tokens), bytes([1] * len(tokens)))
        wanted = rows_of(context, len(tokens))
        for i, token in enumerate(tokens):
            context.forward([token], [apart], b"\1")
            assert rows_of(context, 1) == [wanted[i]]
        for begin in range(0, len(tokens), 7):
            piece = tokens[begin : begin + 7]
            n = len(piece)
            context.forward(piece * 2, [left] * n + [right] * n, bytes([1] * 2 * n))
            assert rows_of(context, 2 * n) == wanted[begin : begin + n] * 2
        del whole, apart, left, right, context, model


# ---------------------------------------------------------------------------- LongRoPE


@pytest.mark.parametrize(("n_ctx", "max_seq_len", "long"), [(None, 64, False), (32, 32, False), (64, 64, False), (65, 65, True)])
def test_long_rope_has_the_table_of_the_context_that_is_asked_for(
    tmp_path: Path, n_ctx: int | None, max_seq_len: int, long: bool
) -> None:
    source = hf_dir(tmp_path / "hf", "phi4_mini")
    with FrozenFile.open(freeze(source, tmp_path / "m", n_ctx=n_ctx)) as file:
        assert file.config.max_seq_len == max_seq_len
        inv_freq = stored_vector(file, "rope.0.inv_freq", 8)
    wanted = np.atleast_2d(fixtures.load("phi4_mini_long" if long else "phi4_mini").inv_freq)[0]
    np.testing.assert_allclose(inv_freq[:6], wanted, rtol=1e-6)
    assert not inv_freq[6:].any()  # pairs that are not turned


def test_a_context_beyond_the_checkpoint_is_refused(tmp_path: Path) -> None:
    source = hf_dir(tmp_path / "hf", "phi4_mini")
    with pytest.raises(InvalidArgumentError, match="n_ctx is 513, but the model is made for 512 positions"):
        freeze(source, tmp_path / "m", n_ctx=513)
    for wrong in (0, -1, True, 1.5, "64", -(10**5000)):
        with pytest.raises(InvalidArgumentError, match="n_ctx must be "):
            freeze(source, tmp_path / "m", n_ctx=wrong)  # type: ignore[arg-type]


def test_a_context_may_be_smaller_than_the_checkpoints(tmp_path: Path) -> None:
    with FrozenFile.open(freeze(hf_dir(tmp_path / "hf", "granite"), tmp_path / "m", n_ctx=100)) as file:
        assert file.config.max_seq_len == 100


# ---------------------------------------------------------------------------- settings


@pytest.mark.parametrize("beginning", ["language_model.model.", "model.language_model."])
@pytest.mark.parametrize(("name", "kind"), [("gemma3", "gemma3"), ("ministral3", "mistral3")])
def test_the_text_model_of_one_that_sees(tmp_path: Path, name: str, kind: str, beginning: str) -> None:
    fixture = fixtures.load(name)
    wanted = weight_bytes(freeze(fixtures.write_hf_dir(fixture, tmp_path / "text"), tmp_path / "m"))
    outside = ("architectures", "model_type", "eos_token_id")
    text = {key: value for key, value in fixture.hf_config.items() if key not in outside}
    config = {
        "architectures": [f"{kind.capitalize()}ForConditionalGeneration"], "model_type": kind, "text_config": text,
        "vision_config": {"hidden_size": 8}, "eos_token_id": fixture.hf_config["eos_token_id"], "bos_token_id": 0,
    }  # fmt: skip
    tensors = {name.replace("model.", beginning, 1): w for name, w in fixture.hf_weights.items()}
    tensors |= {"vision_tower.x.weight": np.ones((8, 8), np.float32), "multi_modal_projector.y": np.ones(8, np.float32)}
    directory = fixtures.write_hf_dir(replace(fixture, hf_config=config, hf_weights=tensors), tmp_path / "both")
    with FrozenFile.open(freeze(directory, tmp_path / "n")) as file:
        assert file.config.eos_token_ids == (1,)
    assert weight_bytes(tmp_path / "n") == wanted
    (directory / "config.json").write_text(json.dumps(config | {"text_config": None}))
    with pytest.raises(ModelFormatError, match="text_config is missing"):
        open_source(directory)


def test_whose_flag_ties_the_embeddings_of_a_model_that_sees(tmp_path: Path) -> None:
    """Version 4 of transformers goes by the text model's, version 5 by the whole's: where they differ the file tells."""
    fixture, soft = fixtures.load("gemma3"), {"final_logit_softcapping": 3.0}
    inside = {name.replace("model.", "model.language_model.", 1): w for name, w in fixture.hf_weights.items()}
    output = {"lm_head.weight": fixture.hf_weights["model.embed_tokens.weight"] + np.float16(1)}
    for whole, text, tensors in ((False, True, inside | output), (True, False, inside), (True, True, inside)):
        config = {"architectures": ["Gemma3ForConditionalGeneration"], "bos_token_id": 0, "eos_token_id": 1,
                  "tie_word_embeddings": whole, "text_config": fixture.hf_config | {"tie_word_embeddings": text}}  # fmt: skip
        path = fixtures.write_hf_dir(replace(fixture, hf_config=config, hf_weights=tensors), tmp_path / f"{whole}{text}")
        with contextlib.closing(open_source(path)) as source:
            assert source.config.tie_embeddings == (tensors is inside)
        (path / "config.json").write_text(json.dumps(config | {"text_config": config["text_config"] | soft}))
        with pytest.raises(UnsupportedModelError, match="final_logit_softcapping"):
            open_source(path)


V5_ROPE = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "rope_theta": 7.0}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("olmo3", {"rope_parameters": V5_ROPE, "rope_scaling": ..., "rope_theta": ...}),
        ("qwen3_moe", {"num_local_experts": 8, "num_experts": ...}),
        ("granite_hybrid", {"layer_types": ["full_attention"] * 2}),
    ],
)
def test_the_spelling_of_transformers_5(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    """What it writes of a configuration says what the older keys say."""
    if "rope_parameters" in changes:  # the full layers' object is the older scaling, with the base inside
        full = fixtures.load(name).hf_config["rope_scaling"] | {"rope_theta": 1e4}
        changes = changes | {"rope_parameters": {**V5_ROPE, "full_attention": full}}
    wanted = freeze(hf_dir(tmp_path / "a", name), tmp_path / "m")
    assert weight_bytes(freeze(hf_dir(tmp_path / "b", name, **changes), tmp_path / "n")) == weight_bytes(wanted)


def test_gemma3_in_the_spelling_of_transformers_5_and_by_its_defaults(tmp_path: Path) -> None:
    """``rope_parameters`` by kind of layer and ``layer_types`` say what the older keys say; a pattern and bases have defaults."""
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    older = dict.fromkeys(("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"), ...)
    wanted = weight_bytes(freeze(hf_dir(tmp_path / "a", "gemma3"), tmp_path / "m"))
    new = hf_dir(tmp_path / "b", "gemma3", **older, rope_parameters=parameters, layer_types=kinds)
    assert weight_bytes(freeze(new, tmp_path / "n")) == wanted
    absent = hf_dir(tmp_path / "c", "gemma3", rope_theta=..., rope_local_base_freq=..., hidden_activation=...)
    assert weight_bytes(freeze(absent, tmp_path / "o")) == wanted



def test_layers_without_rope_by_their_interval(tmp_path: Path) -> None:
    source = hf_dir(tmp_path / "hf", "smollm3", no_rope_layers=..., layer_types=...)  # interval 4
    with FrozenFile.open(freeze(source, tmp_path / "m")) as file:
        assert [layer.rope for layer in file.config.layers] == [0, 0, 0, 1]
        assert stored_vector(file, "rope.0.inv_freq", 8).all() and not stored_vector(file, "rope.1.inv_freq", 8).any()
    source = hf_dir(tmp_path / "hf", "smollm3", no_rope_layers=..., no_rope_layer_interval=5)
    with FrozenFile.open(freeze(source, tmp_path / "n")) as file:
        assert [layer.rope for layer in file.config.layers] == [0, 0, 0, 0]


def test_lfm2_by_its_older_keys(tmp_path: Path) -> None:
    """Which layers have attention, and the width that the MLP's is made from."""
    wanted = weight_bytes(freeze(hf_dir(tmp_path / "a", "lfm2"), tmp_path / "m"))
    width = fixtures.load("lfm2").hf_config["intermediate_size"]
    older = {"layer_types": ..., "full_attn_idxs": [1], "block_ff_dim": width, "intermediate_size": 3 * width}
    older |= {"tie_word_embeddings": ..., "tie_embedding": True, "block_ffn_dim_multiplier": 1}
    older |= {"conv_L_cache": ..., "norm_eps": ...}
    assert weight_bytes(freeze(hf_dir(tmp_path / "b", "lfm2", **older), tmp_path / "n")) == wanted


@pytest.mark.parametrize(
    ("heads", "window", "match"),
    [
        ([0, 1, 2], 0, "one number of heads"), ([0, 0, 0], 0, "one number of heads"), ([0, 1], 0, "for each layer"),
        ([0, 1, 0], 9, "with windows"),
    ],
)  # fmt: skip
def test_lfm2_of_gguf_whose_heads_make_no_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, heads: list[int], window: int, match: str
) -> None:
    def keys(writer: Any, hf: dict[str, Any]) -> None:
        writer.add_head_count_kv(heads)
        writer.add_shortconv_l_cache(hf["conv_L_cache"])
        writer.add_sliding_window(window)

    monkeypatch.setitem(gguf_fixtures.EXTRA_KEYS, "lfm2", keys)
    source = gguf_fixtures.write(fixtures.load("lfm2"), tmp_path / "m.gguf")
    with pytest.raises(PyEngineError, match=match):
        open_source(source)


def test_granite_4_without_rope(tmp_path: Path) -> None:
    """In config.json by the key or its absence, in GGUF by what Granite's readers take for that."""
    changes = [{"position_embedding_type": "nope"}, {"position_embedding_type": ...}]
    sources = [hf_dir(tmp_path / f"hf{i}", "granite_hybrid", **one) for i, one in enumerate(changes)]
    fixture = fixtures.load("granite_hybrid")
    without = replace(fixture, hf_config=fixture.hf_config | changes[0])
    sources.append(gguf_fixtures.write(without, tmp_path / "m.gguf"))
    frozen = [freeze(source, tmp_path / f"{i}") for i, source in enumerate(sources)]
    with FrozenFile.open(frozen[0]) as file:
        assert not stored_vector(file, "rope.0.inv_freq", 8).any()
    assert weight_bytes(frozen[0]) == weight_bytes(frozen[1]) == weight_bytes(frozen[2])


@pytest.mark.parametrize("name", ["granite_moe", "granite_moe_shared"])
def test_granite_moe_without_rope(name: str, tmp_path: Path) -> None:
    """transformers' classes read the key too, and mean RoPE where it is absent."""
    nope, rope, silent = (
        freeze(hf_dir(tmp_path / f"hf{i}", name, position_embedding_type=one), tmp_path / f"{i}")
        for i, one in enumerate(("nope", "rope", ...))
    )
    with FrozenFile.open(nope) as file:
        assert not stored_vector(file, "rope.0.inv_freq", file.config.head_dim // 2).any()
    assert weight_bytes(rope) == weight_bytes(silent) != weight_bytes(nope)


def test_multipliers_default_to_one(tmp_path: Path) -> None:
    keys = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
    plain = hf_dir(tmp_path / "a", "granite", **dict.fromkeys(keys, 1.0), attention_multiplier=0.25)  # 1 / sqrt(head_dim)
    absent = hf_dir(tmp_path / "b", "granite", **dict.fromkeys(keys, ...), attention_multiplier=0.25)
    assert weight_bytes(freeze(plain, tmp_path / "m")) == weight_bytes(freeze(absent, tmp_path / "n"))


# ---------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("name", ["rope_factors_short.weight", "rope_factors_long.weight"])
def test_long_rope_needs_both_tables(tmp_path: Path, name: str) -> None:
    source = gguf_fixtures.write(fixtures.load("phi4_mini"), tmp_path / "m.gguf")
    assert source.read_bytes().count(name.encode()) == 1
    source.write_bytes(source.read_bytes().replace(name.encode(), name.replace("rope", "RoPE").encode()))
    with pytest.raises(ModelFormatError, match=f"'{name}' is missing"):
        open_source(source)


class OneTensor:
    """A GGUF file with a tensor of RoPE's divisors."""

    def __init__(self, value: float) -> None:
        self.values = np.full(8, value, np.float32)
        self.shapes = {"rope_freqs.weight": (8,)}

    def matrix(self, name: str) -> Any:
        raise AssertionError(name)

    def vector(self, name: str) -> Any:
        return self.values


def test_numbers_of_gguf_that_float32_does_not_hold() -> None:
    """Nothing is warned of: they are refused here, or by the freezer, which looks at every vector."""
    keys = Fields({"cap": 1e308}, "GGUF")
    with pytest.raises(ModelFormatError, match="cap must be 0, or a number in"):
        gguf_keys.softcap(keys, "cap")
    assert not np.isfinite(gguf_keys.rope_table(keys, 16, OneTensor(1e-45))).all()
    with pytest.raises(ModelFormatError, match="finite positive"):
        gguf_keys.rope_table(keys, 16, OneTensor(0.0))


def test_constants_that_were_saved_along_say_nothing(tmp_path: Path) -> None:
    """Pythia's files have the causal mask of each layer."""
    fixture = fixtures.load("gpt_neox")
    inv_freq = np.ones(2, np.float32)
    constants = {"bias": np.ones((1, 1, 4, 4), np.uint8), "masked_bias": np.float32(-1e9), "rotary_emb.inv_freq": inv_freq}
    extra = {f"gpt_neox.layers.{i}.attention.{name}": np.asarray(value) for i in range(2) for name, value in constants.items()}
    older = replace(fixture, hf_weights=fixture.hf_weights | extra)
    wanted = weight_bytes(freeze(fixtures.write_hf_dir(fixture, tmp_path / "a"), tmp_path / "m"))
    assert weight_bytes(freeze(fixtures.write_hf_dir(older, tmp_path / "b"), tmp_path / "n")) == wanted


def test_keys_of_their_own_count_before_the_usual_ones(tmp_path: Path) -> None:
    """Wherever these stand in the file: transformers writes both, sorted."""
    fixture, found = fixtures.load("gpt_neox"), []
    usual = {"partial_rotary_factor": 1.0, "rope_theta": 5.0}
    for i, config in enumerate((fixture.hf_config, usual | fixture.hf_config, fixture.hf_config | usual)):
        directory = fixtures.write_hf_dir(replace(fixture, hf_config=config), tmp_path / f"{i}")
        found.append(weight_bytes(freeze(directory, tmp_path / f"{i}.m")))
    assert found[0] == found[1] == found[2]


def test_an_amplitude_that_a_norm_behind_it_undoes(tmp_path: Path) -> None:
    """nanochat norms heads when they are turned."""
    fixture, found = fixtures.load("nanochat"), []
    for factor in (1.0, 1.3):
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": factor}
        model = replace(fixture, hf_config=fixture.hf_config | {"rope_parameters": {**scaling, "rope_theta": 1e4}})
        found.append(weight_bytes(freeze(fixtures.write_hf_dir(model, tmp_path / f"{factor}"), tmp_path / f"{factor}.m")))
    assert found[0] == found[1]


@pytest.mark.parametrize("value", [None, "x", [1.0, 2.0, 3.0], [], [["a"], ["b"]], ["a", "b"], np.ones((2, 2))])
def test_numbers_of_layers_that_gguf_lacks(value: Any) -> None:
    file = SimpleNamespace(metadata={"xielu.beta": value}, shapes={})
    with pytest.raises(ModelFormatError, match=r"xielu\.beta must be a number, or one for each of 2 layers"):
        WithNumbers(file, {"xielu.beta": "blk.{i}.beta"}, 2)


# ---------------------------------------------------------------------------- YaRN


def test_ministral3_has_the_positions_before_its_queries_grow(tmp_path: Path) -> None:
    source = hf_dir(tmp_path / "hf", "ministral3")
    for n_ctx, wanted in ((None, 64), (40, 40), (64, 64)):
        with FrozenFile.open(freeze(source, tmp_path / f"{n_ctx}", n_ctx=n_ctx)) as file:
            assert file.config.max_seq_len == wanted
    with pytest.raises(InvalidArgumentError, match=r"n_ctx is 65, but queries .* from 64 on"):
        freeze(source, tmp_path / "m", n_ctx=65)


@pytest.mark.parametrize(
    ("name", "rope"),  # as transformers' classes have it
    [
        ("gpt_oss", {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}),
        (
            "ministral3",
            {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16_384, "rope_theta": 1e6}
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
        ),
        ("ernie4_5", {"rope_type": "default", "rope_theta": 500_000.0}),
        ("smollm3", {"rope_type": "default", "rope_theta": 2_000_000.0}),
        ("mixtral", {"rope_type": "default", "rope_theta": 1_000_000.0}),
        ("qwen3", {"rope_type": "default", "rope_theta": 10_000.0}),
    ],
)
def test_a_configuration_that_says_nothing_of_rope_has_its_class_s_own(
    name: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    silent = dict.fromkeys(("rope_scaling", "rope_parameters", "rope_theta"), ...)
    said = silent | {"rope_parameters": rope}
    paths = [freeze(hf_dir(tmp_path / f"hf{i}", name, **one), tmp_path / f"{i}") for i, one in enumerate((said, silent))]
    assert weight_bytes(paths[0]) == weight_bytes(paths[1])


def test_ministral3_needs_a_length_before_its_queries_grow(tmp_path: Path) -> None:
    for length in (0, -1):
        rope = {"rope_type": "default", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": length}
        source = hf_dir(tmp_path / f"hf{length}", "ministral3", rope_parameters=rope)
        with pytest.raises(ModelFormatError, match="queries that grow every"):
            freeze(source, tmp_path / "m")


def test_yarn_keeps_what_turns_often_and_slows_what_does_not() -> None:
    """By hand: base 10^4, 8 pairs, 128 positions. Pair i turns 128 / (2 pi 10^(i / 2)) times: 16 at i = 0.21, 2 at 2.02."""
    settings = {"factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0}
    plain = 10.0 ** -(np.arange(8) / 2)
    slowed = np.clip((np.arange(8) - 0) / 3, 0, 1)  # floor(0.21), ceil(2.02)
    rope = yarn(16, 1e4, settings)
    np.testing.assert_allclose(rope.inv_freq, plain * (1 - slowed) + plain / 4 * slowed, rtol=1e-6)
    assert rope.amplitude == 0.1 * math.log(4.0) + 1
    low, high = (2 * math.log10(128 / (times * 2 * math.pi)) for times in (16, 2))
    slowed = np.clip((np.arange(8) - low) / (high - low), 0, 1)
    exact = yarn(16, 1e4, settings | {"truncate": False, "attention_factor": 1.5})
    np.testing.assert_allclose(exact.inv_freq, plain * (1 - slowed) + plain / 4 * slowed, rtol=1e-6)
    assert exact.amplitude == 1.5
    assert yarn(16, 1e4, settings | {"mscale": 1.0, "mscale_all_dim": 1.0}).amplitude == 1.0


def test_yarn_of_gemma3_is_of_the_layers_without_a_window(tmp_path: Path) -> None:
    """Their table, and its amplitude in the gains of their queries; by default the first training was as long as the context."""
    settings = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    silent = {"rope_type": "yarn", "factor": 4.0}
    plain, scaled, absent, null = (
        freeze(hf_dir(tmp_path / f"hf{i}", "gemma3", rope_scaling=one), tmp_path / f"{i}")
        for i, one in enumerate((None, settings, silent, silent | {"original_max_position_embeddings": None}))
    )
    assert weight_bytes(absent) == weight_bytes(null)
    rope = yarn(32, 1e6, settings)
    with FrozenFile.open(plain) as one, FrozenFile.open(scaled) as other, FrozenFile.open(absent) as third:
        assert stored_vector(other, "rope.0.inv_freq", 16).tolist() == stored_vector(one, "rope.0.inv_freq", 16).tolist()
        assert stored_vector(other, "rope.1.inv_freq", 16).tolist() == rope.inv_freq.tolist()
        default = yarn(32, 1e6, settings | {"original_max_position_embeddings": 512})
        assert stored_vector(third, "rope.1.inv_freq", 16).tolist() == default.inv_freq.tolist()
        for layer, factor in ((0, 1.0), (1, 1.0), (2, rope.amplitude**2)):
            gains = [stored_vector(file, f"layers.{layer}.q_norm", 32) for file in (one, other)]
            np.testing.assert_allclose(gains[1], gains[0] * factor, rtol=1e-6)


def test_numbers_of_yarn_whose_quotients_are_none_are_refused() -> None:
    settings = {"factor": 4.0, "original_max_position_embeddings": 128}
    for key in (*settings, "beta_fast", "beta_slow", "attention_factor"):
        for number in (1e-320, 1e-300, 1e300):
            with pytest.raises(ModelFormatError, match=re.escape(f"{key} {number!r} is out of range")):
                yarn(16, 1e4, settings | {key: number})


def test_an_amplitude_of_gguf_that_is_not_yarns_is_refused() -> None:
    values = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 64}
    shape = Shape(16, 1, 1, 1, 16, True, 512, None)
    file = OneTensor(1.0)
    with pytest.raises(UnsupportedModelError, match=r"YaRN and rope_freqs\.weight together"):
        gguf_keys.scaled_rope(Fields(values, "GGUF"), shape, file)
    file.shapes = {}
    for said in (1.0, 1.2079441):
        keys = Fields(values | {"rope.scaling.yarn_attn_factor": said}, "GGUF")
        assert gguf_keys.scaled_rope(keys, shape, file).amplitude == 0.1 * math.log(8.0) + 1
    with pytest.raises(UnsupportedModelError, match=r"yarn_attn_factor 1\.5"):
        gguf_keys.scaled_rope(Fields(values | {"rope.scaling.yarn_attn_factor": 1.5}, "GGUF"), shape, file)
