"""The command line as people meet it: Ctrl-C, closed pipes, terminals, conversations."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.cli_tools import command, environment, run_process, write_talker

import pyengine
from pyengine.cli import main
from pyengine.cli.progress import ProgressLine

FOREVER = ("--temp", "1", "-s", "3", "--ignore-eos")
DEADLINE_S = 200.0  # for a busy machine; pytest's own timeout is longer still


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen model with a chat template that can go on for minutes."""
    directory = tmp_path_factory.mktemp("talker")
    return pyengine.freeze(write_talker(directory / "hf"), directory / "talker.safetensors")


@contextlib.contextmanager
def process(directory: Path, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
    """A running command with pipes, killed at the end if it still runs."""
    pipe = subprocess.PIPE
    running = subprocess.Popen(
        command(*arguments), cwd=directory, env=environment(), stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0
    )
    with running:
        try:
            yield running
        finally:
            running.kill()


class Terminal:
    """A command on a pseudo-terminal. `expect` reads until the output holds something."""

    def __init__(self, directory: Path, *arguments: object, term: str = "dumb") -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:  # the child: nothing but exec, whatever happens
            try:
                os.chdir(directory)
                os.execve(command()[0], command(*arguments), environment(TERM=term, COLUMNS="80"))
            finally:
                os._exit(99)
        self.output = ""
        self.code: int | None = None

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def _read(self, timeout: float) -> bool:
        """Whether there was something to read before the end of output."""
        if not select.select([self.fd], [], [], timeout)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # the other side is closed
            data = b""
        self.output += data.decode("utf-8", "replace")
        return bool(data)

    def expect(self, text: str, after: int = 0) -> int:
        """Wait for `text` in the output from `after` on; the position behind it."""
        end = time.monotonic() + DEADLINE_S
        while text not in self.output[after:]:
            assert time.monotonic() < end, f"no {text!r} in {self.output[after:][-2000:]!r}"
            assert self._read(1.0), f"ended without {text!r}: {self.output[after:][-2000:]!r}"
        return after + self.output[after:].index(text) + len(text)

    def expect_prompt(self, after: int = 0) -> int:
        """`expect` a prompt, and that the program sleeps at it. CPython looks for signals before readline's `select` and when
        that is interrupted: a Ctrl-C in the microseconds between would be noticed at the next key."""
        at = self.expect("> ", after)
        end = time.monotonic() + DEADLINE_S
        asleep = 0
        while asleep < 3:
            assert time.monotonic() < end, "it does not wait for input"
            time.sleep(0.01)
            state = Path(f"/proc/{self.pid}/stat").read_text().rpartition(") ")[2][0]
            asleep = asleep + 1 if state == "S" else 0
        return at

    def wait(self) -> int:
        """Read to the end; the exit code."""
        end = time.monotonic() + DEADLINE_S
        while self._read(1.0):
            assert time.monotonic() < end, "it does not end"
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.code


@contextlib.contextmanager
def terminal(directory: Path, *arguments: object, term: str = "dumb") -> Iterator[Terminal]:
    opened = Terminal(directory, *arguments, term=term)
    try:
        yield opened
    finally:
        if opened.code is None:
            os.kill(opened.pid, signal.SIGKILL)
            os.waitpid(opened.pid, 0)
        os.close(opened.fd)


# -------------------------------------------------------------------- signals and pipes


def test_ctrl_c_ends_generate_with_what_there_is(talker: Path, tmp_path: Path) -> None:
    with process(tmp_path, "generate", "-m", talker, "hello", *FOREVER) as running:
        assert running.stdout is not None and running.stderr is not None
        first = running.stdout.read(50)  # it streams: there is output long before the end
        running.send_signal(signal.SIGINT)
        rest = running.stdout.read()
        assert running.wait(DEADLINE_S) == 130
        assert running.stderr.read() == b""
    assert len(first) > 0 and rest.endswith(b"\n")


def test_ctrl_c_ends_json_with_what_there_is(
    talker: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = pyengine.Engine.stream

    def interrupted(self: pyengine.Engine, *arguments: Any, **options: Any) -> Iterator[pyengine.Piece]:
        yield from itertools.islice(stream(self, *arguments, **options), 5)
        raise KeyboardInterrupt

    with pyengine.Engine(talker) as engine:
        expected = engine.generate("hello", temperature=1, seed=3, ignore_eos=True, max_tokens=5).tokens
    monkeypatch.setattr(pyengine.Engine, "stream", interrupted)
    assert main(["generate", "-m", str(talker), "hello", "--json", *FOREVER]) == 130
    result = json.loads(capsys.readouterr().out)
    assert (result["tokens"], result["finish_reason"]) == (expected, "cancelled") and isinstance(result["text"], str)


def test_a_reader_that_leaves_is_no_error(talker: Path, tmp_path: Path) -> None:
    with process(tmp_path, "generate", "-m", talker, "hello", *FOREVER) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.read(1)
        running.stdout.close()
        assert running.wait(DEADLINE_S) == 141
        assert running.stderr.read() == b""


def test_no_reader_at_all(talker: Path, tmp_path: Path) -> None:
    """Output that is only flushed at the end meets the closed pipe too."""
    with process(tmp_path, "info", "-m", talker) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.close()
        assert running.wait(DEADLINE_S) == 141
        assert running.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_disk_is_one_line(talker: Path, tmp_path: Path) -> None:
    generate = command("generate", "-m", talker, "hello", "-n", 4)
    with open("/dev/full", "w") as full:
        done = subprocess.run(generate, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"pyengine: error: No space left on device\n")


def test_closed_outputs(talker: Path, tmp_path: Path) -> None:
    def code(*arguments: object, redirect: str) -> int:
        shell = ["sh", "-c", f'"$@" {redirect}', "sh", *command(*arguments)]
        return subprocess.run(shell, cwd=tmp_path, env=environment()).returncode

    assert code("generate", "-m", talker, "hello", "-n", 4, redirect=">&-") == 0
    assert code("generate", redirect="2>&-") == 2


# -------------------------------------------------------------------- progress


def test_progress_is_for_terminals(talker: Path, tmp_path: Path) -> None:
    checkpoint = talker.parent / "hf"
    with terminal(tmp_path, "freeze", checkpoint, "-o", tmp_path / "a.safetensors", term="xterm") as tty:
        assert tty.wait() == 0
    assert " %  " in tty.output.partition("freezing ")[2] and "a.safetensors: " in tty.output
    with terminal(tmp_path, "freeze", checkpoint, "-o", tmp_path / "a.safetensors", "--force") as tty:
        assert tty.wait() == 0
    assert "freezing" not in tty.output and "\x1b" not in tty.output and "a.safetensors: " in tty.output
    piped = run_process(tmp_path, "freeze", checkpoint, "-o", tmp_path / "b.safetensors")
    assert (piped.returncode, piped.stdout, piped.stderr) == (0, "", "")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_model_frozen_into_the_cache_shows_progress(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    with terminal(tmp_path, "info", talker.parent / "hf", term="xterm") as tty:
        assert tty.wait() == 0
    assert " %  " in tty.output.partition("freezing into the cache ")[2]
    assert len(list((tmp_path / "xdg" / "pyengine").glob("*.safetensors"))) == 1


# -------------------------------------------------------------------- chat


def test_chat_through_a_pipe_remembers(talker: Path, tmp_path: Path) -> None:
    options = {"temperature": 0.0, "max_tokens": 12, "stop": "\n"}
    messages = [{"role": "system", "content": "Be brief."}]
    answers = []
    with pyengine.Engine(talker) as engine:
        for question in ("Hello", "And again", "Third"):
            messages = messages[:1] if question == "Third" else messages  # after /reset
            messages.append({"role": "user", "content": question})
            answers.append(engine.chat(messages, **options).text)
            messages.append({"role": "assistant", "content": answers[-1]})
    arguments = ("chat", "-m", talker, "-sys", "Be brief.", "--temp", "0", "-n", "12", "--stop", "\n")
    done = run_process(tmp_path, *arguments, input="Hello\n\nAnd again\n/reset\nThird\n/exit\nnever said\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(answer + "\n" for answer in answers)


def test_chat_commands(talker: Path, tmp_path: Path) -> None:
    done = run_process(tmp_path, "chat", "-m", talker, input="/help\n/exit\n/help\n")
    assert done.returncode == 0 and done.stdout == "" and done.stderr.count("/reset") == 1
    with terminal(tmp_path, "chat", "-m", talker) as tty:
        at = tty.expect_prompt()
        tty.type("/wat now\n")
        at = tty.expect("there is no command /wat; /help lists them", at)
        tty.expect("> ", at)
        tty.type("/exit\n")
        assert tty.wait() == 0


def test_a_piped_question_may_begin_with_a_slash(talker: Path, tmp_path: Path) -> None:
    done = run_process(tmp_path, "chat", "-m", talker, "--temp", "0", "-n", "3", input="\ufeff/etc/passwd holds what?\r\n")
    with pyengine.Engine(talker) as engine:
        said = [{"role": "user", "content": "/etc/passwd holds what?"}]
        answer = engine.chat(said, temperature=0, max_tokens=3).text
    assert (done.returncode, done.stdout, done.stderr) == (0, answer.removesuffix("\n") + "\n", "")


def test_closed_stdin_is_one_line(talker: Path, tmp_path: Path) -> None:
    for arguments in (("generate", "-m", talker, "-"), ("chat", "-m", talker), ("eval", "-m", talker, "-")):
        shell = ["sh", "-c", '"$@" <&-', "sh", *command(*arguments)]
        done = subprocess.run(shell, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=250)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == "pyengine: error: standard input is closed\n"


# -------------------------------------------------------------------- what others say

EVIL = "a\x1b[2J\x1b]0;owned\x07\r\nb\x9b31m\u202ec\x7f"


@pytest.fixture(scope="module")
def evil(talker: Path) -> Path:
    """A model whose name and source are not polite."""
    path = talker.parent / "evil.safetensors"
    data = talker.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header["__metadata__"] |= {"name": EVIL, "source": EVIL, "generator": EVIL}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + n :])
    return path


def is_tame(text: str) -> bool:
    return all(character.isprintable() or character == "\n" for character in text)


def test_no_control_character_of_a_file_reaches_the_user(evil: Path, tmp_path: Path) -> None:
    info = run_process(tmp_path, "info", "-m", evil, "--tensors")
    assert info.returncode == 0 and is_tame(info.stdout) and "a\\x1b[2J" in info.stdout
    assert sum(line.startswith("b") for line in info.stdout.splitlines()) == 1  # begin of text
    with terminal(tmp_path, "chat", "-m", evil) as tty:
        tty.expect("> ")
        tty.type("/exit\n")
        assert tty.wait() == 0
    assert "a\\x1b[2J\\x1b]0;owned\\x07" in tty.output and "\x1b[2J" not in tty.output and "\x07" not in tty.output
    bad = tmp_path / "x\x1b[2J\x07.safetensors"
    bad.write_bytes(b"nothing of the kind")
    for arguments in (("info", bad), ("verify", "-m", bad), ("generate", "-m", bad, "a"), ("info", tmp_path / "no\x1b[2J")):
        done = run_process(tmp_path, *arguments)
        assert done.returncode == 1 and is_tame(done.stderr) and "\\x1b[2J" in done.stderr
    done = run_process(tmp_path, "info", bad, env=environment(PYENGINE_TRACEBACK="1"))
    assert "Traceback" in done.stderr and is_tame(done.stderr)


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_no_control_character_of_a_model_reaches_a_terminal(
    talker: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a pipe it goes as it is."""
    pieces = [pyengine.Piece(text, 1, None, None) for text in ("é\t😀\u200d\n", EVIL[:3], EVIL[3:])]

    def speak(self: pyengine.Engine, *_: Any, **__: Any) -> Iterator[pyengine.Piece]:
        yield from pieces
        yield pyengine.Piece("", None, None, self.generate("a", max_tokens=1))

    monkeypatch.setattr(pyengine.Engine, "stream" if name == "generate" else "chat", speak)
    outputs = []
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        monkeypatch.setattr("sys.stdout.isatty", lambda is_terminal=is_terminal: is_terminal, raising=False)
        assert main([name, "-m", str(talker), *(["a"] if name == "generate" else [])]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == "é\t😀\u200d\n" + EVIL + "\n"
    assert outputs[1] == "é\t😀\u200d\na\\x1b[2J\\x1b]0;owned\\x07\\r\nb\\x9b31m\u202ec\\x7f\n"


def test_progress_shows_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")

    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Tty()
    with ProgressLine("x", stream) as line:
        line.update(1, 1, EVIL)
    assert is_tame(stream.getvalue().replace("\r\x1b[K", ""))


def test_nothing_is_printed_at_the_end_of_the_interpreter(talker: Path, tmp_path: Path) -> None:
    """A stream that is left half read, in a module, in a cycle, in a thread: Python ends it when much is gone already."""
    code = """
import sys, threading
import pyengine
engine = pyengine.Engine(sys.argv[1])
def begin():
    return pyengine.Engine(sys.argv[1]).stream("Once", max_tokens=100, ignore_eos=True)
stream = begin()
next(stream)
another = engine.chat([{"role": "user", "content": "a"}], stream=True, max_tokens=100, ignore_eos=True)
next(another)
class Cycle: pass
cycle = Cycle()
cycle.me, cycle.stream = cycle, begin()
next(cycle.stream)
kept = []
def work():
    kept.append(begin())
    next(kept[-1])
thread = threading.Thread(target=work)
thread.start()
thread.join()
engine.chat_template._in_process().start()
"""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", code, str(talker)],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_chat_with_a_question_answers_it(talker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"temperature": 0.0, "max_tokens": 12, "stop": "\n"}
    with pyengine.Engine(talker) as engine:
        system = {"role": "system", "content": "be kind"}
        text = engine.chat([system, {"role": "user", "content": "hello\nyou"}], **options).text
    (tmp_path / "question").write_text("hello\nyou\n")
    for given in (["hello\nyou"], ["-p", "hello\nyou"], ["-f", str(tmp_path / "question")], ["-e", r"hello\nyou"]):
        arguments = ["-m", str(talker), "--temp", "0", "-n", "12", "--stop", "\n", "--system-prompt", "be kind"]
        assert main(["chat", *arguments, *given]) == 0
        assert capsys.readouterr() == (text + "\n", "")
    full = main(["chat", "-m", str(talker), "-c", "64", "x" * 100])
    assert full == 1 and "the context holds 64" in capsys.readouterr().err
    assert main(["chat", "-m", str(talker), "a", "-p", "b"]) == 2
    assert "more than one prompt" in capsys.readouterr().err


def test_a_line_that_goes_on_in_the_next(talker: Path, tmp_path: Path) -> None:
    """On a terminal; through a pipe every line is a question."""
    options = ("--temp", "0", "-n", "12", "--stop", "\n")
    with pyengine.Engine(talker) as engine:
        messages = [{"role": "user", "content": "hello\nyou"}]
        answer = engine.chat(messages, temperature=0.0, max_tokens=12, stop="\n").text
    with terminal(tmp_path, "chat", "-m", talker, *options) as tty:
        tty.expect("> ")
        tty.type("hello\\\n")
        at = tty.expect(". ", tty.expect("hello"))
        tty.type("you\n")
        assert tty.expect("\n> ", at) > at
        tty.type("/exit\n")
        assert tty.wait() == 0
    shown = tty.output[at:].partition("you\r\n")[2].partition("\r\n> ")[0]
    assert shown == "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in answer)


def test_chat_needs_a_template(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["chat", "-m", str(tiny_model)]) == 1
    assert "chat template" in capsys.readouterr().err
    monkeypatch.delenv("PYENGINE_MODEL", raising=False)
    assert main(["chat"]) == 1
    assert "name another one with -m" in capsys.readouterr().err


def test_chat_whose_context_is_full(talker: Path, tmp_path: Path) -> None:
    piped = run_process(tmp_path, "chat", "-m", talker, "-c", "64", input="x" * 100 + "\n")
    assert piped.returncode == 1 and "the context holds 64" in piped.stderr
    with terminal(tmp_path, "chat", "-m", talker, "-c", "64", "-n", "4", "--temp", "0") as tty:
        tty.expect("> ")
        tty.type("x" * 100 + "\n")
        at = tty.expect("/reset starts anew")
        tty.expect("> ", at)
        tty.type("\x04")
        assert tty.wait() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(talker: Path, tmp_path: Path) -> None:
    with terminal(tmp_path, "chat", "-m", talker, *FOREVER) as tty:
        at = tty.expect("> ")
        for question in ("hello", "once more"):
            tty.type(question + "\n")
            at = tty.expect(question, at)
            while len(tty.output) < at + 100:  # the answer is on its way
                tty._read(1.0)
            tty.type("\x03")
            at = tty.expect("\n> ", at)
        tty.type("/exit\n")
        assert tty.wait() == 0


def test_ctrl_c_twice_at_the_prompt_leaves(talker: Path, tmp_path: Path) -> None:
    with terminal(tmp_path, "chat", "-m", talker, "-n", "3") as tty:
        tty.expect_prompt()
        tty.type("half a line\x03")
        tty.expect_prompt(tty.expect("(Ctrl-C again leaves)"))
        tty.type("\x03")
        assert tty.wait() == 130


def test_end_of_input_leaves(talker: Path, tmp_path: Path) -> None:
    with terminal(tmp_path, "chat", "-m", talker) as tty:
        tty.expect("> ")
        tty.type("\x04")
        assert tty.wait() == 0
