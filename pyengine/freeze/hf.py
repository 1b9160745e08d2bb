"""Hugging Face directories (config.json, safetensors, tokenizer files) -> ``SourceModel``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.config import MAX_LAYERS, MAX_POSITIONS, FrozenConfig, LayerSpec
from ..format.container import MAX_HEADER_BYTES, SafetensorsEntry, parse_safetensors_header
from ..format.inventory import MAX_RIDER_BYTES
from ..format.quantize import Float32Array, RowSource
from ..format.strict_json import parse_json_object
from .architectures import ARCHITECTURES, PARTS, Architecture, build_model
from .rope import rope_inv_freq
from .sources import FLOAT_CONVERTERS, FileRows, SourceModel
from .tokenizer import check_tokenizer_json

_MAX_SHARDS = 4096
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28


def _read(path: Path, limit: int) -> bytes:
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise ModelFormatError(f"{path.name} is larger than {limit} bytes")
    return data


def _read_json(path: Path, limit: int = MAX_HEADER_BYTES) -> dict[str, Any]:
    return parse_json_object(_read(path, limit), path.name)


# ---------------------------------------------------------------------------- tensors


class SafetensorsReader:
    """The tensors of one or many safetensors files, read by rows."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: list[Any] = []
        self._entries: dict[str, tuple[int, SafetensorsEntry]] = {}
        try:
            for path in paths:
                self._add(path)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path) -> None:
        file = open(path, "rb", buffering=0)  # noqa: SIM115  # closed by close()
        self._files.append(file)
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = min(int.from_bytes(start, "little"), MAX_HEADER_BYTES)
        try:
            header = parse_safetensors_header(start + file.read(length), size)
        except ModelFormatError as error:
            raise ModelFormatError(f"{path.name}: {error}") from None
        for name, entry in header.entries.items():
            if name in self._entries:
                raise ModelFormatError(f"{path.name}: tensor {name!r} is in another shard too")
            self._entries[name] = (file.fileno(), entry)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, (_, entry) in self._entries.items()}

    def matrix(self, name: str) -> RowSource:
        fd, entry = self._entries[name]
        if entry.dtype not in FLOAT_CONVERTERS:
            raise UnsupportedModelError(f"tensor {name!r}: dtype {entry.dtype} is not implemented")
        rows, columns = entry.shape if len(entry.shape) == 2 else (1, math.prod(entry.shape))
        row_bytes = (entry.end - entry.begin) // rows
        return FileRows(name, fd, entry.begin, (rows, columns), row_bytes, FLOAT_CONVERTERS[entry.dtype])

    def vector(self, name: str) -> Float32Array:
        return self.matrix(name).read_rows(0, 1).reshape(-1)

    def close(self) -> None:
        for file in self._files:
            file.close()


def _weight_files(directory: Path) -> list[Path]:
    """model.safetensors, or the shards that the index names, which must be plain file names."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if not index.exists():
        raise UnsupportedModelError(
            f"{directory} has no model.safetensors and no model.safetensors.index.json; "
            "pickled weights (.bin, .pt) are never read"
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{index.name} has no weight_map")
    names = set(weight_map.values())
    if len(names) > _MAX_SHARDS:
        raise ModelFormatError(f"{index.name} names {len(names)} files, too many")
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelFormatError(f"{index.name} names the file {name!r:.200}")
    return [directory / name for name in sorted(names)]


# ---------------------------------------------------------------------------- configuration


def _architecture(config: dict[str, Any]) -> Architecture:
    named = config.get("architectures")
    if named is None:
        kind = config.get("model_type")
        found = next((a for a in ARCHITECTURES if a.model_type == kind), None)
        named = [kind]
    else:
        if not isinstance(named, list) or len(named) != 1:
            raise ModelFormatError(f"config.json: architectures must name one, not {named!r:.200}")
        found = next((a for a in ARCHITECTURES if a.hf == named[0]), None)
    if found is None:
        raise UnsupportedModelError(f"architecture {named[0]!r:.80} is not implemented")
    return found


def _int(config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise ModelFormatError(f"config.json: {key} is missing")
    if type(value) is not int:
        raise ModelFormatError(f"config.json: {key} must be an integer, not {value!r:.80}")
    return value


def _refuse_unknown_arithmetic(config: dict[str, Any]) -> None:
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"activation {activation!r:.80} is not implemented")
    if config.get("mlp_bias"):
        raise UnsupportedModelError("mlp_bias is not implemented")
    if config.get("quantization_config"):
        raise UnsupportedModelError("checkpoints that are quantized already are not implemented")
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor is not implemented")


def _windows(config: dict[str, Any], architecture: Architecture, n_layers: int) -> list[int]:
    """Every layer's attention window in positions, 0 for none.

    A key that is absent has the default of transformers' class; null is none.
    """
    none = [0] * n_layers
    if architecture.window == "never" or config.get("sliding_window", 0) is None:
        return none
    if architecture.window == "opt-in":
        if not config.get("use_sliding_window", False):
            return none
        full = min(_int(config, "max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS), n_layers)
        default = ["full_attention"] * full + ["sliding_attention"] * (n_layers - full)
    else:
        default = ["sliding_attention"] * n_layers
    kinds = config.get("layer_types") or default
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise ModelFormatError("config.json: layer_types must name every layer's attention")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"a layer of type {kind!r:.80} is not implemented")
    if "sliding_attention" not in kinds:
        return none
    window = _int(config, "sliding_window", _DEFAULT_WINDOW)
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _inv_freq(config: dict[str, Any], head_dim: int) -> Float32Array:
    """Both spellings: rope_theta and rope_scaling, or rope_parameters with both inside."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if scaling is not None and not isinstance(scaling, dict):
        raise ModelFormatError("config.json: the RoPE scaling is not an object")
    scaling = scaling or {}
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UnsupportedModelError("RoPE parameters that differ between layers are not implemented")
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor is not implemented")
    theta = scaling.get("rope_theta", config.get("rope_theta", 10_000.0))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)):
        raise ModelFormatError(f"config.json: rope_theta must be a number, not {theta!r:.80}")
    return rope_inv_freq(head_dim, float(theta), scaling)


