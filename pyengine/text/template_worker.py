"""The process that renders one chat template, and that the kernel ends when it takes too long or too much.

It speaks lines of JSON over its standard input, a socket. The first line is {"source", "time_limit"}: the template, which is
compiled; each further one {"context", "max_output", "time_limit"}. Answers are {"text"} or {"error"}, with "last": true if it
leaves after that. It also leaves when the other side has gone.

Limits are the kernel's. Timers of CPU time and of the clock end the process by a signal that nothing handles, whatever it is
doing; memory is the size of the address space; files cannot grow; no core is written.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
from typing import Any

import jinja2

from pyengine.errors import TemplateError
from pyengine.text import sandbox

MEMORY = 256 << 20  # bytes beyond what the process has at its start
MAX_LINE = 1 << 26  # bytes of a request; a conversation has at most 2^22 characters, of at most 12 bytes in JSON


def address_space() -> int:
    """Bytes of this process's address space; a guess where /proc does not tell."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):
        return 256 << 20


def set_limits() -> None:
    def limit(kind: int, value: int) -> None:
        with contextlib.suppress(ValueError, OSError):  # a platform that does not know it, or a lower limit already
            resource.setrlimit(kind, (value, value))

    limit(resource.RLIMIT_AS, address_space() + MEMORY)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_CORE, 0)


def set_timers(seconds: float) -> None:
    """End this process after so many seconds of CPU time, or five times as many on a machine that has other things to do."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 5 * seconds)


def answer(template: jinja2.Template | None, line: bytes) -> tuple[jinja2.Template | None, bytes, bool]:
    """Compile the template, or render it: (template, what to say, whether this was the last)."""
    last = False
    try:
        request = json.loads(line)
        set_timers(request["time_limit"])
        if template is None:
            template, text = sandbox.compile_template(request["source"]), ""
        else:
            text = sandbox.render(template, request["context"], request["max_output"])
        reply: dict[str, Any] = {"text": text}
        data = json.dumps(reply).encode()
    except TemplateError as error:
        last = template is None
        data = json.dumps({"error": str(error)[:4096], "last": last}).encode()
    except MemoryError:
        last = True
        data = json.dumps({"error": f"the chat template needs more than {MEMORY >> 20} MiB", "last": True}).encode()
    set_timers(0)
    return template, data, last


def main() -> None:
    for number in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program that started us
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    connection = socket.socket(fileno=0)
    sandbox.render(sandbox.compile_template("{{ '' }}"), {}, 1)  # what is imported late is imported now
    set_limits()
    template, last = None, False
    with connection.makefile("rb") as lines:
        while not last and (line := lines.readline(MAX_LINE)):
            template, data, last = answer(template, line)
            del line
            connection.sendall(data + b"\n")
