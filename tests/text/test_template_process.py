"""The process that renders templates that are not plain: its limits, and how it lives and dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from engine import cli_tools

from pyengine.errors import InvalidArgumentError, TemplateError
from pyengine.text import template_process
from pyengine.text.chat import ChatTemplate
from pyengine.text.template_process import TemplateProcess

MESSAGES = [{"role": "user", "content": "x"}]
NOT_PLAIN = "{{ messages | sort(attribute='role') | map(attribute='content') | join }}"
BIG = "'\U0001f600ABCDEFGHIJKLMNO' * 240000"  # 16 MB of it

ENDLESS = '{% for a in range(99999) %}{% for b in range(99999) %}{% if "" | sort %}{% endif %}{% endfor %}{% endfor %}'

SLOW = {
    "a test that is not a call": "{% set x = range(100000)|list %}{{ range(100000)|select('in', x)|list|length }}",
    "the same, lazily": "{% set x = range(99999)|list %}{{ ([-1] * 99999) | select('in', x) | first }}",
    "a sum of lists": "{% set x = [[1]] * 250000 %}{{ (x|sum(start=[]))|length }}",
    "a sum of tuples": "{% set x = [(1,)] * 250000 %}{{ (x|sum(start=()))|length }}",
    "hashes that collide": (
        "{% set ns = namespace(l=[]) %}{% for i in range(90000) %}{% set ns.l = ns.l + [i * 2305843009213693951] %}{% endfor %}"
        "{{ ns.l | unique | list | length }}"
    ),
    "loops in loops": ENDLESS,
    "a power": "{{ 9 ** 99999999 }}",
    "a pattern": "{% for i in range(99999) %}{{ ('<' * 99999) | striptags | length }}{% endfor %}",
    "a text that is long to compile": "{% if x %}" + "{% elif x %}{% set y = 1 %}" * 9000 + "{% endif %}",
}
BIG_ONES = {
    "a constant, while it is compiled": "{{ ([[1]] * 250000) | sum(start=[]) | length }}{{ 'a' * 1000000000 }}",
    "generators that hold": (
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}"
        "{% set ns.l = ns.l + [(" + BIG + " ~ i)|map('upper')] %}{% endfor %}"
    ),
    "methods that hold": (
        "{% set ns = namespace(l=[]) %}{% for i in range(99999) %}{% set ns.l = ns.l + [("
        + BIG
        + " ~ i).upper] %}{% endfor %}"
    ),
    "many names": "".join(f"{{% set a{i} = {BIG} %}}" for i in range(4000)),
    "a block": "{% set x %}{% for i in range(25000) %}" + "A" * 200_000 + "{% endfor %}{% endset %}{{ x|length }}",
    "frames": "{% macro m(n) %}{% set a = " + BIG + " ~ n %}{{ m(n+1) }}{{ a|length }}{% endmacro %}{{ m(0) }}",
    "loops that call themselves": (
        "{% for i in [1] recursive %}{% set a = " + BIG + " ~ i %}{{ loop([i+1]) }}{{ a|length }}{% endfor %}"
    ),
    "a string": "{{ 'a' * 10000000000 }}",
    "a list": "{{ ([1] * 10000000000) | sort }}",
    "padding": "{{ 'a' | center(10000000000) }}",
}


@pytest.mark.parametrize("name", SLOW)
def test_time_is_a_limit(name):
    """0.2 s of CPU time, then the kernel ends it; what does not take as long, since a machine is fast, may come back."""
    template = None
    try:
        template = TemplateProcess(SLOW[name], 0.2)
        template.render({"messages": MESSAGES}, 1 << 20, 0.2)
    except TemplateError as error:
        assert "within 0.2 s" in str(error) or "more than 256 MiB" in str(error) or "Overflow" in str(error)
    finally:
        if template is not None:
            template.close()


def test_a_template_without_end_is_ended():
    template = TemplateProcess("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", 1.0)
    for _ in range(2):  # and the next one has a process of its own
        with pytest.raises(TemplateError, match=r"did not finish within 0\.2 s"):
            template.render({}, 100, 0.2)
    template.close()


@pytest.mark.parametrize("name", BIG_ONES)
def test_memory_is_a_limit(name):
    template = TemplateProcess(BIG_ONES[name], 2.0)
    with pytest.raises(TemplateError, match=r"256 MiB|finish within|exceeds|recursion|cannot be compiled|Overflow"):
        template.render({"messages": MESSAGES}, 1 << 20, 2.0)
    template.close()


def peak(pid: int) -> int:
    """The most address space that the process has had, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.partition("VmPeak:")[2].split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_the_limit_of_memory_is_what_it_says():
    template = TemplateProcess("{{ ('a' * n) | length | string | sort | join }}", 2.0)
    template.start()
    assert template._worker is not None
    before = peak(template._worker._process.pid)
    assert template.render({"n": 200 << 20}, 100, 2.0)
    assert peak(template._worker._process.pid) < before + (256 << 20)
    with pytest.raises(TemplateError, match="more than 256 MiB"):
        template.render({"n": 300 << 20}, 100, 2.0)
    template.close()