def _token_ids(value: Any) -> list[int]:
    """eos_token_id may be absent, one id or a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _bias(flag: bool | None, config: dict[str, Any]) -> bool:
    return bool(config.get("attention_bias", False)) if flag is None else flag


def _frozen_config(config: dict[str, Any], generation: dict[str, Any], names: set[str]) -> FrozenConfig:
    architecture = _architecture(config)
    _refuse_unknown_arithmetic(config)
    dim, n_heads = _int(config, "hidden_size"), _int(config, "num_attention_heads")
    n_layers = _int(config, "num_hidden_layers")
    if not 1 <= n_layers <= MAX_LAYERS:
        raise ModelFormatError(f"config.json: num_hidden_layers {n_layers} is not in 1..{MAX_LAYERS}")
    if n_heads < 1 or dim < 1:
        raise ModelFormatError(f"config.json: {n_heads} heads and hidden_size {dim}")
    eos = generation.get("eos_token_id", config.get("eos_token_id"))
    tied = config.get("tie_word_embeddings")
    return FrozenConfig(
        architecture=architecture.hf,
        dim=dim,
        hidden_dim=_int(config, "intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=_int(config, "num_key_value_heads", n_heads if architecture.model_type == "llama" else None),
        head_dim=_int(config, "head_dim", dim // n_heads),
        vocab_size=_int(config, "vocab_size"),
        max_seq_len=min(_int(config, "max_position_embeddings"), MAX_POSITIONS),
        norm_eps=config.get("rms_norm_eps"),  # type: ignore[arg-type]  # checked there
        layers=tuple(LayerSpec(window=window) for window in _windows(config, architecture, n_layers)),
        tie_embeddings=PARTS["output"].hf not in names if tied is None else bool(tied),
        qkv_bias=_bias(architecture.qkv_bias, config),
        o_bias=_bias(architecture.o_bias, config),
        qk_norm=architecture.qk_norm,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(_token_ids(eos))),
    )


# ---------------------------------------------------------------------------- riders


def _tokenizer_json(directory: Path, vocab_size: int) -> bytes:
    path = directory / "tokenizer.json"
    if not path.exists():
        raise UnsupportedModelError(f"{directory} has no tokenizer.json (Hugging Face tokenizers)")
    raw = _read(path, MAX_RIDER_BYTES)
    document = parse_json_object(raw, path.name)
    if document.get("truncation") or document.get("padding"):
        # A setting of somebody's training run: here it would cut prompts silently.
        document |= {"truncation": None, "padding": None}
        raw = json.dumps(document, separators=(",", ":")).encode()
    check_tokenizer_json(raw.decode("utf-8"), vocab_size)
    return raw


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """chat_template.jinja, or tokenizer_config.json's: one string, or named ones of which "default"
    counts.

    A single string moves out of ``settings``; named ones stay there too.
    """
    path = directory / "chat_template.jinja"
    if path.exists():
        settings.pop("chat_template", None)
        try:
            return _read(path, MAX_HEADER_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFormatError(f"{path.name} is not UTF-8") from None
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    else:
        settings.pop("chat_template", None)
    if template is not None and not isinstance(template, str):
        raise ModelFormatError("tokenizer_config.json: chat_template is neither a string nor a list")
    return template


def _riders(directory: Path, vocab_size: int) -> dict[str, bytes]:
    riders = {"tokenizer.json": _tokenizer_json(directory, vocab_size)}
    settings: dict[str, Any] = {}
    if (path := directory / "tokenizer_config.json").exists():
        settings = _read_json(path)
    template = _chat_template(directory, settings)
    if settings:
        riders["tokenizer_config.json"] = json.dumps(settings).encode()
    if (path := directory / "generation_config.json").exists():
        riders["generation_config.json"] = json.dumps(_read_json(path)).encode()
    if template is not None:
        try:
            riders["chat_template.jinja"] = template.encode()
        except UnicodeEncodeError:
            raise ModelFormatError("tokenizer_config.json: chat_template is not Unicode") from None
    return riders


def load_hf(directory: Path, name: str | None = None) -> SourceModel:
    """Read the headers of a Hugging Face directory; weights are read when the freezer asks for
    their rows.
    """
    path = directory / "config.json"
    if not path.exists():
        raise ModelFormatError(f"{directory} has no config.json")
    config = _read_json(path)
    generation: dict[str, Any] = {}
    if (path := directory / "generation_config.json").exists():
        generation = _read_json(path)
    architecture = _architecture(config)  # before the weights: the clearest reason to refuse
    reader = SafetensorsReader(_weight_files(directory))
    try:
        frozen = _frozen_config(config, generation, set(reader.shapes))
        ignored = [n for n in reader.shapes if n.endswith(".self_attn.rotary_emb.inv_freq")]
        if frozen.tie_embeddings:
            ignored.append(PARTS["output"].hf)  # some save the shared matrix twice
        model = build_model(
            reader,
            frozen,
            [_inv_freq(config, frozen.head_dim)],
            kind="hf",
            name=name or directory.resolve().name,
            source=f"{directory.resolve().name} ({architecture.model_type})",
            interleaved=False,
            ignored=ignored,
        )
        model.riders = _riders(directory, frozen.vocab_size)
    except BaseException:
        reader.close()
        raise
    model.close = reader.close
    return model
