"""The attachment ``config.json``: the shape of a model (csrc/FORMAT.md, section 2).

A file comes from strangers, and perhaps from a later version of this program: every value is checked, and what is not
known is refused by its name, except below ``extra``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ..errors import ModelFormatError, UnsupportedModelError
from .strict_json import parse_json_object

MAX_DIM = 1 << 20
MAX_LAYERS = 4096
MAX_HEAD_DIM = 512
MAX_POSITIONS = 1 << 24  # above it, positions are no longer exact in float32
MAX_ROPE_TABLES = 16
DEFAULT_KIND = "int8_g64"

KEY_BIAS = "key_bias"  # a part of the keys' bias is kept out of the cache
FEATURES = frozenset({KEY_BIAS})  # what a file may require
PARALLEL = "rmsnorm_parallel"
# before attention and the MLP, after them, both; one before both, which read the same
NORMS = ("rmsnorm", "rmsnorm_after", "rmsnorm_around", PARALLEL)
XIELU = "xielu"  # with three numbers of each layer
UNGATED = ("gelu_tanh", "gelu", "relu2", XIELU)
ACTIVATIONS = ("swiglu", "geglu_tanh", "swiglu_clamped", *UNGATED)
SHORT_CONV = "short_conv"
MIXERS = ("attention", SHORT_CONV)  # what a position sees others by
MAX_TAPS = 16  # positions that a convolution sees
MAX_EXPERTS = 1024  # of a layer
MAX_MODEL_EXPERTS = 16_384  # of all layers: a file has at most 65,536 tensors, four for each, six with biases
SOFTCAP_RANGE = (2.0**-10, 2.0**20)

_INT_RANGES = {
    "dim": (1, MAX_DIM),
    "hidden_dim": (1, MAX_DIM),
    "n_layers": (1, MAX_LAYERS),
    "n_heads": (1, 65_536),
    "n_kv_heads": (1, 65_536),
    "head_dim": (2, MAX_HEAD_DIM),
    "vocab_size": (1, 1 << 24),
    "max_seq_len": (1, MAX_POSITIONS),
}
_FLAGS = ("tie_embeddings", "qkv_bias", "o_bias", "qk_norm")
# Absent from a file that does not need it, as softcaps are.
_OPTIONAL_FLAGS = (
    "qk_norm_all_heads", "experts_normalized", "shared_gated", "gate_up_bias", "down_bias", "output_bias", "attention_sinks",
    "router_bias", "qk_norm_after_rope",
)  # fmt: skip
_SOFTCAPS = ("attention_softcap", "logits_softcap")
_EXPERTS = ("n_experts", "n_experts_used", "shared_hidden_dim")
_MAX_EOS_TOKENS = 256
_MAX_REQUIRED = 256


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ModelFormatError(f"config: {name} must be an integer in {low}..{high}, not {value!r:.80}")


def _check_name(what: str, value: Any) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= 64:
        raise ModelFormatError(f"config: {what} must be a name of 1..64 characters, not {value!r:.80}")


def unknown(what: str, known: Iterable[str] = ()) -> UnsupportedModelError:
    """The refusal of what a later version may know, with what this one knows."""
    names = ", ".join(known)
    rest = f"; it knows {names}" if names else ""
    return UnsupportedModelError(f"{what}, which this version of pyengine does not know{rest}; a newer one may")


def _refuse_unknown_keys(document: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse the first key that is not known, or the first known one that is missing."""
    if strange := sorted(document.keys() - set(known)):
        raise unknown(f"config: {where} has the key {strange[0]!r:.80}")
    if missing := [name for name in known if name not in document]:
        raise ModelFormatError(f"config: key {missing[0]!r} of {where} is missing")


def _check_requires(names: Any) -> tuple[str, ...]:
    """Called before anything else is looked at: what a file requires may change the meaning of all of it."""
    if not isinstance(names, (tuple, list)) or len(names) > _MAX_REQUIRED:
        raise ModelFormatError(f"config: requires must list <= {_MAX_REQUIRED} names")
    for name in names:
        _check_name("requires", name)
        if name not in FEATURES:
            raise unknown(f"config: the model requires {name!r}")
    return tuple(names)


