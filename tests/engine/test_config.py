"""config.json and the inventory: what a file may say about its model, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import ModelFormatError, UnsupportedModelError
from pyengine.format.config import (
    ACTIVATIONS,
    MAX_ROPE_TABLES,
    MIXERS,
    NORMS,
    SHORT_CONV,
    UNGATED,
    FrozenConfig,
    LayerSpec,
    same_layers,
)
from pyengine.format.inventory import (
    count_macs,
    count_parameters,
    inventory,
    stored_tensors,
)
from pyengine.format.kv import KvLayout, kv_bytes_per_position, kv_layout

CONFIG: dict[str, Any] = {
    "requires": [], "architecture": "LlamaForCausalLM", "dim": 64, "hidden_dim": 88, "n_layers": 2, "n_heads": 4,
    "n_kv_heads": 2, "head_dim": 16, "vocab_size": 300, "max_seq_len": 128, "norm_eps": 1e-5,
    "tie_embeddings": False, "qkv_bias": False, "o_bias": False, "qk_norm": False,
    "layers": {"window": 0, "rope": 0, "norm": "rmsnorm", "activation": "swiglu"},
    "bos_token_id": 256, "eos_token_ids": [257], "kinds": {"default": "int8_g64"},
}  # fmt: skip


def parse(**changes: Any) -> FrozenConfig:
    return FrozenConfig.from_json(json.dumps(CONFIG | changes))


def with_layers(**changes: Any) -> FrozenConfig:
    return parse(layers=CONFIG["layers"] | changes)


# ---------------------------------------------------------------------------- one value at a time


def test_a_config_is_read() -> None:
    config = parse()
    assert config.eos_token_ids == (257,) and config.q_dim == 64 and config.kv_dim == 32
    assert config.layers == (LayerSpec(0, 0, "rmsnorm", "swiglu", "attention"),) * 2
    assert config.to_document() == CONFIG and next(iter(config.to_document())) == "requires"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", ""), ("architecture", 5), ("dim", 0), ("dim", -64), ("dim", 1 << 21),
        ("dim", 64.0), ("dim", True), ("dim", "64"), ("dim", None), ("dim", 1 << 64),
        ("hidden_dim", 0), ("n_layers", 0), ("n_layers", 4097), ("n_layers", "2"), ("n_layers", 1 << 60),
        ("n_heads", 0), ("n_heads", 1 << 17), ("n_kv_heads", 3), ("n_kv_heads", 0),
        ("head_dim", 15), ("head_dim", 514), ("head_dim", 0),
        ("vocab_size", (1 << 24) + 1), ("max_seq_len", 0), ("max_seq_len", (1 << 24) + 1),
        ("norm_eps", 0.0), ("norm_eps", 2.0), ("norm_eps", 10**400), ("norm_eps", "x"), ("norm_eps", None),
        ("tie_embeddings", 1), ("qkv_bias", None), ("o_bias", "no"), ("qk_norm", 0),
        ("bos_token_id", 300), ("bos_token_id", -1), ("bos_token_id", 1.0),
        ("eos_token_ids", [300]), ("eos_token_ids", 257), ("eos_token_ids", [None]), ("eos_token_ids", [0] * 257),
        ("layers", None), ("layers", []), ("layers", "x"), ("kinds", None), ("kinds", []), ("kinds", {}),
        ("kinds", {"default": 8}), ("kinds", {"default": ["int8_g64"] * 2}), ("kinds", {"default": ""}),
        ("kinds", {"default": "int8_g64", "wo": 1}), ("kinds", {"default": "int8_g64", "wo": ["int8_g64"]}),
        ("kinds", {"default": "int8_g64", "wo": [1, 2]}), ("kinds", {"default": "int8_g64", "wo": ["x" * 65] * 2}),
        ("kinds", {"default": "int8_g64", "w" * 65: "int8_g64"}),
        ("requires", None), ("requires", "experts"), ("requires", [1]), ("requires", [""]), ("requires", ["x" * 65]),
        ("attention_softcap", -1.0), ("attention_softcap", True), ("attention_softcap", 1e-4), ("attention_softcap", None),
        ("logits_softcap", 10**400), ("logits_softcap", "30"), ("qk_norm_all_heads", 1), ("qk_norm_all_heads", True),
        ("n_experts", 4), ("n_experts", 1025), ("n_experts", -1), ("n_experts_used", 1), ("experts_normalized", True),
        ("shared_hidden_dim", 8), ("shared_hidden_dim", -1), ("shared_gated", True), ("gate_up_bias", 1), ("down_bias", None),
        ("output_bias", "no"), ("requires", ["x"] * 257), ("extra", 1), ("extra", []), ("extra", None),
    ],
)  # fmt: skip
def test_errors_name_the_field(key: str, value: Any) -> None:
    with pytest.raises(ModelFormatError, match=f"config: .*{key}"):
        parse(**{key: value})


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("window", -1, "window of layer 0"), ("window", [0, 1 << 25], "window of layer 1"),
        ("window", True, "window of layer 0"), ("window", None, "window of layer 0"),
        ("window", [0], r"layers\.window lists 1 values for 2 layers"), ("window", [], r"layers\.window lists 0"),
        ("rope", -1, "rope of layer 0"), ("rope", MAX_ROPE_TABLES, "rope of layer 0"), ("rope", "0", "rope of layer"),
        ("rope", [0, 2], "no layer uses RoPE table 1"), ("rope", 1, "no layer uses RoPE table 0"),
        ("norm", 1, "norm of layer 0"), ("norm", ["rmsnorm", ""], "norm of layer 1"),
        ("activation", {}, "activation of layer 0"), ("mixer", 1, "mixer of layer 0"), ("mixer", [], r"layers\.mixer lists 0"),
        ("mixer", ["attention", SHORT_CONV], "window of layer 1, a short_conv, must be an integer in 1..16"),
    ],
)  # fmt: skip
def test_errors_name_the_layer(field: str, value: Any, match: str) -> None:
    with pytest.raises(ModelFormatError, match=f"config: .*{match}"):
        with_layers(**{field: value})


def test_what_is_no_json_object_is_refused() -> None:
    with pytest.raises(ModelFormatError, match=r"'dim' of config\.json is missing"):
        FrozenConfig.from_json(json.dumps({k: v for k, v in CONFIG.items() if k != "dim"}))
    with pytest.raises(ModelFormatError, match="'rope' of layers is missing"):
        parse(layers={k: v for k, v in CONFIG["layers"].items() if k != "rope"})
    with pytest.raises(ModelFormatError, match="NaN is not JSON"):
        parse(norm_eps=float("nan"))
    with pytest.raises(ModelFormatError, match="not a JSON object"):
        FrozenConfig.from_json("[]")
    with pytest.raises(ModelFormatError, match="not valid JSON"):
        FrozenConfig.from_json(b"\xff\xfe")


# ---------------------------------------------------------------------------- files of a later version


def test_what_is_required_and_not_known_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="requires 'experts', which this version of pyengine does not know"):
        parse(requires=["experts"])
    # before anything else is looked at: with experts, all the rest may mean something else
    with pytest.raises(UnsupportedModelError, match="'experts'"):
        FrozenConfig.from_json('{"requires": ["experts"], "dim": "many"}')
    with pytest.raises(UnsupportedModelError, match=r"config\.json has the key 'n_wheels', which .* not know"):
        parse(n_wheels=8)
    with pytest.raises(UnsupportedModelError, match=r"layers has the key 'post_norm', which .* not know"):
        with_layers(post_norm="rmsnorm")
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has the norm 'layernorm', which .* not know"):
        with_layers(norm=["rmsnorm", "layernorm"])
    with pytest.raises(UnsupportedModelError, match=r"layer 0 has the activation 'geglu', which .* not know"):
        with_layers(activation="geglu")
    with pytest.raises(UnsupportedModelError, match=r"layer 1 has the mixer 'mamba', which .* not know"):
        with_layers(mixer=["attention", "mamba"])


def test_optional_keys_are_left_out_where_they_say_nothing() -> None:
    """So a file of before there were such keys is as it was."""
    said = {"qk_norm_all_heads": False, "attention_softcap": 0, "logits_softcap": 0.0}
    assert parse(**said) == parse() and parse(**said).to_document() == CONFIG
    assert with_layers(mixer=["attention"] * 2).to_document() == CONFIG
    said = {"qk_norm": True, "qk_norm_all_heads": True, "attention_softcap": 50.0, "logits_softcap": 30}
    assert parse(**said).to_document() == CONFIG | said
    assert FrozenConfig.from_json(parse(**said).to_json()) == parse(**said)


def test_norms_and_their_tensors() -> None:
    """By layer: the norms before, those after, or both; norms of all heads are as wide as q and k."""
    config = with_layers(norm=["rmsnorm_after", "rmsnorm_around"])
    names = {weight.name: weight.shape for weight in inventory(config)}
    assert [name for name in names if "0" in name and "norm" in name] == [
        "layers.0.post_attention_norm", "layers.0.post_ffn_norm",
    ]  # fmt: skip
    assert [name for name in names if "1" in name and "norm" in name] == [
        "layers.1.attention_norm", "layers.1.post_attention_norm", "layers.1.ffn_norm", "layers.1.post_ffn_norm",
    ]  # fmt: skip
    shapes = {weight.name: weight.shape for weight in inventory(parse(qk_norm=True, qk_norm_all_heads=True))}
    assert (shapes["layers.0.q_norm"], shapes["layers.0.k_norm"]) == ((64,), (32,))


def test_experts_and_their_tensors() -> None:
    config = parse(n_experts=3, n_experts_used=2, experts_normalized=True)
    names = [weight.name for weight in inventory(config) if weight.layer == 1]
    assert names[-7:] == ["layers.1.router", *(f"layers.1.experts.{e}.{m}" for e in range(3) for m in ("w_gate_up", "w_down"))]
    dense = parse()
    mlp = 3 * 64 * 88
    assert count_parameters(config) - count_parameters(dense) == 2 * (2 * mlp + 3 * 64)
    assert count_macs(config, 5, 1) - count_macs(dense, 5, 1) == (5 + 1) * mlp  # a token takes two
    assert FrozenConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelFormatError, match="n_experts 1024 in 17 layers: more than 16384 in all"):
        parse(n_layers=17, n_experts=1024, n_experts_used=1)


def test_a_shared_expert_and_its_tensors() -> None:
    mixture = {"n_experts": 2, "n_experts_used": 1}
    config = parse(**mixture, shared_hidden_dim=24, shared_gated=True)
    names = [weight.name for weight in inventory(config) if weight.layer == 1]
    assert [name.removeprefix("layers.1.") for name in names[-8:]] == [
        "router", "shared_router", "experts.0.w_gate_up", "experts.0.w_down", "experts.1.w_gate_up", "experts.1.w_down",
        "shared.w_gate_up", "shared.w_down",
    ]  # fmt: skip
    without = parse(**mixture)
    assert count_parameters(config) - count_parameters(without) == 2 * (3 * 64 * 24 + 64)
    assert count_macs(config, 5, 1) - count_macs(without, 5, 1) == (5 + 1) * 3 * 64 * 24  # every token takes it
    assert FrozenConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelFormatError, match="shared_hidden_dim"):
        parse(**mixture, shared_hidden_dim=1 << 23)
    for wrong in ("gate_up_bias", "down_bias"):
        with pytest.raises(ModelFormatError, match=f"{wrong}.* beside a shared expert"):
            parse(**mixture, shared_hidden_dim=24, **{wrong: True})
    with pytest.raises(ModelFormatError, match="layer 0 has the norm rmsnorm_parallel and experts"):
        parse(**mixture, layers={"window": 0, "rope": 0, "norm": "rmsnorm_parallel", "activation": "swiglu"})


def test_sinks_and_biases_of_experts() -> None:
    mixture = {"n_experts": 2, "n_experts_used": 1, "gate_up_bias": True, "down_bias": True, "router_bias": True}
    layers = {"window": 0, "rope": 0, "norm": "rmsnorm", "activation": "swiglu_clamped"}
    config = parse(**mixture, attention_sinks=True, layers=layers)
    found = {weight.name: weight for weight in inventory(config)}
    names = [name.removeprefix("layers.1.") for name in found if name.startswith("layers.1.")]
    assert names[names.index("sinks") :] == [
        "sinks", "wo", "ffn_norm", "router", "router.bias",
        "experts.0.w_gate_up", "experts.0.w_gate_up.bias", "experts.0.w_down", "experts.0.w_down.bias",
        "experts.1.w_gate_up", "experts.1.w_gate_up.bias", "experts.1.w_down", "experts.1.w_down.bias",
    ]  # fmt: skip
    assert found["layers.0.sinks"].shape == (config.n_heads,) and found["layers.0.router.bias"].shape == (2,)
    assert found["layers.0.experts.1.w_gate_up.bias"].alternating
    assert FrozenConfig.from_json(config.to_json()) == config
    with pytest.raises(ModelFormatError, match="router_bias needs n_experts"):
        parse(router_bias=True)
    for key in ("attention_sinks", "router_bias"):
        assert key not in parse().to_document()  # files of before there were such keys are as they were
        with pytest.raises(ModelFormatError, match=f"{key} must be true or false"):
            parse(**mixture | {key: 1})


def test_norms_of_heads_after_rope() -> None:
    config = parse(qk_norm=True, qk_norm_after_rope=True)
    assert FrozenConfig.from_json(config.to_json()) == config
    for wrong in ({"qk_norm": False}, {"qk_norm": True, "qk_norm_all_heads": True}):
        with pytest.raises(ModelFormatError, match="qk_norm_after_rope needs qk_norm, of each head"):
            parse(qk_norm_after_rope=True, **wrong)


def test_an_mlp_without_a_gate_and_biases() -> None:
    layers = {"window": 0, "rope": 0, "norm": ["rmsnorm", "rmsnorm_parallel"], "activation": ["swiglu", "gelu_tanh"]}
    config = parse(layers=layers, gate_up_bias=True, down_bias=True, output_bias=True)
    found = {weight.name: weight for weight in inventory(config)}
    assert "layers.0.ffn_norm" in found and "layers.1.ffn_norm" not in found
    assert found["layers.0.w_gate_up.bias"].stored()["layers.0.w_gate_up.bias"].shape == (2 * 96,)  # 88, padded
    assert found["layers.1.w_up"].shape == (88, 64) and found["layers.1.w_up.bias"].shape == (88,)
    assert "layers.1.w_gate_up" not in found and found["output.bias"].shape == (config.vocab_size,)
    assert FrozenConfig.from_json(config.to_json()) == config


def test_what_may_be_ignored_is_kept() -> None:
    extra = {"made": {"by": ["someone", None, 1.5]}, "n_experts": 8}
    config = parse(extra=extra)
    assert config.extra == extra
    assert FrozenConfig.from_json(config.to_json()).extra == extra
    assert stored_tensors(config) == stored_tensors(parse())
    assert "extra" not in parse().to_document()


@pytest.mark.parametrize(
    ("folded", "error", "match"),
    [
        ([], ModelFormatError, "extra.folded must be an object"),
        ({"q": "2"}, ModelFormatError, "q of extra.folded is '2'"),
        ({"q": True}, ModelFormatError, "q of extra.folded is True"),
        ({"wo": float("nan")}, ModelFormatError, "wo of extra.folded is nan"),
        ({"up": 10**400}, ModelFormatError, "up of extra.folded is 1000"),
        ({"wqkv": 2.0}, UnsupportedModelError, "extra.folded has the key 'wqkv'"),
    ],
)
def test_folded_multipliers_are_checked_when_a_file_is_opened(folded: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        replace(parse(), extra={"folded": folded})


def test_folded_multipliers_are_numbers() -> None:
    assert parse(extra={"folded": {"q": 2, "down": 0.5}}).folded == {"q": 2.0, "down": 0.5}
    assert parse().folded is None and parse(extra={"folded": {}}).folded == {}


# ---------------------------------------------------------------------------- kinds


def kinds_of(config: FrozenConfig) -> dict[str, str]:
    return {weight.name: weight.kind for weight in inventory(config) if weight.is_matrix}


def test_every_matrix_has_a_kind() -> None:
    assert set(kinds_of(parse()).values()) == {"int8_g64"}
    config = parse(kinds={"default": "int8_g64", "wo": "int8_g64", "w_down": ["int8_g64", "int8_g64"]})
    assert kinds_of(config) == kinds_of(parse())
    assert FrozenConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("kinds", "matrix"),
    [
        ({"default": "int4_g32"}, "tok_embeddings"),
        ({"default": "int8_g64", "output": "int4_g32"}, "output"),
        ({"default": "int8_g64", "w_down": ["int8_g64", "int4_g32"]}, "layers.1.w_down"),
        ({"default": "f32"}, "tok_embeddings"),  # vectors are; matrices not
    ],
)
def test_a_kind_that_is_not_known_is_refused_with_the_matrix(kinds: dict[str, Any], matrix: str) -> None:
    config = parse(kinds=kinds)
    with pytest.raises(UnsupportedModelError, match=f"the matrix '{matrix}' is of the kind .*not know"):
        inventory(config)


@pytest.mark.parametrize(
    ("kinds", "match"),
    [
        ({"default": "int8_g64", "norm": "int8_g64"}, "'norm', which is no matrix"),
        ({"default": "int8_g64", "layers.0.wo": "int8_g64"}, "'layers.0.wo', which is no matrix"),
        ({"default": "int8_g64", "output": ["int8_g64"] * 2}, "kinds.output lists kinds by layer"),
    ],
)
def test_kinds_name_matrices(kinds: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelFormatError, match=match):
        inventory(parse(kinds=kinds))
    with pytest.raises(ModelFormatError, match="'output', which is no matrix"):
        inventory(parse(kinds={"default": "int8_g64", "output": "int8_g64"}, tie_embeddings=True))


# ---------------------------------------------------------------------------- properties

names = st.text(min_size=1, max_size=20)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | names,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def configs(draw: st.DrawFn) -> FrozenConfig:
    n_layers, n_kv_heads = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    n_tables = draw(st.integers(1, min(3, n_layers)))
    rope = draw(st.permutations([*range(n_tables), *draw(st.lists(
        st.integers(0, n_tables - 1), min_size=n_layers - n_tables, max_size=n_layers - n_tables
    ))]))  # fmt: skip
    windows = draw(st.lists(st.sampled_from([0, 1, 4096]), min_size=n_layers, max_size=n_layers))
    activations = draw(st.lists(st.sampled_from(ACTIVATIONS), min_size=n_layers, max_size=n_layers))
    by_layer = st.tuples(*[st.just("int8_g64")] * n_layers)
    mixers = draw(st.lists(st.sampled_from(MIXERS), min_size=n_layers, max_size=n_layers))
    matrices = [matrix for mixer in set(mixers) for matrix in {"attention": ["wqkv", "wo"], SHORT_CONV: ["conv_in"]}[mixer]]
    matrices += ["w_down", *{"w_up" if activation in UNGATED else "w_gate_up": 0 for activation in activations}]
    kinds = draw(st.dictionaries(st.sampled_from(matrices), st.just("int8_g64") | by_layer))
    return FrozenConfig(
        architecture=draw(names),
        dim=draw(st.integers(1, 300)),
        hidden_dim=draw(st.integers(1, 300)),
        n_layers=n_layers,
        n_heads=n_kv_heads * draw(st.integers(1, 4)),
        n_kv_heads=n_kv_heads,
        head_dim=2 * draw(st.integers(1, 40)),
        vocab_size=draw(st.integers(1, 500)),
        max_seq_len=draw(st.integers(1, 1 << 24)),
        norm_eps=draw(st.floats(1e-12, 0.5)),
        tie_embeddings=draw(st.booleans()),
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        layers=tuple(
            LayerSpec(window, table, draw(st.sampled_from(NORMS)), activation)
            if mixer == "attention"
            else LayerSpec(draw(st.integers(1, 16)), table, "rmsnorm", activation, mixer)
            for window, table, activation, mixer in zip(windows, rope, activations, mixers, strict=True)
        ),
        gate_up_bias=draw(st.booleans()),
        down_bias=draw(st.booleans()),
        output_bias=draw(st.booleans()),
        attention_softcap=draw(st.sampled_from([0.0, 50.0])),
        logits_softcap=draw(st.sampled_from([0.0, 30.0])),
        bos_token_id=draw(st.none() | st.just(0)),
        eos_token_ids=tuple(draw(st.lists(st.just(0), max_size=3))),
        kinds={"default": "int8_g64", **kinds},
        extra=draw(st.dictionaries(names, json_values, max_size=3)),
    )


@given(configs())
@settings(deadline=None)
def test_to_json_and_back(config: FrozenConfig) -> None:
    assert FrozenConfig.from_json(config.to_json()) == config
    # a list with equal values says what one value says
    columns = {name: [getattr(layer, name) for layer in config.layers] for name in LayerSpec._fields}
    assert FrozenConfig.from_json(json.dumps(config.to_document() | {"layers": columns})) == config


@given(st.sampled_from([*CONFIG, "extra"]), json_values)
@settings(max_examples=500, deadline=None)
def test_any_value_is_read_or_refused(key: str, value: Any) -> None:
    try:
        config = parse(**{key: value})
        inventory(config)
    except (ModelFormatError, UnsupportedModelError):
        return
    assert FrozenConfig.from_json(config.to_json()) == config


@given(st.sampled_from(LayerSpec._fields), json_values)
@settings(max_examples=500, deadline=None)
def test_any_value_of_a_layer_is_read_or_refused(key: str, value: Any) -> None:
    try:
        config = with_layers(**{key: value})
    except (ModelFormatError, UnsupportedModelError):
        return
    assert FrozenConfig.from_json(config.to_json()) == config


@given(st.sampled_from(["", "layers"]), names)
@settings(deadline=None)
def test_any_other_key_is_refused_by_name(where: str, key: str) -> None:
    document = CONFIG | {"layers": dict(CONFIG["layers"])}
    inside = document["layers"] if where else document
    if key in inside or key == "extra":
        return
    inside[key] = 0
    with pytest.raises(UnsupportedModelError) as refusal:
        FrozenConfig.from_json(json.dumps(document))
    assert repr(key)[:80] in str(refusal.value)


@given(configs())
@settings(deadline=None)
def test_the_inventory_is_consistent(config: FrozenConfig) -> None:
    weights = inventory(config)
    assert len({weight.name for weight in weights}) == len(weights)
    for weight in weights:
        assert weight.shape[0] == sum(part.rows for part in weight.parts)
        assert (
            weight.name == weight.role
            if weight.layer is None
            else weight.name == f"layers.{weight.layer}.{weight.role}"
        )
        for name, tensor in weight.stored().items():
            assert name.startswith(weight.name) and tensor.nbytes % 64 == 0
    assert [weight.layer for weight in weights if weight.layer is not None] == sorted(
        i for i in range(config.n_layers) for weight in weights if weight.layer == i
    )
    assert sum(weight.role.startswith("rope.") for weight in weights) == config.n_rope_tables
    assert sum(weight.use == "row" for weight in weights) == (not config.tie_embeddings)
    # a product reads each of its matrix's elements once
    matrices = sum(w.shape[0] * w.shape[1] for w in weights if w.is_matrix and w.use != "row")
    assert count_macs(config, 1, 1) == matrices < count_parameters(config) + 1
    assert count_macs(config, 3, 0) % 3 == 0


def test_counts_by_hand() -> None:
    config = parse(qkv_bias=True, o_bias=True, qk_norm=True)
    layer = 64 * (64 + 32 + 32) + 64 * 64 + 3 * 64 * 88 + 2 * 64 + 128 + 64 + 2 * 16
    assert count_parameters(config) == 2 * layer + 2 * 300 * 64 + 64
    # three of the five tokens want nothing: of the second layer they have keys and values only
    assert count_macs(config, 5, 2) == 5 * 2 * 64 * 128 + (5 + 2) * (64 * 64 + 3 * 64 * 88) + 2 * 300 * 64
    # a head: codes of k and v padded to 16, one scale of k, one of v
    assert kv_bytes_per_position(config) == 2 * 2 * (16 + 16 + 4 + 4)
    assert kv_bytes_per_position(config, "f32") == 2 * 2 * 2 * 16 * 4
    assert kv_bytes_per_position(replace(config, head_dim=20)) == 2 * 2 * (32 + 32 + 4 + 4)


def test_bytes_of_keys_and_values_by_what_layers_see() -> None:
    layer = 256 * kv_bytes_per_position(parse()) // 2
    assert kv_layout(parse()) == KvLayout(2 * layer, 0, 0)
    assert kv_layout(parse(layers=CONFIG["layers"] | {"window": [40, 0]})) == KvLayout(layer, layer, 40)
    assert kv_layout(parse(layers=CONFIG["layers"] | {"window": 40}), "f32").data_bytes == 0
    assert kv_layout(parse(layers=CONFIG["layers"] | {"window": 128})) == KvLayout(2 * layer, 0, 0)  # as long as the context
    assert [KvLayout(5, 0, 0).n_bytes(n) for n in (0, 1, 256, 257, 2560)] == [0, 5, 5, 10, 50]
    # 40 and 64 positions lie in two pages at most, with 1,024 in six
    assert [KvLayout(5, 3, 40).n_bytes(n) for n in (0, 1, 256, 257, 513, 2560)] == [0, 8, 8, 16, 21, 56]
    assert KvLayout(5, 3, 40).n_bytes(2560, 1024) == 50 + 6 * 3


def test_key_bias_is_a_share_of_the_biases() -> None:
    """A vector of its own in the file, and no parameter that was not there."""
    whole, shared = parse(qkv_bias=True), parse(qkv_bias=True, requires=["key_bias"])
    assert shared.key_bias and not whole.key_bias
    assert count_parameters(shared) == count_parameters(whole)
    names = {weight.name: weight.shape for weight in inventory(shared)}
    assert {name: names.pop(name) for name in list(names) if "key_bias" in name} == {
        "layers.0.key_bias": (32,), "layers.1.key_bias": (32,),
    }  # fmt: skip
    assert list(names) == [weight.name for weight in inventory(whole)]


@pytest.mark.parametrize(("qkv_bias", "qk_norm"), [(False, False), (False, True), (True, True)])
def test_key_bias_needs_a_bias_that_no_norm_follows(qkv_bias: bool, qk_norm: bool) -> None:
    with pytest.raises(ModelFormatError, match="key_bias needs qkv_bias, and a bias that no norm follows"):
        parse(qkv_bias=qkv_bias, qk_norm=qk_norm, requires=["key_bias"])


def test_same_layers_checks_their_number() -> None:
    assert same_layers(3, window=5) == (LayerSpec(window=5),) * 3
    for n in (0, 1 << 60, "2"):
        with pytest.raises(ModelFormatError, match="n_layers"):
            same_layers(n)  # type: ignore[arg-type]
