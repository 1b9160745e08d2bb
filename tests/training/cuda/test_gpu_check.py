"""The check for a GPU machine, without one: its control flow, and its sections on the simulator at tiny sizes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from pyengine_training.arena import Arena
from pyengine_training.backend.cuda import CudaBackend
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.gpu_check import __main__ as main
from pyengine_training.gpu_check import ranks, sections
from pyengine_training.gpu_check.cases import linear, rmsnorm
from pyengine_training.ops.cuda import attention
from pyengine_training.ops.cuda._runtime import use_runtime
from simulated_runtime import SimulatedRuntime

ROOT = Path(__file__).parents[3]
PATIENCE = 600  # seconds that a process lasts which nobody should wait for
TINY = ModelConfig(vocab_size=11, dim=8, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=4, hidden_dim=8, max_seq_len=4)


def has_gpu() -> bool:
    from pyengine_training.ops.cuda._gpu import GpuRuntime
    from pyengine_training.ops.cuda._runtime import DeviceError

    try:
        GpuRuntime()
    except DeviceError:
        return False
    return True


def test_sections_and_limits_agree() -> None:
    assert list(main.LIMITS) == list(sections.SECTIONS)
    assert max(main.LIMITS.values()) < main.TOTAL < 480


def test_sections_without_time_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(main, "run_section", lambda _name, limit, _report: "ok" if limit > 100 else "timeout")
    monkeypatch.setattr(main, "TOTAL", 0)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", "kernels"])
    monkeypatch.delenv("OUT", raising=False)
    assert main.main() == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["summary"] == {"kernels": "no time left"}
    monkeypatch.setattr(main, "TOTAL", 470)
    assert main.main() == 0


def test_without_a_gpu_every_section_says_so_and_the_run_fails(tmp_path: Path) -> None:
    if has_gpu():
        pytest.skip("this machine has a GPU: training/gpu_check.sh is the test")
    command = [str(ROOT / "training" / "gpu_check.sh"), "--only", "versions", "--only", "kernels"]
    environment = {"OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 1, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "gpu_check.jsonl").read_text().splitlines()]
    assert [json.loads(line) for line in done.stdout.splitlines()] == lines
    assert [line.get("status") for line in lines[:-1]] == ["no device", "no device"]
    assert all("driver" in line["detail"] or "cupy" in line["detail"] for line in lines[:-1])
    assert lines[-1] == {"summary": {"versions": "no device", "kernels": "no device"}, "ok": False}


Section = Callable[..., str]


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Section:
    """Runs code as a section and returns its status; late: its time is over as soon as it has said something."""

    def run(code: str, *, late: bool = False) -> str:
        said = threading.Event()
        report = main.Report(str(tmp_path))
        line = report.line

        def noticed(text: str) -> None:
            line(text)
            said.set()

        class Child(subprocess.Popen[str]):
            def __init__(self, _command: Any, **options: Any) -> None:
                super().__init__([sys.executable, "-c", code], **options)

            def wait(self, timeout: float | None = None) -> int:
                if timeout is None or not late:
                    return super().wait()
                assert said.wait(PATIENCE)
                raise subprocess.TimeoutExpired(code, timeout)

        monkeypatch.setattr(report, "line", noticed)
        monkeypatch.setattr(main.subprocess, "Popen", Child)
        status = main.run_section("kernels", 1, report)
        report.close()
        return status

    return run


@pytest.mark.parametrize(
    "code, status",
    [
        ("print('{\"a\": 1}')", "ok"),
        ("import sys; print('{\"a\": 1}'); sys.exit(1)", "failed"),
        ("raise ValueError('broken')", "failed"),
        ("import sys; sys.exit(3)", "no device"),
        ("import os; os.kill(os.getpid(), 9)", "crashed"),
        ("import time; print('{\"a\": 1}', flush=True); time.sleep(60)", "timeout"),
    ],
)
def test_every_ending_of_a_section_is_told(code: str, status: str, tmp_path: Path, section: Section) -> None:
    assert section(code, late=status == "timeout") == status
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert lines[-1]["status"] == status
    assert ({"a": 1} in lines) == ("a" in code and "{" in code)
    if "broken" in code:
        assert "ValueError: broken" in lines[-1]["detail"]


@pytest.mark.parametrize("end", ["", "time.sleep(600)"])
def test_what_a_section_has_started_ends_with_it(end: str, tmp_path: Path, section: Section) -> None:
    """A compiler that has the section's pipes would hold up the others until it is done."""
    started = f"subprocess.Popen(['sh', '-c', 'sleep {PATIENCE}; touch {tmp_path}/done'])"
    code = f"import subprocess, time; {started}; print('{{\"a\": 1}}', flush=True); {end}"
    assert section(code, late=bool(end)) == ("timeout" if end else "ok")
    assert json.loads((tmp_path / "gpu_check.jsonl").read_text().splitlines()[0]) == {"a": 1}
    assert not (tmp_path / "done").exists()


def test_what_a_section_says_need_not_be_text(tmp_path: Path, section: Section) -> None:
    """Of libraries, in whatever encoding; more than a pipe holds, so that it would wait for a reader who has given up."""
    code = "import sys; sys.stderr.buffer.write(b'\\xff' * (1 << 18)); print('{\"a\": 1}'); sys.exit('broken')"
    assert section(code) == "failed"
    lines = [json.loads(line) for line in (tmp_path / "gpu_check.jsonl").read_text().splitlines()]
    assert lines[0] == {"a": 1} and lines[1]["detail"].endswith("broken")


