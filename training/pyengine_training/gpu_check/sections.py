"""The sections themselves. Each prints JSON lines and returns whether all went well; none needs a network.

Everything here runs on a GPU only. What it compares with runs on the CPU in the same process, or in PyTorch where that
is installed.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..config import ModelConfig, TrainConfig
from ..device import CPU, Device, make_trainer
from ..errors import TrainingError
from ..trainer import Trainer
from .cases import large_cases, small_cases
from .judge import check, from_bf16, to_bf16

Array = Any
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bfloat16, by the data sheets
SMALL = ModelConfig(
    vocab_size=256, dim=128, n_layers=4, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=352, max_seq_len=128
)
LARGE = ModelConfig(  # 124 million parameters
    vocab_size=50304, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, hidden_dim=2048, max_seq_len=1024
)
SEQ, ROWS, STEPS = 64, 16, 200  # of the small model's runs
LARGE_ROWS = 16
WARMUP, REPEATS = 3, 8  # steps before and under the clock
MEASURED: tuple[tuple[int, dict[str, Any], bool], ...] = (  # rows, knobs, attention on tensor cores; in order of worth
    (LARGE_ROWS, {}, False),
    (LARGE_ROWS, {}, True),
    (LARGE_ROWS, {"optimizer": "muon"}, False),
    (LARGE_ROWS, {"quantize": "always"}, False),
    (4 * LARGE_ROWS, {}, False),
)
RANKS = 8  # at most; shards of a batch
PRODUCTS = (2048, 8192)  # sides of the square products that are timed
_started = False


def say(**values: Any) -> None:
    """One finding."""
    print(json.dumps(values), flush=True)


def started() -> bool:
    """Whether a GPU was found in this process."""
    return _started


def gpu() -> Any:
    """The runtime. Raises DeviceError where there is no GPU."""
    global _started
    Device("cuda").require()
    from ..ops.cuda._runtime import runtime

    found = runtime()
    _started = True
    return found


def chain(rows: int, seq_len: int, seed: int, vocab: int = 256) -> tuple[Array, Array]:
    """Text that can be learnt: a fixed random Markov chain with four successors to a token."""
    successors = np.random.default_rng(1).integers(0, vocab, (vocab, 4))
    generator = np.random.default_rng([2, seed])
    tokens = np.empty((rows, seq_len + 1), np.int64)
    tokens[:, 0] = generator.integers(0, vocab, rows)
    choices = generator.choice(4, (rows, seq_len), p=[0.6, 0.2, 0.1, 0.1])
    for t in range(seq_len):
        tokens[:, t + 1] = successors[tokens[:, t], choices[:, t]]
    return tokens[:, :-1], tokens[:, 1:]


def distance(got: Array, wanted: Array) -> float:
    """Of two arrays, relative to the one that is wanted; infinite where it is no number, which no maximum would find."""
    found = float(np.linalg.norm(got - wanted) / max(1e-30, float(np.linalg.norm(wanted))))
    return found if np.isfinite(found) else float("inf")


# ---- sections ----------------------------------------------------------------------------------------------------


def versions() -> bool:
    """Libraries, driver, card."""
    device = gpu()
    import numba
    import numba_cuda

    runtime = device.cupy.cuda.runtime
    properties = runtime.getDeviceProperties(0)
    say(
        python=platform.python_version(),
        numpy=np.__version__,
        numba=numba.__version__,
        numba_cuda=numba_cuda.__version__,
        cupy=device.cupy.__version__,
        driver=runtime.driverGetVersion(),
        runtime=runtime.runtimeGetVersion(),
        gpu=properties["name"].decode(),
        capability=f"{properties['major']}.{properties['minor']}",
        memory=device.memory()[1],
    )
    from cuda.pathfinder import load_nvidia_dynamic_lib

    for library in ("nvvm", "nvrtc", "nvJitLink", "cublas"):
        say(library=library, path=load_nvidia_dynamic_lib(library).abs_path)
    try:
        import torch

        say(torch=torch.__version__, torch_cuda=torch.version.cuda)
    except ImportError:
        say(torch=None)
    return True


def kernels() -> bool:
    """Every op against the CPU, small and odd and large, float32 and bfloat16."""
    device = gpu()
    from ..ops import cuda as ops

    outcomes = []
    for case in (*small_cases(), *large_cases()):
        for bf16 in case.precisions:
            try:
                outcome = check(case, ops, bf16=bf16, upload=device.upload, download=device.download)
            except Exception as error:  # a finding, and the others still count
                say(case=case.name, bf16=bf16, ok=False, error=f"{type(error).__name__}: {error}"[:500])
                outcomes.append(False)
                continue
            outcomes.append(outcome.ok)
            if not outcome.ok or outcome.error > 1e-3:
                say(case=case.name, bf16=bf16, ok=outcome.ok, error=outcome.error, cpu_error=outcome.cpu_error)
    say(cases=len(outcomes), failed=outcomes.count(False))
    return all(outcomes)


def pair(model: ModelConfig, config: TrainConfig, precision: str) -> tuple[Trainer, Any]:
    """The CPU's trainer and the GPU's, with the same parameters."""
    trainers = tuple(make_trainer(model, config, device=device) for device in (CPU, Device("cuda", precision)))
    for trainer in trainers:
        trainer.initialize()
    return trainers[0], trainers[1]


# precision, int8, bounds of the gradients' relative and the loss's absolute difference. Sums in another order move a value by a
# few float32 roundings, which now and then pushes it over the edge between two int8 codes: about one code in ten thousand, and
# then by a whole step, where rounding moves every code by up to half of one. So the difference has to stay below what int8 as a
# whole does to this model, whose loss of 5.5697 becomes 5.5707: 1e-3.
GRADIENTS = (("float32", False, 1e-4, 1e-4), ("float32", True, 0.1, 1e-3), ("bf16", False, 0.1, 0.05))


def gradients() -> bool:
    """Loss and every gradient of a whole model."""
    gpu()
    config = TrainConfig(seq_len=SEQ, batch_size=4, shards=2, steps=10)
    tokens, targets = chain(4, SEQ, 0, SMALL.vocab_size)
    good = True
    for precision, quantize, bound, loss_bound in GRADIENTS:
        cpu, cuda = pair(SMALL, config, precision)
        losses = [trainer.gradients(tokens, targets, quantize=quantize) for trainer in (cpu, cuda)]
        wanted, got = cpu.grads, cuda.grads
        errors = {name: distance(got[name], wanted[name]) for name in wanted.shapes}
        worst = max(errors, key=lambda name: errors[name])
        ok = errors[worst] < bound and abs(losses[1] - losses[0]) < loss_bound
        good = good and ok
        say(precision=precision, int8=quantize, ok=ok, losses=losses, worst=worst, error=errors[worst])
    return good


def matmuls() -> bool:
    """bfloat16 products against NumPy in every orientation, and their speed."""
    device = gpu()
    from ..ops.cuda import linear
    from ..ops.cuda._runtime import Product

    generator = np.random.default_rng(0)
    good = True
    for trans_a in (False, True):
        for trans_b in (False, True):
            m, n, k = 300, 200, 400
            a = to_bf16(generator.standard_normal((k, m) if trans_a else (m, k), np.float32))
            b = to_bf16(generator.standard_normal((n, k) if trans_b else (k, n), np.float32))
            c = device.upload(np.zeros((m, n), np.float32))
            arrays = [device.upload(x) for x in (a, b)]
            ends = [(x.reshape(-1), 0, x.shape[1], 0) for x in (c, *arrays)]
            device.gemm(Product(ends[0], ends[1], ends[2], (m, n, k), trans_a=trans_a, trans_b=trans_b))
            wide_a, wide_b = from_bf16(a), from_bf16(b)
            wanted = (wide_a.T if trans_a else wide_a) @ (wide_b.T if trans_b else wide_b)
            error = distance(device.download(c), wanted)
            good = good and error < 1e-5
            say(trans_a=trans_a, trans_b=trans_b, error=error)
    for n in PRODUCTS:
        for dtype in (np.uint16, np.float32):
            x, w, y = (device.upload(random_matrix(n, dtype, seed)) for seed in range(3))
            linear.linear_forward(y, x, w)
            device.synchronize()
            began = time.monotonic()
            repeats = 10
            for _ in range(repeats):
                linear.linear_forward(y, x, w)
            device.synchronize()
            flops = 2 * n**3 * repeats / (time.monotonic() - began)
            say(product=n, dtype="bf16" if dtype is np.uint16 else "float32", tflops=round(flops / 1e12, 1))
    return good


def random_matrix(n: int, dtype: Any, seed: int) -> Array:
    """(n, n) standard normal: products of zeros draw less power and run faster than real ones."""
    row = np.random.default_rng(seed).standard_normal(1 << 16, np.float32)
    values = np.resize(row, (n, n))
    return to_bf16(values) if dtype is np.uint16 else values


def loss_curve() -> bool:
    """200 steps of a small model: the CPU's losses, float32's and bfloat16's."""
    gpu()
    recipe = {"lr": 3e-3, "muon_lr": 0.01, "beta2": 0.95, "decay_fraction": 0.3, "quantize_fraction": 0.0}
    config = TrainConfig(seq_len=SEQ, batch_size=ROWS, shards=2, steps=STEPS, **recipe)
    curves = {}
    for label, device in (
        ("cuda float32", Device("cuda", "float32")),
        ("cuda bf16", Device("cuda")),
        ("cpu", CPU),
    ):
        trainer = make_trainer(SMALL, config, device=device)
        trainer.initialize()
        began = time.monotonic()
        curves[label] = [trainer.step(*chain(ROWS, SEQ, step, SMALL.vocab_size)).loss for step in range(config.steps)]
        say(
            curve=label,
            seconds=round(time.monotonic() - began, 2),
            losses=[round(x, 4) for x in curves[label][:: max(1, STEPS // 10)]],
        )
        trainer.close()
    means = {label: float(np.mean(curve[-20:])) for label, curve in curves.items()}
    first = max(abs(a - b) for a, b in zip(curves["cpu"][:20], curves["cuda float32"][:20], strict=True))
    ok = first < 0.02 and all(abs(mean - means["cpu"]) < 0.05 for mean in means.values())
    say(last_20_steps=means, worst_of_first_20_float32=first, ok=ok and means["cpu"] < curves["cpu"][0] - 1)
    return ok and means["cpu"] < curves["cpu"][0] - 1


def resume() -> bool:
    """Save, go on while that is written, restore into a fresh trainer, go on: the same bits, through the quantized decay."""
    gpu()
    from ..checkpoint import hf_config, hf_tensors
    from ..files import save_safetensors, write_json
    from ..threads import Beside

    config = TrainConfig(seq_len=SEQ, batch_size=8, shards=2, steps=6, decay_fraction=0.5, quantize_fraction=0.0)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "step"
        first = make_trainer(SMALL, config, device=Device("cuda"))
        first.initialize()
        for step in range(2):
            first.step(*chain(8, SEQ, step, SMALL.vocab_size))
        params, beside = first.params.copy(), Beside()

        def write_model(target: Path) -> None:
            write_json(target / "config.json", hf_config(first.model, 0, 0))
            save_safetensors(target / "model.safetensors", hf_tensors(params, first.model))

        def go_on(trainer: Trainer) -> None:
            losses = [trainer.step(*chain(8, SEQ, step, SMALL.vocab_size)).loss for step in range(2, 6)]
            results.append((losses, trainer.params.flat.copy()))

        try:
            first.save(folder, "data", write_model, beside=beside)
            go_on(first)
            beside.finish()
        finally:
            beside.close()
        second = make_trainer(SMALL, config, device=Device("cuda"))
        second.restore(folder)
        go_on(second)
    same_losses = results[0][0] == results[1][0]
    same_bits = bool(np.array_equal(results[0][1], results[1][1]))
    say(same_losses=same_losses, same_parameters=same_bits, losses=results[0][0])
    return same_losses and same_bits


def ranks() -> bool:
    """One, two and more ranks: the same bits, by NCCL on several GPUs, through the host on one."""
    from .ranks import Run, compare, on_processes

    # in a process of its own: ranks are forked from this one
    count, reason = on_processes(1, lambda _: _count_gpus())[0]
    if reason:
        from ..ops.cuda._runtime import DeviceError

        raise DeviceError(reason)
    say(gpus=count)
    config = TrainConfig(
        seq_len=SEQ, batch_size=ROWS, shards=RANKS, steps=min(STEPS, 6), decay_fraction=0.5, quantize_fraction=0.0
    )
    sizes = [size for size in (2, 4, 8) if size <= RANKS]
    runs = [Run(1), Run(2, "host"), Run(2, "host", shard_optimizer=True)]
    runs += [Run(size, "nccl", shard_optimizer=shard) for size in sizes if size <= count for shard in (False, True)]
    return compare(runs, SMALL, config, lambda step: chain(ROWS, SEQ, step, SMALL.vocab_size), say)


def _count_gpus() -> tuple[int, str]:
    """How many, or why there is none."""
    try:
        return int(gpu().cupy.cuda.runtime.getDeviceCount()), ""
    except (TrainingError, ImportError) as error:
        return 0, str(error)


def graph() -> bool:
    """A recorded step against the same step launched piece by piece: the same bits, and both times."""
    device = gpu()
    config = TrainConfig(seq_len=SEQ, batch_size=8, shards=1, steps=100, quantize="never")
    repeats = max(1, STEPS // 10)
    results, seconds = [], []
    record = device.record
    for eager in (False, True):
        device.record = (lambda function: function) if eager else record
        trainer = make_trainer(SMALL, config, device=Device("cuda"))
        trainer.initialize()
        losses = [trainer.step(*chain(8, SEQ, step, SMALL.vocab_size)).loss for step in range(2)]
        device.synchronize()
        began = time.monotonic()
        batch = chain(8, SEQ, 5, SMALL.vocab_size)
        losses.extend(trainer.step(*batch).loss for _ in range(repeats))
        seconds.append((time.monotonic() - began) / repeats)
        results.append((losses, trainer.params.flat.copy()))
    device.record = record
    same = results[0][0] == results[1][0] and bool(np.array_equal(results[0][1], results[1][1]))
    say(same_bits=same, recorded_ms=round(1e3 * seconds[0], 2), launched_ms=round(1e3 * seconds[1], 2))
    return same


def measured(
    step: Callable[[], Any], wait: Callable[[], Any], tokens: int, model: ModelConfig, card: str
) -> dict[str, Any]:
    """Tokens per second over some steps, and what share of the card's peak that is."""
    for _ in range(WARMUP):
        step()
    wait()
    times = []
    for _ in range(REPEATS):
        began = time.monotonic()
        step()
        wait()
        times.append(time.monotonic() - began)
    rate = tokens / float(np.median(times))
    peak = next((value for key, value in PEAK.items() if key in card), None)
    utilization = round(rate * model.flops_per_token(model.max_seq_len) / peak, 4) if peak else None
    return {"tokens_per_second": round(rate), "mfu": utilization, "ms": [round(1e3 * t, 1) for t in times]}


def throughput() -> bool:
    """Tokens a second at 124 million parameters, sequences of 1,024, beside PyTorch in the same run."""
    device = gpu()
    from ..ops.cuda import attention

    name, before = device.cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(), attention.use_flash
    for rows, knobs, use_flash in MEASURED:
        attention.use_flash = use_flash
        try:
            _ours(device, dataclasses.replace(large_config(rows), **knobs), name, "flash" if use_flash else "unfused")
        except TrainingError as error:  # a batch that does not fit is a finding, and the others still count
            say(engine="pyengine", batch=rows, error=str(error)[:300], **knobs)
        device.cupy.get_default_memory_pool().free_all_blocks()
    attention.use_flash = before
    try:
        import torch
    except ImportError:
        say(engine="torch", error="not installed")
        return True
    from .torch_model import make_step

    config = large_config(LARGE_ROWS)
    count = config.batch_size * config.seq_len
    for compiled in (False, True):
        step = make_step(LARGE, config, compiled=compiled)
        result = measured(step, torch.cuda.synchronize, count, LARGE, name)
        engine = "torch compiled" if compiled else "torch eager"
        say(engine=engine, version=torch.__version__, batch=config.batch_size, **result)
    return True


def profile() -> bool:
    """Where a step of the large model spends its time: milliseconds by kernel, launched one by one between events."""
    gpu()
    for knobs, use_flash in (({}, False), ({}, True), ({"optimizer": "muon", "quantize": "always"}, False)):
        _profile(dataclasses.replace(large_config(LARGE_ROWS), **knobs), use_flash)
    return True


def _profile(config: TrainConfig, use_flash: bool) -> None:
    from ..ops.cuda import attention

    device, before = gpu(), attention.use_flash
    record, launch, gemm = device.record, device.launch, device.gemm
    spans: list[tuple[str, Any, Any]] = []

    def timed(name: str, start: Callable[[], None]) -> None:
        events = [device.cupy.cuda.Event() for _ in range(2)]
        events[0].record(device.stream)
        start()
        events[1].record(device.stream)
        spans.append((name, *events))

    def named(kernel: Any) -> str:
        return str(kernel.py_func.__name__)

    attention.use_flash = use_flash
    device.record = lambda function: function
    device.launch = lambda kernel, *rest: timed(named(kernel), lambda: launch(kernel, *rest))
    device.gemm = lambda p: timed(f"gemm {p.m}x{p.n}x{p.k} x{p.batch}", lambda: gemm(p))
    try:
        trainer = make_trainer(LARGE, config, device=Device("cuda"))
        trainer.initialize()
        batch = chain(config.batch_size, config.seq_len, 0, LARGE.vocab_size)
        for _ in range(2):
            trainer.step(*batch)
        spans.clear()
        _keep_busy(gemm)  # so that events measure the device, not how fast Python launches
        trainer.step(*batch)
        device.synchronize()
        trainer.close()
    finally:
        device.record, device.launch, device.gemm = record, launch, gemm
        attention.use_flash = before
    totals: dict[str, list[float]] = {}
    for name, begin, end in spans:
        totals.setdefault(name, []).append(device.cupy.cuda.get_elapsed_time(begin, end))
    table = sorted(((sum(times), len(times), name) for name, times in totals.items()), reverse=True)
    what = {"flash": use_flash, "optimizer": config.optimizer, "int8": config.quantize == "always"}
    say(profile="one step", **what, ms=round(sum(row[0] for row in table), 2), launches=len(spans))
    for ms, count, name in table[:40]:
        say(kernel=name, ms=round(ms, 3), count=count)
    device.cupy.get_default_memory_pool().free_all_blocks()


def _keep_busy(gemm: Callable[[Any], None]) -> None:
    """Some 300 ms of products."""
    device = gpu()
    n = PRODUCTS[-1]
    ends = [(device.empty((n * n,), np.uint16), 0, n, 0) for _ in range(3)]
    from ..ops.cuda._runtime import Product

    for _ in range(200 if n > 4096 else 1):
        gemm(Product(*ends, (n, n, n)))


def large_config(rows: int) -> TrainConfig:
    """Steps of the large model."""
    seq = LARGE.max_seq_len
    knobs: dict[str, Any] = {"optimizer": "adamw", "lr": 3e-3, "quantize": "never"}
    return TrainConfig(seq_len=seq, batch_size=rows, shards=1, steps=1000, **knobs)


def _ours(device: Any, config: TrainConfig, name: str, kind: str) -> None:
    trainer = make_trainer(LARGE, config, device=Device("cuda"))
    trainer.initialize()
    batch = chain(config.batch_size, config.seq_len, 0, LARGE.vocab_size)
    count = config.batch_size * config.seq_len
    result = measured(lambda: trainer.step(*batch), device.synchronize, count, LARGE, name)
    free, total = device.memory()
    what = {"attention": kind, "optimizer": config.optimizer, "int8": config.quantize == "always"}
    say(engine="pyengine", **what, gpu=name, batch=config.batch_size, **result, used=total - free)
    trainer.close()


def memory() -> bool:
    """Bytes held for the 124 million parameter model at each level of recomputation."""
    device = gpu()
    pool = device.cupy.get_default_memory_pool()
    for recompute in ("none", "activations", "block"):
        _one_step(pool, dataclasses.replace(large_config(8), recompute=recompute))
        pool.free_all_blocks()
    return True


def _one_step(pool: Any, config: TrainConfig) -> None:
    trainer = make_trainer(LARGE, config, device=Device("cuda"))
    trainer.initialize()
    loss = trainer.step(*chain(config.batch_size, config.seq_len, 0, LARGE.vocab_size)).loss
    say(recompute=config.recompute, bytes=pool.used_bytes(), loss=loss)
    trainer.close()


SECTIONS: dict[str, Callable[[], bool]] = {
    "versions": versions,
    "kernels": kernels,
    "gradients": gradients,
    "throughput": throughput,
    "profile": profile,
    "matmuls": matmuls,
    "loss_curve": loss_curve,
    "resume": resume,
    "graph": graph,
    "ranks": ranks,
    "memory": memory,
}
