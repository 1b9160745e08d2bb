"""Forks while other threads hold locks of ours. Each scene runs in a process of its own; a child that waits for ever is killed,
and fails its scene."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")

PRELUDE = """
import os, signal, sys, threading, time, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tested
from pyengine import fork

def child(work, seconds=20):
    '''Fork; the child's exit code after work(), "hangs" if it has none in time.'''
    pid = os.fork()
    if pid == 0:
        signal.alarm(seconds)
        try:
            work()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return "hangs" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM else os.waitstatus_to_exitcode(status)

def started(target):
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread

def when_forking(action):
    '''Call action() at the beginning of every fork: handlers that were registered last come first.'''
    os.register_at_fork(before=action)

def take(lock):
    lock.acquire()
    lock.release()

def ctrl_c_comes_after_a_fork():
    try:
        if os.fork() == 0:
            os._exit(0)
        for _ in range(200):
            time.sleep(0.1)
    except KeyboardInterrupt:
        return True
    return False

class Recorded:
    '''A lock that writes down what happens to it.'''
    def __init__(self, name, log):
        self.name, self.log, self.lock = name, log, threading.RLock()
    def acquire(self):
        self.lock.acquire()
        self.log.append("+" + self.name)
        return True
    def release(self):
        self.log.append("-" + self.name)
        self.lock.release()
