"""Ministral 3, and the text models of it and of Mistral Small 3.1 and 3.2, which see images: Mistrals, Ministral 3 with YaRN.

Ministral 3's queries grow with their position, in steps of the length of the first training. A frozen file has the positions
before the first step, whose queries are as they are."""

from __future__ import annotations

from ...errors import InvalidArgumentError, ModelFormatError
from ...format.config import LayerSpec
from ..fields import Fields
from ..rope import Rope
from . import gguf_keys, hf_config
from .base import Architecture, Shape, Tensors, Traits
from .gemma import TEXT_OF_IMAGES

_GROWTH = "attention.temperature_scale"
_DEFAULT_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16_384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip


def _positions(shape: Shape, growth: float, step: int) -> int | None:
    """Those that the file has, if it is not for the checkpoint to say. InvalidArgumentError if more are asked for,
    ModelFormatError for a step that is none."""
    if growth == 0.0:
        return None
    if step < 1:
        raise ModelFormatError(f"queries that grow every {step!r:.80} positions, of original_max_position_embeddings")
    most = min(step, shape.context)
    if shape.n_ctx is not None and shape.n_ctx > most:
        raise InvalidArgumentError(
            f"n_ctx is {shape.n_ctx}, but queries that are scaled by their position, from {most} on, are not implemented"
        )
    return most if shape.n_ctx is None else shape.n_ctx


def _traits(windows: list[int], rope: Rope, activation: str, max_seq_len: int | None) -> Traits:
    return Traits(
        layers=tuple(LayerSpec(window=window, activation=activation) for window in windows),
        rope_tables=(rope.inv_freq,),
        rope_amplitudes=(rope.amplitude,),
        max_seq_len=max_seq_len,
    )


def _hf(config: Fields, shape: Shape) -> Traits:
    inside, _ = hf_config.rope_scaling(config)
    growth = inside.number("llama_4_scaling_beta", 0.0)
    step = inside.integer("original_max_position_embeddings") if growth != 0.0 else 0
    windows = hf_config.windows(config, [hf_config.SLIDING] * shape.n_layers)
    rope = hf_config.scaled_rope(config, shape.head_dim)
    return _traits(windows, rope, hf_config.activation(config), _positions(shape, growth, step))


def _gguf(keys: Fields, shape: Shape, file: Tensors) -> Traits:
    growth = keys.number(_GROWTH, 0.0)
    step = keys.integer("rope.scaling.original_context_length") if growth != 0.0 else 0
    windows = [gguf_keys.window(keys)] * shape.n_layers
    return _traits(windows, gguf_keys.scaled_rope(keys, shape, file), "swiglu", _positions(shape, growth, step))


MINISTRAL3 = Architecture(
    "Ministral3ForCausalLM", "ministral3", "mistral3", _hf, _gguf, gguf_permuted=True,
    hf_defaults={"num_key_value_heads": 8, "head_dim": 128, "rope_parameters": _DEFAULT_ROPE},
    gguf_keys=frozenset({gguf_keys.YARN_LOG, _GROWTH}),
)  # fmt: skip
# Its text model may be a Mistral, whose RoPE is plain if nothing is said.
MISTRAL3_IMAGES = MINISTRAL3._replace(
    hf="Mistral3ForConditionalGeneration", model_type="mistral3", hf_text=TEXT_OF_IMAGES,
    hf_defaults={"num_key_value_heads": 8, "head_dim": 128},
)  # fmt: skip
