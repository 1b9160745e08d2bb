"""Many ranks, the same bits: the tree of sums, who owns what, and steps of ranks that are threads."""

from __future__ import annotations

import hashlib
import itertools
import operator
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.arena import Arena, parameter_shapes
from pyengine_training.checkpoint import hf_config, hf_tensors
from pyengine_training.comm import ALONE, ending_together, same_everywhere, together
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.device import make_trainer
from pyengine_training.errors import ConfigError, NotFiniteError, RankError
from pyengine_training.files import save_safetensors, write_json
from pyengine_training.lora import LoraConfig
from pyengine_training.ranks import Exchange, Piece, ShardSum, add_tree, cut, owners, trailing_ones
from pyengine_training.trainer import Trainer

Array = np.ndarray[Any, Any]


class ThreadComm:
    """Ranks that are threads of this process."""

    threads, local_rank = 1, 0

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank, self.size, self.shared, self.host = rank, size, shared, self
        self.aborted = False

    def gather(self, value: Any) -> list[Any]:
        self.shared["values"][self.rank] = value
        self.shared["barrier"].wait()
        found = list(self.shared["values"])
        self.shared["barrier"].wait()
        return found

    def exchange(self, sends: Sequence[tuple[int, Array]], receives: Sequence[tuple[int, Array]]) -> Callable[[], None]:
        for rank, array in sends:
            self.shared["mail"][self.rank, rank].put(array.copy())

        def wait() -> None:
            for rank, array in receives:
                array[...] = self.shared["mail"][rank, self.rank].get(timeout=60)

        return wait

    def abort(self) -> None:
        self.aborted = True
        self.shared["barrier"].abort()


def on_ranks(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """work(comm) on so many ranks, each a thread; the results, or the first rank's exception."""
    shared: dict[str, Any] = {
        "barrier": threading.Barrier(size, timeout=60),
        "values": [None] * size,
        "mail": {(a, b): queue.Queue() for a in range(size) for b in range(size)},
    }
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, ThreadComm(rank, size, shared)) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        if errors:
            raise errors[0]
        return [future.result() for future in futures]


# ---- sums --------------------------------------------------------------------------------------------------------


def tree(parts: Sequence[Array]) -> Array:
    """The definition: halves, added."""
    if len(parts) == 1:
        return parts[0]
    half = len(parts) // 2
    return tree(parts[:half]) + tree(parts[half:])


def shards_of(count: int, n: int = 3000) -> list[Array]:
    """Gradients whose sum depends on its order."""
    generator = np.random.default_rng(count)
    return [
        (generator.standard_normal(n) * 10.0 ** generator.integers(-3, 4, n)).astype(np.float32) for _ in range(count)
    ]


