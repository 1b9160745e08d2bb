"""`pyengine cost`: what training a model was and what running it is, in the same units."""

from __future__ import annotations

import argparse
import statistics
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli import options
from pyengine.cli.progress import ProgressLine
from pyengine.errors import InvalidArgumentError, PyEngineError

if TYPE_CHECKING:
    from pyengine.engine import Engine

EPILOG = """\
examples:
  pyengine cost ~/runs/mine --rate 0.10
  pyengine cost ~/runs/mine --rate 0.10 -m mine.safetensors -t 1 --json
  pyengine cost ~/runs/mine --tokens-per-second 5000

Training is what the run's newest checkpoint has counted, the pieces that it continues included: FLOPs (6 per weight and token),
tokens, time on the clock, and energy where the machine reported it. Inference is measured here: one sequence, -n tokens one after
the other, the median of -r runs. Without -m the model is the run's own, frozen once into the cache. --rate prices an hour of
the machine for both, so the tokens that cost as much as the training are those that take as long to generate.
PYENGINE_NUM_THREADS, PYENGINE_ISA and PYENGINE_CACHE count as everywhere; PYENGINE_MODEL does not, it is another model.
"""


def training_half() -> Any:
    """The module of the trainer that knows its run folders. It reads JSON: the extra [train] need not be installed."""
    if find_spec("pyengine_training") is None:
        raise PyEngineError(
            "the cost sheet needs the training half, which this installation lacks: pip install 'pyengine-lm[train]'"
        )
    return import_module("pyengine_training.cost")


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("cost", EPILOG)
    training_half().add_options(parser)
    add = parser.add_argument
    add("-n", "--n-gen", type=options.positive, default=128, metavar="N", help="tokens of a measured run (128)")
    add("-r", "--repetitions", type=options.positive, default=5, metavar="N", help="measured runs (5)")
    group = parser.add_argument_group("model")
    model_help = "what is measured: a frozen file or checkpoint of the same model; default: the run's own"
    group.add_argument("-m", "--model", metavar="PATH", help=model_help)
    options.add_threads_option(group)
    options.add_isa_option(group)
    return parser


def model_to_measure(args: argparse.Namespace, checkpoint: Path) -> str:
    """-m, else the run's model: the finished one, or the checkpoint that was counted. PYENGINE_MODEL is another model."""
    if args.model:
        return str(args.model)
    final = checkpoint.parent.parent / "final"
    return str(final if args.run.resolve() == final.parent.resolve() and final.exists() else checkpoint)


def check_same_model(engine: Engine, model: Any, path: Path) -> None:
    """The halves of the sheet must speak of one model."""
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
        if engine.config[name] != getattr(model, name):
            raise InvalidArgumentError(
                f"{path} is not the model that was trained: its {name} is {engine.config[name]}, the run's {getattr(model, name)}"
            )


def measure(engine: Engine, n_gen: int, repetitions: int, line: ProgressLine) -> float:
    """Tokens per second of one sequence, the median; what `pyengine bench` calls tgN."""
    from pyengine.cli.bench import Test

    test = Test(0, min(n_gen, engine.n_ctx), 0, 1)
    samples = []
    for number in range(repetitions + 1):  # the first one warms up
        line.show(f"cost {test.label}, {engine.n_threads} threads: {number or 'warm-up'}")
        samples.append(test.n_tokens / max(test.run(engine), 1e-9))
    return statistics.median(samples[1:])


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    cost = training_half()
    training_error = import_module("pyengine_training.errors").TrainingError
    try:
        checkpoint = cost.find_checkpoint(args.run)
        training = cost.read_training(checkpoint)
    except training_error as error:
        raise PyEngineError(str(error)) from error
    speed, facts = args.tokens_per_second, {}
    if speed is None:
        args.model = model_to_measure(args, checkpoint)
        with options.open_engine(args) as engine, ProgressLine("cost") as line:
            check_same_model(engine, training.model, Path(args.model))
            speed = measure(engine, args.n_gen, args.repetitions, line)
            facts = {"model": str(engine.path), "threads": engine.n_threads, "isa": engine.isa}
    options.tolerant_stdout()
    cost.show(cost.cost_sheet(training, args.rate, speed), args.rate, args.json, run=str(args.run), **facts)
    return 0
