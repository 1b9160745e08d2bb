"""Training speed beside PyTorch: the same model, batch and optimizer (AdamW, float32), step by step in turn.

    python training/tools/bench_torch.py [--shape small] [--rounds 7] [--compile] [--clock cpu]
    python training/tools/bench_torch.py --lora 8,16 [--shape smollm2]

Needs torch; --lora needs transformers and peft, too, and sets adapters beside every matrix of a frozen model against PEFT's. All
use all CPUs that the process may run on. Prints one JSON line a shape: tokens a second of each, the median of the paired ratios
with their range, and in "blas" the kernels of our products, which OPENBLAS_CORETYPE can hold back. Only ratios from one run mean
anything: by the clock on a quiet machine. On a busy one --clock cpu --threads 1 says something about the arithmetic: processor
time of one thread. (Of several threads it counts those that spin while they wait for one that the machine has put aside.)
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pyengine_training.blas import kernels_in_use
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.device import make_trainer
from pyengine_training.lora import LoraConfig, parse
from pyengine_training.threads import available_threads

try:
    import torch
    import torch.nn.functional as F
except ImportError as missing:
    raise SystemExit(f"this compares with PyTorch, which is not installed: {missing}") from missing

Step = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SHAPES: dict[str, tuple[int, int, int, int, int, int, int, int, int]] = {
    # vocab, dim, layers, heads, kv heads, head_dim, hidden, rows, seq
    "small": (4096, 128, 4, 4, 2, 32, 384, 16, 256),
    "shipped": (4096, 256, 4, 4, 2, 64, 704, 16, 512),
    "large": (8192, 384, 8, 6, 2, 64, 1024, 16, 256),
    "smollm2": (49152, 576, 30, 9, 3, 64, 1536, 4, 256),
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


def torch_step(model: Any, optimizer: Any, tokens: Any, targets: Any) -> Step:
    """One whole step of the model from PyTorch's parts, or of transformers' with adapters."""

    def step() -> None:
        optimizer.zero_grad()
        model(tokens, targets).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()

    return step


class PeftModel(torch.nn.Module):
    """transformers' Llama of the same sizes with PEFT's adapters, which alone are trained."""

    def __init__(self, c: ModelConfig, lora: LoraConfig) -> None:
        try:
            import peft
            import transformers
        except ImportError as missing:
            raise SystemExit(f"--lora compares with PEFT, which is not installed: {missing}") from missing
        super().__init__()
        config = transformers.LlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.dim,
            intermediate_size=c.hidden_dim,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            max_position_embeddings=c.max_seq_len,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            use_cache=False,
        )
        knobs = {"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "target_modules": list(lora.targets)}
        model = transformers.LlamaForCausalLM(config).train()
        self.model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **knobs))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = self.model(input_ids=tokens).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def alternate(runs: dict[str, Step], rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Seconds of each run's steps, taken in turn, (rounds) each; the first two rounds compile and warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, step in runs.items():
            began = clock()
            step()
            if number >= 2:
                times[name].append(clock() - began)
    return {name: np.asarray(taken) for name, taken in times.items()}


def compare(name: str, rounds: int, clock: str, threads: int, lora: str | None, compiled: bool) -> dict[str, Any]:
    """One shape."""
    vocab, dim, layers, heads, kv, head_dim, hidden, rows, seq = SHAPES[name]
    config = ModelConfig(vocab, dim, layers, heads, kv, head_dim, hidden, seq)
    shards = max(1, min(threads, rows))
    knobs = {"optimizer": "adamw", "quantize": "never", "steps": 1000, "shards": shards, "lr": 1e-3 if lora else 3e-3}
    train = TrainConfig(seq_len=seq, batch_size=rows, **knobs)
    adapters = parse(lora, Path()) if lora else None
    ours = make_trainer(config, train, threads=threads, lora=adapters)
    ours.initialize()
    if ours.backend.adapters:
        ours.backend.adapters.begin(1)
    torch.set_num_threads(threads)
    model: Any = PeftModel(config, adapters) if adapters else TorchModel(config, seq)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train.lr, betas=(train.beta1, train.beta2), weight_decay=0.0 if lora else 0.1)
    tokens = np.random.default_rng(0).integers(0, vocab, (rows, seq + 1))
    batch = (tokens[:, :-1].copy(), tokens[:, 1:].copy())
    tensors = tuple(torch.tensor(b) for b in batch)
    other = "peft" if lora else "torch"
    runs: dict[str, Step] = {"ours": lambda: ours.step(*batch), other: torch_step(model, optimizer, *tensors)}
    if compiled:
        runs[f"{other}_compiled"] = torch_step(torch.compile(model), optimizer, *tensors)
    times = alternate(runs, rounds, CLOCKS[clock])
    mine = times["ours"]
    ours.close()
    result: dict[str, Any] = {"shape": name, "parameters": config.n_params(), "clock": clock, "rounds": rounds}
    for label, taken in times.items():
        result[label] = {"tokens_per_second": round(rows * seq / float(np.median(taken)), 1)}
        if label != "ours":
            ratios = taken / mine
            result[label]["ratio"] = round(float(np.median(ratios)), 3)
            result[label]["ratio_range"] = [round(float(np.quantile(ratios, p)), 3) for p in (0.1, 0.9)]
    return {**result, "torch_version": torch.__version__, "blas": kernels_in_use(), "threads": threads}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--shape", choices=SHAPES, action="append", help="default: all, with --lora smollm2; repeatable"
    )
    parser.add_argument("--lora", metavar="R,ALPHA[,NAME,…]", help="adapters, beside PEFT, instead of whole models")
    parser.add_argument("--compile", action="store_true", help="beside torch.compile, too")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument(
        "--threads", type=int, default=available_threads(), help="of each (default: the CPUs allowed here)"
    )
    args = parser.parse_args()
    for name in args.shape or (["smollm2"] if args.lora else [name for name in SHAPES if name != "smollm2"]):
        print(json.dumps(compare(name, args.rounds, args.clock, args.threads, args.lora, args.compile)), flush=True)


if __name__ == "__main__":
    main()
