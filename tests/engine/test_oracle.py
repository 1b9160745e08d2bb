"""The float64 oracle against transformers (through the committed fixtures), and against itself with
features removed.

A tolerance here is a share of a row's norm. transformers ran in float32: a value passes a few dozen
roundings of 2^-24 a block, and sums of up to 136 terms whose errors grow like the square root of
their number, about 12. TOLERANCE allows 2^-24 * 12 for each of a fixture's two blocks, its
embedding and its head, once for the sum and once for what follows. A large key bias makes large
scores, and the softmax turns a score's absolute error into a probability's relative one: one more
rounding of the largest bias.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from reference import fixtures
from reference.oracle import (
    Oracle,
    dequantize_weight,
    hadamard,
    hadamard_f32,
    kl_divergence,
    quantize,
    quantize_weight,
    visible,
)

TOLERANCE = 2.0**-24 * 12 * 4 * 2


def row_errors(got: Any, wanted: Any) -> Any:
    """|got - wanted| / |wanted| of every row."""
    return np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


@cache
def oracle_of(name: str, quantized: bool) -> tuple[fixtures.Fixture, Oracle]:
    fixture = fixtures.load(name)
    config, weights = fixtures.canonical_config(fixture), fixtures.canonical_weights(fixture)
    return fixture, Oracle(config, weights, quantized=quantized)


def test_fixtures_cover_what_they_promise() -> None:
    """Every architecture and ratio that the docstring of make_fixtures.py names is there, and stays
    small."""
    configs = [fixtures.canonical_config(fixtures.load(name)) for name in fixtures.names()]
    assert {c["architecture"] for c in configs} == {
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
        "GraniteForCausalLM", "Phi3ForCausalLM", "SmolLM3ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
        "Olmo2ForCausalLM", "MixtralForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "GraniteMoeForCausalLM",
        "Qwen2MoeForCausalLM", "GraniteMoeSharedForCausalLM", "GraniteMoeHybridForCausalLM", "Starcoder2ForCausalLM",
        "Glm4ForCausalLM", "Exaone4ForCausalLM", "Ernie4_5ForCausalLM", "SeedOssForCausalLM", "CohereForCausalLM",
        "Cohere2ForCausalLM", "PhiForCausalLM", "StableLmForCausalLM", "OlmoForCausalLM",
        "GlmForCausalLM", "MinistralForCausalLM",
        "GptOssForCausalLM", "Ministral3ForCausalLM", "HunYuanDenseV1ForCausalLM", "Olmo3ForCausalLM", "MiniCPMForCausalLM",
        "InternLM2ForCausalLM", "InternLM3ForCausalLM", "ArceeForCausalLM", "NanoChatForCausalLM", "NemotronForCausalLM",
        "ApertusForCausalLM", "GPTNeoXForCausalLM", "Lfm2ForCausalLM",
    }  # fmt: skip
    assert {c["n_heads"] // c["n_kv_heads"] for c in configs} == {1, 2, 3, 4}
    assert {c["head_dim"] for c in configs} == {16, 32, 64}
    assert {c["tie_embeddings"] for c in configs} == {False, True}
    assert all(c["hidden_dim"] % 64 and c["vocab_size"] % 16 for c in configs)
    assert sum(path.stat().st_size for path in fixtures.DATA.glob("*.npz")) < 6.4e6


@pytest.mark.parametrize("name", fixtures.names())
def test_plain_oracle_equals_transformers(name: str) -> None:
    fixture, oracle = oracle_of(name, False)
    apart = [np.abs(w).max() for key, w in oracle.weights.items() if key.endswith(".key_bias")]
    tolerance = TOLERANCE + 2.0**-24 * max(apart, default=0.0)
    states = oracle.hidden_states(fixture.token_ids)
    for state, wanted in zip(states, fixtures.expected_hidden(fixture), strict=True):
        assert row_errors(state[fixture.rows], wanted).max() < tolerance
    logits = oracle.head(states[-1])[fixture.rows]
    assert row_errors(logits, fixture.logits).max() < tolerance


def without(fixture: fixtures.Fixture, feature: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and weights of the fixture's model with one feature forgotten."""
    config, weights = fixtures.canonical_config(fixture), fixtures.canonical_weights(fixture)
    if feature == "rope scaling":
        exponent = np.arange(0, config["head_dim"], 2) / config["head_dim"]
        weights["rope.0.inv_freq"] = (fixture.hf_config["rope_theta"] ** -exponent).astype(np.float32)
    elif feature == "output.bias":
        del weights[feature]
    elif feature.endswith(".bias"):
        for layer in range(config["n_layers"]):
            del weights[f"layers.{layer}.{feature}"]
    elif feature in ("window", "rope", "activation", "norm"):
        other = "gelu_tanh" if config["layers"]["activation"] in ("relu2", "xielu") else "swiglu"
        config["layers"] = config["layers"] | {feature: other if feature == "activation" else 0}
    elif feature.startswith("post_") or feature == "sinks":
        for layer in range(config["n_layers"]):
            del weights[f"layers.{layer}.{feature}"]
    elif feature == "taps":  # all but that of the position itself
        for layer in range(0, config["n_layers"], 2):
            weights[f"layers.{layer}.taps"][: -config["dim"]] = 0
    elif feature == "output":
        config["tie_embeddings"] = True
    else:
        config[feature] = 0
    return config, weights


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("llama3_rope", "rope scaling"),
        ("llama_linear_bias", "rope scaling"),
        ("llama_linear_bias", "wo.bias"),
        ("mistral_window", "window"),
        ("mistral_long", "window"),
        ("qwen3_mixed", "window"),
        ("mistral_window", "output"),
        ("qwen2", "wq.bias"),
        ("qwen2", "wv.bias"),
        ("qwen3", "qk_norm"),
        ("phi3_window", "window"),
        ("smollm3", "rope"),
        ("gemma3", "window"),
        ("gemma3", "rope"),
        ("gemma3", "activation"),
        ("gemma3", "post_attention_norm"),
        ("gemma3", "post_ffn_norm"),
        ("gemma3", "qk_norm"),
        ("gemma2", "window"),
        ("gemma2", "attention_softcap"),
        ("gemma2", "logits_softcap"),
        ("qwen3_moe", "experts_normalized"),
        ("olmo2", "post_attention_norm"),
        ("olmo2", "post_ffn_norm"),
        ("qwen2_moe", "shared_gated"),
        ("qwen2_moe", "shared_hidden_dim"),
        ("granite_moe_shared", "shared_hidden_dim"),
        ("llama_linear_bias", "w_down.bias"),
        ("starcoder2", "w_up.bias"),
        ("starcoder2", "output.bias"),
        ("starcoder2", "window"),
        ("stablelm", "w_gate.bias"),
        ("stablelm", "wv.bias"),
        ("phi2", "norm"),
        ("phi2", "w_up.bias"),
        ("cohere", "norm"),
        ("cohere2", "window"),
        ("cohere2", "rope"),
        ("exaone4", "window"),
        ("exaone4", "rope"),
        ("exaone4", "qk_norm"),
        ("glm4", "post_attention_norm"),
        ("glm4", "wk.bias"),
        ("ernie4_5", "w_gate.bias"),
        ("seed_oss", "wq.bias"),
        ("olmo3", "window"),
        ("olmo3", "rope"),
        ("internlm3", "w_gate.bias"),
        ("hunyuan", "qk_norm_after_rope"),
        ("arcee", "activation"),
        ("apertus", "activation"),
        ("nanochat", "logits_softcap"),
        ("nanochat", "qk_norm"),
        ("nemotron", "output.bias"),
        ("gpt_neox", "norm"),
        ("gpt_neox", "w_up.bias"),
        ("lfm2", "taps"),
        ("lfm2", "qk_norm"),
        ("gpt_oss", "window"),
        ("gpt_oss", "sinks"),
        ("gpt_oss", "activation"),
        ("gpt_oss", "router.bias"),
        ("gpt_oss", "experts.1.w_down.bias"),
    ],
)
def test_forgetting_a_feature_is_seen(name: str, feature: str) -> None:
    """The fixture exercises the feature: without it the oracle leaves the tolerance a
    thousandfold."""
    fixture = fixtures.load(name)
    config, weights = without(fixture, feature)
    logits = Oracle(config, weights, quantized=False).logits(fixture.token_ids)[fixture.rows]
    assert row_errors(logits, fixture.logits).max() > 1000 * TOLERANCE