def test_output_is_a_limit():
    template = TemplateProcess("{{ 'a' | center(1000) }}", 1.0)
    assert len(template.render({}, 1000, 1.0)) == 1000
    with pytest.raises(TemplateError, match="exceeds 999"):
        template.render({}, 999, 1.0)
    template.close()


@pytest.mark.parametrize(
    "source, message",
    [("{% for %}", "line 1"), ("{{ x | nosuchfilter }}", "nosuchfilter"), ("{{" + "(" * 3000, "line 1|cannot be compiled"),
     ("{{ x" + " + 1" * 20000 + " }}", "cannot be compiled|did not finish")],
)  # fmt: skip
def test_what_is_no_template_is_refused_at_the_start(source, message):
    with pytest.raises(TemplateError, match=message):
        TemplateProcess(source, 1.0).start()


def test_the_templates_own_words_come_back():
    template = TemplateProcess("{{ raise_exception('no ' ~ messages[0].role) if messages | sort else '' }}", 1.0)
    with pytest.raises(TemplateError, match=r"^no user$"):
        template.render({"messages": MESSAGES}, 100, 1.0)
    template.close()


@pytest.mark.parametrize("source", ["{{ messages[0].items }}", "{{ [messages | map('upper')] }}", "{{ raise_exception ~ '' }}"])
def test_no_address_of_an_object_comes_out(source):
    """It would be another one each time."""
    template = TemplateProcess(source, 1.0)
    with pytest.raises(TemplateError, match="no text"):
        template.render({"messages": MESSAGES}, 1000, 1.0)
    template.close()
    template = TemplateProcess("{{ messages[0].content }}", 1.0)  # but it may be said
    said = [{"role": "user", "content": "<a at 0x7f00>"}]
    assert template.render({"messages": said}, 1000, 1.0) == "<a at 0x7f00>"
    template.close()


def test_any_character_makes_the_journey():
    text = "".join(map(chr, [0, 10, 13, 34, 92, 0x7F, 0xE9, 0x2028, 0xDFFF, 0xD800, 0xFFFF, 0x1F600]))
    template = TemplateProcess("{{ x | sort | length }}{{ x }}", 1.0)
    assert template.render({"x": text}, 1000, 1.0) == f"{len(text)}{text}"
    template.close()


# -------------------------------------------------------------------- when it is used


def test_plain_templates_start_no_process(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr(template_process, "_Worker", refuse)
    assert ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}").render(MESSAGES) == "x"


def test_others_are_started_once_and_kept():
    template = ChatTemplate(NOT_PLAIN)
    assert not template.is_plain
    pids = set()
    for _ in range(3):
        assert template.render(MESSAGES) == "x"
        assert template._process is not None and template._process._worker is not None
        pids.add(template._process._worker._process.pid)
    assert len(pids) == 1
    template.close()
    assert template.render(MESSAGES) == "x"  # and started again when they are needed after all
    template.close()


def test_a_plain_template_that_runs_out_of_fuel_goes_on_elsewhere():
    template = ChatTemplate("{% for i in range(60000) %}{{ 'a' if messages else 'b' }}{% endfor %}")
    assert template.is_plain and template._process is None
    assert template.render(MESSAGES) == "a" * 60000
    assert template._process is not None
    template.close()


