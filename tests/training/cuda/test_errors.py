"""No GPU, no driver, an old driver, missing libraries, the wrong simulator: an error that says what to do."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the CUDA kernels need numba-cuda: extra [cuda]")

from pyengine_training import device
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.errors import ConfigError, TrainingError
from pyengine_training.ops.cuda import _gpu, _jit
from pyengine_training.ops.cuda._gpu import GpuRuntime, _check_device, _check_driver, _libraries
from pyengine_training.ops.cuda._runtime import DeviceError, kept, runtime, use_runtime

MODEL = ModelConfig(
    vocab_size=19, dim=12, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=6, hidden_dim=20, max_seq_len=8
)
CONFIG = TrainConfig(seq_len=5, batch_size=2, shards=1, steps=4)


def fake_cuda(error: Any = None, capability: tuple[int, int] = (9, 0)) -> Any:
    return SimpleNamespace(
        cuda_error=lambda: error, get_current_device=lambda: SimpleNamespace(compute_capability=capability)
    )


def fake_cupy(version: int = 13000, count: int = 1) -> Any:
    calls = SimpleNamespace(driverGetVersion=lambda: version, getDeviceCount=lambda: count)
    return SimpleNamespace(cuda=SimpleNamespace(runtime=calls))


def test_no_driver() -> None:
    with pytest.raises(DeviceError, match=r"no NVIDIA driver.*--gpus all.*cannot be found"):
        _check_driver(fake_cuda("CUDA driver library\ncannot be found"), fake_cupy())


def test_old_driver() -> None:
    with pytest.raises(DeviceError, match=r"supports CUDA 11\.8, 12\.2 is needed: update the driver"):
        _check_driver(fake_cuda(), fake_cupy(version=11080))


def test_no_gpu() -> None:
    with pytest.raises(DeviceError, match=r"finds no GPU.*CUDA_VISIBLE_DEVICES"):
        _check_driver(fake_cuda(), fake_cupy(count=0))


def test_old_gpu() -> None:
    with pytest.raises(DeviceError, match=r"capability 7\.5; 8\.0 or newer"):
        _check_device(fake_cuda(capability=(7, 5)))
    _check_device(fake_cuda())
    _check_driver(fake_cuda(), fake_cupy())


@pytest.mark.parametrize("missing", ["numba_cuda", "cupy"])
def test_missing_library(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    real = builtins.__import__

    def without(name: str, globals_: Any = None, locals_: Any = None, names: Any = (), level: int = 0) -> Any:
        if name == missing:
            raise ImportError(f"No module named {name}")
        return real(name, globals_, locals_, names, level)

    monkeypatch.setattr(builtins, "__import__", without)
    wanted = missing.replace("_", "-")
    with pytest.raises(DeviceError, match=rf"needs {wanted}: pip install 'pyengine-lm\[cuda\]'"):
        _libraries()


def test_numpy_that_numba_cuda_cannot_compile_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("numpy.row_stack", raising=False)  # NumPy 2.5 has none
    with pytest.raises(DeviceError, match=r"cannot compile with NumPy .*: pip install 'numpy<2.5'"):
        _libraries()


def test_numbas_own_cuda_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where numba-cuda lies in a folder whose .pth files Python does not read: on PYTHONPATH, or in another environment."""
    import numba.cuda

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace())
    monkeypatch.setattr("numpy.row_stack", np.vstack, raising=False)
    monkeypatch.setattr(numba.cuda, "__file__", "/layer/numba_cuda/numba/cuda/__init__.py")
    assert _libraries() == (numba.cuda, sys.modules["cupy"])
    monkeypatch.setattr(numba.cuda, "__file__", "/layer/numba/cuda/__init__.py")
    with pytest.raises(DeviceError, match=r"numba's own CUDA module \(/layer/.*: pip install --ignore-installed"):
        _libraries()