"""


def scene(code: str, *arguments: object) -> str:
    """Run the code in a fresh interpreter; its standard output."""
    result = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,  # not the checkout's root, whose uncompiled package would be found first
    )
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    return result.stdout


# -------------------------------------------------------------------- the registry


def test_a_fork_waits_for_the_holder_and_the_child_can_take_the_lock() -> None:
    scene("""
        lock, held = threading.RLock(), threading.Event()
        fork.register(lock, fork.LEAF)
        forking = threading.Event()
        done = []
        def hold():
            with lock:
                held.set()
                forking.wait()
                time.sleep(0.05)  # the fork has begun to wait, or does not wait at all
                done.append(True)
        started(hold)
        held.wait()
        when_forking(forking.set)
        assert child(lambda: (take(lock), done or sys.exit(1))) == 0
        take(lock)
    """)


def test_two_threads_that_fork_at_once() -> None:
    """Both begin while a third holds the lock; each child and the parent can take it afterwards."""
    scene("""
        lock, held, both = threading.RLock(), threading.Event(), threading.Semaphore(0)
        fork.register(lock, fork.ENGINE)
        fork.register(other := threading.RLock(), fork.ENGINE)
        def hold():
            with lock:
                held.set()
                both.acquire(); both.acquire()
                time.sleep(0.05)
        started(hold)
        held.wait()
        when_forking(both.release)
        codes = []
        def work():
            take(lock), take(other)
        threads = [started(lambda: codes.append(child(work))) for _ in range(2)]
        for thread in threads:
            thread.join(60)
        assert codes == [0, 0], codes
        take(lock), take(other)
    """)


def test_many_forks_from_many_threads() -> None:
    scene("""
        locks = [threading.RLock() for _ in range(5)]
        for i, lock in enumerate(locks):
            fork.register(lock, i % 3)
        stop, codes = threading.Event(), []
        def worker():
            while not stop.is_set():
                for lock in locks:
                    take(lock)
        def forker():
            for _ in range(20):
                codes.append(child(lambda: [take(lock) for lock in locks]))
        started(worker), started(worker)
        forkers = [started(forker) for _ in range(3)]
        for thread in forkers:
            thread.join(60)
        stop.set()
        assert codes == [0] * 60, codes
    """)


def test_locks_are_taken_by_rank_and_only_while_they_live() -> None:
    scene("""
        log = []
        leaf, part, first, second, dead = (Recorded(name, log) for name in ("leaf", "part", "first", "second", "dead"))
        fork.register(leaf, fork.LEAF)
        fork.register(part, fork.PART)
        fork.register(first, fork.ENGINE)
        fork.register(second, fork.ENGINE)
        fork.register(dead, fork.ENGINE)
        del dead
        assert child(lambda: None) == 0
        assert log == ["+first", "+second", "+part", "+leaf", "-leaf", "-part", "-second", "-first"], log
        assert len(fork._locks) == 5  # these four, and that of imports
    """)


def test_a_lock_registered_while_a_fork_waits_is_taken_too() -> None:
    """And in its place: what comes after it is let go of meanwhile, so no two threads wait for each other."""
    scene("""
        log = []
        engine, part = Recorded("engine", log), Recorded("part", log)
        fork.register(part, fork.PART)
        class Opens(Recorded):
            def acquire(self):
                if "+leaf" not in self.log:
                    fork.register(engine, fork.ENGINE)
                return super().acquire()
        leaf = Opens("leaf", log)
        fork.register(leaf, fork.LEAF)
        assert child(lambda: None) == 0
        taken = log[: log.index("-leaf")]
        assert log[-6:] == ["+engine", "+part", "+leaf", "-leaf", "-part", "-engine"] or (
            log == ["+part", "+leaf", "-leaf", "-part", "+engine", "+part", "+leaf", "-leaf", "-part", "-engine"]), log
    """)


def test_the_forking_thread_may_hold_locks() -> None:
    scene("""
        lock = threading.RLock()
        fork.register(lock, fork.PART)
        def work():
            lock.release()  # the one that it held
            thread = threading.Thread(target=take, args=(lock,))
            thread.start()
            thread.join()
        with lock:
            assert child(work) == 0
        thread = threading.Thread(target=take, args=(lock,))
        thread.start()
        thread.join()
    """)


def test_ctrl_c_while_a_fork_waits_comes_after_it() -> None:
    scene("""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        lock, held = threading.RLock(), threading.Event()
        fork.register(lock, fork.PART)
        main = threading.get_ident()
        def hold():
            with lock:
                held.set()
                while sys._current_frames()[main].f_code is not fork._take_all.__code__:
                    time.sleep(0.001)  # until the fork waits for the lock
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000):
                    if fork._late:  # it has woken the fork
                        break
                    time.sleep(0.001)
                # else it came an instant before the fork slept, and is heard when the lock is free
        started(hold)
        held.wait()
        try:
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)
                take(lock)
                os._exit(0)
            while True: time.sleep(1)
        except KeyboardInterrupt:
            pass
        assert os.waitpid(-1, 0)[1] == 0
        assert child(lambda: take(lock)) == 0
    """)


def test_a_late_ctrl_c_waits_for_the_end_of_the_fork() -> None:
    """Whoever brings it may be quicker than the handler that sends for it, in which it would be printed and forgotten."""
    scene("""
        import _thread
        from types import SimpleNamespace
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def start_and_linger(function, args):
            _thread.start_new_thread(function, args)
            time.sleep(0.5)
        fork._thread = SimpleNamespace(start_new_thread=start_and_linger, interrupt_main=_thread.interrupt_main)
        fork._late.append(KeyboardInterrupt())
        assert ctrl_c_comes_after_a_fork()
    """)


def test_ctrl_c_when_all_locks_are_taken_is_late_too() -> None:
    scene("""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupted = []
        class Held(list):
            def append(self, item):
                super().append(item)
                if not interrupted:
                    interrupted.append(True)
                    raise KeyboardInterrupt
        fork._held = Held()
        lock = threading.RLock()
        fork.register(lock, fork.PART)
        assert ctrl_c_comes_after_a_fork() and not fork._held
        assert child(lambda: take(lock)) == 0
    """)


# -------------------------------------------------------------------- engines and tokenizers


def test_fork_from_two_threads_while_engines_generate(tiny_model: Path) -> None:
    scene(
        """
        from pyengine import Engine
        engines = [Engine(sys.argv[1], n_threads=1 + i % 2) for i in range(3)]
        expected = engines[0].generate("hello", max_tokens=4, temperature=0).tokens
        stop, codes = threading.Event(), []
        def generate(engine):
            while not stop.is_set():
                engine.generate("hello", max_tokens=4)
        def work():
            for engine in engines:
                assert engine.generate("hello", max_tokens=4, temperature=0).tokens == expected
        def forker():
            for _ in range(10):
                codes.append(child(work))
        for engine in engines:
            started(lambda engine=engine: generate(engine))
        forkers = [started(forker) for _ in range(2)]
        for thread in forkers:
            thread.join(100)
        stop.set()
        assert codes == [0] * 20, codes
        """,
        tiny_model,
    )


def test_a_fork_while_whoever_has_the_steps_loads_a_part(tiny_model: Path) -> None:
    scene(
        """
        from pyengine import Engine
        engine, codes = Engine(sys.argv[1], n_threads=1), []
        def work(_):
            thread = started(lambda: codes.append(child(lambda: engine.tokenize("hello"))))
            while not engine.scheduler.step_lock.is_wanted:
                time.sleep(0.001)  # until the fork waits for the steps
            engine.tokenize("hello")
            return thread
        engine.exclusively(work).join()
        assert codes == [0], codes
        """,
        tiny_model,
    )


def test_what_is_aborted_while_a_fork_waits_is_let_go_of(tiny_model: Path) -> None:
    """It holds the steps, so that nobody else can; there may be no later call."""
    scene(
        """
        from pyengine import Engine
        engine = Engine(sys.argv[1], n_threads=1)
        stream = engine.stream("hello", max_tokens=9, ignore_eos=True)
        next(stream)
        class Closing(Recorded):
            def acquire(self):
                started(stream.close).join()
                return super().acquire()
        fork.register(lock := Closing("lock", []), fork.LEAF)
        assert child(lambda: None) == 0
        assert stream.request.sequence is None and not engine.scheduler._holders
        """,
        tiny_model,
    )


@pytest.mark.parametrize("is_plain", [False, True], ids=["function", "plain"])
def test_two_forks_at_once_of_which_one_is_inside_a_step(tiny_model: Path, is_plain: bool) -> None:
    """In a caller's own function. The other one is in that of another engine, or plain, and this function waits for it: no fork
    waits for a function, not in handlers of others either, and both children can use both engines."""
    scene(
        """
        import concurrent.futures.thread  # whose handler takes a lock for as long as a fork lasts
        from pyengine import Engine
        engines = [Engine(sys.argv[1], n_threads=1) for _ in range(2)]
        options = dict(max_tokens=4, temperature=0)
        expected = engines[0].generate("hello", **options).tokens
        met, is_over, codes = threading.Barrier(2), threading.Event(), []

        def check():
            for engine in engines:
                assert engine.generate("hello", **options).tokens == expected

        def forking(engine):
            pids = []
            def function(tokens, logits):
                if not pids:
                    met.wait()
                    if sys.argv[2] == "True":
                        is_over.wait()
                    pids.append(os.fork())
                    if pids == [0]:
                        signal.alarm(20)
            try:
                assert engine.generate("hello", logits_processor=function, **options).tokens == expected
                if pids == [0]:
                    check()
                    os._exit(0)
                codes.append(os.waitpid(pids[0], 0)[1])
            finally:
                if pids == [0]:
                    os._exit(1)

        def plain():
            met.wait()
            codes.append(child(check))
            is_over.set()

        second = plain if sys.argv[2] == "True" else lambda: forking(engines[1])
        threads = [started(lambda: forking(engines[0])), started(second)]
        for thread in threads:
            thread.join(30)
        assert codes == [0, 0], codes
        check()
        """,
        tiny_model,
        is_plain,
    )


def test_a_child_has_no_jobs_of_its_parents_loops(tiny_model: Path) -> None:
    """Nobody reads them there: what steps for the child's own ends with these."""
    scene(
        """
        import asyncio, weakref
        from pyengine import AsyncEngine, Engine, SamplingParams
        engine = Engine(sys.argv[1], n_threads=1)
        one = AsyncEngine(engine)
        def work():
            asyncio.run(one.generate("hello", max_tokens=2, temperature=0))
            while (thread := one.stepper._thread) is not None:
                thread.join()
            assert not engine.scheduler._requests and not one.stepper._jobs
        async def prepared():
            params = engine.resolve(SamplingParams(max_tokens=400, ignore_eos=True))
            return await one.prepare(lambda job: engine.requests(job, [[5] * 100], params))
        job = asyncio.run(prepared())
        one.stepper._jobs[id(job)] = weakref.ref(job)  # it has been added, and has not begun
        engine.scheduler.add(job.requests)
        assert child(work) == 0
        job.close()
        """,
        tiny_model,
    )


