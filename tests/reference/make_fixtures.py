"""Make data/*.npz: tiny random models of every architecture and what transformers computes with
them in float32.

    pip install '.[oracle]' && python tests/reference/make_fixtures.py [NAME ...]

A fixture holds (keys of the .npz)
    config            the model's config.json, as published checkpoints write it
    weights/<name>    under the names of the Hugging Face checkpoint: matrices float16, with values
                      that float32 shares exactly; norms and biases float32 (on a coarse grid,
                      normed embeddings would often lie exactly between two codes, and a
                      comparison of codes would only count those ties)
    token_ids         (n_tokens) int32
    rows              (n_rows) positions that hidden and logits keep
    hidden            (n_layers + 1, n_rows, dim) float32: the input of layer 0, then the output
                      of every layer
    logits            (n_rows, vocab_size) float32
    inv_freq          (n_tables, turned elements of a head / 2) float32, every RoPE scaling applied: Gemma 3
                      has two tables, of its full and of its sliding layers, OLMo 3 of its sliding and of its full
                      ones. Older fixtures have (head_dim / 2)

The dimensions are small and awkward on purpose: widths that 64 does not divide, vocabularies that
16 does not, every ratio of query to kv heads from 1 to 4, more positions than one attention chunk
has, windows that leave a whole chunk out of sight, layers with a window beside layers without.
Magnitudes are those of real models where these are known for them: large key biases (LARGE_KEY_BIAS),
channels of the residual stream that are far larger than the others (LOUD_CHANNELS), and what the multipliers
of an architecture presuppose (MAGNITUDES).
"""

from __future__ import annotations

import copy
import json
import sys
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fixture_models import COMMON, LARGE_KEY_BIAS, LOUD_CHANNELS, LOUDNESS, MAGNITUDES, MODELS
from folds import head_dim_of
from transformers import AutoConfig, AutoModelForCausalLM

DATA = Path(__file__).parent / "data"
MATRIX_GRID = 2.0**-8  # exact in float16, and compresses


