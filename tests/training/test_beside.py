"""Checkpoints and samples beside the steps: the same files, errors that surface, nothing lost; and checkpoints by the clock."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training import checkpoint as checkpoints
from pyengine_training import train
from pyengine_training.__main__ import main
from pyengine_training.device import Machine
from pyengine_training.threads import Beside, share_out
from pyengine_training.trainer import Trainer

SIZES = "--vocab-size 300 --dim 32 --n-layers 1 --n-heads 2 --n-kv-heads 1 --head-dim 16 --hidden-dim 64"
KNOBS = "--seq-len 32 --batch-size 4 --shards 2 --eval-documents 4 --eval-every 3 --sample-every 2 --sample-tokens 4"
LENGTH = "--steps 9 --checkpoint-every 2 --keep-checkpoints 0 --decay-fraction 0.5 --warmup-fraction 0"


def run(folder: Path, stories: Path, *words: str) -> int:
    given = ["--data", str(stories), *SIZES.split(), *KNOBS.split(), *(words or LENGTH.split())]
    return main(["train", "--run-dir", str(folder), *given])


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where steps run on another device."""
    monkeypatch.setattr(Machine, "waits_for_host", True)


class Steps:
    """How far the run is; the writer's thread can wait for a step that comes after its checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
        self.done, self.changed, self.late = 0, threading.Condition(), 0
        step, save = Trainer.step, checkpoints.save_checkpoint

        def counted(trainer: Trainer, *batch: Any) -> Any:
            result = step(trainer, *batch)
            with self.changed:
                self.done = trainer.state.step
                self.changed.notify_all()
            return result

        def after_another_step(folder: Path, *args: Any) -> None:
            own = int(folder.name.removeprefix("step_"))
            with self.changed:
                assert self.changed.wait_for(lambda: self.done > own or own == last, 60)
                self.late += self.done > own
            save(folder, *args)

        monkeypatch.setattr(Trainer, "step", counted)
        monkeypatch.setattr(checkpoints, "save_checkpoint", after_another_step)


def samples(folder: Path) -> list[str]:
    return [line.partition(" ")[2] for line in (folder / "log.txt").read_text().splitlines() if " sample: " in line]


@pytest.mark.usefixtures("beside")
def test_what_is_written_later_is_what_was(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each checkpoint is written only after the next step has changed parameters and moments."""
    with monkeypatch.context() as patch:
        patch.setattr(Machine, "waits_for_host", False)
        assert run(tmp_path / "plain", stories) == 0
    steps = Steps(monkeypatch, last=9)
    assert run(tmp_path / "beside", stories) == 0
    names = [path.name for path in checkpoints.checkpoints(tmp_path / "plain")]
    assert names == [f"step_{step:08d}" for step in (2, 4, 5, 6, 8, 9)] and steps.late == 5
    for part in [*(f"checkpoints/{name}" for name in names), "trunk", "final"]:
        files = sorted(path.name for path in (tmp_path / "plain" / part).iterdir())
        assert files == sorted(path.name for path in (tmp_path / "beside" / part).iterdir())
        for file in (name for name in files if name != "state.json"):  # which has seconds
            one, other = ((tmp_path / folder / part / file).read_bytes() for folder in ("plain", "beside"))
            assert one == other, (part, file)
    assert samples(tmp_path / "plain") == samples(tmp_path / "beside")
    states = [[checkpoints.read_state(f) for f in checkpoints.checkpoints(tmp_path / n)] for n in ("plain", "beside")]
    assert [(s["step"], s["tokens"], s["best_validation"]) for s in states[0]] == [
        (s["step"], s["tokens"], s["best_validation"]) for s in states[1]
    ]