# ---------------------------------------------------------------------------- a draft head


class DraftHeadSpec(NamedTuple):
    """The shape of a draft head: a small network that guesses at next tokens from the model's final hidden state."""

    hidden_dim: int  # of its MLP
    vocab_size: int  # how many of the model's tokens it knows


def _draft_head(extra: Mapping[str, Any], vocab_size: int) -> DraftHeadSpec | None:
    if "draft" not in extra:
        return None
    document = extra["draft"]
    if not isinstance(document, Mapping):
        raise ModelFormatError("config: extra.draft must be an object")
    _refuse_unknown_keys(document, DraftHeadSpec._fields, "extra.draft")
    _check_int("hidden_dim of extra.draft", document["hidden_dim"], *_INT_RANGES["hidden_dim"])
    _check_int("vocab_size of extra.draft", document["vocab_size"], 1, vocab_size)
    return DraftHeadSpec(**document)


# ---------------------------------------------------------------------------- folded multipliers

MAX_FOLDED = 3.4e38  # what float32 holds
FOLDED_PARTS = ("q", "k", "v", "wo", "gate", "up", "down")  # matrices that an adapter beside the model may change


def _folded(extra: Mapping[str, Any]) -> dict[str, float] | None:
    if extra.get("folded", False) is False:  # False: more was done than adapters could undo
        return None
    document = extra["folded"]
    if not isinstance(document, Mapping):
        raise ModelFormatError("config: extra.folded must be an object")
    if strange := sorted(document.keys() - set(FOLDED_PARTS)):
        raise unknown(f"config: extra.folded has the key {strange[0]!r:.80}", FOLDED_PARTS)
    for part, value in document.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MAX_FOLDED:
            raise ModelFormatError(f"config: {part} of extra.folded is {value!r:.80}, not a number that float32 holds")
    return {part: float(value) for part, value in document.items()}


# ---------------------------------------------------------------------------- layers


class LayerSpec(NamedTuple):
    """What may differ from layer to layer."""

    window: int = 0  # a query sees the last `window` positions, its own included; 0 = all
    rope: int = 0  # which table of RoPE frequencies
    norm: str = NORMS[0]  # where the norms of the residual stream are
    activation: str = ACTIVATIONS[0]
    mixer: str = MIXERS[0]  # or a gated convolution of `window` positions in attention's place


_OPTIONAL_COLUMNS: Mapping[str, Any] = {"mixer": MIXERS[0]}  # absent from files whose layers all have attention


def same_layers(n_layers: int, **spec: Any) -> tuple[LayerSpec, ...]:
    """Every layer alike; ``spec`` are fields of LayerSpec."""
    _check_int("n_layers", n_layers, *_INT_RANGES["n_layers"])
    return (LayerSpec(**spec),) * n_layers


def _check_layers(layers: Any, n_layers: int, n_experts: int) -> tuple[LayerSpec, ...]:
    if not isinstance(layers, (tuple, list)) or len(layers) != n_layers:
        raise ModelFormatError(f"config: layers must describe {n_layers} layers")
    for i, (window, rope, norm, activation, mixer) in enumerate(layers):
        _check_int(f"window of layer {i}", window, 0, MAX_POSITIONS)
        _check_int(f"rope of layer {i}", rope, 0, MAX_ROPE_TABLES - 1)
        for what, name, known in (("norm", norm, NORMS), ("activation", activation, ACTIVATIONS), ("mixer", mixer, MIXERS)):
            _check_name(f"{what} of layer {i}", name)
            if name not in known:
                raise unknown(f"config: layer {i} has the {what} {name!r}", known)
        if norm == PARALLEL and n_experts:
            raise ModelFormatError(f"config: layer {i} has the norm {PARALLEL} and experts")
        if mixer == SHORT_CONV:
            _check_int(f"window of layer {i}, a {SHORT_CONV},", window, 1, MAX_TAPS)
        if mixer == SHORT_CONV and norm == PARALLEL:
            raise ModelFormatError(f"config: layer {i} has the norm {PARALLEL} and is a {SHORT_CONV}")
    tables = {layer.rope for layer in layers}
    if absent := set(range(max(tables))) - tables:
        raise ModelFormatError(f"config: no layer uses RoPE table {min(absent)}, and one uses table {max(tables)}")
    return tuple(layers)


