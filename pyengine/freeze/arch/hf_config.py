"""What several architectures read in a Hugging Face config.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ModelFormatError, UnsupportedModelError
from ...format.config import MAX_POSITIONS, SOFTCAP_RANGE, XIELU, LayerSpec
from ...format.quantize import Float32Array
from ..fields import Fields
from ..rope import Rope, rope_inv_freq, yarn
from .base import Shape

_DEFAULT_ROPE_THETA = 10_000.0
FULL, SLIDING = "full_attention", "sliding_attention"
_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu_tanh"}
_UNGATED_ACTIVATIONS = {
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu": "gelu", "relu2": "relu2",
    XIELU: XIELU,
}  # fmt: skip


def activation(config: Fields, key: str = "hidden_act", default: str = "silu", known: Mapping[str, str] = _ACTIVATIONS) -> str:
    """FrozenConfig's name of the activation."""
    name = config.text(key, default)
    if name not in known:
        raise UnsupportedModelError(f"activation {name!r:.80} is not implemented; known are {', '.join(sorted(known))}")
    return known[name]


def ungated_activation(config: Fields, default: str) -> str:
    """The same of an MLP without a gate."""
    return activation(config, "hidden_act", default, _UNGATED_ACTIVATIONS)


def multiplier(config: Fields, key: str, default: float = 1.0) -> float:
    """A factor that may be folded into weights, and divided by."""
    value = config.number(key, default)
    if not 1e-9 <= value <= 1e9:
        raise config.wrong(key, "a number in 1e-9..1e9")
    return value


def softcap(config: Fields, key: str) -> float:
    """A soft limit of scores or logits; 0 for none, as null says."""
    value = 0.0 if config.is_null(key) else config.number(key, 0.0)
    if not SOFTCAP_RANGE[0] <= value <= SOFTCAP_RANGE[1] and key in config:
        raise config.wrong(key, f"a number in {SOFTCAP_RANGE[0]}..{SOFTCAP_RANGE[1]}")
    return value


def is_mxfp4(config: Fields) -> bool:
    """Whether matrices are in MXFP4 (freeze/mxfp4.py)."""
    found = config.raw("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "mxfp4"


# ---------------------------------------------------------------------------- windows


def layer_kinds(config: Fields, default: Sequence[str], known: Sequence[str] = (FULL, SLIDING)) -> list[str]:
    """``layer_types``: every layer's kind, by default of attention: full or sliding."""
    kinds = config.raw("layer_types") or list(default)
    if not isinstance(kinds, list) or len(kinds) != len(default):
        raise ModelFormatError("config.json: layer_types must name every layer's attention")
    for kind in kinds:
        if kind not in known:
            raise UnsupportedModelError(
                f"a layer of type {kind!r:.80} is not implemented, only {' and '.join(known)}"
            )
    return kinds


def every(period: int, n_layers: int) -> list[str]:
    """The last layer of so many has no window."""
    return [SLIDING if (i + 1) % period else FULL for i in range(n_layers)]


def periodic_kinds(config: Fields, n_layers: int, period: int) -> list[str]:
    """By ``sliding_window_pattern``, by default ``period``: the last layer of so many has no window."""
    period = config.integer("sliding_window_pattern", period)
    if period < 1:
        raise config.wrong("sliding_window_pattern", "a positive integer")
    return every(period, n_layers)


def windows(config: Fields, kinds: Sequence[str], default: int | None = None) -> list[int]:
    """Every layer's attention window in positions, 0 for none. A key that is absent has ``default``, that of transformers'
    class; null is none."""
    none = [0] * len(kinds)
    if SLIDING not in kinds or config.is_null("sliding_window"):
        return none
    if default is None and "sliding_window" not in config:
        return none
    window = config.integer("sliding_window", default or 0)
    if window > MAX_POSITIONS:  # wider than any context
        return none
    return [window if kind == SLIDING else 0 for kind in kinds]


def no_windows(shape: Shape, **spec: Any) -> tuple[LayerSpec, ...]:
    """Every layer alike, and none with a window."""
    return (LayerSpec(**spec),) * shape.n_layers


# ---------------------------------------------------------------------------- RoPE


def rope_scaling(config: Fields) -> tuple[Fields, dict[str, Any]]:
    """The object that counts, for typed access, and as it is.

    Newer configurations have ``rope_parameters`` with the base inside, older ones ``rope_scaling`` beside ``rope_theta``. Of both
    the older counts, and then nothing of the newer does: model cards tell people to add a rope_scaling.
    """
    key = "rope_scaling" if config.table("rope_scaling", None) else "rope_parameters"
    scaling = config.table(key, {})
    return Fields(scaling, f"config.json: {key}"), scaling


def partial_rotary_factor(config: Fields) -> float:
    inside, _ = rope_scaling(config)
    return inside.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))


