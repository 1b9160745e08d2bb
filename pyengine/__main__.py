"""The command `pyengine`, and `python -m pyengine`.

Everything is imported inside of `main`, so that Ctrl-C while it is read ends as it does later: without a traceback, with 130.
"""

import sys


def main() -> int:
    """The command line of this process. Returns the exit code."""
    try:
        from pyengine.cli import main as command_line

        return command_line()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
