"""A chat template in a process of its own: started once, kept while the template is used, killed when it goes beyond its limits.

A thread cannot be stopped from outside and jinja2 cannot be interrupted, so a template that is more than a few loops over the
messages (plain_template.py) is rendered where the kernel can end it. The process is started by `subprocess`, whose fork and exec
are one step in C, so threads of ours do not matter. It holds no file of ours but one end of a socket: when we die, however that
is, the socket closes and it leaves. After a fork, the child starts one of its own.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from pyengine import fork
from pyengine.errors import TemplateError

START_TIMEOUT = 60.0  # seconds until the process answers; 0.05 on a machine that has nothing else to do
MAX_ANSWER = 1 << 27  # bytes

_HERE = os.path.dirname(__file__)  # in the package pyengine
_BOOT = "import sys; sys.path[:0] = sys.argv[1:]; from pyengine.text.template_worker import main; main()"
_ENVIRONMENT = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL", "LC_CTYPE")
_all: weakref.WeakSet[TemplateProcess] = weakref.WeakSet()


def interpreter() -> str:
    """The Python that runs us. Raises TemplateError if there is no telling: a program that embeds Python, or a frozen one."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    candidates = [
        sys.executable,
        getattr(sys, "_base_executable", None),
        os.path.join(sys.base_exec_prefix, "bin", version),
    ]
    for path in candidates:
        if path and os.path.basename(path).startswith(("python", "pypy")) and os.path.isfile(path):
            return path
    raise TemplateError(
        "this model's chat template must be rendered by a process of its own, and sys.executable is no Python interpreter: "
        f"{sys.executable!r}"
    )


def command() -> list[str]:
    """argv: isolated, without site-packages but for the directories of what it needs."""
    import jinja2
    import markupsafe

    packages = [os.path.dirname(os.path.abspath(str(path))) for path in (jinja2.__file__, markupsafe.__file__, _HERE)]
    homes = map(os.path.dirname, packages)
    options = ["-I", "-S", *(["-B"] if sys.dont_write_bytecode else [])]
    if sys.pycache_prefix:
        options += ["-X", f"pycache_prefix={sys.pycache_prefix}"]
    return [interpreter(), *options, "-c", _BOOT, *dict.fromkeys(homes)]


class TemplateProcess:
    """One template and the process that renders it. Calls from several threads take turns.

    source      the template
    time_limit  seconds of CPU time that compiling it may take
    """

    def __init__(self, source: str, time_limit: float) -> None:
        self._source = source
        self._compile_limit = time_limit
        self._lock = threading.RLock()
        fork.register(self._lock, fork.PART)  # a fork waits for the rendering that is under way
        self._worker: _Worker | None = None
        _all.add(self)

    def start(self) -> None:
        """Start the process now. Raises TemplateError if the source is no template."""
        with self._lock:
            self._started()

    def render(self, context: Mapping[str, Any], max_output: int, time_limit: float) -> str:
        """The text for these variables, which are JSON's types. Raises TemplateError for whatever goes wrong."""
        with self._lock:
            request = {"context": context, "max_output": max_output, "time_limit": time_limit}
            return self._ask(self._started(), request)

    def close(self) -> None:
        """End the process. Another rendering would start one."""
        with self._lock:
            self._stop()

    def _started(self) -> _Worker:
        """The running process; a new one at the beginning, after a fork, and when the last was killed."""
        if self._worker is None:
            self._worker = _Worker()
            self._ask(self._worker, {"source": self._source, "time_limit": self._compile_limit})
        return self._worker

    def _stop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close()

    def _ask(self, worker: _Worker, request: Mapping[str, Any]) -> str:
        try:
            answer = worker.ask(request)
        except BaseException:  # an interrupt too: the process would be in the middle of something
            self._stop()
            raise
        if answer.get("last"):
            self._stop()
        if "error" in answer:
            raise TemplateError(str(answer["error"]))
        return str(answer["text"])


class _Worker:
    """A process that runs template_worker.py, and our end of the socket that is its standard input."""

    def __init__(self) -> None:
        if os.name == "nt":  # no limits that the kernel enforces, and no sockets as standard input
            raise TemplateError(
                "this chat template uses parts of jinja2 that are rendered in another process only, which has limits of time and "
                "memory; on Windows there is no such process yet"
            )
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process: subprocess.Popen[bytes] = subprocess.Popen(
                    command(),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
                    start_new_session=True,  # Ctrl-C of a terminal is for us
                )
            except OSError as error:
                ours.close()
                raise TemplateError(f"no process for the chat template can be started: {error}") from None
            except BaseException:
                ours.close()
                raise
        self._socket = ours
        self._finalizer = weakref.finalize(self, _end, self._process, ours)

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises TemplateError if there is none."""
        # The kernel counts the time. This is for a process that somebody has stopped.
        self._socket.settimeout(START_TIMEOUT + 10 * request["time_limit"])
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n", getattr(socket, "MSG_NOSIGNAL", 0))
            line = self._line()
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise TemplateError(self._why(request["time_limit"]))
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or not answer.keys() & {"text", "error"}:
            raise TemplateError("the chat template's process answers nonsense")
        return answer

    def _line(self) -> bytes:
        parts: list[bytes] = []
        size = 0
        while not parts or not parts[-1].endswith(b"\n"):
            part = self._socket.recv(1 << 20)
            size += len(part)
            if not part or size > MAX_ANSWER:
                break
            parts.append(part)
        return b"".join(parts)

    def _why(self, time_limit: float) -> str:
        """What became of a process that does not answer."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "the chat template's process does not answer"
        if code in (-signal.SIGPROF, -signal.SIGALRM):
            return f"the chat template did not finish within {time_limit:g} s"
        return f"the chat template's process ended with code {code}"

    def close(self) -> None:
        self._finalizer()

    def abandon(self) -> None:
        """After a fork: it is our parent's, and we only close our copy of the socket."""
        self._finalizer.detach()
        self._process.returncode = 0  # otherwise Popen complains that nobody has waited
        self._socket.close()


def _end(process: subprocess.Popen[bytes], connection: socket.socket) -> None:
    connection.close()
    process.kill()
    process.wait()


def _after_fork_in_child() -> None:
    for template in list(_all):
        worker, template._worker = template._worker, None
        if worker is not None:
            worker.abandon()


fork.call_after(in_child=_after_fork_in_child)