def test_the_first_call_of_an_event_loop_may_come_while_a_fork_waits() -> None:
    """What it would import has handlers of its own at a fork, and must not be in time for the second of them only."""
    scene("""
        import pyengine.async_engine
        class Calling(Recorded):
            def acquire(self):
                import concurrent.futures.thread  # as asyncio.to_thread does
                return super().acquire()
        fork.register(lock := Calling("lock", []), fork.LEAF)
        unraised = []
        sys.unraisablehook = unraised.append
        assert child(lambda: None) == 0
        assert not unraised, unraised
    """)


SLOWLY = """
def slowly(module, name):
    '''From now on module.name() waits until a fork has begun, and then a little.'''
    original, begun, forking = getattr(module, name), threading.Event(), threading.Event()
    def slow(*args, **kwargs):
        begun.set()
        forking.wait(20)
        time.sleep(0.1)
        return original(*args, **kwargs)
    setattr(module, name, slow)
    when_forking(forking.set)
    return begun
"""


@pytest.mark.parametrize(
    "load",
    [
        "engine.tokenize('hello')",  # loads the tokenizer
        "engine.tokenize('hello'), engine.tokenize(SPECIAL)",  # and the guarded one, for text that spells a special token
        "engine.chat_template",
    ],
)
def test_fork_while_a_part_loads(tmp_path: Path, load: str) -> None:
    from engine import freeze_models

    from pyengine.freeze import freeze

    source = freeze_models.write_hf(tmp_path / "hf")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    freeze(source, tmp_path / "m.safetensors")
    scene(
        SLOWLY
        + textwrap.dedent(f"""
        import tokenizers
        import pyengine.engine, pyengine.text.tokenizer, pyengine.text.chat, pyengine.text.plain_template
        SPECIAL = "a <|end|> b"
        engine = pyengine.Engine(sys.argv[1], n_threads=1)
        def use():
            {load}
        if "chat" in {load!r}:
            begun = slowly(pyengine.text.plain_template, "parse")
        elif "SPECIAL" in {load!r}:
            engine.tokenize("hello")
            begun = slowly(pyengine.text.tokenizer, "_respell_special")
        else:
            begun = slowly(pyengine.text.tokenizer, "_load")
        thread = started(use)
        assert begun.wait(20)
        assert child(use) == 0
        thread.join(20)
        use()
        """),
        tmp_path / "m.safetensors",
    )


