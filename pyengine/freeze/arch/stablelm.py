"""StableLM 2: LayerNorms, RoPE over a part of the head, and perhaps halves of a layer that are parallel."""

from __future__ import annotations

from ...errors import UnsupportedModelError
from ...format.config import NORMS, PARALLEL
from ..fields import Fields
from . import gguf_keys, hf_config, rotary
from .base import PARTS, Architecture, Shape, Tensors, Traits
from .layer_norm import NORM_BIASES, QKV_BIASES, folded

_PARALLEL_KEY = "use_parallel_residual"


def _norm(is_parallel: bool) -> str:
    return PARALLEL if is_parallel else NORMS[0]


def _hf(config: Fields, shape: Shape) -> Traits:
    if config.flag("qk_layernorm", False):
        raise UnsupportedModelError("qk_layernorm, LayerNorms of q and k heads, is not implemented")
    rotated, is_parallel = rotary.hf_rotated(config, shape), config.flag(_PARALLEL_KEY, False)
    plain = Traits(
        layers=hf_config.no_windows(shape, norm=_norm(is_parallel), activation=hf_config.activation(config)),
        **rotary.hf_rope(config, shape, rotated),
        folds=rotary.folds(rotary.order(shape.head_dim, rotated)),
    )
    own = QKV_BIASES if config.flag("use_qkv_bias", False) else ()
    return folded(plain, norm_eps=config.number("layer_norm_eps", 1e-5), own=own, is_parallel=is_parallel)


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    rotated, is_parallel = rotary.gguf_rotated(keys, shape), keys.flag(_PARALLEL_KEY, False)
    plain = Traits(
        layers=gguf_keys.same_windows(keys, shape, norm=_norm(is_parallel)),
        **rotary.gguf_rope(keys, shape, file, rotated),
        folds=rotary.folds(rotary.order(shape.head_dim, rotated)),
    )
    own = QKV_BIASES if gguf_keys.has_bias(file, "attn_q") else ()
    eps = gguf_keys.norm_eps(keys, gguf_keys.LAYER_NORM_EPS)
    return folded(plain, norm_eps=eps, own=own, is_parallel=is_parallel)


STABLELM = Architecture(
    "StableLmForCausalLM", "stablelm", "stablelm", _hf, _gguf, {**PARTS, **NORM_BIASES},
    hf_defaults={"partial_rotary_factor": 0.25}, gguf_keys=frozenset({gguf_keys.LAYER_NORM_EPS, _PARALLEL_KEY}),
)  # fmt: skip