def judge(config_json: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model of transformers that computes the same, of a model that it has only as code beside the
    published files: MiniCPM is Granite's arithmetic, InternLM Llama's."""
    kind, config = config_json["model_type"], {**config_json}
    config.pop("quantization_config", None)  # its values are the parameters' of a model that is not quantized
    if kind in ("internlm2", "internlm3"):
        has_bias = config_json["bias"]
        return {**config, "model_type": "llama", "attention_bias": has_bias, "mlp_bias": has_bias}
    if kind != "minicpm":
        return config
    return {
        **config,
        "model_type": "granite",
        "embedding_multiplier": config["scale_emb"],
        "residual_multiplier": config["scale_depth"] / config["num_hidden_layers"] ** 0.5,
        "attention_multiplier": (config["hidden_size"] / config["num_attention_heads"]) ** -0.5,
        "logits_scaling": config["hidden_size"] / config["dim_model_base"],
    }


def turn_windows_plainly(model: Any) -> Any:
    """Let OLMo 3's layers with a window turn without YaRN, as its authors' code, the readers of its GGUF files and transformers 4
    have it; transformers 5 has one table for all layers. Returns the module of the plain table."""
    config = copy.deepcopy(model.config)
    config.rope_parameters = {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
    plain = type(model.model.rotary_emb)(config)

    def replace(_module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "position_embeddings": plain(args[0], kwargs["position_ids"])}

    for layer, kind in zip(model.model.layers, model.config.layer_types, strict=True):
        if kind == "sliding_attention":
            layer.register_forward_pre_hook(replace, with_kwargs=True)
    return plain

def random_weight(name: str, w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Values that make every part matter: attention that looks somewhere, logits with winners."""
    noise = torch.randn(w.shape, generator=generator)
    if name.endswith("norm.weight"):
        value = 1.0 + 0.25 * noise
    elif name.endswith("bias"):
        value = 0.3 * noise
    elif name.endswith("sinks"):
        value = 1.0 + noise
    elif name.endswith(EMBEDDINGS):
        value = 0.25 * noise
    else:
        value = (1.2 / w.shape[-1] ** 0.5) * noise
    return (value / MATRIX_GRID).round() * MATRIX_GRID if w.ndim > 1 else value


def realistic_weight(name: str, key: str, w: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As random_weight, by the magnitudes of the fixture's architecture."""
    ends = [end for end in MAGNITUDES[name] if key.endswith(end)]
    value = random_weight(key, w, generator)
    if ends:
        mean, deviation = MAGNITUDES[name][ends[0]]
        value = mean + deviation / (w.shape[-1] ** 0.5 if w.ndim > 1 else 1.0) * torch.randn(w.shape, generator=generator)
    if key.endswith(EMBEDDINGS):
        value[:, list(LOUD_CHANNELS)] *= LOUDNESS
        if name in ("olmo2", "olmo3"):  # no norm before layer 0: an equal maximum in every group, or codes of codes would be ties
            value[:, list(LOUD_CHANNELS)] = 1.25 * value[:, list(LOUD_CHANNELS)].sign()
    elif w.ndim > 1 and w.shape[-1] > max(LOUD_CHANNELS) and not key.endswith(WRITERS):
        value[..., list(LOUD_CHANNELS)] /= LOUDNESS  # who reads the stream is used to them
    elif key == "model.norm.weight":  # Gemma's gain is 1 + w
        gain = value[list(LOUD_CHANNELS)] + (1.0 if name in ("gemma2", "gemma3") else 0.0)
        value[list(LOUD_CHANNELS)] += gain / LOUDNESS**2 - gain
    return (value / MATRIX_GRID).round() * MATRIX_GRID if w.ndim > 1 else value


EMBEDDINGS = ("embed_tokens.weight", "embed_in.weight")
SAVED_BUFFERS = ("act_fn.beta", "act_fn.eps")  # published files have them beside the parameters
WRITERS = (  # to the residual stream
    "o_proj.weight", "down_proj", "down_proj.weight", "output_linear.weight", "c_proj.weight", "dense.weight", "fc2.weight",
    "dense_4h_to_h.weight",
)  # fmt: skip


def published(name: str, key: str, w: np.ndarray) -> dict[str, np.ndarray]:
    """transformers' parameter under the names of published files, which have a matrix for each expert."""
    if name == "gpt_neox":
        return {key.replace("lm_head", "embed_out"): w}
    mixtral = name == "mixtral"
    prefix = key.partition("mlp.")[0] + ("block_sparse_moe" if mixtral else "mlp")
    if key.endswith("mlp.gate.weight"):
        return {f"{prefix}.gate.weight": w}
    if name == "granite_moe":  # one tensor of all experts, gate above up
        ends = {"router.weight": "router.layer.weight", "experts.gate_up_proj": "input_linear.weight",
                "experts.down_proj": "output_linear.weight"}  # fmt: skip
        return {next((key.replace(old, new) for old, new in ends.items() if key.endswith(old)), key): w}
    if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {key: w}
    halves = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[key.rpartition(".")[2]]
    spelled = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if mixtral else {half: half for half in halves}
    return {
        f"{prefix}.experts.{e}.{spelled[half]}.weight": part
        for e in range(len(w))
        for half, part in zip(halves, np.split(w[e], len(halves)), strict=True)
    }


INTERNLM2_NAMES = {
    "embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn.o_proj": "attention.wo",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}  # fmt: skip


def as_internlm2(weights: dict[str, np.ndarray], n_kv_heads: int) -> dict[str, np.ndarray]:
    """A Llama's weights as InternLM 2's files have them: of each kv head the rows of its queries, of its keys, of its values."""
    renamed: dict[str, np.ndarray] = {}
    for key, w in weights.items():
        if key.endswith("q_proj.weight"):
            parts = [weights[key.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            of_head = [part.reshape(n_kv_heads, -1, part.shape[1]) for part in parts]
            renamed[key.replace("self_attn.q_proj", "attention.wqkv")] = np.concatenate(of_head, axis=1).reshape(-1, w.shape[1])
        elif not key.endswith(("k_proj.weight", "v_proj.weight")):
            found = next((old for old in INTERNLM2_NAMES if old in key), "")
            renamed[key.replace(found, INTERNLM2_NAMES[found]) if found else key] = w
    return renamed


FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)


def as_mxfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """w (..., rows, columns) -> blocks (..., rows, groups, 16) and scales (..., rows, groups), uint8, of gpt-oss's files."""
    groups = w.reshape(*w.shape[:-1], -1, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(axis=-1, keepdims=True))) - 2
    scaled = np.ldexp(groups, -exponent.astype(int))
    codes = np.abs(np.abs(scaled)[..., None] - FP4).argmin(axis=-1) + 8 * (scaled < 0)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    return blocks.astype(np.uint8), (exponent[..., 0] + 127).astype(np.uint8)


def from_mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 32)
    values = np.where(codes & 8, -FP4[codes & 7], FP4[codes & 7])
    return np.ldexp(values, scales[..., None].astype(int) - 127).reshape(*scales.shape[:-1], -1).astype(np.float32)


def put_mxfp4(key: str, parameter: torch.Tensor) -> dict[str, np.ndarray]:
    """gpt-oss's experts, (n_experts, inputs, outputs) with values that MXFP4 has, from now on -> what its files have of them."""
    blocks, scales = as_mxfp4(parameter.data.numpy().swapaxes(1, 2))
    parameter.data.copy_(torch.from_numpy(from_mxfp4(blocks, scales).swapaxes(1, 2).copy()))
    return {f"{key}_blocks": blocks, f"{key}_scales": scales}


def put_large_key_bias(name: str, key: str, bias: torch.Tensor, head_dim: int) -> None:
    """Into the bias (kv_dim) of `key` if it is one of the fixture's layers' keys."""
    for (layer, head), values in LARGE_KEY_BIAS.get(name, {}).items():
        if key == f"model.layers.{layer}.self_attn.k_proj.bias":
            for element, value in values.items():
                bias[head * head_dim + element] = value


def rope_tables(rotary: torch.nn.Module) -> np.ndarray:
    """(n_tables, turned / 2)."""
    names = ["full_attention_inv_freq", "sliding_attention_inv_freq"] if not hasattr(rotary, "inv_freq") else ["inv_freq"]
    return np.stack([getattr(rotary, name).numpy() for name in names])


def make(name: str, config_json: dict[str, Any], n_tokens: int) -> None:
    config_json = {k: v for k, v in {**COMMON, **config_json}.items() if v is not None}
    config = AutoConfig.for_model(**json.loads(json.dumps(judge(config_json))))  # it writes into what it is given
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    tied = config_json["tie_word_embeddings"]
    weights = {}
    inner = model.base_model
    for key, parameter in model.named_parameters():
        make_weight = partial(realistic_weight, name) if name in MAGNITUDES else random_weight
        parameter.data.copy_(make_weight(key, parameter, generator))
        put_large_key_bias(name, key, parameter.data, head_dim_of(config_json))
        if name == "gpt_oss" and key.endswith(("gate_up_proj", "down_proj")):
            weights |= put_mxfp4(key, parameter)
            continue
        stored = parameter.data.numpy().astype(np.float16 if parameter.ndim > 1 else np.float32)
        assert np.array_equal(stored.astype(np.float32), parameter.data.numpy()), key
        weights |= published(name, key, stored)
    weights |= {key: value.numpy() for key, value in model.named_buffers() if key.endswith(SAVED_BUFFERS)}
    assert any(key in weights for key in ("lm_head.weight", "embed_out.weight")) == (not tied)
    if name == "internlm2":
        weights = as_internlm2(weights, config_json["num_key_value_heads"])
    tables = rope_tables(inner.rotary_emb if hasattr(inner, "rotary_emb") else inner.pos_emb)
    if name == "olmo3":
        tables = np.concatenate([rope_tables(turn_windows_plainly(model)), tables])

    # 263: the ids that the fixtures' tokenizer knows; a larger vocab_size is padding, as published
    # models have it
    token_ids = torch.randint(0, 263, (n_tokens,), generator=generator)
    blocks: list[torch.Tensor] = []
    first: list[torch.Tensor] = []
    inner.layers[0].register_forward_pre_hook(lambda _m, inputs: first.append(inputs[0][0]))
    for layer in inner.layers:
        layer.register_forward_hook(lambda _m, _i, out: blocks.append(out[0]))
    with torch.no_grad():
        logits = model(token_ids[None]).logits[0]
    hidden = [first[0], *(b.reshape(n_tokens, -1) for b in blocks)]
    rows = np.unique(np.linspace(0, n_tokens - 1, 16).astype(np.int64))
    np.savez_compressed(
        DATA / f"{name}.npz",
        config=np.array(json.dumps(config_json)),
        token_ids=token_ids.numpy().astype(np.int32),
        rows=rows.astype(np.int32),
        hidden=np.stack([h.detach().numpy()[rows] for h in hidden]),
        logits=logits.numpy()[rows],
        inv_freq=tables,
        **{f"weights/{key}": w for key, w in weights.items()},
    )


def main() -> None:
    torch.set_num_threads(1)
    DATA.mkdir(exist_ok=True)
    for name in sys.argv[1:] or MODELS:
        make(name, *MODELS[name])
        print(f"{name}: {(DATA / f'{name}.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()