@pytest.mark.parametrize("module", ["pyengine.sampling", "tokenizers"])
def test_fork_while_a_module_is_imported(tiny_model: Path, module: str) -> None:
    """The first engine and the first call of a process import; a child of that moment would wait for the import for ever."""
    scene(
        SLOWLY
        + textwrap.dedent("""
        import encodings.ascii, importlib.abc, importlib.util
        from pyengine import Engine, _core, _draft  # these here, so that nothing else is imported meanwhile
        begun, forking = threading.Event(), threading.Event()
        class Slow(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name == sys.argv[2] and not begun.is_set():
                    begun.set()
                    forking.wait(20)
                    time.sleep(0.1)
                return None
        sys.meta_path.insert(0, Slow())
        when_forking(forking.set)
        if sys.argv[2] == "tokenizers":
            engine = Engine(sys.argv[1], n_threads=1)
            def use():
                engine.generate("hello", max_tokens=2, temperature=0)
        else:  # the first engine of a process imports it
            def use():
                Engine(sys.argv[1], n_threads=1).close()
        thread = started(use)
        assert begun.wait(20)
        assert child(use) == 0
        thread.join(20)
        """),
        tiny_model,
        module,
    )


def test_fork_while_the_throttling_is_looked_at() -> None:
    scene(
        SLOWLY
        + textwrap.dedent("""
        from pyengine import _core, cpu_watch
        begun = slowly(_core, "throttling")
        def use():
            cpu_watch.begin()
            cpu_watch.end(2)
        started(use)
        assert begun.wait(20)
        assert child(use) == 0
        """)
    )
