"""Hugging Face directories (config.json, safetensors, tokenizer files) -> ``SourceModel``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import MissingFileError, ModelFormatError, PyEngineError, UnsupportedModelError
from ..files import read_regular
from ..format.config import MAX_DIM, MAX_HEAD_DIM, MAX_LAYERS, MAX_POSITIONS, FrozenConfig
from ..format.container import MAX_HEADER_BYTES, SafetensorsEntry
from ..format.quantize import Float32Array, RowSource
from ..format.strict_json import parse_json_object
from . import rank_head, sentence
from .arch import architecture_of_hf, is_classifier
from .arch.base import Architecture, Shape, Traits, spelled
from .arch.hf_config import is_mxfp4
from .build import TensorReader, build_model, checked_n_ctx, folded_multipliers, frozen_fields
from .fields import Fields
from .lora import AdaptedTensors, Adapter
from .mxfp4 import Mxfp4Tensors
from .packed import PackedTensors, StoredTensors
from .safetensors import SafetensorsReader
from .sources import SourceModel, row_blocks
from .special_tokens import begin_and_end, spellings
from .tokenizer import check_tokenizer_json, json_bytes

_CONFIG, _GENERATION, _SETTINGS, _TOKENS_MAP = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
_HEAD = "score.weight"  # of a classifier
_TOKENIZER, _TEMPLATE = "tokenizer.json", "chat_template.jinja"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TIED = "tie_word_embeddings"
DOCUMENTS = (_CONFIG, _GENERATION, _SETTINGS, _TOKENS_MAP, _TOKENIZER, _TEMPLATE, *sentence.DOCUMENTS, _INDEX)

_MAX_SHARDS = 4096
_MAX_NAME_BYTES = 255
_MAX_TOKENIZER_BYTES = 64 << 20  # twice the largest of today's vocabularies of 256k tokens


def _read_json(directory: Path, name: str) -> dict[str, Any] | None:
    """A JSON object, or None if there is no such file."""
    try:
        return parse_json_object(read_regular(directory / name, MAX_HEADER_BYTES), name)
    except MissingFileError:
        return None


# ---------------------------------------------------------------------------- tensors


class RenamedTensors:
    """The tensors of a text model under the names that they have when it is alone and whole.

    ``beginnings`` maps the beginnings of names in the file to those outside, the first that fits; what has none of them is not
    of the text model.
    """

    def __init__(self, reader: SafetensorsReader, beginnings: Mapping[str, str]) -> None:
        self._reader = reader
        self._names: dict[str, str] = {}
        for name in reader.shapes:
            found = next((begin for begin in beginnings if name.startswith(begin)), None)
            if found is None:
                continue
            if self._names.setdefault(beginnings[found] + name.removeprefix(found), name) != name:
                raise ModelFormatError(f"tensor {name!r} is there under another name too")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._reader.shapes
        return {name: shapes[inside] for name, inside in self._names.items()}

    def stored(self, name: str) -> tuple[int, SafetensorsEntry]:
        return self._reader.stored(self._names[name])

    def matrix(self, name: str) -> RowSource:
        return self._reader.matrix(self._names[name])

    def vector(self, name: str) -> Float32Array:
        return self._reader.vector(self._names[name])


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


def _text_tensors(file: SafetensorsReader, architecture: Architecture) -> tuple[StoredTensors, bool]:
    """(the tensors by the names of the architecture's parts, whether they are of what is inside of the class with an output
    matrix, saved alone and named so: Qwen3-Embedding's)."""
    if architecture.hf_text is not None:
        return RenamedTensors(file, architecture.hf_text), False
    inner = architecture.parts["tok_embeddings"].hf.partition(".")[0] + "."  # begins all names but the output matrix's: "model."
    if any(name.startswith(inner) for name in file.shapes):
        return file, False
    output = architecture.parts["output"].hf
    return RenamedTensors(file, {output: output, "": inner}), True


def missing_weights(directory: Path) -> list[str]:
    """The files of weights that a directory ought to have and has not. Raises ModelFormatError for an index that is damaged."""
    if (directory / _WEIGHTS).exists():
        return []
    return [name for name in _shard_names(directory) or [_WEIGHTS] if not (directory / name).exists()]


def refuse_unknown_architecture(directory: Path) -> None:
    """By config.json alone, before weights are fetched for nothing. Raises UnsupportedModelError, ModelFormatError."""
    architecture_of_hf(_read_json(directory, _CONFIG) or {})


def files_of(directory: Path) -> list[Path]:
    """Everything in a directory that decides what it freezes to, whether it is there or not."""
    names = [*DOCUMENTS, _WEIGHTS]
    with contextlib.suppress(PyEngineError):  # whoever opens it will say what is wrong
        names += _shard_names(directory)
    return [directory / name for name in names]


# ---------------------------------------------------------------------------- configuration


def _refuse_unknown_arithmetic(config: Fields, traits: Traits) -> None:
    if config.flag("mlp_bias", False) and not traits.gate_up_bias:
        raise UnsupportedModelError("mlp_bias is not implemented")
    if config.raw("use_bidirectional_attention") or not config.flag("is_causal", True):
        raise UnsupportedModelError("attention that is not causal (use_bidirectional_attention, is_causal) is not implemented")


def _text_config(document: dict[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The text model's own part of config.json; older files have its keys among the others."""
    if architecture.hf_text is None or ("text_config" not in document and "hidden_size" in document):
        return {}
    return Fields(document, _CONFIG).table("text_config")


def _config(found: dict[str, Any], architecture: Architecture) -> Fields:
    """What a model says of itself under the usual keys; one of its own counts where it has both."""
    own = {usual: name for name, usual in architecture.hf_keys.items() if name in found}
    usual = {key: found[name] for key, name in own.items()}
    return Fields({**architecture.hf_defaults, **found, **usual}, _CONFIG, names=own)


def _is_tied(whole: Fields, text: Fields, config: Fields, has_output: bool) -> bool:
    """Whether the embeddings are the output matrix too. Of a model whose text model is a part, version 4 of transformers goes by
    the part's flag and version 5 by the whole's: where they differ, by what the file has."""
    if _TIED in whole and _TIED in text and whole.flag(_TIED) != text.flag(_TIED):
        return not has_output
    return config.flag(_TIED, not has_output)


def _differ(reader: TensorReader, architecture: Architecture) -> bool:
    """Whether the output matrix, of a file that has one though it is said to be the embeddings, is another: then version 5 of
    transformers takes both as they are. Most such files have the shared matrix twice."""
    names = [architecture.parts[part].hf for part in ("tok_embeddings", "output")]
    if any(name not in reader.shapes for name in names) or reader.shapes[names[0]] != reader.shapes[names[1]]:
        return False  # whoever reads them will say what is wrong
    pairs = zip(*(row_blocks(reader.matrix(name)) for name in names), strict=True)
    return any(not np.array_equal(rows, others, equal_nan=True) for (_, rows), (_, others) in pairs)


def _vocab_size(config: Fields) -> int:
    found = config.integer("vocab_size")
    if found < 1:
        raise config.wrong("vocab_size", "a positive integer")
    return found


def _shape(config: Fields, is_tied: bool, n_ctx: int | None) -> Shape:
    dim, n_heads = config.integer("hidden_size"), config.integer("num_attention_heads")
    n_layers = config.integer("num_hidden_layers")
    if not 1 <= n_layers <= MAX_LAYERS:
        raise ModelFormatError(f"{_CONFIG}: num_hidden_layers {n_layers} is not in 1..{MAX_LAYERS}")
    if n_heads < 1 or not 1 <= dim <= MAX_DIM:  # JSON has integers of any size
        raise ModelFormatError(f"{_CONFIG}: {n_heads!r:.80} heads and hidden_size {dim!r:.80}")
    head_dim = config.integer("head_dim", dim // n_heads)
    if not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        raise ModelFormatError(f"{_CONFIG}: head_dim {head_dim} is not an even number in 2..{MAX_HEAD_DIM}")
    context = min(config.integer("max_position_embeddings"), MAX_POSITIONS)
    return Shape(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=config.integer("num_key_value_heads", n_heads),
        head_dim=head_dim,
        tied=is_tied,
        context=context,
        n_ctx=checked_n_ctx(n_ctx, context),
    )


def _frozen_config(
    config: Fields,
    architecture: Architecture,
    shape: Shape,
    traits: Traits,
    bos: int | None,
    eos: tuple[int, ...],
    extra: Mapping[str, Any],
) -> FrozenConfig:
    return FrozenConfig(
        architecture=architecture.hf,
        hidden_dim=config.integer("intermediate_size") if traits.hidden_dim is None else traits.hidden_dim,
        vocab_size=config.integer("vocab_size"),
        norm_eps=config.number("rms_norm_eps") if traits.norm_eps is None else traits.norm_eps,
        bos_token_id=bos,
        eos_token_ids=eos,
        extra=extra,
        **frozen_fields(shape, traits),
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
        self.ids = ids = check_tokenizer_json(tokenizer, vocab_size)
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


def _head(reader: TensorReader, output: str, ids: Mapping[str, int], traits: Traits) -> dict[str, Any]:
    """Which tokens a reranker's head stands for, for ``extra``; output: the name of the output matrix."""
    for name in (_HEAD, output):
        if len(reader.shapes.get(name, ())) != 2:
            raise ModelFormatError(f"tensor {name!r} is missing, or no matrix")
    head, rows = reader.matrix(_HEAD), reader.matrix(output)
    return {"rerank": rank_head.tokens_of(head, rows, ids, tolerance=rank_head.EXACT, is_folded=bool(traits.folds))}


def _models_in(directory: Path) -> str:
    """For the error about a directory that is no model: a few files in it that may be one."""
    with contextlib.suppress(OSError):
        files = [one.name for one in directory.iterdir() if one.suffix in (".gguf", ".safetensors")]
        names = sorted(name for name in files if not name.startswith("model"))[:3]  # model-00001-of-00002.safetensors is a part
        return f"; a model may be a file in it: {', '.join(names)}" if names else ""
    return ""


def load_hf(
    directory: Path, name: str | None = None, lora: Sequence[Adapter] = (), n_ctx: int | None = None
) -> SourceModel:
    """Read the headers of a Hugging Face directory; weights are read, and merged with adapters, when the freezer asks for
    their rows. ``n_ctx`` as in ``freeze``.
    """
    document = _read_json(directory, _CONFIG)
    if document is None:
        raise ModelFormatError(f"{directory} has no {_CONFIG}{_models_in(directory)}")
    architecture = architecture_of_hf(document)  # before the weights: the clearest reason to refuse
    text = _text_config(document, architecture)
    config = _config(document | text, architecture)
    file = _open_weights(directory)
    try:
        stored, is_inner = _text_tensors(file, architecture)
        packing = config.table("quantization_config", {})
        reader: TensorReader = stored
        if packing:
            settings = Fields(packing, f"{_CONFIG}: quantization_config")
            reader = Mxfp4Tensors(stored) if is_mxfp4(config) else PackedTensors(stored, settings)
        documents = _Documents(directory, config, _vocab_size(config))
        has_output = architecture.parts["output"].hf in reader.shapes
        whole, inside = Fields(document, _CONFIG), Fields({**architecture.hf_defaults, **text}, _CONFIG)
        # A model that was saved without an output matrix is for its hidden states; its embeddings stand there, as in GGUF.
        is_ranker = is_classifier(document)
        is_tied = _is_tied(whole, inside if text else whole, config, has_output) or ((is_inner or is_ranker) and not has_output)
        is_tied = is_tied and not (has_output and _differ(reader, architecture))
        shape = _shape(config, is_tied, n_ctx)
        traits = architecture.from_hf(config, shape)
        _refuse_unknown_arithmetic(config, traits)
        extra = sentence.extra_of(partial(_read_json, directory), config.integer("vocab_size")) | folded_multipliers(traits)
        if is_ranker:
            extra |= _head(reader, spelled(architecture.parts, shape.tied)["output"].hf, documents.ids, traits)
        frozen = _frozen_config(config, architecture, shape, traits, documents.bos, documents.eos, extra)
        ignored = [n for n in reader.shapes if n.endswith((".self_attn.rotary_emb.inv_freq", *architecture.hf_ignored))]
        if is_ranker:
            ignored.append(_HEAD)
        if shape.tied:
            ignored.append(architecture.parts["output"].hf)  # some save the shared matrix twice
        label = directory.resolve().name
        tensors = AdaptedTensors(reader, lora)
        model = build_model(
            tensors,
            frozen,
            traits.rope_tables,
            parts=spelled(architecture.parts, shape.tied),
            kind="hf",
            name=name or label,
            source=" + ".join([f"{label} ({architecture.model_type})", *(one.path.resolve().name for one in lora)]),
            interleaved=False,
            folds=traits.folds,
            query_scales=[traits.query_scale(i) for i in range(shape.n_layers)],
            ignored=ignored,
        )
        tensors.check_all_used()
        model.attachments = documents.attachments
    except BaseException:
        file.close()
        raise
    model.close = file.close
    return model