@pytest.mark.parametrize("name", fixtures.names())
def test_quantization_costs_little_and_something(name: str) -> None:
    """KL between 1e-5 (it did happen) and 0.01 nats, where whole-row int8 scales would cost several
    times that."""
    fixture, quantized = oracle_of(name, True)
    _, plain = oracle_of(name, False)
    kl = kl_divergence(plain.logits(fixture.token_ids), quantized.logits(fixture.token_ids))
    assert 1e-5 < kl.mean() < 0.01


def test_the_hadamard_transform_in_both_ways_of_writing_it() -> None:
    """Additions in float32 and a product with the matrix in float64, on integers; and by hand for blocks of 1, 2 and 4."""
    rng = np.random.default_rng(6)
    for n in (1, 2, 3, 24, 64, 96, 100, 576):
        x = rng.integers(-1000, 1000, (3, n)).astype(np.float64)
        assert np.array_equal(hadamard(x), hadamard_f32(x))
    assert hadamard_f32([5, 7, 9]).tolist() == [5, 7, 9]
    assert hadamard_f32([5, 7]).tolist() == [12, -2]
    assert hadamard_f32([1, 2, 3, 4]).tolist() == [10, -2, -4, 0]


def test_weight_codes_follow_the_law() -> None:
    """Hand-computed groups of an odd number of columns, which are not transformed: the stored scale divides, halves go to even,
    tiny groups vanish."""
    w = np.zeros((3, 71), dtype=np.float32)
    w[0, :4] = 127, 2.5, 3.5, -0.5  # scale 1
    w[1, 64:66] = -127, 64  # the second, partial group
    w[2, :2] = 1e-7, 1.0e-6  # absmax / 127 = 7.9e-9 rounds to half 0
    codes, scales = quantize_weight(w)
    assert codes.shape == (3, 2, 64)
    assert codes[0, 0, :5].tolist() == [127, 2, 4, 0, 0]
    assert codes[1, 1, :3].tolist() == [-127, 64, 0]
    assert scales.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert not codes[2].any()
    assert np.array_equal(dequantize_weight(w)[0, :4], [127, 2, 4, 0])


