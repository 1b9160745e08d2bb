"""argparse as all commands use it: errors are one line, and types that their options have."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

from pyengine.cli import COMMANDS, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is not a number") from None


class Parser(argparse.ArgumentParser):
    """argparse with errors as exceptions, so that they are one line like all others, and with answers for options that other
    programs have (elsewhere.py; `is_server`: those of servers, too)."""

    def __init__(self, command: str, epilog: str, usage: str | None = None, *, is_server: bool = False) -> None:
        self.width = 80
        self._is_server = is_server
        super().__init__(
            prog=f"pyengine {command}",
            usage=usage,
            description=COMMANDS[command][0].upper() + COMMANDS[command][1:] + ".",
            epilog=epilog,
            formatter_class=self._formatter,
            allow_abbrev=False,
        )
        self.register("type", int, _whole_number)  # what type=int reads with: argparse would speak of an "int value"
        self.register("type", float, _number)

    def _formatter(self, prog: str) -> argparse.HelpFormatter:
        """argparse makes one for every option that it is told of, and importing what knows the terminal takes 2 ms."""
        return argparse.RawDescriptionHelpFormatter(prog, width=self.width)

    def format_help(self) -> str:
        from shutil import get_terminal_size

        self.width = get_terminal_size().columns - 2
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ('{self.prog} --help' tells more)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """All of them are to be known: UsageError for what is not, with what was perhaps meant."""
        self._refuse_options_of_others(args or ())
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown[0])}")
        return parsed, unknown

    def _refuse_options_of_others(self, words: Sequence[str]) -> None:
        """Before argparse reads them: to it -ngl is -n with the value "gl", and -hf is -h."""
        for word in words:
            name = word.partition("=")[0]
            if word == "--":
                return
            if not name.startswith("-") or name in self._option_string_actions:
                continue
            from pyengine.cli import elsewhere

            meant = elsewhere.meaning(name, elsewhere.SERVER_OPTIONS if self._is_server else elsewhere.OPTIONS)
            if meant is not None:
                raise UsageError(f"there is no option {name}: {meant}")

    def _meant(self, word: str) -> str:
        if word.startswith("-"):
            return ""
        if any(action.dest == "prompt" for action in self._get_positional_actions()):
            return "; a prompt of several words is put in quotes"
        return f"; a model is given with -m {word}" if "-m" in self._option_string_actions else ""


def positive(text: str) -> int:
    """argparse type: an integer from 1."""
    return _integer(text, 1)


def natural(text: str) -> int:
    """argparse type: an integer from 0."""
    return _integer(text, 0)


def seconds(text: str) -> float:
    """argparse type: a number from 0; infinity is for ever."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return value


def count_list(text: str) -> list[int]:
    """argparse type: "128" or "0,4096"."""
    return [_integer(part, 0) for part in text.split(",")]


def _integer(text: str, low: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from {low}")
    return value
