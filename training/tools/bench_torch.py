"""Training speed against PyTorch eager: the same model, batch and optimizer (AdamW), alternating,
medians.

    python training/tools/bench_torch.py [--rounds 7] [--shape small|shipped|large]

Needs torch. Both use all CPUs that the process may run on. Prints one JSON line a shape: tokens a
second of each and the median of the paired ratios. Only ratios from one run on a quiet machine mean
anything.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.device import make_trainer
from pyengine_training.threads import available_threads

SHAPES: dict[str, tuple[int, int, int, int, int, int, int, int, int]] = {
    # vocab, dim, layers, heads, kv heads, head_dim, hidden, rows, seq
    "small": (4096, 128, 4, 4, 2, 32, 384, 16, 256),
    "shipped": (4096, 256, 4, 4, 2, 64, 704, 16, 512),
    "large": (8192, 384, 8, 6, 2, 64, 1024, 16, 256),
}


class TorchModel(torch.nn.Module):
    """The same transformer from PyTorch's own parts."""

    def __init__(self, c: ModelConfig, seq: int) -> None:
        super().__init__()
        self.c = c
        self.table = torch.nn.Parameter(torch.randn(c.vocab_size, c.dim) * 0.02)
        rows = c.q_dim + 2 * c.kv_dim

        def weight(out: int, inputs: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(out, inputs) / inputs**0.5)

        def each(make: Callable[[], torch.nn.Parameter]) -> torch.nn.ParameterList:
            return torch.nn.ParameterList(make() for _ in range(c.n_layers))

        self.wqkv = each(lambda: weight(rows, c.dim))
        self.wo = each(lambda: weight(c.dim, c.q_dim))
        self.gate_up = each(lambda: weight(2 * c.hidden_dim, c.dim))
        self.down = each(lambda: weight(c.dim, c.hidden_dim))
        self.norms = torch.nn.ParameterList(torch.nn.Parameter(torch.ones(c.dim)) for _ in range(2 * c.n_layers + 1))
        exponent = torch.arange(0, c.head_dim, 2) / c.head_dim
        angle = torch.arange(seq)[:, None] / c.rope_theta**exponent
        self.cos, self.sin = angle.cos(), angle.sin()

    def rope(self, x: torch.Tensor) -> torch.Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        c = self.c
        batch, seq = tokens.shape
        x = self.table[tokens]
        for i in range(c.n_layers):
            normed = F.rms_norm(x, (c.dim,), self.norms[2 * i], c.norm_eps)
            heads = (normed @ self.wqkv[i].T).view(batch, seq, -1, c.head_dim).transpose(1, 2)
            q, k, v = heads.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], 1)
            att = F.scaled_dot_product_attention(self.rope(q), self.rope(k), v, is_causal=True, enable_gqa=c.n_rep > 1)
            x = x + att.transpose(1, 2).reshape(batch, seq, -1) @ self.wo[i].T
            normed = F.rms_norm(x, (c.dim,), self.norms[2 * i + 1], c.norm_eps)
            gate, up = (normed @ self.gate_up[i].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ self.down[i].T
        logits = F.rms_norm(x, (c.dim,), self.norms[-1], c.norm_eps) @ self.table.T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def torch_step(model: TorchModel, optimizer: Any, tokens: Any, targets: Any) -> None:
    optimizer.zero_grad()
    model(tokens, targets).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def compare(name: str, rounds: int) -> dict[str, Any]:
    """Alternate single steps."""
    vocab, dim, layers, heads, kv, head_dim, hidden, rows, seq = SHAPES[name]
    config = ModelConfig(vocab, dim, layers, heads, kv, head_dim, hidden, seq)
    shards = max(1, min(available_threads(), rows))
    train = TrainConfig(seq_len=seq, batch_size=rows, shards=shards, optimizer="adamw", quantize="never", steps=1000)
    ours = make_trainer(config, train)
    ours.initialize()
    torch.set_num_threads(available_threads())
    model = TorchModel(config, seq)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, seq + 1))
    batch = (tokens[:, :-1].copy(), tokens[:, 1:].copy())
    tensors = tuple(torch.tensor(b) for b in batch)
    runs: dict[str, tuple[Callable[[], Any], list[float]]] = {
        "ours": (lambda: ours.step(*batch), []),
        "torch": (lambda: torch_step(model, optimizer, *tensors), []),
    }
    for number in range(rounds + 2):
        for step, times in runs.values():
            began = time.perf_counter()
            step()
            if number >= 2:  # compiled and warm
                times.append(time.perf_counter() - began)
    mine, theirs = (np.asarray(times) for _, times in runs.values())
    ours.close()
    return {
        "shape": name,
        "parameters": config.n_params(),
        "tokens_per_second": round(rows * seq / float(np.median(mine))),
        "torch_tokens_per_second": round(rows * seq / float(np.median(theirs))),
        "ratio": round(float(np.median(theirs / mine)), 3),
        "ratio_range": [round(float(np.quantile(theirs / mine, p)), 3) for p in (0.1, 0.9)],
        "torch": torch.__version__,
        "threads": available_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shape", choices=SHAPES, action="append")
    args = parser.parse_args()
    for name in args.shape or SHAPES:
        print(json.dumps(compare(name, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
