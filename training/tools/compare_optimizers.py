"""AdamW against Muon at equal time, each over a few learning rates.

    python training/tools/compare_optimizers.py --data tinystories.txt --out ~/runs/optimizers --minutes 5

Every candidate trains the same model on the same batches for the same time, so the cheaper step gets
more steps, with its whole schedule (warmup, constant, decay to zero) inside that time. Two run at
once, on one thread each. The clock is the CPU time of the steps: with one thread it is the wall time
of a core that does nothing else: a paused process costs nothing, a busy neighbour a few per cent.
Steps are shared out by the cost of one, measured in turns at the start. Validation, samples and
checkpoints are not counted.

A candidate that has finished in --out is not run again; the table is made from all metrics.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyengine_training
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.device import make_trainer
from pyengine_training.files import read_json, write_json
from pyengine_training.runfolder import read_metrics

# 1.3 million parameters; int8 is a question of its own and stays out of this one
MODEL = {"dim": 128, "n_layers": 4, "n_heads": 2, "n_kv_heads": 1, "head_dim": 64, "hidden_dim": 384}
SCHEDULE: dict[str, Any] = {"warmup_fraction": 0.05, "decay_fraction": 0.4, "quantize": "never"}
VOCABULARY, SEQ_LEN, ROWS, SHARDS = 4096, 256, 16, 4
MARKS = (0.25, 0.5, 0.75, 1.0)  # of the time, where the table shows the curves
VALIDATIONS = 12


@dataclass(frozen=True)
class Candidate:
    """An optimizer with the peak learning rate of the blocks' matrices."""

    optimizer: str
    rate: float

    @property
    def name(self) -> str:
        return f"{self.optimizer}_{self.rate:g}"

    def options(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, ("lr" if self.optimizer == "adamw" else "muon_lr"): self.rate}


def flags(options: dict[str, Any]) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def trainer_command(*words: object) -> None:
    """Run the trainer's command line in a process of its own; its log stays in the run folder."""
    root = str(Path(pyengine_training.__file__).parents[1])
    path = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pyengine_training", *map(str, words)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{done.stderr}")


# ---- running -----------------------------------------------------------------------------------------------------


def step_seconds(rounds: int) -> dict[str, float]:
    """Median CPU seconds of a step of each optimizer, taken in turns."""
    model = ModelConfig(VOCABULARY, **MODEL, max_seq_len=SEQ_LEN)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (ROWS, SEQ_LEN + 1))
    batch = (tokens[:, :-1].copy(), tokens[:, 1:].copy())
    trainers = {}
    for optimizer in ("adamw", "muon"):
        config = TrainConfig(seq_len=SEQ_LEN, batch_size=ROWS, shards=SHARDS, optimizer=optimizer, quantize="never")
        trainers[optimizer] = make_trainer(model, config, threads=1)
        trainers[optimizer].initialize()
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(rounds + 1):
        for name, trainer in trainers.items():
            began = time.process_time()
            trainer.step(*batch)
            times[name].append(time.process_time() - began)
    for trainer in trainers.values():
        trainer.close()
    return {name: float(np.median(values[1:])) for name, values in times.items()}  # the first one compiles


def train(candidate: Candidate, out: Path, steps: int, seed: int) -> None:
    folder = out / candidate.name
    if (folder / "final").exists():
        return
    options = {
        "data": out / "data",
        **MODEL,
        **SCHEDULE,
        **candidate.options(),
        "seq_len": SEQ_LEN,
        "batch_size": ROWS,
        "shards": SHARDS,
        "threads": 1,
        "steps": steps,
        "seed": seed,
        "eval_every": max(1, steps // VALIDATIONS),
        "sample_every": 0,
        "checkpoint_every": 0,
    }
    trainer_command("train", "--run-dir", folder, *flags(options))
    print(f"{candidate.name}: done", file=sys.stderr, flush=True)


def run_all(candidates: list[Candidate], args: argparse.Namespace) -> None:
    out: Path = args.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "data").exists():
        given = flags({"vocab_size": VOCABULARY} if args.tokenizer is None else {"tokenizer": args.tokenizer})
        trainer_command("prepare", args.data, out / "data", *given)
    plan = out / "plan.json"
    if not plan.exists():
        seconds = step_seconds(args.rounds)
        write_json(plan, {"minutes": args.minutes, "step_seconds": seconds})
    values = read_json(plan)
    with ThreadPoolExecutor(args.at_once) as pool:
        futures = []
        for candidate in candidates:
            steps = round(values["minutes"] * 60 / values["step_seconds"][candidate.optimizer])
            futures.append(pool.submit(train, candidate, out, max(1, steps), args.seed))
        for future in futures:
            future.result()


