"""Hugging Face directories (config.json, safetensors, tokenizer files) -> ``SourceModel``."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import MissingFileError, ModelFormatError, PyEngineError, UnsupportedModelError
from ..files import open_regular, read_regular
from ..format.config import MAX_LAYERS, MAX_POSITIONS, FrozenConfig, LayerSpec
from ..format.container import MAX_HEADER_BYTES, SafetensorsEntry, parse_safetensors_header
from ..format.quantize import Float32Array, RowSource
from ..format.strict_json import parse_json_object
from .architectures import ARCHITECTURES, PARTS, Architecture, build_model, required_features
from .fields import Fields
from .lora import AdaptedTensors, Adapter
from .rope import rope_inv_freq
from .sources import FLOAT_CONVERTERS, FileRows, SourceModel
from .special_tokens import begin_and_end, spellings
from .tokenizer import check_tokenizer_json, json_bytes

_CONFIG, _GENERATION, _SETTINGS, _TOKENS_MAP = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
_TOKENIZER, _TEMPLATE = "tokenizer.json", "chat_template.jinja"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
DOCUMENTS = (_CONFIG, _GENERATION, _SETTINGS, _TOKENS_MAP, _TOKENIZER, _TEMPLATE, _INDEX)

_MAX_SHARDS = 4096
_MAX_NAME_BYTES = 255
_MAX_TOKENIZER_BYTES = 64 << 20  # twice the largest of today's vocabularies of 256k tokens
_DEFAULT_WINDOW = 4096
_DEFAULT_ROPE_THETA = 10_000.0
_DEFAULT_MAX_WINDOW_LAYERS = 28


def _read_json(directory: Path, name: str) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    try:
        return parse_json_object(read_regular(directory / name, MAX_HEADER_BYTES), name)
    except MissingFileError:
        return None


# ---------------------------------------------------------------------------- tensors


class SafetensorsReader:
    """The tensors of one or many safetensors files, read by rows."""

    def __init__(self, paths: list[Path]) -> None:
        self._files: list[io.FileIO] = []
        self._entries: dict[str, tuple[int, SafetensorsEntry]] = {}
        try:
            for path in paths:
                self._add(path)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path) -> None:
        file = open_regular(path)
        self._files.append(file)
        size = file.seek(0, 2)
        file.seek(0)
        start = file.read(8)
        length = min(int.from_bytes(start, "little"), size, MAX_HEADER_BYTES)
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


def _shard_names(directory: Path) -> list[str]:
    """The shards that model.safetensors.index.json names, which must be plain file names; none if there is no index."""
    index = _read_json(directory, _INDEX)
    if index is None:
        return []
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFormatError(f"{_INDEX} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not _is_plain(name) or not name.endswith(".safetensors"):
            raise ModelFormatError(f"{_INDEX} names the file {name!r:.200}")
    names = sorted(set(weight_map.values()))
    if len(names) > _MAX_SHARDS:
        raise ModelFormatError(f"{_INDEX} names {len(names)} files, too many")
    return names


def _is_plain(name: str) -> bool:
    """Whether it names a file in the directory itself."""
    return Path(name).name == name and name.isprintable() and len(name.encode("utf-8", "replace")) <= _MAX_NAME_BYTES


def _open_weights(directory: Path) -> SafetensorsReader:
    if (directory / _WEIGHTS).exists():
        return SafetensorsReader([directory / _WEIGHTS])
    names = _shard_names(directory)
    if not names:
        raise UnsupportedModelError(
            f"{directory} has no {_WEIGHTS} and no {_INDEX}; pickled weights (.bin, .pt) are never read"
        )
    for name in names:
        if not (directory / name).exists():
            raise ModelFormatError(f"{directory} has no {name}, which {_INDEX} names")
    return SafetensorsReader([directory / name for name in names])


def missing_weights(directory: Path) -> list[str]:
    """The files of weights that a directory ought to have and has not. Raises ModelFormatError for an index that is damaged."""
    if (directory / _WEIGHTS).exists():
        return []
    return [name for name in _shard_names(directory) or [_WEIGHTS] if not (directory / name).exists()]


def refuse_unknown_architecture(directory: Path) -> None:
    """By config.json alone, before weights are fetched for nothing. Raises UnsupportedModelError, ModelFormatError."""
    _architecture(_read_json(directory, _CONFIG) or {})


def files_of(directory: Path) -> list[Path]:
    """Everything in a directory that decides what it freezes to, whether it is there or not."""
    names = [*DOCUMENTS, _WEIGHTS]
    with contextlib.suppress(PyEngineError):  # whoever opens it will say what is wrong
        names += _shard_names(directory)
    return [directory / name for name in names]


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


def _refuse_unknown_arithmetic(config: Fields) -> None:
    activation = config.text("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedModelError(f"activation {activation!r:.80} is not implemented")
    if config.flag("mlp_bias", False):
        raise UnsupportedModelError("mlp_bias is not implemented")
    if config.raw("quantization_config"):
        raise UnsupportedModelError("checkpoints that are quantized already are not implemented")


def _windows(config: Fields, architecture: Architecture, n_layers: int) -> list[int]:
    """Every layer's attention window in positions, 0 for none.

    A key that is absent has the default of transformers' class; null is none.
    """
    none = [0] * n_layers
    if architecture.window == "never" or config.is_null("sliding_window"):
        return none
    if architecture.window == "opt-in":
        if not config.flag("use_sliding_window", False):
            return none
        full = max(0, min(config.integer("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS), n_layers))
        default = ["full_attention"] * full + ["sliding_attention"] * (n_layers - full)
    else:
        default = ["sliding_attention"] * n_layers
    kinds = config.raw("layer_types") or default
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise ModelFormatError(f"{_CONFIG}: layer_types must name every layer's attention")
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModelError(f"a layer of type {kind!r:.80} is not implemented")
    if "sliding_attention" not in kinds:
        return none
    window = config.integer("sliding_window", _DEFAULT_WINDOW)
    if window > MAX_POSITIONS:  # wider than any context
        return none
    return [window if kind == "sliding_attention" else 0 for kind in kinds]


def _rope(config: Fields) -> tuple[float, dict[str, Any]]:
    """(base, scaling), as transformers reads them.

    Newer configurations have ``rope_parameters`` with the base inside, older ones ``rope_scaling`` beside ``rope_theta``. Of both
    the older counts, and then nothing of the newer does: model cards tell people to add a rope_scaling.
    """
    key = "rope_scaling" if config.table("rope_scaling", None) else "rope_parameters"
    scaling = config.table(key, {})
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UnsupportedModelError("RoPE parameters that differ between layers are not implemented")
    inside = Fields(scaling, f"{_CONFIG}: {key}")
    if inside.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0)) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor is not implemented")
    theta = inside.number("rope_theta", config.number("rope_theta", _DEFAULT_ROPE_THETA))
    numbers: dict[str, float] = {
        name: inside.number(name) for name, value in scaling.items() if type(value) in (int, float)
    }
    kind = inside.text("rope_type", inside.text("type", "default"))
    if kind == "llama3":
        key = "original_max_position_embeddings"
        numbers[key] = config.number(key, numbers.get(key, config.number("max_position_embeddings")))
    return theta, {**scaling, **numbers, "rope_type": kind}


def _frozen_config(
    config: Fields, architecture: Architecture, names: Mapping[str, object], bos: int | None, eos: tuple[int, ...]
) -> FrozenConfig:
    _refuse_unknown_arithmetic(config)
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    n_layers = config.integer("num_hidden_layers")
    if not 1 <= n_layers <= MAX_LAYERS:
        raise ModelFormatError(f"{_CONFIG}: num_hidden_layers {n_layers} is not in 1..{MAX_LAYERS}")
    if n_heads < 1 or dim < 1:
        raise ModelFormatError(f"{_CONFIG}: {n_heads} heads and hidden_size {dim}")
    n_kv_heads = config.integer("num_key_value_heads", n_heads) if architecture.model_type == "llama" else None
    has_bias = config.flag("attention_bias", False)
    qkv_bias = has_bias if architecture.qkv_bias is None else architecture.qkv_bias
    return FrozenConfig(
        architecture=architecture.hf,
        dim=dim,
        hidden_dim=config.integer("intermediate_size"),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=config.integer("num_key_value_heads") if n_kv_heads is None else n_kv_heads,
        head_dim=config.integer("head_dim", dim // n_heads),
        vocab_size=config.integer("vocab_size"),
        max_seq_len=min(config.integer("max_position_embeddings"), MAX_POSITIONS),
        norm_eps=config.number("rms_norm_eps"),
        layers=tuple(LayerSpec(window=window) for window in _windows(config, architecture, n_layers)),
        tie_embeddings=config.flag("tie_word_embeddings", PARTS["output"].hf not in names),
        qkv_bias=qkv_bias,
        o_bias=has_bias if architecture.o_bias is None else architecture.o_bias,
        qk_norm=architecture.qk_norm,
        bos_token_id=bos,
        eos_token_ids=eos,
        requires=required_features(qkv_bias, architecture.qk_norm),
    )


# ---------------------------------------------------------------------------- attachments


def _tokenizer_json(directory: Path) -> bytes:
    try:
        raw = read_regular(directory / _TOKENIZER, _MAX_TOKENIZER_BYTES)
    except MissingFileError:
        raise UnsupportedModelError(f"{directory} has no {_TOKENIZER} (Hugging Face tokenizers)") from None
    document = parse_json_object(raw, _TOKENIZER)
    if document.get("truncation") or document.get("padding"):
        # A setting of somebody's training run: here it would cut prompts silently.
        return json_bytes(document | {"truncation": None, "padding": None}, _TOKENIZER)
    return raw


def _chat_template(directory: Path, settings: dict[str, Any]) -> bytes | None:
    """chat_template.jinja, or tokenizer_config.json's: one string, or named ones of which "default"
    counts.

    A single string moves out of ``settings``; named ones stay there too.
    """
    try:
        content = read_regular(directory / _TEMPLATE, MAX_HEADER_BYTES)
    except MissingFileError:
        pass
    else:
        settings.pop("chat_template", None)
        try:
            content.decode("utf-8")
        except UnicodeDecodeError:
            raise ModelFormatError(f"{_TEMPLATE} is not UTF-8") from None
        return content
    template = settings.get("chat_template")
    if isinstance(template, list):
        if not all(isinstance(t, dict) and isinstance(t.get("name"), str) for t in template):
            raise ModelFormatError(f"{_SETTINGS}: chat_template lists something else than named templates")
        template = {t["name"]: t.get("template") for t in template}.get("default")
    else:
        settings.pop("chat_template", None)
    if template is None:
        return None
    if not isinstance(template, str):
        raise ModelFormatError(f"{_SETTINGS}: chat_template is neither a string nor a list")
    try:
        return template.encode()
    except UnicodeEncodeError:
        raise ModelFormatError(f"{_SETTINGS}: chat_template is not Unicode") from None


class _Documents:
    """The JSON and text of a directory: what rides along, and the special tokens that follow from it."""

    def __init__(self, directory: Path, config: Fields, vocab_size: int) -> None:
        settings, generation = _read_json(directory, _SETTINGS), _read_json(directory, _GENERATION)
        tokens_map = _read_json(directory, _TOKENS_MAP)
        names = spellings(settings or {}, tokens_map or {})
        tokenizer = _tokenizer_json(directory)
        ids = check_tokenizer_json(tokenizer, vocab_size)
        self.bos, self.eos = begin_and_end(names, ids, config, Fields(generation or {}, _GENERATION), vocab_size)
        self.attachments = {_TOKENIZER: tokenizer}
        kept = {**(settings or {}), **(names if tokens_map else {})}
        template = _chat_template(directory, kept)
        if kept:
            self.attachments[_SETTINGS] = json_bytes(kept, _SETTINGS)
        if generation is not None:
            self.attachments[_GENERATION] = json_bytes(generation, _GENERATION)
        if template is not None:
            self.attachments[_TEMPLATE] = template


def load_hf(directory: Path, name: str | None = None, lora: Sequence[Adapter] = ()) -> SourceModel:
    """Read the headers of a Hugging Face directory; weights are read, and merged with adapters, when the freezer asks for
    their rows.
    """
    document = _read_json(directory, _CONFIG)
    if document is None:
        raise ModelFormatError(f"{directory} has no {_CONFIG}")
    config = Fields(document, _CONFIG)
    architecture = _architecture(document)  # before the weights: the clearest reason to refuse
    reader = _open_weights(directory)
    try:
        documents = _Documents(directory, config, config.integer("vocab_size"))
        frozen = _frozen_config(config, architecture, reader.shapes, documents.bos, documents.eos)
        ignored = [n for n in reader.shapes if n.endswith(".self_attn.rotary_emb.inv_freq")]
        if frozen.tie_embeddings:
            ignored.append(PARTS["output"].hf)  # some save the shared matrix twice
        label = directory.resolve().name
        tensors = AdaptedTensors(reader, lora)
        model = build_model(
            tensors,
            frozen,
            [rope_inv_freq(frozen.head_dim, *_rope(config))],
            kind="hf",
            name=name or label,
            source=" + ".join([f"{label} ({architecture.model_type})", *(one.path.resolve().name for one in lora)]),
            interleaved=False,
            ignored=ignored,
        )
        tensors.check_all_used()
        model.attachments = documents.attachments
    except BaseException:
        reader.close()
        raise
    model.close = reader.close
    return model
