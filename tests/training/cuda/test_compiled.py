"""Every kernel, with the types it is launched with, compiled for compute capability 9.0: no float64, no spills."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

import numpy as np
from compiled import RecordingRuntime, float64_lines, ptx, usage
from pyengine_training.backend.cuda import CudaBackend
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.gpu_check.cases import attention, cross_entropy, small_cases
from pyengine_training.gpu_check.judge import check
from pyengine_training.ops import cuda as ops
from pyengine_training.ops.cuda._runtime import use_runtime
from pyengine_training.trainer import Trainer


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
    """(kernel, signature) -> threads of every launch that training steps and the cases make, both precisions."""
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8, "hidden_dim": 16}
    model = ModelConfig(vocab_size=9, max_seq_len=4, **sizes)
    tokens = np.zeros((2, 4), np.int64)
    with use_runtime(RecordingRuntime()) as runtime:
        for precision in ("bf16", "float32"):
            config = TrainConfig(seq_len=4, batch_size=2, shards=1, steps=2, decay_fraction=0.5, quantize_fraction=0.0)
            trainer = Trainer(model, config, CudaBackend(model, config, precision=precision))
            trainer.step(tokens, tokens)
            trainer.step(tokens, tokens)  # the quantized phase
            trainer.close()
        widest = cross_entropy(1, 8192)  # rows that get the largest blocks, whose registers must suffice
        for case in (*small_cases(), *widest, *attention(1, 1, 3, 1, 64, prefix="flash_")):
            for bf16 in case.precisions:
                check(case, ops, bf16=bf16)
    return runtime.launches


def check_compiled(launches: dict[tuple[Any, Any], int], folder: Path) -> int:
    """Compile all; returns how many were assembled."""
    reason = nvvm_missing()
    if reason:
        pytest.skip(reason)
    lines = []
    for (kernel, signature), threads in launches.items():
        name = f"{kernel.py_func.__name__}{signature.args}"
        text = ptx(kernel, signature)
        assert not list(float64_lines(text)), f"{name}: {list(float64_lines(text))[:5]}"
        if kernel.targetoptions.get("fastmath") is False:
            assert "div.approx" not in text and "fma.rn" not in text, name
        if shutil.which("ptxas"):
            used = usage(text, folder)
            lines.append(f"{kernel.py_func.__name__}: {used}")
            assert used.spill_bytes == used.stack_bytes == 0, f"{name}: {used}"
            assert used.registers * threads <= 65536, f"{name}: {used} with {threads} threads"
    print("\n".join(sorted(lines)))
    return len(lines)


def test_every_kernel_compiles_without_float64_and_without_spills(tmp_path: Path) -> None:
    """Once each, in the types that a step in bfloat16 gives it; those on tensor cores are in the slow test."""
    first: dict[Any, Any] = {}
    launches = recorded()
    for key in launches:
        if "flash" not in key[0].py_func.__name__:
            first.setdefault(key[0], key)
    assert len(first) >= 30
    assert check_compiled({key: launches[key] for key in first.values()}, tmp_path) in (0, len(first))


@pytest.mark.slow
def test_every_kernel_compiles_in_all_its_types(tmp_path: Path) -> None:
    launches = recorded()
    assert sum("flash" in kernel.py_func.__name__ for kernel, _ in launches) == 3
    check_compiled(launches, tmp_path)