# ---- reading -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """Validation bits per byte over seconds of training."""

    name: str
    optimizer: str
    steps: int
    seconds: list[float]
    bits: list[float]

    def at(self, seconds: float) -> float | None:
        """Between the two nearest validations; None before the first one."""
        if not self.seconds or seconds < self.seconds[0]:
            return None
        return float(np.interp(seconds, self.seconds, self.bits))


def read_curve(folder: Path, clock: str = "cpu_seconds") -> Curve:
    """The curve of a run. clock: cpu_seconds (summed over the steps) or seconds (elapsed)."""
    optimizer = read_json(folder / "run.json")["train"]["optimizer"]
    total, now, steps = 0.0, {}, 0
    points: dict[float, float] = {}  # the last validation of a step counts
    for entry in read_metrics(folder / "metrics.jsonl"):
        step = entry["step"]
        if "val_bits_per_byte" in entry:
            points[now.get(step, 0.0)] = entry["val_bits_per_byte"]
            continue
        total = total + entry[clock] if clock == "cpu_seconds" else entry[clock]
        now[step], steps = total, step
    return Curve(folder.name, optimizer, steps, list(points), list(points.values()))


def table(curves: list[Curve]) -> tuple[list[str], dict[str, Any]]:
    """Lines for people and a verdict: the best of each optimizer at its end.

    Columns are parts of a run's own seconds. They were meant to be equal; a step costs a little more
    beside a busy neighbour, which shows in the seconds and not in what the steps have learnt.
    """
    marks = " ".join(f"{mark:7.0%}" for mark in MARKS)
    lines = [f"{'':14} {'steps':>6} {'ms/step':>8} {'seconds':>8}   bits per byte at {marks}"]
    for curve in curves:
        end = curve.seconds[-1]
        cells = [curve.at(end * mark) for mark in MARKS]
        shown = " ".join("      -" if c is None else f"{c:7.4f}" for c in cells)
        lines.append(f"{curve.name:14} {curve.steps:6d} {1000 * end / curve.steps:8.0f} {end:8.0f} {'':18} {shown}")
    best: dict[str, Curve] = {}
    for curve in curves:
        if curve.optimizer not in best or curve.bits[-1] < best[curve.optimizer].bits[-1]:
            best[curve.optimizer] = curve
    ranked = sorted(best.values(), key=lambda c: c.bits[-1])
    verdict: dict[str, Any] = {"best": {c.optimizer: [c.name, c.bits[-1]] for c in ranked}}
    if len(ranked) > 1:
        verdict["winner"] = ranked[0].optimizer
        verdict["ahead_by_bits_per_byte"] = ranked[1].bits[-1] - ranked[0].bits[-1]
        lines.append(f"{ranked[0].name} wins by {verdict['ahead_by_bits_per_byte']:.4f} over {ranked[1].name}")
    return lines, verdict


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, required=True, help="a text")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--minutes", type=float, default=5.0, help="CPU minutes a candidate (default 5)")
    parser.add_argument("--adamw", type=float, nargs="*", default=[1e-3, 3e-3, 6e-3], help="its learning rates")
    parser.add_argument("--muon", type=float, nargs="*", default=[0.01, 0.02], help="its learning rates")
    parser.add_argument("--tokenizer", type=Path, help="of 4096 tokens; default: one is trained")
    parser.add_argument("--at-once", type=int, default=2, help="candidates that run side by side (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="steps that are timed to share out the minutes")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="the curves and the verdict as one JSON object")
    args = parser.parse_args()
    lists = {"adamw": args.adamw, "muon": args.muon}
    longest = max(map(len, lists.values()), default=0)
    candidates = [Candidate(name, rates[i]) for i in range(longest) for name, rates in lists.items() if i < len(rates)]
    if not candidates:
        parser.error("no candidate: give --adamw or --muon a learning rate")
    run_all(candidates, args)
    curves = [read_curve(args.out / candidate.name) for candidate in candidates]
    lines, verdict = table(curves)
    if args.json:
        print(json.dumps({**verdict, "curves": [dataclasses.asdict(curve) for curve in curves]}))
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    main()
