"""Lines to stderr, whose terminal may be gone: a run goes on, or ends as it should, with nobody to read it."""

from __future__ import annotations

import errno
import os
import sys


def tell(text: str = "", end: str = "\n") -> None:
    """Print to stderr at once; from the moment on at which its terminal has been closed, to nowhere."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # what is still buffered goes there, too
