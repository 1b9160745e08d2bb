"""The same architecture in PyTorch, written the usual way, as the yardstick of a run: autocast, SDPA, fused AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..config import ModelConfig, TrainConfig
from ..ops.cpu.rope import rope_tables


class Block(nn.Module):
    """Attention and SwiGLU with RMSNorm before each."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.c = c
        self.attention_norm, self.ffn_norm = nn.RMSNorm(c.dim, c.norm_eps), nn.RMSNorm(c.dim, c.norm_eps)
        self.wqkv = nn.Linear(c.dim, c.q_dim + 2 * c.kv_dim, bias=False)
        self.wo = nn.Linear(c.q_dim, c.dim, bias=False)
        self.w_gate_up = nn.Linear(c.dim, 2 * c.hidden_dim, bias=False)
        self.w_down = nn.Linear(c.hidden_dim, c.dim, bias=False)

    def rotate(self, x: Any, cos: Any, sin: Any) -> Any:
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def forward(self, x: Any, cos: Any, sin: Any) -> Any:
        c = self.c
        batch, seq, _ = x.shape
        qkv = self.wqkv(self.attention_norm(x)).view(batch, seq, -1, c.head_dim).transpose(1, 2)
        q, k, v = qkv.split([c.n_heads, c.n_kv_heads, c.n_kv_heads], 1)
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        grouped = c.n_heads != c.n_kv_heads
        o = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True, enable_gqa=grouped)
        x = x + self.wo(o.transpose(1, 2).reshape(batch, seq, -1))
        gate, up = self.w_gate_up(self.ffn_norm(x)).chunk(2, -1)
        return x + self.w_down(F.silu(gate) * up)


class Model(nn.Module):
    """Tied embeddings; returns the mean loss."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.dim)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layers))
        self.norm = nn.RMSNorm(c.dim, c.norm_eps)
        nn.init.normal_(self.embedding.weight, std=0.02)
        for name, table in zip(("cos", "sin"), rope_tables(c.max_seq_len, c.head_dim, c.rope_theta), strict=True):
            self.register_buffer(name, torch.from_numpy(table))

    def forward(self, tokens: Any, targets: Any) -> Any:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def make_step(model: ModelConfig, config: TrainConfig, *, compiled: bool, device: str = "cuda") -> Callable[[], Any]:
    """A function that does one training step on a fixed batch."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    module: Any = Model(model).to(device)
    fused = device == "cuda"
    optimizer = torch.optim.AdamW(
        module.parameters(), config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay, fused=fused
    )
    run = torch.compile(module) if compiled else module
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (config.batch_size, config.seq_len + 1))
    tokens = torch.from_numpy(ids[:, :-1].copy()).to(device)
    targets = torch.from_numpy(ids[:, 1:].copy()).to(device)

    def step() -> Any:
        with torch.autocast(device, torch.bfloat16):
            loss = run(tokens, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step
