"""Every kernel, with the types it is launched with, compiled for compute capability 9.0: no float64, no spills."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba.cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

import numpy as np
from compiled import RecordingRuntime, float64_lines, ptx, usage
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.cuda_trainer import CudaTrainer
from pyengine_training.gpu_check.cases import check, small_cases
from pyengine_training.ops import cuda as ops
from pyengine_training.ops.cuda._runtime import use_runtime


def nvvm_missing() -> str | None:
    """Why nothing can be compiled here, or None."""
    try:
        from numba import cuda, types

        def empty(x: Any) -> None:
            x[0] = 1

        cuda.compile_ptx(empty, types.void(types.int32[::1]), cc=(9, 0))
    except Exception as error:  # whatever the tool chain raises when a library is missing
        return f"NVVM is not usable here ({type(error).__name__}): pip install 'numba-cuda[cu13]'"
    return None


def recorded() -> dict[tuple[Any, Any], int]:
    """(kernel, signature) -> threads of every launch that the cases and training steps make, both precisions."""
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "hidden_dim": 16}
    model = ModelConfig(vocab_size=9, max_seq_len=4, **sizes)
    tokens = np.zeros((2, 4), np.int64)
    with use_runtime(RecordingRuntime()) as runtime:
        for precision in ("bf16", "float32"):
            config = TrainConfig(seq_len=4, batch_size=2, shards=1, steps=2, decay_fraction=0.5)
            trainer = CudaTrainer(model, config, precision=precision)
            trainer.step(tokens, tokens)
            trainer.step(tokens, tokens)  # the quantized phase
            trainer.close()
        for case in small_cases():
            for bf16 in (False, True) if case.bf16 else (False,):
                check(case, ops, bf16=bf16)
    return runtime.launches


def test_every_kernel_compiles_without_float64_and_without_spills(tmp_path: Path) -> None:
    reason = nvvm_missing()
    if reason:
        pytest.skip(reason)
    has_ptxas = shutil.which("ptxas") is not None
    lines = []
    for (kernel, signature), threads in recorded().items():
        name = f"{kernel.py_func.__name__}{signature.args}"
        text = ptx(kernel, signature)
        assert not list(float64_lines(text)), f"{name}: {list(float64_lines(text))[:5]}"
        if kernel.targetoptions.get("fastmath") is False:
            assert "div.approx" not in text and "fma.rn" not in text, name
        if has_ptxas:
            used = usage(text, tmp_path)
            lines.append(f"{kernel.py_func.__name__}: {used}")
            assert used.spill_bytes == 0, f"{name}: {used}"
            assert used.registers * threads <= 65536, f"{name}: {used} with {threads} threads"
    assert len(lines) > 30 or not has_ptxas
    print("\n".join(sorted(lines)))
