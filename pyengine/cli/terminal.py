"""Text of others on its way to the user: a terminal obeys some of the characters that it is sent.

Names, messages and everything else that we say about a file go through `visible` or `say`, wherever they are written to: a log is
looked at in a terminal later. What a model says goes through `write`: as it is into pipes and files, without control characters
onto a terminal. (JSON needs neither: it is ASCII.)
"""

from __future__ import annotations

import re
import sys
from typing import TextIO

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # without tab and newline


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def visible(text: str, keep: str = "") -> str:
    """`text` with escapes for what is not printable, as Python's repr has them, but for the characters in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else _escape(character) for character in text
    )


def say(line: str, stream: TextIO | None = None) -> None:
    """Print one line, on stdout if no stream is given."""
    print(visible(line), file=sys.stdout if stream is None else stream)


def warn(line: str) -> None:
    """Print one line on stderr."""
    say(line, sys.stderr)


def write(text: str) -> None:
    """Write words of a model to stdout now."""
    if sys.stdout.isatty():
        text = _CONTROL.sub(lambda match: _escape(match[0]), text)
    sys.stdout.write(text)
    sys.stdout.flush()
