"""Checkpoints: a Hugging Face folder that ``transformers`` and ``pyengine freeze`` open, plus what
resuming needs.

config.json, model.safetensors (float32 masters), tokenizer.json, tokenizer_config.json,
generation_config.json
state.json           step, counters, configs, versions, data fingerprint
optimizer.safetensors  the moments, flat

A checkpoint appears whole or not at all: temporary folder, fsync, rename.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arena import Arena, parameter_shapes
from .blas import kernels_in_use
from .config import ModelConfig, TrainConfig, to_json
from .errors import CheckpointError, ConfigError
from .files import atomic_directory, load_safetensors, new_safetensors, read_json, save_safetensors, write_json
from .text import load_tokenizer, tokenizer_config

Array = NDArray[Any]
FORMAT_VERSION = 1
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}  # by model_type; Qwen3 is Llama with QK-norm
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
ATTACHMENTS = (*TOKENIZER_FILES, "chat_template.jinja", "special_tokens_map.json")


# ---- names -------------------------------------------------------------------------------------------------------


def hf_tensors(params: Arena, config: ModelConfig) -> dict[str, Array]:
    """Hugging Face name -> view of the arena (writable): fused matrices are given row range by row range."""
    c = config
    tensors = {"model.embed_tokens.weight": params["tok_embeddings"]}
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        wqkv, gate_up = params[ours + "wqkv"], params[ours + "w_gate_up"]
        k, v = c.q_dim, c.q_dim + c.kv_dim
        tensors[theirs + "input_layernorm.weight"] = params[ours + "attention_norm"]
        tensors[theirs + "self_attn.q_proj.weight"] = wqkv[:k]
        tensors[theirs + "self_attn.k_proj.weight"] = wqkv[k:v]
        tensors[theirs + "self_attn.v_proj.weight"] = wqkv[v:]
        if c.qk_norm:
            tensors[theirs + "self_attn.q_norm.weight"] = params[ours + "q_norm"]
            tensors[theirs + "self_attn.k_norm.weight"] = params[ours + "k_norm"]
        tensors[theirs + "self_attn.o_proj.weight"] = params[ours + "wo"]
        tensors[theirs + "post_attention_layernorm.weight"] = params[ours + "ffn_norm"]
        tensors[theirs + "mlp.gate_proj.weight"] = gate_up[: c.hidden_dim]
        tensors[theirs + "mlp.up_proj.weight"] = gate_up[c.hidden_dim :]
        tensors[theirs + "mlp.down_proj.weight"] = params[ours + "w_down"]
    tensors["model.norm.weight"] = params["norm"]
    if not c.tie_embeddings:
        tensors["lm_head.weight"] = params["output"]
    return tensors


def hf_config(config: ModelConfig, bos: int | None, eos: int | None) -> dict[str, Any]:
    """config.json."""
    c, kind = config, "qwen3" if config.qk_norm else "llama"
    values = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_seq_len,
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": c.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": "float32",
    }
    if c.qk_norm:
        values.update(use_sliding_window=False, sliding_window=None, max_window_layers=c.n_layers)
        del values["mlp_bias"]
    return values


def model_config_from_hf(values: dict[str, Any], where: Path) -> ModelConfig:
    """ModelConfig of a config.json; CheckpointError names what is not supported."""
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise CheckpointError(f"{where}: model_type is {kind!r}; only {', '.join(ARCHITECTURES)} can be trained")
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict) or not isinstance(values.get("layer_types") or [], list):
        raise CheckpointError(f"{where}: rope_parameters, rope_scaling or layer_types is malformed")
    unsupported = {
        "RoPE scaling": rope.get("rope_type", rope.get("type", "default")) != "default",
        "sliding windows": bool(values.get("use_sliding_window"))
        or "sliding_attention" in (values.get("layer_types") or []),
        "attention_bias": bool(values.get("attention_bias")),
        "mlp_bias": bool(values.get("mlp_bias")),
        "hidden_act": values.get("hidden_act", "silu") != "silu",
    }
    for what, present in unsupported.items():
        if present:
            raise CheckpointError(f"{where}: {what} of this model is not supported in training")
    try:
        heads, dim = int(values["num_attention_heads"]), int(values["hidden_size"])
        if heads < 1:
            raise ConfigError(f"num_attention_heads is {heads}; it must be at least 1")
        return ModelConfig(
            vocab_size=int(values["vocab_size"]),
            dim=dim,
            n_layers=int(values["num_hidden_layers"]),
            n_heads=heads,
            n_kv_heads=int(values.get("num_key_value_heads") or heads),
            head_dim=int(values.get("head_dim") or dim // heads),
            hidden_dim=int(values["intermediate_size"]),
            max_seq_len=int(values["max_position_embeddings"]),
            norm_eps=float(values.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
            tie_embeddings=bool(values.get("tie_word_embeddings", False)),
            qk_norm=kind == "qwen3",
        )
    except ConfigError as error:
        raise CheckpointError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{where}: missing or malformed {error}") from error


# ---- models ------------------------------------------------------------------------------------------------------


def write_hf_folder(
    folder: Path,
    params: Arena,
    config: ModelConfig,
    *,
    tokenizer: Any,
    bos: int | None,
    eos: int | None,
    attachments: Path | None = None,
) -> None:
    """The Hugging Face part of a checkpoint into an existing folder. attachments: where to copy
    tokenizer and generation files from (a fine-tuned model keeps its own); without it they are made
    for a tokenizer trained here.
    """
    write_json(folder / "config.json", hf_config(config, bos, eos))
    save_safetensors(folder / "model.safetensors", hf_tensors(params, config), {"format": "pt"})
    if attachments is not None:
        for name in ATTACHMENTS:
            if (attachments / name).exists():
                shutil.copyfile(attachments / name, folder / name)
        return
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, config.max_seq_len, bos, eos))
    generation: dict[str, Any] = {"bos_token_id": bos, "eos_token_id": eos, "do_sample": True}
    generation.update(temperature=0.7, top_p=0.9)
    write_json(folder / "generation_config.json", generation)


def read_model_config(folder: Path) -> ModelConfig:
    """ModelConfig of a Hugging Face folder."""
    path = folder / "config.json"
    return model_config_from_hf(read_json(path), path)


def special_ids(folder: Path) -> tuple[int | None, int | None]:
    """BOS and EOS of a Hugging Face folder, as transformers resolves them.

    tokenizer_config.json's tokens come before config.json's ids (the first where there are several).
    """
    values = read_json(folder / "config.json")
    ids = [values.get("bos_token_id"), values.get("eos_token_id")]
    ids = [(value or [None])[0] if isinstance(value, list) else value for value in ids]
    path = folder / "tokenizer_config.json"
    if path.exists() and (folder / "tokenizer.json").exists():
        named = read_json(path)
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        for index, name in enumerate(("bos_token", "eos_token")):
            token = named.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            found = tokenizer.token_to_id(token) if isinstance(token, str) else None
            ids[index] = ids[index] if found is None else found
    return ids[0], ids[1]


def load_parameters(folder: Path, params: Arena, config: ModelConfig) -> None:
    """Fill the arena from model.safetensors (or its shards). Missing, extra or misshapen tensors are errors."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        names = sorted(set(map(str, read_json(index, {"weight_map": dict})["weight_map"].values())))
    found: dict[str, Array] = {}
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"{index}: {name!r} is no file name")
        found.update(load_safetensors(folder / name))
    if config.tie_embeddings:
        found.pop("lm_head.weight", None)  # some writers store the shared table twice
    wanted = hf_tensors(params, config)
    missing, extra = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    extra = [name for name in extra if not name.endswith("rotary_emb.inv_freq")]
    if missing or extra:
        raise CheckpointError(f"{folder}: missing tensors {missing[:3]}, unknown {extra[:3]}")
    for name, view in wanted.items():
        if found[name].shape != view.shape:
            raise CheckpointError(f"{folder}: {name} has shape {found[name].shape}, expected {view.shape}")
        view[...] = found[name]
    if not np.isfinite(params.flat).all():
        raise CheckpointError(f"{folder}: a weight is infinite or NaN")


