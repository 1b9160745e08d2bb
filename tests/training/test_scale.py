"""Runs on paper: parts that can be checked are checked, and what has to be monotonous is."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.__main__ import main
from pyengine_training.arena import Arena, parameter_shapes
from pyengine_training.comm import NoComm
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.device import make_trainer
from pyengine_training.ranks import Exchange, cut
from pyengine_training.scale import CARDS, INT8_COMPUTE, LATENCY, OVERHEAD, predict, state_bytes
from pyengine_training.setup import activations_on_a_card

LARGE = ModelConfig(
    vocab_size=50304, dim=768, n_layers=12, n_heads=12, n_kv_heads=12, head_dim=64, hidden_dim=2048, max_seq_len=1024
)
MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "gpu-nvidia-h200-72ccf8e.jsonl"
CONFIG = TrainConfig(seq_len=1024, batch_size=512, shards=512, steps=1000)


class Silent(NoComm):
    """One of several ranks that nobody talks to, and that counts what it is given to send."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.sent = 0

    def exchange(self, sends: Any, receives: Any) -> Any:
        self.sent += sum(array.nbytes for _, array in sends)
        for _, array in receives:
            array.fill(0)
        return lambda: None


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_moments_take_what_the_plan_says(tiny_sizes: dict[str, Any], optimizer: str, ranks: int) -> None:
    model, config = ModelConfig(**tiny_sizes), TrainConfig(seq_len=24, shards=4, optimizer=optimizer)
    measured = []
    for rank in range(ranks):
        comm = Silent(rank, ranks)
        trainer = make_trainer(model, config, threads=1, comm=comm, shard_optimizer=True)
        measured.append(trainer.backend.optimizer.state_bytes)  # type: ignore[attr-defined]
        trainer.close()
    assert max(measured) == state_bytes(model, config, ranks, True)
    assert sum(measured) == state_bytes(model, config, 1, False) == state_bytes(model, config, 4, False)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_quarter_of_the_moments_and_one_matrix_on_four_ranks(optimizer: str) -> None:
    config = TrainConfig(optimizer=optimizer)
    largest = 4 * LARGE.vocab_size * LARGE.dim
    assert state_bytes(LARGE, config, 4, True) <= state_bytes(LARGE, config, 1, True) / 4 + largest


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_send_what_the_plan_says(ranks: int) -> None:
    """2 (W - 1) / W of the parameters each on average, the owners' imbalance aside; on GPUs a sharded optimizer's once more."""
    model = ModelConfig(
        vocab_size=300, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, hidden_dim=96, max_seq_len=24
    )
    params = Arena(parameter_shapes(model))
    pieces = cut(params, model, TrainConfig())
    sent = 0
    for rank in range(ranks):
        comm = Silent(rank, ranks)
        exchange = Exchange(comm, pieces)
        flat = np.zeros_like(params.flat)
        exchange.reduce(flat)
        exchange.distribute(flat)
        sent += comm.sent
    assert sent == 2 * (ranks - 1) * 4 * model.n_params()
    for trips, shard in ((2, False), (3, True)):
        slow = predict(model, CONFIG, CARDS["h100"], ranks=ranks, nodes=ranks, shard_optimizer=shard, activations=0)
        latencies = trips * -(-len(cut(params, model, CONFIG)) // ranks) * LATENCY
        assert slow.communication - latencies == pytest.approx(trips / 2 * sent / ranks / CARDS["h100"].network)


def test_predictions_follow_the_sizes() -> None:
    sheets = [
        predict(LARGE, CONFIG, CARDS["h100"], ranks=r, nodes=-(-r // 8), shard_optimizer=True, activations=10**9)
        for r in (1, 8, 64, 512)
    ]
    assert sheets[0].communication == 0 and sheets[0].compute == pytest.approx(8 * sheets[1].compute)
    for fewer, more in itertools.pairwise(sheets):
        assert more.seconds < fewer.seconds and more.efficiency < fewer.efficiency
        assert more.memory_bytes < fewer.memory_bytes
    huge = ModelConfig(
        vocab_size=50304,
        dim=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        head_dim=128,
        hidden_dim=28672,
        max_seq_len=4096,
    )
    sheet = predict(huge, CONFIG, CARDS["h200"], ranks=512, nodes=64, shard_optimizer=True, activations=10**9)
    assert not sheet.fits and "does not fit" in "\n".join(sheet.lines(2.0))


@pytest.mark.parametrize(
    ("attention", "optimizer", "int8", "batch"),
    [("unfused", "adamw", False, 16), ("unfused", "muon", False, 16), ("unfused", "adamw", True, 16),
     ("unfused", "adamw", False, 64)],
)  # fmt: skip
def test_a_step_on_paper_takes_the_time_and_memory_that_an_h200_took(
    attention: str, optimizer: str, int8: bool, batch: int
) -> None:
    lines = [json.loads(line) for line in MEASURED.read_text().splitlines()]
    wanted = {"attention": attention, "optimizer": optimizer, "int8": int8, "batch": batch}
    (line,) = (line for line in lines if wanted.items() <= line.items())
    quantize = "always" if int8 else "never"
    config = TrainConfig(seq_len=1024, batch_size=batch, shards=1, steps=100, optimizer=optimizer, quantize=quantize)
    held = activations_on_a_card(LARGE, config)
    sheet = predict(LARGE, config, CARDS["h200"], ranks=1, nodes=1, shard_optimizer=False, activations=held)
    assert sheet.memory_bytes + OVERHEAD == pytest.approx(line["used"], rel=0.06)
    assert sheet.total_seconds / config.steps == pytest.approx(1e-3 * np.median(line["ms"]), rel=0.06)


def test_a_run_counts_its_int8_steps() -> None:
    """They cost INT8_COMPUTE times the products of the others, and nothing else is dearer."""
    card = CARDS["h200"]
    totals = {}
    for quantize in ("never", "decay", "always"):
        config = dataclasses.replace(CONFIG, quantize=quantize)
        sheet = predict(LARGE, config, card, ranks=1, nodes=1, shard_optimizer=False, activations=0)
        totals[quantize] = sheet.total_seconds
    part = CONFIG.quantized_steps / CONFIG.steps
    assert totals["decay"] == pytest.approx((1 - part) * totals["never"] + part * totals["always"])
    assert totals["always"] - totals["never"] == pytest.approx((INT8_COMPUTE - 1) * sheet.compute * CONFIG.steps)


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--plan --depth 12 --tokens 1e9 --batch-size 64 --shards 64 --ranks 64 --gpu h200 --shard-optimizer --rate 2"
    )
    assert main(["train", *words.split()]) == 0
    out = capsys.readouterr().out
    for part in ("64 x h200 on 8 machines", "communication", "card hours", "at 2 a card hour", "on paper"):
        assert part in out
    assert "assumed" not in out
    assert main(["train", *words.replace("h200", "a100").split()]) == 0
    assert (
        "assumed     that a100 reaches the share of its peak that one h200 was measured at" in capsys.readouterr().out
    )
    assert main(["train", *words.split(), "--nodes", "65"]) == 1
    assert "64 ranks on 65 machines" in capsys.readouterr().err
    assert main(["train", *words.split(), "--data", "x.txt"]) == 1
    assert "--data would have no effect" in capsys.readouterr().err
    assert main(["train", "--plan", "--ranks", "3"]) == 1
    assert "power of two" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--depth", "2"])
    assert "--run-dir" in capsys.readouterr().err
