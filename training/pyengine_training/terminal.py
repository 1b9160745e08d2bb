"""Lines to stderr, whose reader may be gone: a run goes on, or ends as it should, with nobody to read it."""

from __future__ import annotations

import errno
import os
import sys

_GONE = (errno.EIO, errno.EPIPE)  # a terminal that is closed; a pipe whose reader ended, tee for one, which is told first


def tell(text: str = "", end: str = "\n") -> None:
    """Print to stderr at once; from the moment on at which nobody can read it, to nowhere."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())  # what is still buffered goes there, too
        os.close(nowhere)