def test_threads_take_turns():
    template, texts = ChatTemplate(NOT_PLAIN), []
    threads = [threading.Thread(target=lambda: texts.append(template.render(MESSAGES))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == ["x"] * 8
    template.close()


# -------------------------------------------------------------------- life and death


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until_gone(pid: int) -> None:
    while is_alive(pid):  # pytest's timeout is the limit
        threading.Event().wait(0.01)


SCENE = textwrap.dedent(
    """
    import os, signal, sys, time
    from pyengine.text.chat import ChatTemplate
    template = ChatTemplate({source!r})
    ENDLESS = {endless!r}
    messages = [{{"role": "user", "content": "x"}}]
    def busy(other):  # whether another thread renders it
        held = not other._process._lock.acquire(blocking=False)
        if not held:
            other._process._lock.release()
        return held
    assert template.render(messages) == "x"
    print(template._process._worker._process.pid, flush=True)
    """
).format(source=NOT_PLAIN, endless=ENDLESS)


def scene(directory: Path, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", SCENE + textwrap.dedent(code)],
        cwd=directory, env=cli_tools.environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize(
    "end", ["", "sys.exit(3)", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)", "raise SystemExit"]
)
def test_it_dies_with_us(tmp_path, end):
    done = scene(tmp_path, end)
    assert done.stderr == ""
    wait_until_gone(int(done.stdout))


def test_it_dies_with_us_also_when_a_child_lives_on(tmp_path):
    """A child of a fork has a copy of our end of the socket, and closes it."""
    done = scene(
        tmp_path,
        """
        if os.fork() == 0:
            os.close(0), os.close(1), os.close(2)
            time.sleep(60)
            os._exit(0)
        os._exit(0)
        """,
    )
    wait_until_gone(int(done.stdout))


def test_the_child_of_a_fork_starts_its_own(tmp_path):
    done = scene(
        tmp_path,
        """
        child = os.fork()
        if child == 0:
            assert template.render(messages) == "x"
            print(template._process._worker._process.pid, flush=True)
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert template.render(messages) == "x"
        print(template._process._worker._process.pid)
        """,
    )
    assert done.returncode == 0 and done.stderr == ""
    first, second, third = map(int, done.stdout.split())
    assert first == third != second


def test_a_fork_while_another_thread_renders(tmp_path):
    """The fork waits for it: the child finds no lock that another thread holds."""
    done = scene(
        tmp_path,
        """
        import threading
        slow = ChatTemplate(ENDLESS)
        def render():
            try:
                slow.render(messages, time_limit=0.5)
            except Exception as error:
                assert "within" in str(error)
        thread = threading.Thread(target=render)
        thread.start()
        while not busy(slow):
            time.sleep(0.001)
        child = os.fork()
        if child == 0:
            render()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        thread.join()
        """,
    )
    assert done.returncode == 0, done.stderr


def test_ctrl_c_reaches_us_and_not_it(tmp_path):
    """It is interrupted with us in the middle of a rendering: the next one has a new process."""
    done = scene(
        tmp_path,
        """
        import threading
        signal.signal(signal.SIGINT, signal.default_int_handler)
        slow = ChatTemplate(ENDLESS)
        def interrupt():
            while not busy(slow):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt).start()
        try:
            slow.render(messages, time_limit=60)
        except KeyboardInterrupt:
            pass
        else:
            raise SystemExit("not interrupted")
        try:
            slow.render(messages, time_limit=0.1)
        except Exception as error:
            assert "within" in str(error), error
        """,
    )
    assert done.returncode == 0, done.stderr


def test_it_is_killed_and_another_comes():
    template = ChatTemplate(NOT_PLAIN)
    assert template._process is not None and template._process._worker is not None
    pid = template._process._worker._process.pid
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(TemplateError, match="ended with code -9"):
        template.render(MESSAGES)
    assert template.render(MESSAGES) == "x"
    template.close()


def test_it_has_nothing_of_ours():
    """No variable of the environment but those of the loader and the clock, no file but its socket."""
    template = ChatTemplate(NOT_PLAIN)
    assert template._process is not None and template._process._worker is not None
    proc = Path(f"/proc/{template._process._worker._process.pid}")
    if not proc.exists():
        pytest.skip("no /proc")
    names = {line.partition(b"=")[0].decode() for line in (proc / "environ").read_bytes().split(b"\0") if line}
    assert names <= set(template_process._ENVIRONMENT)
    assert {int(fd.name) for fd in (proc / "fd").iterdir()} == {0, 1, 2}
    assert (proc / "cwd").resolve() == Path("/")
    assert os.getsid(int(proc.name)) == int(proc.name)
    template.close()


@pytest.mark.parametrize("executable", [None, "", "/opt/app/blender", "/nowhere/python3"])
def test_an_interpreter_that_is_none(monkeypatch, executable):
    monkeypatch.setattr(sys, "executable", executable)
    monkeypatch.setattr(sys, "_base_executable", executable, raising=False)
    monkeypatch.setattr(sys, "base_exec_prefix", "/nowhere")
    assert ChatTemplate("{{ messages[0].content }}").render(MESSAGES) == "x"
    with pytest.raises(TemplateError, match="no Python interpreter"):
        ChatTemplate(NOT_PLAIN)


def test_a_program_that_is_no_interpreter(monkeypatch, tmp_path):
    fake = tmp_path / "python3"
    fake.write_text("#!/bin/sh\necho hello\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(TemplateError, match=r"ended with code 0|answers nonsense"):
        ChatTemplate(NOT_PLAIN)


def test_the_interpreter_is_found_beside_an_odd_executable(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/opt/app/blender")
    template = ChatTemplate(NOT_PLAIN)
    assert template.render(MESSAGES) == "x"
    template.close()


# -------------------------------------------------------------------- what it is given


def test_values_are_data():
    for bad in (b"x", object(), {1: 2}, {"a": {1}}, 10**30, [[lambda: 1]], "x" * (1 << 23)):
        with pytest.raises(InvalidArgumentError):
            ChatTemplate("{{ x }}").render(MESSAGES, x=bad)
    loop: list[object] = []
    loop.append(loop)
    deep: object = "x"
    for _ in range(5000):
        deep = [deep]
    for bad in (loop, deep):
        with pytest.raises(InvalidArgumentError, match="nested deeper"):
            ChatTemplate("{{ x }}").render(MESSAGES, x=bad)
