"""Training a draft head on stored states: batches, steps, what held-out outputs say about it, checkpoints.

The batch is cut into shards, each of which runs forward and backward on one thread; their gradients are added by one fixed
binary tree. So a run has the same bits on any number of threads, and after it was stopped and continued.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..arena import Arena
from ..checkpoint import checkpoints, environment, prune
from ..config import TrainConfig
from ..errors import CheckpointError, NotFiniteError
from ..files import atomic_directory, load_safetensors, read_json, save_safetensors, write_json
from ..optimizer import Optimizer, norm_of, schedule
from ..ranks import SLICE, Piece
from ..threads import run_all, share_out
from .head import Batch, HeadConfig, HeadWorker, head_shapes, initialize_head
from .states import States

Array = NDArray[Any]
HELD_OUT_STARTS = 4096  # guesses that a validation makes, evenly spread over the held-out outputs
KEEP_CHECKPOINTS = 2
FORMAT_VERSION = 1


# ---- batches -----------------------------------------------------------------------------------------------------


class Batches:
    """Guesses from stored states: a new order each epoch; ``batch`` is a pure function of the arguments and the step."""

    def __init__(
        self, states: States, known: Array, embeddings: Array, head: HeadConfig, batch_size: int, seed: int
    ) -> None:
        """known (U,): the tokens of the states, ascending; embeddings (U, dim) theirs."""
        self.states, self.known, self.embeddings, self.head = states, known, embeddings, head
        self.batch_size, self.seed = batch_size, seed
        self.starts, self.held_out = states.starts(False), states.starts(True)
        self.ends = states.ends()
        self._order: tuple[int, Array] = (-1, self.starts)

    def _start(self, row: int) -> int:
        epoch, place = divmod(row, len(self.starts))
        if self._order[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 8, epoch]))
            self._order = epoch, generator.permutation(self.starts)
        return int(self._order[1][place])

    def batch(self, step: int) -> Batch:
        first = step * self.batch_size
        return self.at(np.array([self._start(row) for row in range(first, first + self.batch_size)]))

    def at(self, starts: Array) -> Batch:
        """Guesses from these rows of the states: of row r, step i reads the token of row r + i and guesses that of r + i + 1."""
        steps = np.arange(self.head.n_steps)[:, None]  # (K, 1)
        rows = starts[None, :] + steps + 1  # (K, B), whose distribution is learnt
        valid = rows < self.ends[starts][None, :]
        rows = np.where(valid, rows, starts[None, :])  # any row: it does not count
        s = self.states
        return Batch(
            s.hidden[starts].astype(np.float32),
            self.embeddings[np.searchsorted(self.known, s.tokens[rows - valid])],
            s.ids[rows],
            s.probs[rows],
            valid,
        )

    def held_out_starts(self) -> Array:
        """At most HELD_OUT_STARTS of the held-out rows."""
        every = -(-len(self.held_out) // HELD_OUT_STARTS)
        return self.held_out[::every]


# ---- what held-out outputs say -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acceptance:
    """Of held-out guesses, by step: agreement (K,), the share in which the head's likeliest token is the target's; expected
    (K,), the share that comes true at temperature 1 if both draw with the best shared noise, at least (of the k likeliest);
    ahead: mean number of greedy guesses before the first wrong one. unigram: agreement of the most frequent token alone."""

    loss: float
    agreement: list[float]
    expected: list[float]
    ahead: float
    unigram: float

    def __str__(self) -> str:
        shares = ", ".join(f"{share:.3f}" for share in self.agreement)
        expected = ", ".join(f"{share:.3f}" for share in self.expected)
        return (
            f"KL {self.loss:.4f}, greedy agreement {shares} (most frequent token {self.unigram:.3f}), "
            f"{self.ahead:.2f} right in a row, expected at temperature 1 {expected}"
        )


def measure(batches: Batches, params: Arena, workers: list[HeadWorker], pool: ThreadPoolExecutor) -> Acceptance:
    """Acceptance on held-out outputs."""
    starts = batches.held_out_starts()
    rows, head = workers[0].rows, batches.head
    chunks = [starts[at : at + rows] for at in range(0, len(starts), rows)]
    agrees, expected, losses, valid = (np.zeros((head.n_steps, len(starts))) for _ in range(4))

    def judge(worker: HeadWorker, number: int) -> None:
        chunk = chunks[number]
        padded = np.concatenate([chunk, np.repeat(chunk[:1], rows - len(chunk))])
        found = _judge(batches, worker, params, padded)
        at = slice(number * rows, number * rows + len(chunk))
        for result, values in zip((agrees, expected, losses, valid), found, strict=True):
            result[:, at] = values[:, : len(chunk)]

    share_out(pool, workers, range(len(chunks)), judge)
    counts = np.maximum(1, valid.sum(axis=1))
    greedy = batches.states.greedy[starts + 1]
    known = greedy[greedy >= 0]
    return Acceptance(
        float((losses.sum(axis=1) / counts) @ head.weights()),
        (agrees.sum(axis=1) / counts).tolist(),
        (expected.sum(axis=1) / counts).tolist(),
        float(np.cumprod(agrees, axis=0).sum(axis=0).mean()),
        float(np.bincount(known).max() / len(greedy)) if len(known) else 0.0,
    )


def _judge(batches: Batches, worker: HeadWorker, params: Arena, starts: Array) -> tuple[Array, Array, Array, Array]:
    """(K, B) float64 each: agrees, expected acceptance, KL divergence, valid; 0 where not valid."""
    batch = batches.at(starts)
    worker.forward(params, batch)
    shape = batch.valid.shape
    logits = worker.logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.where(batch.valid, starts + np.arange(1, shape[0] + 1)[:, None], starts)
    agrees = log_p.argmax(axis=1).reshape(shape) == batches.states.greedy[rows]
    q = batch.probs.astype(np.float64)
    q /= q.sum(axis=2, keepdims=True)
    log_known = np.take_along_axis(log_p, batch.ids.reshape(len(log_p), -1).astype(np.int64), axis=1).reshape(
        batch.ids.shape
    )
    expected = np.minimum(q[..., :-1] * batches.states.inside[rows][..., None], np.exp(log_known)).sum(axis=2)
    rest = np.log(np.maximum(1e-30, 1 - np.exp(log_known).sum(axis=2)))
    log_q = np.log(np.maximum(q, 1e-30))
    loss = (q[..., :-1] * (log_q[..., :-1] - log_known)).sum(axis=2) + q[..., -1] * (log_q[..., -1] - rest)
    return agrees * batch.valid, expected * batch.valid, loss * batch.valid, batch.valid.astype(np.float64)


# ---- training ----------------------------------------------------------------------------------------------------


class HeadTrainer:
    """Parameters, optimizer and shards of a head."""

    def __init__(self, head: HeadConfig, config: TrainConfig, threads: int) -> None:
        self.head, self.config, self.step_number = head, config, 0
        self.params = Arena(head_shapes(head))
        self.pool = ThreadPoolExecutor(threads)
        self.optimizer = Optimizer(config, list(_pieces(self.params)), self.pool)
        shard = config.batch_size // config.shards
        self.workers = [HeadWorker(head, shard) for _ in range(min(threads, config.shards))]
        self.grads = [self.params.like() for _ in range(config.shards)]

    def step(self, batch: Batch) -> tuple[float, float]:
        """One update; (loss, norm of the gradient). Raises NotFiniteError, with nothing changed, when either is not finite."""
        shards, rows = len(self.grads), self.workers[0].rows
        counts = batch.valid.sum(axis=1)
        sums = np.zeros((shards, self.head.n_steps))

        def task(slot: int) -> Callable[[], None]:
            def run() -> None:
                for shard in range(slot, shards, len(self.workers)):
                    part = batch[shard * rows : (shard + 1) * rows]
                    sums[shard] = self.workers[slot].forward_backward(self.params, self.grads[shard], part, counts)

            return run

        run_all(self.pool, [task(slot) for slot in range(len(self.workers))])
        self._add_up()
        grads = self.grads[0].flat
        norm = norm_of(self.optimizer.squares(grads, self.optimizer.pieces))
        loss = float((sums.sum(axis=0) / np.maximum(1, counts)) @ self.head.weights())
        if not np.isfinite(norm) or not np.isfinite(loss):
            raise NotFiniteError(f"step {self.step_number}: loss {loss}, norm of the gradient {norm}: try a lower --lr")
        self.optimizer.step(self.params.flat, grads, self.step_number, schedule(self.config, self.step_number), norm)
        self.step_number += 1
        return loss, norm

    def _add_up(self) -> None:
        """((0 + 1) + (2 + 3)) + ... into the first shard's, whoever adds which slice."""
        size = self.params.flat.size

        def task(begin: int) -> Callable[[], None]:
            def run() -> None:
                part, stride = slice(begin, min(size, begin + SLICE)), 1
                while stride < len(self.grads):
                    for i in range(0, len(self.grads), 2 * stride):
                        self.grads[i].flat[part] += self.grads[i + stride].flat[part]
                    stride *= 2

            return run

        run_all(self.pool, [task(begin) for begin in range(0, size, SLICE)])

    def save(self, run: Path, identity: dict[str, Any]) -> None:
        """A checkpoint, whole or not at all."""
        folder = run / "checkpoints" / f"step_{self.step_number:08d}"
        folder.parent.mkdir(exist_ok=True)
        m, v = self.params.like(), self.params.like()
        for piece in self.optimizer.pieces:
            part = slice(piece.start, piece.stop)
            m.flat[part], v.flat[part] = self.optimizer.moments(piece)
        with atomic_directory(folder) as temporary:
            save_safetensors(temporary / "head.safetensors", self.params.views)
            save_safetensors(temporary / "optimizer.safetensors", {"m": m.flat, "v": v.flat})
            state = {"format_version": FORMAT_VERSION, "step": self.step_number, "environment": environment()}
            write_json(temporary / "state.json", {**state, **identity})
        prune(run, KEEP_CHECKPOINTS)

    def restore(self, run: Path, identity: dict[str, Any]) -> dict[str, Any] | None:
        """From the newest checkpoint, if there is one; its environment. Raises CheckpointError for another head or other data."""
        found = checkpoints(run)
        if not found:
            return None
        values = read_json(found[-1] / "state.json")
        if values.get("format_version") != FORMAT_VERSION or any(values.get(k) != v for k, v in identity.items()):
            raise CheckpointError(f"{found[-1]}: a checkpoint of another head or other data")
        tensors = load_safetensors(found[-1] / "head.safetensors")
        for name, view in self.params.views.items():
            if name not in tensors or tensors[name].shape != view.shape:
                raise CheckpointError(f"{found[-1]}: {name} is missing or has another shape")
            view[...] = tensors[name]
        moments = load_safetensors(found[-1] / "optimizer.safetensors")
        if any(name not in moments or moments[name].shape != self.params.flat.shape for name in ("m", "v")):
            raise CheckpointError(f"{found[-1]}: the optimizer's state does not fit the head")
        self.optimizer.load(moments["m"], moments["v"])
        self.step_number = int(values["step"])
        return dict(values["environment"])

    def close(self) -> None:
        self.pool.shutdown()


