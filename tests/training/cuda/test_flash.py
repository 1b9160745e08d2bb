"""Attention on tensor cores, in the simulator, against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from pyengine_training.gpu_check.cases import attention
from pyengine_training.gpu_check.judge import check
from pyengine_training.ops import cuda as ops
from pyengine_training.ops.cuda._runtime import use_runtime
from simulated_runtime import SimulatedRuntime

# the third one has documents that begin and end inside tiles, and one that no earlier block of keys is seen by
SHAPES = [(1, 1, 1, 1, 16), (2, 2, 9, 1, 16), (1, 1, 90, 1, 16), pytest.param((1, 2, 23, 3, 32), marks=pytest.mark.slow)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("schedule", ["random", pytest.param("reverse", marks=pytest.mark.slow)])
def test_forward_and_backward(shape: tuple[int, ...], schedule: str) -> None:
    for case in attention(*shape, prefix="flash_"):
        with use_runtime(SimulatedRuntime(schedule)) as runtime:
            outcome = check(case, ops, bf16=True)
        wanted = ["flash_forward_kernel"]
        if "backward" in case.name:
            wanted += ["merge_heads_kernel", "delta_kernel", "flash_dq_kernel", "flash_dkv_kernel"]
        assert runtime.launches == wanted
        assert outcome.ok, outcome


def test_a_model_trains_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss with and without it, and that float32 and odd heads go the other way."""
    from pyengine_training.config import ModelConfig, TrainConfig
    from pyengine_training.device import Device, make_trainer
    from pyengine_training.ops.cuda import attention as module

    sizes = {"dim": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "hidden_dim": 16}
    model = ModelConfig(vocab_size=9, max_seq_len=4, **sizes)
    config = TrainConfig(seq_len=4, batch_size=1, shards=1, steps=2, optimizer="adamw", quantize="never")
    tokens = np.array([[1, 5, 2, 7]])
    losses = []
    for use_flash, precision in ((False, "bf16"), (True, "bf16"), (True, "float32")):
        monkeypatch.setattr(module, "use_flash", use_flash)
        with use_runtime(SimulatedRuntime()) as runtime:
            trainer = make_trainer(model, config, device=Device("cuda", precision))
            trainer.initialize()
            losses.append(trainer.step(tokens, tokens).loss)
        assert ("flash_dkv_kernel" in runtime.launches) == (use_flash and precision == "bf16")
    assert losses == pytest.approx([losses[2]] * 3, rel=0.02)