def rope_base(config: Fields, default: float = _DEFAULT_ROPE_THETA) -> float:
    inside, _ = rope_scaling(config)
    return inside.number("rope_theta", config.number("rope_theta", default))


def rope_table(config: Fields, rotated: int) -> Float32Array:
    """The one table of a model whose layers turn the same ``rotated`` elements, all, (rotated / 2), as transformers reads it."""
    kind, settings = _rope_settings(config, is_partial=False)
    return rope_inv_freq(rotated, rope_base(config), {**settings, "rope_type": kind})


def scaled_rope(
    config: Fields,
    rotated: int,
    default_base: float = _DEFAULT_ROPE_THETA,
    *,
    is_partial: bool = False,
    base: float | None = None,
) -> Rope:
    """The same, or YaRN; of a part of the elements, if it ``is_partial``, and with another base than the configuration's, if one
    is given."""
    kind, settings = _rope_settings(config, is_partial)
    base = rope_base(config, default_base) if base is None else base
    if kind != "yarn":
        return Rope(rope_inv_freq(rotated, base, {**settings, "rope_type": kind}))
    return yarn(rotated, base, settings)


def one_rope(config: Fields, shape: Shape, default_base: float = _DEFAULT_ROPE_THETA) -> dict[str, Any]:
    """The fields of Traits of a model whose layers all turn whole heads alike, perhaps by YaRN."""
    rope = scaled_rope(config, shape.head_dim, default_base)
    return {"rope_tables": (rope.inv_freq,), "rope_amplitudes": (rope.amplitude,)}


def has_ropes_of_kinds(config: Fields) -> bool:
    """Whether ``rope_parameters`` has an object for a kind of layer."""
    return any(isinstance(value, dict) for value in config.table("rope_parameters", {}).values())


def ropes_of_kinds(config: Fields, head_dim: int, bases: Mapping[str, float]) -> dict[str, Rope]:
    """The tables of the kinds of layers that ``bases`` names, with the base of each where nothing else is said: from
    ``rope_parameters``, which has an object for each kind, and a ``rope_scaling``, which is of the full layers only."""
    inside = Fields(config.table("rope_parameters", {}), "config.json: rope_parameters")
    objects = {kind: inside.table(kind, {}) for kind in bases}
    objects[FULL] = {**objects[FULL], **config.table("rope_scaling", {})}
    ropes = {}
    for kind, found in objects.items():
        scaling = Fields(found, f"config.json: RoPE parameters of {kind}")
        rope_type = scaling.text("rope_type", scaling.text("type", "default"))
        if scaling.number("partial_rotary_factor", 1.0) != 1.0 or rope_type == "llama3":
            raise UnsupportedModelError(f"RoPE type {rope_type!r:.80}, or one over a part of the head, for this architecture")
        base = scaling.number("rope_theta", bases[kind])
        if rope_type == "yarn":
            key = "original_max_position_embeddings"
            trained = scaling.number(key, config.number("max_position_embeddings"))
            ropes[kind] = yarn(head_dim, base, {**found, key: trained, "truncate": scaling.flag("truncate", True)})
        else:
            ropes[kind] = Rope(rope_inv_freq(head_dim, base, {**found, "rope_type": rope_type}))
    return ropes


def _rope_settings(config: Fields, is_partial: bool) -> tuple[str, dict[str, Any]]:
    """(RoPE's type, its numbers as transformers finds them)."""
    inside, scaling = rope_scaling(config)
    if any(isinstance(value, dict) for value in scaling.values()):
        raise UnsupportedModelError("RoPE parameters that differ between layers are not implemented")
    if not is_partial and partial_rotary_factor(config) != 1.0:
        raise UnsupportedModelError("partial_rotary_factor is not implemented for this architecture")
    numbers: dict[str, float] = {
        name: inside.number(name) for name, value in scaling.items() if type(value) in (int, float)
    }
    kind = inside.text("rope_type", inside.text("type", "default"))
    if kind in ("llama3", "yarn"):
        key = "original_max_position_embeddings"
        numbers[key] = config.number(key, numbers.get(key, config.number("max_position_embeddings")))
    if kind == "mrope":  # three positions of a token, which are one in a text
        kind = "default"
    return kind, {**scaling, **numbers, "truncate": inside.flag("truncate", True)}
