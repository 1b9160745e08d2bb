"""Threads: what the affinity mask allows, many contexts at once, fork, Ctrl-C. Each scene runs in a
process of its own, since it changes the process."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pyengine import _core

PRELUDE = """
import hashlib, os, signal, sys, threading, time
sys.path.insert(0, sys.argv[1])
import test_equalities as tiny
from pyengine import _core

def run(model, n_threads, size=300):
    rows, kv = tiny.run_chunks(_core.Context(model, n_threads=n_threads), size)
    return hashlib.sha256(b"".join(rows)).hexdigest(), kv

GOLDEN = tiny.GOLDEN_LOGITS, tiny.GOLDEN_KV
model = tiny.make_model()
"""


def scene(code: str, **environment: str) -> str:
    """Run the code in a fresh interpreter; its standard output."""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,  # not the checkout's root, whose uncompiled package would be found first
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_thread_info_is_consistent() -> None:
    info = _core.thread_info()
    assert 1 <= info["n_default"] <= max(1, info["n_affinity"])
    if info["cpu_quota"]:
        assert info["n_default"] <= max(1, info["cpu_quota"])


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_default_follows_the_affinity_mask() -> None:
    scene("""
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        assert _core.thread_info()["n_affinity"] == 1
        assert _core.Context(model).n_threads == 1
        assert run(model, 0) == GOLDEN
        assert run(model, 4) == GOLDEN  # more threads than CPUs: slow, and the same
    """)


def test_contexts_of_many_python_threads_at_once() -> None:
    """One pool serves them all; who finds it busy works alone. Same bytes."""
    scene("""
        results = []
        def work(i):
            for size in (300, 1 + 40 * (i + 1)):
                results.append(run(model, 1 + i % 4, size))
        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for t in threads: t.start()
        for t in threads: t.join()
        assert results == [GOLDEN] * 12
    """)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no /proc to count threads in")
def test_contexts_share_their_workers() -> None:
    """As many as the largest asks for, less the caller; the last one to go takes them along."""
    scene("""
        def n_threads(): return len(os.listdir("/proc/self/task"))
        def becomes(n):  # a thread that has been joined is still listed for a moment
            end = time.monotonic() + 100
            while n_threads() != n and time.monotonic() < end: time.sleep(0.01)
            return n_threads() == n
        before = n_threads()
        contexts = [_core.Context(model, n_threads=n) for n in (2, 3, 1, 3)]
        assert becomes(before + 2)
        def work():
            assert run(model, 3) == GOLDEN
        callers = [threading.Thread(target=work) for _ in range(3)]
        for caller in callers: caller.start()
        assert n_threads() <= before + 2 + 3
        for caller in callers: caller.join()
        assert becomes(before + 2)
        contexts.clear()
        assert becomes(before)
    """)


@pytest.mark.parametrize("blas", ["", "import numpy; numpy.ones((600, 600)) @ numpy.ones((600, 600))"])
def test_idle_workers_use_no_cpu_time(blas: str) -> None:
    """A BLAS in the same process has threads of its own; between calls neither may take CPUs from the other."""
    scene(f"""
        context = _core.Context(model, n_threads=4)
        assert run(model, 4) == GOLDEN
        {blas}
        assert run(model, 4) == GOLDEN
        def used():
            before = time.process_time()
            time.sleep(0.5)
            return time.process_time() - before
        # OpenBLAS spins for a while, longer on a machine that is busy; what spins for ever never passes.
        assert any(used() < 0.02 for _ in range(40))
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_with_a_live_context() -> None:
    """The child has no pool threads; its contexts, old and new, go on and give the same bytes."""
    scene("""
        context = _core.Context(model, n_threads=3)
        sequence = context.sequence_new()
        half = tiny.TOKENS[:150]
        context.forward(half, [sequence] * 150, bytes([1] * 150))
        rows = tiny.rows_of(context, 150)
        child = os.fork()
        context.forward(tiny.TOKENS[150:], [sequence] * 150, bytes([1] * 150))
        rows += tiny.rows_of(context, context.n_logits)
        good = hashlib.sha256(b"".join(rows)).hexdigest() == GOLDEN[0]
        good = good and run(model, 4) == GOLDEN
        del context
        good = good and run(model, 2) == GOLDEN
        if child == 0:
            os._exit(0 if good else 1)
        assert good
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_while_other_threads_compute() -> None:
    """A fork in the middle of somebody's loop leaves the child a pool that works."""
    scene("""
        stop = threading.Event()
        def work():
            while not stop.is_set(): assert run(model, 3) == GOLDEN
        thread = threading.Thread(target=work)
        thread.start()
        codes = []
        for _ in range(5):
            time.sleep(0.01)
            child = os.fork()
            if child == 0:
                os._exit(0 if run(model, 2) == GOLDEN else 1)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        stop.set()
        thread.join()
        assert codes == [0] * 5
    """)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_signal_handler_forks_in_the_middle_of_a_loop() -> None:
    """The child has no workers, so what they had begun never ends there: its forward is cancelled, the next one is as always."""
    scene(
        """
        from pyengine.errors import CancelledError
        context = _core.Context(model, n_threads=2)
        sequences = [context.sequence_new() for _ in range(60)]
        pids, start = [], time.process_time()
        def fork(*_):
            pids.append(os.fork())
            if pids[0] == 0:
                signal.alarm(60)
        signal.signal(signal.SIGUSR1, fork)
        def send():
            while time.process_time() - start < 0.1: time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        sender = threading.Thread(target=send)
        sender.start()
        try:
            context.forward(tiny.TOKENS * 60, [s for s in sequences for _ in range(300)], bytes(300 * 60))
            is_cancelled = False
        except CancelledError:
            is_cancelled = True
        if pids[0] == 0:
            os._exit(0 if is_cancelled and run(model, 2) == GOLDEN else 1)
        assert not is_cancelled
        assert os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]) == 0
    """,
        PYENGINE_ISA="scalar",
    )


@pytest.mark.parametrize("n_threads", [1, 2])
def test_ctrl_c_ends_a_prefill_and_changes_nothing(n_threads: int) -> None:
    """The scalar table needs seconds for this batch; the signal comes when it has had a tenth of one. (Of CPU time: how long that
    takes is the machine's matter.)"""
    scene(
        f"""
        context = _core.Context(model, n_threads={n_threads})
        sequence = context.sequence_new()
        others = [context.sequence_new() for _ in range(60)]
        context.forward(tiny.TOKENS[:10], [sequence] * 10, bytes(10))
        sequences = [s for s in others for _ in range(300)] + [sequence] * 290
        tokens = tiny.TOKENS * 60 + tiny.TOKENS[10:]
        start = time.process_time()
        def interrupt():
            while time.process_time() - start < 0.1: time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        try:
            threading.Thread(target=interrupt).start()
            context.forward(tokens, sequences, bytes(len(tokens)))
        except KeyboardInterrupt:
            used = time.process_time() - start
        else:
            raise SystemExit("the prefill was not interrupted")
        assert used < 1, used
        assert sequence.length == 10
        assert all(s.length == 0 for s in others)
        context.forward(tiny.TOKENS[10:], [sequence] * 290, bytes([1] * 290))
        expected, _ = tiny.run_chunks(_core.Context(model, n_threads=1), 300)
        assert tiny.rows_of(context, context.n_logits) == expected[10:]
    """,
        PYENGINE_ISA="scalar",
    )


def test_a_deadline_in_the_past_changes_nothing() -> None:
    scene("""
        from pyengine.errors import CancelledError
        context = _core.Context(model, n_threads=2)
        sequence = context.sequence_new()
        try:
            context.forward(tiny.TOKENS, [sequence] * 300, bytes([1] * 300), deadline=time.monotonic() - 1)
        except CancelledError as error:
            assert "cancelled" in str(error)
        else:
            raise SystemExit("the deadline was ignored")
        assert sequence.length == 0
    """)