def test_trailing_ones() -> None:
    assert [trailing_ones(n) for n in range(8)] == [0, 1, 0, 2, 0, 1, 0, 3]


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 8, 16])
@pytest.mark.parametrize("count", [1, 2, 4, 16])
def test_shards_are_summed_by_the_tree_whatever_the_waves(
    count: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyengine_training.ranks.SLICE", 1000)
    shards = shards_of(count)
    wanted = tree(shards)
    if count > 2:
        assert not np.array_equal(wanted, sum(shards[1:], shards[0]))  # in sequence the bits are others
    total = np.full_like(wanted, np.nan)
    with ThreadPoolExecutor(2) as pool:
        shard_sum = ShardSum(total, count, pool)
        for first in range(0, count, threads):
            shard_sum.add(first, [g.copy() for g in shards[first : first + threads]])
    np.testing.assert_array_equal(total, wanted)


def test_ranks_are_summed_by_the_same_tree() -> None:
    parts = shards_of(8)
    wanted = tree(parts)
    for rank in range(8):  # whose own part takes the sum
        copies = [part.copy() for part in parts]
        add_tree(copies, copies[rank], operator.iadd)
        np.testing.assert_array_equal(copies[rank], wanted)


MODEL = ModelConfig(
    vocab_size=48, dim=40, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=10, hidden_dim=72, max_seq_len=24
)


def pieces_of(optimizer: str, model: ModelConfig = MODEL) -> tuple[Arena, list[Piece]]:
    params = Arena(parameter_shapes(model))
    return params, cut(params, model, TrainConfig(optimizer=optimizer))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_exchanges_reduce_to_owners_and_distribute(optimizer: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyengine_training.ranks.SLICE", 500)
    params, pieces = pieces_of(optimizer)
    parts = shards_of(size, params.flat.size)
    wanted = tree(parts)

    def work(comm: Any) -> tuple[Array, Array | None]:
        exchange = Exchange(comm, pieces)
        flat = parts[comm.rank].copy()
        exchange.reduce(flat)
        for piece in exchange.mine:
            np.testing.assert_array_equal(flat[piece.start : piece.stop], wanted[piece.start : piece.stop])
        out = np.zeros_like(flat) if comm.rank == 0 else None
        exchange.collect(lambda piece: flat[piece.start : piece.stop], out)
        exchange.distribute(flat)
        return flat, out

    results = on_ranks(size, work)
    for piece in pieces:
        part = slice(piece.start, piece.stop)
        for flat, _ in results:
            np.testing.assert_array_equal(flat[part], wanted[part])
        np.testing.assert_array_equal(results[0][1][part], wanted[part])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_pieces_cover_everything_and_owners_are_balanced(optimizer: str, size: int) -> None:
    """At a size where it matters: 16 million parameters. No rank has more than its share and one piece."""
    model = ModelConfig(
        vocab_size=8192, dim=384, n_layers=8, n_heads=6, n_kv_heads=3, head_dim=64, hidden_dim=1024, max_seq_len=256
    )
    shapes = parameter_shapes(model)
    params = Arena(shapes, zeros=lambda n, _dtype: np.lib.stride_tricks.as_strided(np.zeros(1), (n,), (0,)))
    pieces = cut(params, model, TrainConfig(optimizer=optimizer))
    assert sum(piece.size for piece in pieces) == model.n_params()
    assert all(a.stop <= b.start for a, b in itertools.pairwise(pieces))
    rank_of = owners(pieces, size)
    assert rank_of == owners(pieces, size)
    for measure in ("state", "work"):
        loads = [
            sum(getattr(p, measure) for p, r in zip(pieces, rank_of, strict=True) if r == rank) for rank in range(size)
        ]
        largest = max(getattr(piece, measure) for piece in pieces)
        assert max(loads) <= sum(loads) / size + largest, (measure, loads)


# ---- steps -------------------------------------------------------------------------------------------------------


def config(**knobs: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "seq_len": 24,
            "batch_size": 8,
            "shards": 8,
            "steps": 6,
            "decay_fraction": 0.5,
            "quantize_fraction": 0.0,
            **knobs,
        }
    )


def batch(seed: int) -> tuple[Array, Array]:
    tokens = np.random.default_rng(seed).integers(0, 48, (8, 25))
    targets = tokens[:, 1:].copy()
    targets[seed % 8, :5] = -1
    return tokens[:, :-1], targets


def write_model(trainer: Trainer) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_json(folder / "config.json", hf_config(trainer.model, 0, 0))
        save_safetensors(folder / "model.safetensors", hf_tensors(trainer.params, trainer.model))

    return write


def digest(trainer: Trainer, folder: Path) -> str:
    """Of a checkpoint's two arrays."""
    trainer.save(folder, "data", write_model(trainer))
    names = ("model.safetensors", "optimizer.safetensors")
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in names)).hexdigest()


