"""Every kernel in the simulator against its CPU twin and the float64 oracle, under every schedule."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from pyengine_training.gpu_check.cases import Case, small_cases
from pyengine_training.gpu_check.judge import check
from pyengine_training.ops import cuda as ops
from pyengine_training.ops.cuda import attention as attention_module
from pyengine_training.ops.cuda import embedding as embedding_module
from pyengine_training.ops.cuda._runtime import use_runtime
from simulated_runtime import SimulatedRuntime
from simulator import SCHEDULES

CASES = {case.name: case for case in small_cases()}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and several groups of heads at sizes that can be simulated."""
    monkeypatch.setattr(attention_module, "TILE", 4)
    monkeypatch.setattr(attention_module, "SCORES", 130)
    monkeypatch.setattr(embedding_module, "CHUNK", 3)


def run(case: Case, schedule: str, bf16: bool) -> dict[str, Any]:
    """Outputs of a case under a schedule, judged."""
    downloaded: dict[int, Any] = {}

    def download(array: Any) -> Any:
        downloaded[len(downloaded)] = array.copy()
        return array

    with use_runtime(SimulatedRuntime(schedule, seed=11)) as runtime:
        outcome = check(case, ops, bf16=bf16, download=download)
    assert runtime.launches or case.name.startswith("linear")
    assert outcome.ok, f"{schedule}: {outcome}"
    return downloaded


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_its_cpu_twin_under_every_schedule(name: str) -> None:
    results = [run(CASES[name], schedule, bf16=False) for schedule in SCHEDULES]
    for other in results[1:]:
        for key, array in results[0].items():
            np.testing.assert_array_equal(array, other[key])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.bf16])
def test_bfloat16_kernel_is_close_to_the_oracle(name: str) -> None:
    run(CASES[name], "forward", bf16=True)