def _pieces(params: Arena) -> Iterator[Piece]:
    """Slices of the arena for AdamW."""
    for name, shape in params.shapes.items():
        first, size = params.offsets[name], int(np.prod(shape))
        for start in range(first, first + size, SLICE):
            yield Piece(start, min(first + size, start + SLICE), None, len(shape) > 1)


def fresh(trainer: HeadTrainer, batches: Batches, output_rows: Array, seed: int) -> None:
    """The head that training begins with."""
    some = batches.states.hidden[batches.starts[:HELD_OUT_STARTS]].astype(np.float64)
    rms = float(np.sqrt(np.mean(some * some)))
    initialize_head(trainer.params, trainer.head, output_rows, rms, seed)


def seconds_of_a_step(
    batches: Batches, head: HeadConfig, config: TrainConfig, output_rows: Array, threads: int
) -> tuple[float, float]:
    """Of a throwaway trainer: the median of some steps, and a validation."""
    trainer = HeadTrainer(head, config, threads)
    try:
        fresh(trainer, batches, output_rows, 0)
        times = []
        for step in range(5):  # the first one compiles
            began = time.monotonic()
            trainer.step(batches.batch(step))
            times.append(time.monotonic() - began)
        began = time.monotonic()
        measure(batches, trainer.params, trainer.workers, trainer.pool)
        return float(np.median(times[1:])), time.monotonic() - began
    finally:
        trainer.close()


def describe(head: HeadConfig, config: TrainConfig, *, steps_may_change: bool) -> dict[str, Any]:
    """What a checkpoint must have been made with to be continued."""
    steps = {} if steps_may_change else {"steps": config.steps}
    return {"head": asdict(head), **steps, "batch_size": config.batch_size, "shards": config.shards}