def run_steps(folder: Path, knobs: dict[str, Any], threads: int = 2, shard: bool = False) -> Callable[[Any], Any]:
    """Three steps, a checkpoint, three steps, a checkpoint: losses, digests, bytes of the optimizer's state."""

    def work(comm: Any) -> Any:
        trainer = make_trainer(MODEL, config(**knobs), threads=threads, comm=comm, shard_optimizer=shard)
        trainer.initialize()
        results, digests = [], []
        for number in range(2):
            results += [trainer.step(*batch(3 * number + s)) for s in range(3)]
            digests.append(digest(trainer, folder / f"step{number}"))
        state = trainer.backend.optimizer.state_bytes  # type: ignore[attr-defined]
        trainer.close()
        return results, digests, state

    return work


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_any_number_of_ranks_and_threads_gives_the_same_bits(tmp_path: Path, optimizer: str) -> None:
    """With and without a sharded optimizer, through the quantized decay, clipped and not."""
    knobs = {"optimizer": optimizer, "clip": 0.5}
    wanted = on_ranks(1, run_steps(tmp_path / "one", knobs))[0]
    whole = 4 * sum(piece.state for piece in pieces_of(optimizer)[1])
    for size, threads, shard in ((1, 3, False), (2, 1, False), (2, 2, True), (4, 1, True), (8, 1, False), (8, 1, True)):
        found = on_ranks(size, run_steps(tmp_path / f"{size}{threads}{shard}", knobs, threads, shard))
        for results, digests, _ in found:
            assert results == wanted[0]
            assert digests == wanted[1]
        states = [state for _, _, state in found]
        assert (sum(states) == whole) if shard else (set(states) == {whole})


def test_adapters_have_the_same_bits_on_ranks(tmp_path: Path) -> None:
    """Their gradients are summed by the same tree; a scale that is no power of two, so that its place in the sum matters."""
    lora = LoraConfig(3, 8.0, ("q_proj", "o_proj", "up_proj"), "unused")

    def work(comm: Any) -> Any:
        trainer = make_trainer(MODEL, config(lr=0.01, clip=0.5), threads=2, comm=comm, lora=lora)
        trainer.initialize()
        adapters = trainer.backend.adapters
        assert adapters is not None
        adapters.begin(1)
        results = [trainer.step(*batch(s)) for s in range(6)]
        moved = float(np.abs(adapters.m.flat).max()) > 0
        trainer.close()
        return results, adapters.values.flat.tobytes(), trainer.params.flat.tobytes(), moved

    wanted = on_ranks(1, work)[0]
    assert wanted[3]
    for size in (2, 4, 8):
        assert all(found == wanted for found in on_ranks(size, work)), size


def test_a_checkpoint_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    wanted = on_ranks(1, run_steps(tmp_path / "one", {}))[0]
    on_ranks(4, run_steps(tmp_path / "four", {}, 1, True))

    def resumed(comm: Any) -> Any:
        trainer = make_trainer(MODEL, config(seed=9), threads=1, comm=comm, shard_optimizer=comm.size == 2)
        trainer.restore(tmp_path / "four" / "step0")
        results = [trainer.step(*batch(3 + s)) for s in range(3)]
        found = digest(trainer, tmp_path / f"resumed{comm.size}")
        trainer.close()
        return results, found

    for size in (1, 2, 8):
        for results, found in on_ranks(size, resumed):
            assert results == wanted[0][3:] and found == wanted[1][1]


def test_validation_is_spread_and_summed_alike() -> None:
    from pyengine_training.data import ValidationBatch

    tokens, targets = batch(1)
    batches = [
        ValidationBatch(tokens[i : i + 1], targets[i : i + 1], targets[i : i + 1] > 5, np.arange(1)) for i in range(7)
    ]

    def work(comm: Any) -> Any:
        trainer = make_trainer(MODEL, config(), threads=1, comm=comm)
        trainer.initialize()
        result = trainer.validate(batches, 100, True)
        trainer.close()
        return result

    assert len({result for size in (1, 2, 4) for result in on_ranks(size, work)}) == 1