def test_device_cuda_without_numba_cuda_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyengine_training.backend.cuda", None)
    with pytest.raises(TrainingError, match=r"pip install 'pyengine-lm\[cuda\]'"):
        device.make_trainer(MODEL, CONFIG, device=device.Device("cuda"))


def test_device_cuda_under_numbas_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_ENABLE_CUDASIM", "1")
    with pytest.raises(ConfigError, match="unset it"):
        device.make_trainer(MODEL, CONFIG, device=device.Device("cuda"))
    root = Path(device.__file__).parents[1]
    code = "from pyengine_training.device import Device; Device('cuda').require()"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "NUMBA_ENABLE_CUDASIM is set" in done.stderr.splitlines()[-1]


def test_unknown_device() -> None:
    with pytest.raises(ConfigError, match="choose from"):
        device.Device("tpu")
    with pytest.raises(ConfigError, match="choose from"):
        device.Device("cuda", "fp8")


def test_device_cpu_is_the_plain_trainer() -> None:
    trainer = device.make_trainer(MODEL, CONFIG)
    assert type(trainer.backend).__name__ == "CpuBackend"
    trainer.close()


def test_the_command_says_so_before_it_prepares_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a machine without a GPU; with one the text is what is missing."""
    from pyengine_training.__main__ import main

    arguments = ["--run-dir", str(tmp_path / "run"), "--data", str(tmp_path / "none.txt"), "--device", "cuda"]
    assert main(["train", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("pyengine: error: ")
    assert any(word in message for word in ("driver", "GPU", "cupy", "none.txt")), message
    assert not (tmp_path / "run").exists()


def test_this_machine_either_has_a_gpu_or_says_why_not() -> None:
    try:
        assert GpuRuntime().memory()[1] > 0
    except DeviceError as error:
        assert any(word in str(error) for word in ("driver", "GPU", "cupy", "cuBLAS")), error


def test_a_failing_launch_names_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    class Kernel:
        py_func = staticmethod(lambda: None)

        def __getitem__(self, _configuration: Any) -> Any:
            def start(*_arguments: Any) -> None:
                raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

            return start

    Kernel.py_func.__name__ = "example_kernel"
    gpu = object.__new__(GpuRuntime)
    gpu.__dict__.update(
        _recent=_gpu.deque(maxlen=4), _numba_stream=None, cupy=SimpleNamespace(ndarray=np.ndarray),
        wait_always=False, capturing=False, _check=None,
    )  # fmt: skip
    with pytest.raises(DeviceError, match=r"kernel example_kernel \(grid 3, block 32\): CUDA_ERROR"):
        gpu.launch(Kernel(), 3, 32, (1, 2.0))

    def fail() -> None:
        raise RuntimeError("illegal memory access")

    gpu.__dict__["stream"] = SimpleNamespace(synchronize=fail)
    with pytest.raises(DeviceError, match=r"illegal memory access; started last: example_kernel.*PYENGINE_CUDA_SYNC"):
        gpu.synchronize()


class Call:
    """Any object of cupy's whose calls fail: an error of the device comes with whichever is next."""

    ndim, size, nbytes = 1, 2, 8

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        return

    @property
    def data(self) -> Any:
        return self

    def fails(self, *_arguments: Any, **_more: Any) -> Any:
        raise RuntimeError("unspecified launch failure")

    set = get = fill = memset_async = launch = empty = fails


@pytest.mark.parametrize(
    "call",
    [
        lambda gpu: gpu.upload(np.zeros(2), Call()),
        lambda gpu: gpu.download(Call()),
        lambda gpu: gpu.fill(Call(), 0),
        lambda gpu: gpu.fill(Call(), 1),
        lambda gpu: gpu.empty((2,), np.float32),
        lambda gpu: gpu.record(print)(),
    ],
)
def test_an_error_of_the_device_is_told_by_whichever_call_it_reaches(call: Any) -> None:
    class Stream(Call):
        def synchronize(self) -> None:
            return

    gpu = object.__new__(GpuRuntime)
    cupy = Call()
    cupy.cuda = SimpleNamespace(memory=SimpleNamespace(OutOfMemoryError=MemoryError))  # type: ignore[attr-defined]
    gpu.__dict__.update(
        _recent=_gpu.deque(["softmax_kernel"], maxlen=4), cupy=cupy, stream=Stream(), _check=None, _capture=lambda _f: Call()
    )
    with pytest.raises(DeviceError, match=r"the GPU reports: unspecified launch failure; started last: softmax_kernel"):
        call(gpu)


