"""nanochat: norms without weights, also of each embedding and of each q and k head; no gate, squares of what is positive; a
softcap of the logits.

It norms heads after RoPE: without weights that is what is done before it here, as no turn changes a mean square; an amplitude
of RoPE (YaRN's) is lost in that norm. Its RoPE turns the other way round: it is the usual one of a head whose halves have changed
places.
"""

from __future__ import annotations

import numpy as np

from ..fields import Fields
from . import hf_config, rotary
from .base import PARTS, Architecture, Fold, Order, Shape, SourceName, Traits, no_gguf

_NORMS = ("attention_norm", "ffn_norm", "norm", "q_norm", "k_norm")
_MLP = {
    "up": SourceName("model.layers.{i}.mlp.fc1.weight", "blk.{i}.ffn_up.weight"),
    "down": SourceName("model.layers.{i}.mlp.fc2.weight", "blk.{i}.ffn_down.weight"),
}


def _hf(config: Fields, shape: Shape) -> Traits:
    has_bias = config.flag("attention_bias", False)
    halves: Order = np.roll(np.arange(shape.head_dim), shape.head_dim // 2)
    return Traits(
        layers=hf_config.no_windows(shape, activation=hf_config.ungated_activation(config, "relu2")),
        rope_tables=(hf_config.scaled_rope(config, shape.head_dim).inv_freq,),
        qkv_bias=has_bias,
        o_bias=has_bias,
        qk_norm=True,
        logits_softcap=hf_config.softcap(config, "final_logit_softcapping"),
        is_untied=True,
        folds={
            **dict.fromkeys(_NORMS, Fold(offset=1.0, is_absent=True)),
            **rotary.folds(halves),
            "tok_embeddings": Fold(row_norm_eps=config.number("rms_norm_eps")),
        },
    )


NANOCHAT = Architecture(
    "NanoChatForCausalLM", "nanochat", None, _hf, no_gguf, {**PARTS, **_MLP},
    hf_defaults={"rms_norm_eps": 1e-6, "final_logit_softcapping": 15.0},
)  # fmt: skip