def test_transformed_weight_codes_follow_the_law() -> None:
    """Blocks of 8 (k = 3): transformed, a quarter; and back."""
    w = np.zeros((1, 24), dtype=np.float32)
    w[0, 9] = 508
    codes, scales = quantize_weight(w)
    assert codes[0, 0, :24].tolist() == [0] * 8 + [127, -127] * 4 + [0] * 8
    assert scales.tolist() == [[1]]
    assert np.array_equal(dequantize_weight(w), w)


def test_weight_codes_divide_by_the_stored_scale() -> None:
    """absmax / 127 rounds down in half here, so absmax / scale exceeds 127 and is clamped; others
    shift too."""
    w = np.full((1, 63), 0.3, dtype=np.float32)
    w[0, 1] = 0.1488
    codes, scales = quantize_weight(w)
    stored = np.float32(np.float16(np.float32(0.3) / np.float32(127)))
    assert scales[0, 0] == stored
    assert codes[0, 0, 0] == min(127, np.rint(np.float32(0.3) / stored))
    assert codes[0, 0, 1] == np.rint(np.float32(0.1488) / stored)


@pytest.mark.parametrize(("n", "bad"), [(63, np.inf), (64, np.inf), (63, np.nan), (64, np.nan), (63, 9e6), (64, 8 * 9e6)])
def test_weights_that_no_scale_can_hold_are_refused(n: int, bad: float) -> None:
    w = np.ones((1, n), dtype=np.float32)
    w[0, 3] = bad
    with np.errstate(over="ignore", invalid="ignore"), pytest.raises(ValueError, match="finite"):
        quantize_weight(w)


def test_activation_codes_follow_the_law() -> None:
    x = np.zeros(72)
    x[:3] = 254.0, -127.0, 5.0  # scale 2: -63.5 and 2.5 are halves
    x[64:66] = 2.0**-65, -(2.0**-66)  # below the smallest absmax
    codes, scales = quantize(x, 64)
    assert codes.shape == (2, 64)
    assert codes[0, :3].tolist() == [127, -64, 2]
    assert scales.tolist() == [2.0, 0.0]
    assert not codes[1].any()


def test_codes_of_another_side_are_followed_at_ties_alone() -> None:
    x = np.array([127.0, 2.5, 2.5, 3.4996, 3.4, 3.4])
    others = np.array([[127, 3, 4, 4, 4, 3]], np.int8)
    assert quantize(x, 6)[0].tolist() == [[127, 2, 2, 3, 3, 3]]
    assert quantize(x, 6, others)[0].tolist() == [[127, 3, 2, 4, 3, 3]]


def test_window_counts_itself() -> None:
    wanted = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert visible(4, 2).astype(int).tolist() == wanted
    assert visible(3, 0).astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]


def test_kl_divergence_by_hand() -> None:
    reference, other = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.25, 0.75], [0.9, 0.1]]) + 3
    wanted = [0.5 * np.log(2) + 0.5 * np.log(2 / 3), 0]
    assert np.allclose(kl_divergence(reference, other), wanted, rtol=1e-12, atol=1e-15)