def _columns(layers: tuple[LayerSpec, ...]) -> dict[str, Any]:
    """Field -> its value if all layers agree, else the list of values; without those that a file leaves out."""
    columns = {name: [getattr(layer, name) for layer in layers] for name in LayerSpec._fields}
    values = {name: column[0] if len(set(column)) == 1 else column for name, column in columns.items()}
    return {name: value for name, value in values.items() if name not in _OPTIONAL_COLUMNS or value != _OPTIONAL_COLUMNS[name]}


def _layers_from_columns(columns: Any, n_layers: Any) -> tuple[LayerSpec, ...]:
    """The inverse: every field is one value for all layers, or a list with one for each."""
    if not isinstance(columns, dict):
        raise ModelFormatError("config: layers must be an object")
    columns = {**_OPTIONAL_COLUMNS, **columns}
    _refuse_unknown_keys(columns, LayerSpec._fields, "layers")
    _check_int("n_layers", n_layers, *_INT_RANGES["n_layers"])
    values = []
    for name in LayerSpec._fields:
        column = columns[name]
        if isinstance(column, list) and len(column) != n_layers:
            raise ModelFormatError(f"config: layers.{name} lists {len(column)} values for {n_layers} layers")
        values.append(column if isinstance(column, list) else [column] * n_layers)
    return tuple(LayerSpec(*row) for row in zip(*values, strict=True))


# ---------------------------------------------------------------------------- kinds

Kinds = Mapping[str, "str | tuple[str, ...]"]


def _check_kinds(kinds: Any, n_layers: int) -> dict[str, str | tuple[str, ...]]:
    if not isinstance(kinds, Mapping) or not isinstance(kinds.get("default"), str):
        raise ModelFormatError("config: kinds must be an object with a default")
    checked: dict[str, str | tuple[str, ...]] = {}
    for role, kind in kinds.items():
        _check_name("a key of kinds", role)
        if isinstance(kind, (list, tuple)):
            if len(kind) != n_layers:
                raise ModelFormatError(f"config: kinds.{role} lists {len(kind)} kinds for {n_layers} layers")
            kind = tuple(kind)
        for one in kind if isinstance(kind, tuple) else [kind]:
            _check_name(f"kinds.{role}", one)
        checked[role] = kind
    return checked


# ---------------------------------------------------------------------------- the configuration

# Keys that a file leaves out where they say nothing: files of before there were such keys are as they were.
_OPTIONAL: Mapping[str, Any] = (
    dict.fromkeys(_OPTIONAL_FLAGS, False) | dict.fromkeys(_SOFTCAPS, 0.0) | dict.fromkeys(_EXPERTS, 0)
)