@pytest.mark.usefixtures("beside")
def test_a_disk_that_is_full_ends_the_run(
    stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = checkpoints.save_checkpoint

    def full(folder: Path, *args: Any) -> None:
        if folder.name == "step_00000004":
            raise OSError(28, "No space left on device")
        save(folder, *args)

    monkeypatch.setattr(checkpoints, "save_checkpoint", full)
    assert run(tmp_path / "run", stories) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert "step_00000002" in {path.name for path in checkpoints.checkpoints(tmp_path / "run")}
    assert not (tmp_path / "run" / "final").exists()
    monkeypatch.setattr(checkpoints, "save_checkpoint", save)
    assert main(["train", "--run-dir", str(tmp_path / "run"), "--resume"]) == 0


@pytest.mark.usefixtures("beside")
def test_a_stop_waits_for_the_checkpoint(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = checkpoints.save_checkpoint

    def slow(folder: Path, *args: Any) -> None:
        time.sleep(0.3)
        save(folder, *args)

    @contextlib.contextmanager
    def signals(received: list[int], ranks: int) -> Iterator[None]:
        received.append(signal.SIGINT)
        yield

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    monkeypatch.setattr(train, "signals", signals)
    assert run(tmp_path / "run", stories) == 130
    assert [path.name for path in checkpoints.checkpoints(tmp_path / "run")] == ["step_00000001"]


def test_work_beside_comes_one_after_the_other_and_its_errors_are_raised() -> None:
    beside, order, go = Beside(), list[int](), threading.Event()

    def first() -> None:
        assert go.wait(60)
        order.append(1)

    def second() -> None:
        order.append(2)
        raise OSError("full")

    beside.start(first)
    beside.check()  # it runs: nothing to say
    go.set()
    beside.start(second)
    assert beside._running is not None and beside._running.exception() is not None  # waits for its end
    with pytest.raises(OSError, match="full"):
        beside.check()
    assert order == [1, 2]
    beside.finish()  # said once
    beside.close()


def test_checkpoints_by_the_clock(stories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 seconds a step: every minute is every third step."""
    clock, step = [1000.0], Trainer.step

    def slow_step(trainer: Trainer, *batch: Any) -> Any:
        clock[0] += 25
        return step(trainer, *batch)

    monkeypatch.setattr(Trainer, "step", slow_step)
    monkeypatch.setattr(train, "monotonic", lambda: clock[0])
    words = ["--steps", "8", "--checkpoint-minutes", "1", "--keep-checkpoints", "0", "--decay-fraction", "0"]
    assert run(tmp_path / "run", stories, *words) == 0
    assert [path.name[-1] for path in checkpoints.checkpoints(tmp_path / "run")] == ["3", "6", "8"]


def test_two_intervals_are_one_too_many(stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "run", stories, "--checkpoint-minutes", "1", "--checkpoint-every", "5") == 1
    assert "--checkpoint-every would have no effect" in capsys.readouterr().err


# ---- work that is shared out -------------------------------------------------------------------------------------


def test_every_item_is_done_once_by_some_worker() -> None:
    seen: list[tuple[str, int]] = []
    told: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        share_out(pool, ["a", "b"], range(5), lambda worker, item: seen.append((worker, item)), told.append)
    assert sorted(seen) == [("a", 0), ("a", 2), ("a", 4), ("b", 1), ("b", 3)]
    assert sorted(told) == [1, 2, 3, 4, 5]


def test_an_error_ends_what_is_shared_out() -> None:
    seen: list[int] = []

    def work(_worker: int, item: int) -> None:
        seen.append(item)
        if item == 3:
            raise ValueError("item 3")

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="item 3"):
        share_out(pool, [0], range(10**6), work)
    assert seen == [0, 1, 2, 3]


def test_an_error_of_who_is_told_ends_what_is_shared_out() -> None:
    """A log on a full disk: what the other workers would still do is for nothing."""
    seen: list[int] = []

    def told(count: int) -> None:
        if count == 1:
            raise OSError("no space")

    with ThreadPoolExecutor(1) as pool, pytest.raises(OSError, match="no space"):
        share_out(pool, [0, 1], range(100), lambda _worker, item: seen.append(item), told)
    assert seen == [0]


def test_ctrl_c_ends_what_is_shared_out() -> None:
    """A teacher's cache takes hours, and a pool that is left waits for what it was given. The item under way is held until the
    caller has left: what would be done after it is what nobody has stopped."""
    left, done = threading.Event(), list[int]()

    def work(_worker: int, item: int) -> None:
        if item == 0:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            assert left.wait(60)
        done.append(item)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()  # a thread whose start is interrupted would not be waited for
        with pytest.raises(KeyboardInterrupt):
            share_out(pool, [0], range(3), work)
        left.set()
    assert done == [0]


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_rank_that_writes_copies_parameters(tmp_path: Path, rank: int) -> None:
    seen: list[bool] = []
    loop: Any = SimpleNamespace(
        leads=rank == 0, writer=object(), run=SimpleNamespace(folder=tmp_path, fingerprint=str), _saved_step=-1,
        trainer=SimpleNamespace(state=SimpleNamespace(step=3), save=lambda *args, **options: None),
        _model_writer=lambda copied: seen.append(copied),
    )  # fmt: skip
    train.Loop.save(loop)
    assert seen == [rank == 0]
