"""The command `pyengine`: one module a command, imported when it is the one that was asked for.

Start-up time is a feature: this module imports nothing but `sys`, and no command imports what another one needs. A command is a
module with `run(argv) -> int`. Results go to stdout, everything else to stderr. Exit codes: 0 done; 2 the words of the command
line are wrong, whatever they name (`UsageError`); 1 what they name, or this machine, will not do (all other exceptions);
130 interrupted; 141 whoever read our output has gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

COMMANDS = {
    "generate": "continue a prompt",
    "chat": "talk with a model",
    "embed": "a vector for each text",
    "rerank": "documents by how well they answer a query",
    "serve": "an OpenAI-compatible server with a page (needs the extra pyengine-lm[serve])",
    "freeze": "turn a checkpoint (Hugging Face, GGUF, llama2.c) into a frozen int8 file",
    "info": "what is in a model file",
    "verify": "check a model's checksums and golden outputs on this machine",
    "models": "what is kept of models: list, remove, prune",
    "bench": "measure speed, load time and memory",
    "eval": "perplexity of a text file, or accuracy on a task",
    "train": "train a model (needs the extra pyengine-lm[train])",
    "runs": "list training runs and compare them",
    "cost": "what training a model was and what running it is",
    "doctor": "what this machine offers and what pyengine makes of it",
}

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_BROKEN_PIPE = 1, 2, 130, 141


class UsageError(Exception):
    """The command line is wrong by its words alone: exit code 2. What a file, a model or this machine has to say against it is
    a PyEngineError."""


def overview() -> str:
    """What `pyengine --help` prints."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items())
    return f"""\
usage: pyengine COMMAND [options]

Run Llama-family language models as frozen int8 tensors on a CPU.

commands:
{commands}

  pyengine COMMAND --help     options and examples
  pyengine --version

examples:
  pyengine generate "Once upon a time"                  with the small model that ships with the package
  pyengine freeze model.gguf -o model.safetensors
  pyengine chat -m model.safetensors
"""


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that argv names. Raises what the command raises."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        if len(argv) > 1 and not argv[1].startswith("-"):
            return dispatch([argv[1], "--help"])
        sys.stdout.write(overview())
        return 0
    name = argv[0]
    if name in ("--version", "-V"):
        from pyengine import __version__

        print(f"pyengine {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"there is no command {name!r}; {_meant(name)}")
    from importlib import import_module

    code: int = import_module(f"pyengine.cli.{name}").run(list(argv[1:]))
    return code


def _meant(name: str) -> str:
    """What somebody meant who typed this for a command."""
    import difflib

    from pyengine.cli import elsewhere

    if name.startswith("-"):
        return f"a command comes first: pyengine generate {name} …"
    if name in elsewhere.COMMANDS:
        return elsewhere.COMMANDS[name]
    if any(mark in name for mark in " ./"):  # no command's: a text, or a model's path
        return "a text is continued by pyengine generate TEXT, a model named by pyengine generate -m MODEL TEXT"
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"did you mean 'pyengine {near[0]}'?" if near else "'pyengine --help' lists the commands"


def main(argv: Sequence[str] | None = None) -> int:
    """The command `pyengine`; argv without the program's name. Returns the exit code and raises nothing that can be expected."""
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started us: say it to nobody
        sys.stdout, sys.stderr = sys.stdout or open("/dev/null", "w"), sys.stderr or open("/dev/null", "w")  # noqa: SIM115
    try:
        code = dispatch(sys.argv[1:] if argv is None else argv)
        sys.stdout.flush()  # here and not at the interpreter's end, where a closed pipe could only be complained about
        return code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        abandon_stdout()
        return EXIT_BROKEN_PIPE
    except SystemExit as stop:  # argparse after --help; a signal that a writer turned into an exception
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else EXIT_ERROR
    except Exception as error:
        from pyengine.cli.errors import report

        return report(error)


def abandon_stdout() -> None:
    """Let what is still buffered go nowhere: the interpreter flushes at its end, and would complain."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