def test_what_an_earlier_trainer_has_given_back_is_free() -> None:
    """cupy keeps the memory of arrays that are gone, and the driver counts it as used."""
    kept = [70]
    calls = SimpleNamespace(memGetInfo=lambda: (100 - kept[0], 100))
    gpu = object.__new__(GpuRuntime)
    gpu.__dict__["cupy"] = SimpleNamespace(
        cuda=SimpleNamespace(runtime=calls),
        get_default_memory_pool=lambda: SimpleNamespace(free_all_blocks=lambda: kept.__setitem__(0, 0)),
    )
    assert gpu.memory() == (100, 100)


def test_what_watches_the_device_ends_the_waiting_for_it() -> None:
    """A message that never comes keeps the stream busy; the network's error is told as it is. So is the device's own."""

    def synchronize() -> None:
        raise RuntimeError("illegal memory access")

    calls: list[None] = []

    def check() -> None:
        calls.append(None)
        if len(calls) == 3:
            raise DeviceError("NCCL: messages: a network error")

    gpu = object.__new__(GpuRuntime)
    status = [_gpu.NOT_READY]
    calls_of = SimpleNamespace(streamQuery=lambda _stream: status[0])
    gpu.__dict__.update(
        cupy=SimpleNamespace(cuda=SimpleNamespace(runtime=calls_of)), stream=SimpleNamespace(synchronize=synchronize),
        stream_address=0, _recent=_gpu.deque(maxlen=4),
    )  # fmt: skip
    gpu.watch(check)
    with pytest.raises(DeviceError, match=r"^NCCL: messages"):
        gpu.synchronize()
    assert len(calls) == 3
    status[0] = 700
    with pytest.raises(DeviceError, match="illegal memory access"):
        gpu.synchronize()


def test_a_failing_recording_says_how_to_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: Any) -> None:
            return

        def begin_capture(self) -> None:
            return

        def end_capture(self) -> Any:
            raise RuntimeError("cudaErrorStreamCaptureInvalidated")

    gpu = object.__new__(GpuRuntime)
    gpu.__dict__.update(stream=Stream(), capturing=False)
    seen = []
    with pytest.raises(DeviceError, match=r"could not be recorded.*Invalidated.*PYENGINE_CUDA_GRAPHS=0"):
        gpu.record(lambda: seen.append(gpu.capturing))
    assert seen == [True] and not gpu.capturing
    monkeypatch.setenv("PYENGINE_CUDA_GRAPHS", "0")
    assert gpu.record(print) is print


def test_nothing_is_allocated_inside_a_graph() -> None:
    pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")
    from simulated_runtime import SimulatedRuntime

    simulated = SimulatedRuntime()
    with use_runtime(simulated):
        first = kept("x", 8, np.float32)
        simulated.capturing = True
        assert kept("x", 8, np.float32) is first
        with pytest.raises(DeviceError, match="allocated inside a graph"):
            kept("y", 8, np.float32)
        assert runtime() is simulated


def test_more_elements_than_32_bits_index_are_refused() -> None:
    """The largest array counts, not the number of threads: gate and up are twice their product."""
    rows, hidden = 1 << 20, 1 << 11
    with pytest.raises(DeviceError, match=r"4,294,967,296 elements.*--shards"):
        _jit.unsigned(rows * hidden, hidden, addressed=2 * rows * hidden)
    assert _jit.unsigned(7, addressed=(1 << 32) - 1) == (7,)
