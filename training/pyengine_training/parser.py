"""argparse with errors of one line, like all others of the command line."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Wrong usage ends the process with 2 and one line on stderr."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"pyengine: error: {message} ('{self.prog} --help' tells more)\n")
