"""A run on paper: seconds of a step, memory of a rank and the price, on so many ranks of a kind of card.

The parts of a step are added, none hidden behind another:

compute        6 FLOP a weight and token, attention included, over the ranks, at a share of the card's peak; a step that
               simulates int8 has INT8_COMPUTE times that
optimizer      Muon's products, and every byte of parameters, gradients and moments read and written once
communication  every gradient to its owner and every sum back: 2 (W - 1) / W of the arena, float32, through the slowest link
               between ranks, and one latency for each round of pieces; with a sharded optimizer once more for the parameters

What no data sheet knows stands in ``Card.share``, ``INT8_COMPUTE`` and ``OVERHEAD``, and was measured on one card of one kind.
Nothing here imports numba.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .arena import Arena, layout_only, parameter_shapes
from .config import ModelConfig, TrainConfig
from .ranks import Piece, cut, owners

LATENCY = 10e-6  # seconds of a message between machines
MEASURED = "h200"  # of CARDS, the one that shares and factors come from
OVERHEAD = 2.5e9  # bytes: a CUDA context, the libraries' workspaces, the gaps in a memory pool; measured on an H200
INT8_COMPUTE = 2.15  # measured on an H200: such steps are float32 and TF32, and quantize every product's inputs


@dataclass(frozen=True)
class Card:
    """A kind of GPU, by its data sheet; bytes a second are for one direction."""

    name: str
    flops: float  # dense bfloat16
    memory: float
    bandwidth: float
    link: float  # to the other cards of its machine
    network: float  # to other machines, for each card
    per_node: int = 8
    share: float = 0.33  # of the peak: measured on an H200 at 124 million parameters; small models reach less


CARDS = {
    card.name: card
    for card in (
        Card("a100", 312e12, 80e9, 2.0e12, 300e9, 25e9),
        Card("h100", 989e12, 80e9, 3.35e12, 450e9, 50e9),
        Card("h200", 989e12, 141e9, 4.8e12, 450e9, 50e9),
    )
}


@dataclass(frozen=True)
class Scale:
    """Predicted for each rank. seconds of one step; bytes of the card's memory."""

    ranks: int
    nodes: int
    card: Card
    tokens: int  # of a step, all ranks
    steps: int
    int8_steps: int  # of the steps, those that simulate int8
    compute: float  # without int8
    optimizer: float
    communication: float
    state_bytes: int
    memory_bytes: int

    @property
    def seconds(self) -> float:
        return self.compute + self.optimizer + self.communication

    @property
    def int8_seconds(self) -> float:
        """Of one step that simulates int8."""
        return self.seconds + (INT8_COMPUTE - 1) * self.compute

    @property
    def total_seconds(self) -> float:
        return (self.steps - self.int8_steps) * self.seconds + self.int8_steps * self.int8_seconds

    @property
    def fits(self) -> bool:
        return self.memory_bytes + OVERHEAD <= self.card.memory

    @property
    def efficiency(self) -> float:
        """Part of the time in which the model is computed."""
        return self.compute / self.seconds

    def lines(self, rate: float | None) -> list[str]:
        """For people. rate: price of a card's hour."""
        hours = self.total_seconds / 3600
        room = (
            "fits" if self.fits else "does not fit: smaller batches, --recompute block, or the model itself must be cut"
        )
        rows = [
            ("ranks", f"{self.ranks} x {self.card.name} on {self.nodes} machine{'s' * (self.nodes > 1)}"),
            ("a step", f"{1e3 * self.seconds:.1f} ms: compute {1e3 * self.compute:.1f} (at {self.card.share:.0%} of the "
             f"peak), optimizer {1e3 * self.optimizer:.1f}, communication {1e3 * self.communication:.1f}"),
            ("speed", f"{self.tokens / self.seconds:,.0f} tokens/s, {self.efficiency:.0%} of the time in the model"),
            ("memory", f"{(self.memory_bytes + OVERHEAD) / 1e9:.1f} of {self.card.memory / 1e9:.0f} GB a rank, "
             f"{self.state_bytes / 1e9:.2f} of them moments: {room}"),
            ("run", f"{hours:,.2f} hours, {hours * self.ranks:,.1f} card hours"),
        ]  # fmt: skip
        if self.int8_steps:
            row = f"{1e3 * self.int8_seconds:.1f} ms for each of the {self.int8_steps:,} steps that simulate int8"
            rows.insert(2, ("int8 step", row))
        if rate is not None:
            rows.append(("price", f"{hours * self.ranks * rate:,.2f} at {rate:g} a card hour"))
        if self.card.name != MEASURED:
            rows.append(
                ("assumed", f"that {self.card.name} reaches the share of its peak that one {MEASURED} was measured at")
            )
        return [f"{name:12}{value}" for name, value in rows]


def _loads(pieces: list[Piece], ranks: int, shard_optimizer: bool) -> tuple[int, float]:
    """Elements of state and multiply-adds of the optimizer on the rank that has most."""
    rank_of = owners(pieces, ranks if shard_optimizer else 1)
    state, work = [0] * ranks, [0.0] * ranks
    for piece, rank in zip(pieces, rank_of, strict=True):
        state[rank] += piece.state
        work[rank] += piece.work
    return max(state), max(work)


def state_bytes(model: ModelConfig, config: TrainConfig, ranks: int, shard_optimizer: bool) -> int:
    """Bytes of moments on the rank that has most."""
    pieces = cut(Arena(parameter_shapes(model), zeros=layout_only), model, config)
    return 4 * _loads(pieces, ranks, shard_optimizer)[0]


def predict(
    model: ModelConfig,
    config: TrainConfig,
    card: Card,
    *,
    ranks: int,
    nodes: int,
    shard_optimizer: bool,
    activations: int,
) -> Scale:
    """A step of ``ranks`` ranks. activations: bytes that a rank's forward and backward hold, gradients included."""
    n = model.n_params()
    tokens = config.batch_size * config.seq_len
    pieces = cut(Arena(parameter_shapes(model), zeros=layout_only), model, config)
    state, work = _loads(pieces, ranks, shard_optimizer)
    flops = model.flops_per_token(config.seq_len) * tokens / ranks
    updated = n / ranks if shard_optimizer else n
    communication = 0.0
    if ranks > 1:
        slowest = card.link if nodes == 1 else card.network
        rounds = math.ceil(len(pieces) / ranks)
        trips = 3 if shard_optimizer else 2
        communication = trips * (4 * n * (ranks - 1) / ranks / slowest + rounds * LATENCY)
    copies = (
        4 * n + 4 * n + 2 * n + (4 * n if config.quantize != "never" else 0)
    )  # masters, gradients, bf16, int8 values
    return Scale(
        ranks=ranks,
        nodes=nodes,
        card=card,
        tokens=tokens,
        steps=config.steps,
        int8_steps=config.quantized_steps,
        compute=flops / (card.flops * card.share),
        optimizer=2 * work / (card.flops * card.share) + (16 * updated + 8 * state) / card.bandwidth,
        communication=communication,
        state_bytes=4 * state,
        memory_bytes=copies + 4 * state + activations,
    )