def test_a_loss_that_is_not_finite_is_everybodys_and_changes_nothing() -> None:
    def work(comm: Any) -> None:
        trainer = make_trainer(MODEL, config(quantize="never"), threads=1, comm=comm)
        trainer.initialize()
        trainer.params["norm"][3] = np.inf
        before = trainer.params.flat.copy()
        with pytest.raises(NotFiniteError, match=r"step 0: loss .* gradients of tok_embeddings") as raised:
            trainer.step(*batch(0))
        assert raised.value.on_all_ranks
        np.testing.assert_array_equal(trainer.params.flat, before)
        trainer.close()

    on_ranks(2, work)


def test_a_value_that_int8_cannot_hold_on_one_rank_is_everybodys() -> None:
    def work(comm: Any) -> None:
        trainer = make_trainer(MODEL, config(quantize="always"), threads=1, comm=comm)
        trainer.initialize()
        if comm.rank == 1:  # a bit flipped in its memory
            trainer.params["layers.0.wo"][0, 0] = np.nan
        expected = RankError if comm.rank == 0 else (RankError, NotFiniteError)
        with pytest.raises(expected, match=r"rank 1: a weight is infinite"):
            trainer.step(*batch(0))
        trainer.close()

    on_ranks(2, work)


def test_ranks_that_have_drifted_apart_write_no_checkpoint(tmp_path: Path) -> None:
    def work(comm: Any) -> None:
        trainer = make_trainer(MODEL, config(), threads=1, comm=comm)
        trainer.initialize()
        if comm.rank == 2:
            trainer.params["norm"][0] += 1
        with pytest.raises(ConfigError, match="rank 2: its parameters' checksum"):
            trainer.save(tmp_path / "step", "data", write_model(trainer))
        trainer.close()

    on_ranks(4, work)
    assert not (tmp_path / "step").exists()


@pytest.mark.parametrize("size, shards, message", [(3, 8, "power of two"), (4, 2, "give --shards 4 or more")])
def test_ranks_that_cannot_share_a_batch(size: int, shards: int, message: str) -> None:
    def work(comm: Any) -> None:
        with pytest.raises(ConfigError, match=message) as raised:
            make_trainer(MODEL, config(shards=shards), threads=1, comm=comm)
        assert raised.value.on_all_ranks

    on_ranks(size, work)


# ---- errors ------------------------------------------------------------------------------------------------------


def test_an_error_of_one_rank_is_raised_by_all() -> None:
    def work(comm: Any) -> str:
        with pytest.raises((RankError, ConfigError)) as raised, together(comm):
            if comm.rank in (1, 3):
                raise ConfigError(f"broken {comm.rank}")
        return str(raised.value)

    assert on_ranks(4, work) == ["rank 1: broken 1"] * 4

    def leader(comm: Any) -> type:
        with pytest.raises((RankError, OSError)) as raised, together(comm):
            if comm.rank == 0:
                raise OSError("no space")
        return raised.type

    assert on_ranks(2, leader) == [OSError, RankError]


def test_another_version_is_named_with_its_rank() -> None:
    def work(comm: Any) -> str:
        with pytest.raises(ConfigError) as raised:
            same_everywhere(comm, {"numpy": "2.1" if comm.rank == 1 else "2.0", "data": 7})
        return str(raised.value)

    assert set(on_ranks(2, work)) == {"rank 1: its numpy is 2.1, that of rank 0 is 2.0"}
    same_everywhere(ALONE, {"numpy": "2.0"})


def test_an_error_that_only_one_rank_has_ends_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    def work(comm: Any) -> bool:
        try:
            with ending_together(comm):
                if comm.rank == 1:
                    raise MemoryError("2 GiB")
                comm.gather(None)  # would wait for ever
        except (MemoryError, threading.BrokenBarrierError):
            pass
        return bool(comm.aborted)

    assert on_ranks(2, work)[1]
    assert "error: rank 1: 2 GiB" in capsys.readouterr().err
