"""``python -m pyengine_training``, and what ``pyengine train`` calls."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Callable, Sequence

from .comm import launched_ranks
from .errors import Interrupted, TrainingError
from .supervise import in_child
from .terminal import tell

COMMANDS = ("train", "draft", "prepare", "evaluate", "sample", "snap", "plot", "cost", "runs")


def _command(name: str) -> Callable[[Sequence[str]], int]:
    """A command, imported. Those that only read a run's JSON do without numba."""
    if name == "cost":
        from .cost import cost_command

        return cost_command
    if name == "runs":
        from .runs import runs_command

        return runs_command
    if name == "plot":
        from .plot import plot_command

        return plot_command
    if name == "draft":
        from .draft.command import draft_command

        return draft_command
    from . import cli

    return lambda arguments: cli.run(name, arguments)


def _sentence(error: TrainingError | OSError) -> str:
    """What went wrong: of the system's errors the file and its words, without their number."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return str(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (``train`` when the first word is an option); returns the exit code.

    0 done; 1 an error, named on stderr; 2 wrong usage; 128 + n stopped by signal n after a
    checkpoint; 141 whoever read stdout has gone.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    rank, ranks = launched_ranks()
    if ranks > 1 and command == "train":
        in_child(rank, ranks, arguments)
    try:
        run = _command(command)
    except ImportError as error:
        print(f"pyengine: error: training needs {error.name}: install pyengine-lm[train]", file=sys.stderr)
        return 1
    code, message = 1, ""
    try:
        code = run(arguments)
        print(end="", flush=True)  # here and not at the interpreter's end, where a closed pipe could only be complained about
        return code
    except Interrupted as stop:
        code, message = 128 + stop.signal_number, f"{stop}: a checkpoint is written; continue with --resume"
    except KeyboardInterrupt:  # before the first step: nothing to save
        code, message = 130, "interrupted"
    except MemoryError as error:
        advice = "use a smaller --batch-size, more --shards, or --recompute block"
        message = f"pyengine: error: out of memory ({error}): {advice}"
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # what is still buffered goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (TrainingError, OSError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        message = f"pyengine: error: {_sentence(error)}" + (
            ": make room; a run that has taken steps goes on from its last checkpoint with --resume" if full else ""
        )
    if rank == 0:  # errors that come here are those that all ranks have
        tell(message)
    return code


if __name__ == "__main__":
    sys.exit(main())
