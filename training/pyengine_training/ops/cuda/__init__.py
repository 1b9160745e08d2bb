"""The CUDA back end: Numba kernels on flat arrays, matrix products by cuBLAS, the names and signatures of ``ops.cpu``.

Importing it needs numba-cuda; using it needs a GPU, or the simulator of the tests. Arrays are the runtime's
(:mod:`._runtime`): cupy's on a GPU.
"""

from __future__ import annotations

from .adamw import adamw_update
from .attention import attention_backward, attention_forward, attention_scratch, attention_state
from .buffers import add, copy, counted_rows, empty, fill, loss_rows, total, upload, wide_dtype, zeros
from .cross_entropy import cross_entropy_forward, cross_entropy_forward_backward
from .embedding import embedding_backward, embedding_forward, embedding_scratch
from .fake_quant import fake_quant_activations, fake_quant_heads, fake_quant_weights
from .flash import flash_attention_backward, flash_attention_forward, flash_attention_scratch
from .grad_norm import clip_coefficient, sum_of_squares
from .heads import merge_heads, split_heads
from .kl import cross_entropy_kl_forward_backward
from .linear import linear_backward_input, linear_backward_weight, linear_forward
from .muon import muon_scratch, muon_update
from .qk_norm import qk_norm_backward, qk_norm_forward, qk_norm_scratch, qk_norm_state
from .rmsnorm import (
    rmsnorm_backward,
    rmsnorm_forward,
    rmsnorm_residual_forward,
    rmsnorm_scratch,
    rmsnorm_state,
)
from .rope import qkv_rope_backward, qkv_rope_forward, rope_tables
from .swiglu import swiglu_backward, swiglu_forward

__all__ = [
    "adamw_update",
    "add",
    "attention_backward",
    "attention_forward",
    "attention_scratch",
    "attention_state",
    "clip_coefficient",
    "copy",
    "counted_rows",
    "cross_entropy_forward",
    "cross_entropy_forward_backward",
    "cross_entropy_kl_forward_backward",
    "embedding_backward",
    "embedding_forward",
    "embedding_scratch",
    "empty",
    "fake_quant_activations",
    "fake_quant_heads",
    "fake_quant_weights",
    "fill",
    "flash_attention_backward",
    "flash_attention_forward",
    "flash_attention_scratch",
    "linear_backward_input",
    "linear_backward_weight",
    "linear_forward",
    "loss_rows",
    "merge_heads",
    "muon_scratch",
    "muon_update",
    "qk_norm_backward",
    "qk_norm_forward",
    "qk_norm_scratch",
    "qk_norm_state",
    "qkv_rope_backward",
    "qkv_rope_forward",
    "rmsnorm_backward",
    "rmsnorm_forward",
    "rmsnorm_residual_forward",
    "rmsnorm_scratch",
    "rmsnorm_state",
    "rope_tables",
    "split_heads",
    "sum_of_squares",
    "swiglu_backward",
    "swiglu_forward",
    "total",
    "upload",
    "wide_dtype",
    "zeros",
]