@dataclass(frozen=True)
class FrozenConfig:
    """The shape of a model. Every field is checked on construction: ModelFormatError for what cannot be,
    UnsupportedModelError for a name that is not known.

    Lengths are in positions; ``norm_eps`` is added to a mean square; a softcap of c makes c * tanh(x / c) of scores or logits, 0
    is none; ``qk_norm_all_heads`` says that the norms of q and k are over all heads together, ``qk_norm_after_rope`` that they
    come after RoPE. Of ``n_experts`` MLPs
    (0: a dense one) a row takes ``n_experts_used``, with weights that sum to 1 if ``experts_normalized``, and beside them a
    shared one of ``shared_hidden_dim`` (0: there is none), with a weight of its own if ``shared_gated``. With ``attention_sinks``
    each head's softmax has one score more, which has no value. ``kinds`` says how
    matrices are stored (the inventory resolves it), ``requires`` names what else a reader must know, ``extra`` is what it may
    ignore.
    """

    architecture: str
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    layers: tuple[LayerSpec, ...]  # (n_layers)
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    kinds: Kinds = field(default_factory=lambda: {"default": DEFAULT_KIND}, hash=False)
    requires: tuple[str, ...] = ()
    qk_norm_all_heads: bool = False
    attention_softcap: float = 0.0
    logits_softcap: float = 0.0
    n_experts: int = 0
    n_experts_used: int = 0
    experts_normalized: bool = False
    shared_hidden_dim: int = 0
    shared_gated: bool = False
    gate_up_bias: bool = False
    down_bias: bool = False
    output_bias: bool = False
    attention_sinks: bool = False
    router_bias: bool = False
    qk_norm_after_rope: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "requires", _check_requires(self.requires))
        if not isinstance(self.architecture, str) or not 1 <= len(self.architecture) <= 256:
            raise ModelFormatError("config: architecture must be a string of 1..256 characters")
        for name, (low, high) in _INT_RANGES.items():
            _check_int(name, getattr(self, name), low, high)
        for name in _FLAGS + _OPTIONAL_FLAGS:
            if type(getattr(self, name)) is not bool:
                raise ModelFormatError(f"config: {name} must be true or false")
        if self.head_dim % 2:
            raise ModelFormatError(f"config: head_dim must be even, not {self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise ModelFormatError(f"config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.q_dim > MAX_DIM:
            raise ModelFormatError(f"config: n_heads * head_dim {self.q_dim} exceeds {MAX_DIM}")
        eps = self.norm_eps
        if type(eps) not in (float, int) or not 1e-30 <= eps <= 1:  # NaN is not; no float is made of an integer
            raise ModelFormatError(f"config: norm_eps must be in 1e-30..1, not {eps!r:.80}")
        if self.key_bias and (not self.qkv_bias or self.qk_norm):
            raise ModelFormatError(f"config: {KEY_BIAS} needs qkv_bias, and a bias that no norm follows")
        if self.qk_norm_all_heads and not self.qk_norm:
            raise ModelFormatError("config: qk_norm_all_heads needs qk_norm")
        if self.qk_norm_after_rope and (not self.qk_norm or self.qk_norm_all_heads):
            raise ModelFormatError("config: qk_norm_after_rope needs qk_norm, of each head")
        for name in _SOFTCAPS:
            self._check_softcap(name)
        self._check_experts()
        self._check_tokens()
        object.__setattr__(self, "layers", _check_layers(self.layers, self.n_layers, self.n_experts))
        object.__setattr__(self, "kinds", _check_kinds(self.kinds, self.n_layers))
        if not isinstance(self.extra, Mapping):
            raise ModelFormatError("config: extra must be an object")
        _draft_head(self.extra, self.vocab_size)
        _folded(self.extra)

    def _check_softcap(self, name: str) -> None:
        value, (low, high) = getattr(self, name), SOFTCAP_RANGE
        if type(value) not in (float, int) or not (value == 0 or low <= value <= high):
            raise ModelFormatError(f"config: {name} must be 0 or in {low}..{high}, not {value!r:.80}")

    def _check_experts(self) -> None:
        _check_int("n_experts", self.n_experts, 0, MAX_EXPERTS)
        _check_int("n_experts_used", self.n_experts_used, min(1, self.n_experts), self.n_experts)
        if self.n_layers * self.n_experts > MAX_MODEL_EXPERTS:
            raise ModelFormatError(
                f"config: n_experts {self.n_experts} in {self.n_layers} layers: more than {MAX_MODEL_EXPERTS} in all"
            )
        if self.experts_normalized and not self.n_experts:
            raise ModelFormatError("config: experts_normalized needs n_experts")
        _check_int("shared_hidden_dim", self.shared_hidden_dim, 0, _INT_RANGES["hidden_dim"][1] if self.n_experts else 0)
        if self.shared_gated and not self.shared_hidden_dim:
            raise ModelFormatError("config: shared_gated needs shared_hidden_dim")
        if self.shared_hidden_dim and (self.gate_up_bias or self.down_bias):
            raise ModelFormatError("config: gate_up_bias and down_bias are not implemented beside a shared expert")
        if self.router_bias and not self.n_experts:
            raise ModelFormatError("config: router_bias needs n_experts")

    def _check_tokens(self) -> None:
        if self.bos_token_id is not None:
            _check_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        eos = self.eos_token_ids
        if not isinstance(eos, (tuple, list)) or len(eos) > _MAX_EOS_TOKENS:
            raise ModelFormatError(f"config: eos_token_ids must list <= {_MAX_EOS_TOKENS} ids")
        for token in eos:
            _check_int("eos_token_ids", token, 0, self.vocab_size - 1)
        object.__setattr__(self, "eos_token_ids", tuple(eos))

    def has_norms_before(self, layer: int) -> bool:
        """Whether what attention and the MLP of a layer read is normed."""
        return self.layers[layer].norm != "rmsnorm_after"

    def has_ffn_norm(self, layer: int) -> bool:
        """Whether what the MLP of a layer reads has a norm of its own."""
        return self.has_norms_before(layer) and self.layers[layer].norm != PARALLEL

    def has_norms_after(self, layer: int) -> bool:
        """Whether what attention and the MLP of a layer add is normed."""
        return self.layers[layer].norm in ("rmsnorm_after", "rmsnorm_around")

    def is_gated(self, layer: int) -> bool:
        """Whether the MLP of a layer has a gate beside what it gates."""
        return self.layers[layer].activation not in UNGATED

    def is_convolution(self, layer: int) -> bool:
        """Whether a layer has a convolution in attention's place."""
        return self.layers[layer].mixer == SHORT_CONV

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @property
    def key_bias(self) -> bool:
        """Whether layers have a ``key_bias``, the part of k's bias that is kept out of the cache."""
        return KEY_BIAS in self.requires

    @property
    def n_rope_tables(self) -> int:
        return 1 + max(layer.rope for layer in self.layers)

    @property
    def draft_head(self) -> DraftHeadSpec | None:
        """What ``extra`` says of a draft head in the file; None if there is none."""
        return _draft_head(self.extra, self.vocab_size)

    @property
    def folded(self) -> Mapping[str, float] | None:
        """By what a freezer multiplied the rows of parts, 1 for those that are not named; None: the file does not say."""
        return _folded(self.extra)

    def kind_of(self, role: str, layer: int | None) -> str:
        """How a matrix is stored: by its own entry of ``kinds``, else the default."""
        kind = self.kinds.get(role, self.kinds["default"])
        if isinstance(kind, str):
            return kind
        if layer is None:
            raise ModelFormatError(f"config: kinds.{role} lists kinds by layer, but the matrix belongs to no layer")
        return kind[layer]

    @classmethod
    def from_json(cls, text: bytes | str) -> FrozenConfig:
        """Parse ``config.json``."""
        document = parse_json_object(text, "config.json")
        _check_requires(document.get("requires"))
        document = {**_OPTIONAL, "extra": {}, **document}
        _refuse_unknown_keys(document, [f.name for f in fields(cls)], "config.json")
        document["layers"] = _layers_from_columns(document["layers"], document["n_layers"])
        return cls(**document)

    def to_document(self) -> dict[str, Any]:
        """``config.json`` as plain values; what a reader must know comes first."""
        kinds = {role: kind if isinstance(kind, str) else list(kind) for role, kind in self.kinds.items()}
        document: dict[str, Any] = {"requires": list(self.requires)}
        document |= {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("requires", "extra")}
        document = {key: value for key, value in document.items() if key not in _OPTIONAL or value != _OPTIONAL[key]}
        document |= {"layers": _columns(self.layers), "kinds": kinds, "eos_token_ids": list(self.eos_token_ids)}
        return document | ({"extra": dict(self.extra)} if self.extra else {})

    def to_json(self) -> str:
        """One line for each key."""
        lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in self.to_document().items())
        return "{\n" + ",\n".join(lines) + "\n}"