def test_ranks_that_fail_do_not_lose_what_the_others_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def on_processes(size: int, work: Any) -> list[Any]:
        run = work.keywords["run"]
        if run.by == "host":
            raise RuntimeError("ranks ended with the exit codes [1, -9]")
        return [{"same": {"steps": [[1.5, 0.5, False]]}, "ms": 1.0}] * size

    said: list[dict[str, Any]] = []
    monkeypatch.setattr(ranks, "on_processes", on_processes)
    runs = [ranks.Run(1), ranks.Run(2, "host"), ranks.Run(2, "nccl")]
    config = TrainConfig(seq_len=3, batch_size=2, shards=2, steps=1)
    assert not ranks.compare(runs, TINY, config, lambda _step: (None, None), lambda **values: said.append(values))
    assert [(line["by"], line["ok"]) for line in said] == [("", True), ("host", False), ("nccl", True)]
    assert said[1]["error"] == "ranks ended with the exit codes [1, -9]"


class Pool:
    def free_all_blocks(self) -> None:
        return

    def used_bytes(self) -> int:
        return 1


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sections at sizes that can be simulated, on a simulated GPU."""
    values: dict[str, Any] = {
        "SMALL": TINY, "LARGE": TINY, "SEQ": 3, "ROWS": 2, "STEPS": 2, "PRODUCTS": (8,), "LARGE_ROWS": 1,
        "MEASURED": ((1, {}, False), (1, {}, True), (1, {"optimizer": "muon"}, False), (1, {"quantize": "always"}, False)),
        "WARMUP": 1, "REPEATS": 2,
        "small_cases": lambda: [*linear(3, 4, 5), *rmsnorm(2, 3)], "large_cases": lambda: [],
    }  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(sections, name, value)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(attention, "use_flash", False)
    runtime: Any = SimulatedRuntime()
    properties = {"name": b"NVIDIA H100 80GB HBM3"}
    runtime.cupy = SimpleNamespace(
        get_default_memory_pool=Pool,
        cuda=SimpleNamespace(
            runtime=SimpleNamespace(getDeviceProperties=lambda _i: properties),
            Event=lambda: SimpleNamespace(record=lambda _stream: None),
            get_elapsed_time=lambda _begin, _end: 1.0,
        ),
    )
    runtime.stream = None
    with use_runtime(runtime):
        yield runtime


@pytest.mark.parametrize(
    "name",
    [
        "kernels",
        "gradients",
        "matmuls",
        pytest.param("resume", marks=pytest.mark.slow),
        pytest.param("graph", marks=pytest.mark.slow),
    ],
)
def test_a_section_finds_a_right_device_right(name: str, tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sections.SECTIONS[name]()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines and all(line.get("ok", True) for line in lines)


def test_speed_and_memory_are_reported(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert sections.throughput() and sections.memory()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines[0]["tokens_per_second"] > 0 and 0 <= lines[0]["mfu"] < 1 and len(lines[0]["ms"]) == 2
    kinds = [(line["attention"], line["optimizer"], line["int8"]) for line in lines[:4]]
    assert kinds[:2] == [("unfused", "adamw", False), ("flash", "adamw", False)]
    assert kinds[2:] == [("unfused", "muon", False), ("unfused", "adamw", True)]
    assert lines[4] == {"engine": "torch", "error": "not installed"}
    assert [line["recompute"] for line in lines[5:]] == ["none", "activations", "block"]


def test_a_profile_names_every_kernel_and_product(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    launch = tiny.launch
    assert sections.profile()
    assert tiny.launch == launch, "the runtime is left as it was"
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    heads = [line for line in lines if "profile" in line]
    assert [(line["flash"], line["int8"]) for line in heads] == [(False, False), (True, False), (False, True)]
    names = {line["kernel"] for line in lines if "kernel" in line}
    assert "adamw_kernel" in names and any(name.startswith("gemm ") for name in names)


def test_the_loss_curve_is_judged(tiny: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Two steps learn nothing, so the section has to fail, with three curves that agree."""
    assert not sections.loss_curve()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["curve"] for line in lines[:3]] == ["cuda float32", "cuda bf16", "cpu"]
    assert lines[0]["losses"] == pytest.approx(lines[2]["losses"], abs=0.02)
    assert lines[3]["ok"] is False


def test_a_wrong_device_is_found(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gemm = tiny.gemm

    def wrong(product: Any) -> None:
        gemm(product)
        flat, start, *_ = product.c
        flat[start] += 1

    monkeypatch.setattr(tiny, "gemm", wrong)
    assert not sections.kernels()
    assert not sections.matmuls()
    assert not sections.gradients()


def test_a_gradient_that_is_no_number_is_found(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is not the first one, and the loss is right."""
    real = CudaBackend.grads.fget
    assert real is not None

    def broken(backend: CudaBackend) -> Arena:
        grads = real(backend)
        grads[list(grads.shapes)[-1]][0] = np.nan
        return grads

    monkeypatch.setattr(CudaBackend, "grads", property(broken))
    assert not sections.gradients()