def load_model(folder: Path) -> tuple[ModelConfig, Arena]:
    """Configuration and float32 parameters of a Hugging Face folder."""
    config = read_model_config(folder)
    params = Arena(parameter_shapes(config))
    load_parameters(folder, params, config)
    return config, params


# ---- training state ----------------------------------------------------------------------------------------------


@dataclass
class TrainingState:
    """Counters of a run. step = steps done."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    best_validation: float | None = None
    joules: float | None = None  # where the machine reports its energy
    position: int = 0  # of the reader: tokens of all rows read


def environment() -> dict[str, str]:
    """What bitwise resuming depends on."""
    import llvmlite
    import numba

    cpu = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass  # not Linux
    return {
        "cpu": cpu,
        "numpy": np.__version__,
        "blas": kernels_in_use(),
        "numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
        "python": platform.python_version(),
    }


def save_checkpoint(
    folder: Path,
    model: ModelConfig,
    config: TrainConfig,
    size: int,
    fill_moments: Callable[[Array, Array], None],
    state: TrainingState,
    data_fingerprint: str,
    write_model: Callable[[Path], None],
) -> None:
    """Write a whole checkpoint, atomically.

    fill_moments fills two flat arrays of ``size`` elements, which are the file; write_model writes the Hugging Face
    part into the folder it is given.
    """
    with atomic_directory(folder) as temporary:
        write_model(temporary)
        shapes = {"m": (size,), "v": (size,)}
        with new_safetensors(temporary / "optimizer.safetensors", shapes) as moments:
            fill_moments(moments["m"], moments["v"])
        values = {
            "format_version": FORMAT_VERSION,
            "step": state.step,
            "tokens": state.tokens,
            "seconds": state.seconds,
            "best_validation": state.best_validation,
            "joules": state.joules,
            "position": state.position,
            "model": to_json(model),
            "train": to_json(config),
            "data_fingerprint": data_fingerprint,
            "environment": environment(),
        }
        write_json(temporary / "state.json", values)


STATE = {
    **dict.fromkeys(("step", "tokens"), int),
    **dict.fromkeys(("model", "train", "environment"), dict),
    "seconds": (int, float),
    "data_fingerprint": str,
}  # what a run that goes on needs of state.json


def read_state(folder: Path, kinds: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """state.json of a checkpoint, version checked; kinds: as :func:`.files.read_json` has them."""
    path = folder / "state.json"
    version = read_json(path).get("format_version")
    if version != FORMAT_VERSION:
        newer = isinstance(version, int) and version > FORMAT_VERSION
        raise CheckpointError(
            f"{folder}: written by a {'newer' if newer else 'different'} "
            f"version (format {version}, this program reads {FORMAT_VERSION})"
        )
    return read_json(path, kinds)


def reader_position(values: dict[str, Any]) -> int:
    """Tokens of all rows that a checkpoint's run has read, from its state.json."""
    every_step = values["train"]["batch_size"] * values["train"]["seq_len"]
    return int(values.get("position", values["step"] * every_step))


def load_moments(folder: Path, size: int) -> tuple[Array, Array]:
    """The optimizer's moments, flat, of a model whose arena has ``size`` elements."""
    tensors = load_safetensors(folder / "optimizer.safetensors")
    for name in ("m", "v"):
        if name not in tensors or tensors[name].shape != (size,):
            raise CheckpointError(f"{folder}: optimizer state {name!r} does not fit the model")
    return tensors["m"], tensors["v"]


def checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    folder = run_folder / "checkpoints"
    return sorted(p for p in folder.glob("step_*") if (p / "state.json").exists())


def prune(run_folder: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints (0: keep all), and what a process that was killed while it wrote one has
    left. Not while one is written."""
    for unfinished in (run_folder / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for old in checkpoints(run_folder)[:-keep] if keep > 0 else []:
        shutil.rmtree(old, ignore_errors=True)
