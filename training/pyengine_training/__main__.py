"""``python -m pyengine_training``, and what ``pyengine train`` calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

COMMANDS = ("train", "prepare", "evaluate", "sample", "snap", "cost")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command (``train`` when the first word is an option); returns the exit code.

    0 done; 1 an error, named on stderr; 2 wrong usage; 128 + n stopped by signal n after a
    checkpoint.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "train"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from . import cli
        from .errors import TrainingError
    except ImportError as error:
        print(f"error: training needs {error.name}: install pyengine-lm[train]", file=sys.stderr)
        return 1
    try:
        return cli.run(command, arguments)
    except cli.Interrupted as stop:
        print(f"{stop}: a checkpoint is written; continue with --resume", file=sys.stderr)
        return 128 + stop.signal_number
    except KeyboardInterrupt:  # before the first step: nothing to save
        print("interrupted", file=sys.stderr)
        return 130
    except (TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
