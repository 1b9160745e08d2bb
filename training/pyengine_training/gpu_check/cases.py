"""Inputs, calls and outputs of every op, independent of the back end that runs them.

A case is run three times: by the back end under test, by its CPU twin in float32, and by the CPU twin in float64, which
is the oracle (finite differences check it). Outputs that are written with = start as NaN. Sizes are odd on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..ops.cpu.fake_quant import GROUP, hadamard_block
from ..ops.needs import Needs, allocate

Array = NDArray[Any]
Arrays = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call. ``arrays`` are inputs and outputs by name; ``run(ops, arrays)`` makes the call."""

    name: str
    arrays: Arrays
    run: Callable[[Any, Arrays], None]
    outputs: tuple[str, ...]
    exact: bool = False  # equal to the CPU's float32 bit for bit
    wide: tuple[str, ...] = ()  # stay float32 where the rest is bfloat16
    tolerance: float = 2e-6  # of the error's norm relative to the output's, float32
    bf16: bool = True  # whether the op exists on bfloat16
    float32: bool = True  # and on float32

    @property
    def precisions(self) -> tuple[bool, ...]:
        """Values of ``bf16`` to check."""
        return (False,) * self.float32 + (True,) * self.bf16


def normal(*shape: int, seed: int = 0) -> Array:
    """Standard normal float32."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def nothing(*shape: int) -> Array:
    """An output before it is written."""
    return np.full(shape, np.nan, np.float32)


def scratch(ops: Any, needs: Needs) -> Arrays:
    """Working memory whose old contents would show: NaN on the host."""

    def empty(shape: tuple[int, ...], dtype: Any) -> Any:
        made = ops.empty(shape, dtype)
        if isinstance(made, np.ndarray) and made.dtype.kind == "f":
            made.fill(np.nan)
        return made

    return allocate(needs, empty)


def tokens(n: int, vocab: int, seed: int = 0) -> Array:
    """Token ids with many repeats."""
    ids = np.random.default_rng([7, seed, n]).integers(0, vocab, n)
    ids[::3] = ids[0]
    return ids


def embedding(n: int, dim: int, vocab: int) -> Iterator[Case]:
    shape = f"N={n},dim={dim},V={vocab}"
    ids = tokens(n, vocab)
    yield Case(
        f"embedding_forward/{shape}",
        {"x": nothing(n, dim), "table": normal(vocab, dim), "ids": ids},
        lambda ops, a: ops.embedding_forward(a["x"], a["table"], a["ids"]),
        ("x",),
        exact=True,
    )
    yield Case(
        f"embedding_backward/{shape}",
        {"dtable": normal(vocab, dim, seed=1), "dx": normal(n, dim), "ids": ids},
        lambda ops, a: ops.embedding_backward(
            a["dtable"], a["dx"], a["ids"], scratch(ops, ops.embedding_scratch(n, vocab))
        ),
        ("dtable",),
        exact=True,
        wide=("dtable",),
    )


def linear(n: int, n_in: int, n_out: int) -> Iterator[Case]:
    shape = f"N={n},in={n_in},out={n_out}"
    x, w, dy = normal(n, n_in), normal(n_out, n_in, seed=1), normal(n, n_out, seed=2)
    yield Case(
        f"linear_forward/{shape}",
        {"y": nothing(n, n_out), "x": x, "w": w},
        lambda ops, a: ops.linear_forward(a["y"], a["x"], a["w"]),
        ("y",),
    )
    yield Case(
        f"linear_backward_input/{shape}",
        {"dx": nothing(n, n_in), "dy": dy, "w": w},
        lambda ops, a: ops.linear_backward_input(a["dx"], a["dy"], a["w"]),
        ("dx",),
    )
    yield Case(
        f"linear_backward_weight/{shape}",
        {"dw": nothing(n_out, n_in), "dy": dy, "x": x},
        lambda ops, a: ops.linear_backward_weight(a["dw"], a["dy"], a["x"]),
        ("dw",),
        wide=("dw",),
    )


def rmsnorm(n: int, dim: int) -> Iterator[Case]:
    shape = f"N={n},dim={dim}"
    x, w = normal(n, dim), 1 + normal(dim, seed=1) / 4
    inv_rms = (1 / np.sqrt((x**2).mean(1) + 1e-5)).astype(np.float32)
    yield Case(
        f"rmsnorm_forward/{shape}",
        {"y": nothing(n, dim), "inv_rms": nothing(n), "x": x, "w": w},
        lambda ops, a: ops.rmsnorm_forward(a["y"], a["inv_rms"], a["x"], a["w"], 1e-5),
        ("y", "inv_rms"),
        wide=("inv_rms", "w"),
    )
    yield Case(
        f"rmsnorm_residual_forward/{shape}",
        {
            "y": nothing(n, dim),
            "inv_rms": nothing(n),
            "x": x,
            "residual": normal(n, dim, seed=2),
            "w": w,
        },
        lambda ops, a: ops.rmsnorm_residual_forward(a["y"], a["inv_rms"], a["x"], a["residual"], a["w"], 1e-5),
        ("y", "inv_rms", "x"),
        wide=("inv_rms", "w"),
    )
    yield Case(
        f"rmsnorm_backward/{shape}",
        {
            "dx": normal(n, dim, seed=3),
            "dw": normal(dim, seed=4),
            "dy": normal(n, dim, seed=5),
            "x": x,
            "w": w,
            "inv_rms": inv_rms,
        },
        lambda ops, a: ops.rmsnorm_backward(
            *(a[name] for name in ("dx", "dw", "dy", "x", "w", "inv_rms")), scratch(ops, ops.rmsnorm_scratch(dim))
        ),
        ("dx", "dw"),
        wide=("dw", "w", "inv_rms"),
    )


def qk_norm(batch: int, n_kv: int, seq: int, n_rep: int, head_dim: int) -> Iterator[Case]:
    shape = f"B={batch},G={n_kv},T={seq},R={n_rep},D={head_dim}"
    heads, n_all = n_kv * (n_rep + 1), n_kv * (n_rep + 2)
    qkv = normal(batch, seq, n_all, head_dim)
    weights = {name: 1 + normal(head_dim, seed=i) / 4 for i, name in enumerate("qk")}
    raw = qkv[:, :, :heads].copy()
    inv_rms = (1 / np.sqrt((raw**2).mean(-1) + 1e-5)).astype(np.float32)
    kept = ("raw", "inv_rms", "q", "k")
    yield Case(
        f"qk_norm_forward/{shape}",
        {"qkv": qkv, "raw": nothing(*raw.shape), "inv_rms": nothing(*inv_rms.shape), **weights},
        lambda ops, a: ops.qk_norm_forward(a["qkv"], *(a[x] for x in kept), 1e-5),
        ("qkv", "raw", "inv_rms"),
        wide=("inv_rms", "q", "k"),
    )
    gradients = {"dqkv": normal(*qkv.shape, seed=5), "dq": normal(head_dim, seed=6), "dk": normal(head_dim, seed=7)}
    yield Case(
        f"qk_norm_backward/{shape}",
        {**gradients, "raw": raw, "inv_rms": inv_rms, **weights},
        lambda ops, a: ops.qk_norm_backward(
            *(a[x] for x in (*gradients, *kept)), scratch(ops, ops.qk_norm_scratch(head_dim))
        ),
        tuple(gradients),
        wide=("dq", "dk", "q", "k", "inv_rms"),
        tolerance=4e-6,
    )


def rope(batch: int, n_kv: int, seq: int, n_rep: int, head_dim: int) -> Iterator[Case]:
    from ..ops.cpu.rope import rope_tables

    shape = f"B={batch},G={n_kv},T={seq},R={n_rep},D={head_dim}"
    cos, sin = rope_tables(seq + 3, head_dim, 100.0)
    q, kv = (batch, n_kv, seq, n_rep, head_dim), (batch, n_kv, seq, head_dim)
    rows = (batch, seq, n_kv * (n_rep + 2), head_dim)
    names = ("q", "k", "v")
    yield Case(
        f"qkv_rope_forward/{shape}",
        {"q": nothing(*q), "k": nothing(*kv), "v": nothing(*kv), "qkv": normal(*rows)} | {"cos": cos, "sin": sin},
        lambda ops, a: ops.qkv_rope_forward(*(a[x] for x in (*names, "qkv", "cos", "sin"))),
        names,
        wide=("cos", "sin"),
    )
    yield Case(
        f"qkv_rope_backward/{shape}",
        {"qkv": nothing(*rows), "q": normal(*q), "k": normal(*kv), "v": normal(*kv, seed=1)} | {"cos": cos, "sin": sin},
        lambda ops, a: ops.qkv_rope_backward(*(a[x] for x in ("qkv", *names, "cos", "sin"))),
        ("qkv",),
        wide=("cos", "sin"),
    )


def heads(batch: int, n_kv: int, seq: int, n_rep: int, head_dim: int) -> Iterator[Case]:
    shape = f"B={batch},G={n_kv},T={seq},R={n_rep},D={head_dim}"
    o, rows = (batch, n_kv, seq, n_rep, head_dim), (batch, seq, n_kv * n_rep, head_dim)
    yield Case(
        f"merge_heads/{shape}",
        {"rows": nothing(*rows), "o": normal(*o)},
        lambda ops, a: ops.merge_heads(a["rows"], a["o"]),
        ("rows",),
        exact=True,
    )
    yield Case(
        f"split_heads/{shape}",
        {"o": nothing(*o), "rows": normal(*rows)},
        lambda ops, a: ops.split_heads(a["o"], a["rows"]),
        ("o",),
        exact=True,
    )


def attention(batch: int, n_kv: int, seq: int, n_rep: int, head_dim: int, prefix: str = "") -> Iterator[Case]:
    """prefix: "flash_" for the variant that keeps scores on the chip."""
    shape = f"B={batch},G={n_kv},T={seq},R={n_rep},D={head_dim}"
    scale = float(np.float32(head_dim**-0.5))
    q, k = normal(batch, n_kv, seq, n_rep, head_dim), normal(batch, n_kv, seq, head_dim, seed=1)
    v, do = normal(*k.shape, seed=2), normal(*q.shape, seed=3)
    o, lse = nothing(*q.shape), nothing(batch, n_kv, seq * n_rep)
    ids, length = np.arange(seq), 3 if seq < 64 else 41  # documents of a few positions, other ones in each row
    starts = np.stack([np.maximum.accumulate(np.where((ids + b) % (length + b) == 0, ids, 0)) for b in range(batch)])

    def op(ops: Any, name: str) -> Any:
        return getattr(ops, prefix + name, None) or getattr(ops, name)

    def memory(ops: Any, a: Arrays) -> Arrays:
        if hasattr(ops, prefix + "attention_scratch") and prefix:
            return scratch(ops, ops.flash_attention_scratch(q.shape))
        return scratch(ops, ops.attention_scratch(q.shape, a["q"].dtype, True))

    def forward(ops: Any, a: Arrays) -> None:
        arrays = (a[x] for x in ("o", "lse", "q", "k", "v", "starts"))
        op(ops, "attention_forward")(*arrays, scale, memory(ops, a))

    def both(ops: Any, a: Arrays) -> None:
        forward(ops, a)
        ops.merge_heads(a["att"], a["o"])
        arrays = (a[x] for x in ("dq", "dk", "dv", "do", "q", "k", "v", "att", "lse", "starts"))
        op(ops, "attention_backward")(*arrays, scale, memory(ops, a))

    yield Case(
        f"{prefix}attention_forward/{shape}",
        {"o": o, "lse": lse, "q": q, "k": k, "v": v, "starts": starts},
        forward,
        ("o", "lse"),
        wide=("lse",),
        tolerance=4e-6,
        float32=not prefix,
    )
    if not prefix:
        codes = np.random.default_rng(4).integers(-127, 128, v.shape).astype(np.float32)
        codes[..., 0] = 127
        rounded = codes * np.abs(normal(*v.shape[:-1], 1, seed=5))

        def quantized(ops: Any, a: Arrays) -> None:
            arrays = (a[x] for x in ("o", "lse", "q", "k", "v", "starts"))
            ops.attention_forward(*arrays, scale, memory(ops, a), True)

        yield Case(
            f"attention_forward_quantized/{shape}",
            {"o": o, "lse": lse, "q": q, "k": k, "v": rounded, "starts": starts},
            quantized,
            ("o",),
            tolerance=4e-6 if seq < 64 else 1e-2,  # of many codes some flip, by 1 of 127
            bf16=False,
        )
    yield Case(
        f"{prefix}attention_backward/{shape}",
        {"o": o, "lse": lse, "q": q, "k": k, "v": v, "do": do, "starts": starts}
        | {"dq": nothing(*q.shape), "dk": nothing(*k.shape), "dv": nothing(*k.shape)}
        | {"att": nothing(batch, seq, n_kv * n_rep, head_dim)},
        both,
        ("dq", "dk", "dv"),
        wide=("lse",),
        tolerance=4e-6,
        float32=not prefix,
    )


def swiglu(n: int, hidden: int) -> Iterator[Case]:
    shape = f"N={n},hidden={hidden}"
    gate_up = 3 * normal(n, 2 * hidden)
    gate_up[0, 0], gate_up[-1, hidden - 1] = -200.0, 200.0  # exp must not overflow into NaN
    yield Case(
        f"swiglu_forward/{shape}",
        {"h": nothing(n, hidden), "gate_up": gate_up},
        lambda ops, a: ops.swiglu_forward(a["h"], a["gate_up"]),
        ("h",),
    )
    yield Case(
        f"swiglu_backward/{shape}",
        {"d": nothing(n, 2 * hidden), "dh": normal(n, hidden, seed=1), "gate_up": gate_up},
        lambda ops, a: ops.swiglu_backward(a["d"], a["dh"], a["gate_up"]),
        ("d",),
    )


def cross_entropy(n: int, vocab: int) -> Iterator[Case]:
    shape = f"N={n},V={vocab}"
    logits, targets = 4 * normal(n, vocab), np.random.default_rng(5).integers(0, vocab, n)
    targets[n // 2] = -1
    yield Case(
        f"cross_entropy_forward/{shape}",
        {"loss": nothing(n), "logits": logits, "targets": targets},
        lambda ops, a: ops.cross_entropy_forward(a["loss"], a["logits"], a["targets"]),
        ("loss", "logits"),
        wide=("loss",),
    )
    yield Case(
        f"cross_entropy_forward_backward/{shape}",
        {"loss": nothing(n), "logits": logits, "targets": targets},
        lambda ops, a: ops.cross_entropy_forward_backward(a["loss"], a["logits"], a["targets"], 0.25),
        ("loss", "logits"),
        wide=("loss",),
        tolerance=4e-6,
    )
    yield Case(
        f"cross_entropy_kl_forward_backward/{shape}",
        {"loss": nothing(n), "logits": logits, "targets": targets} | {"teacher": 3 * normal(n, vocab, seed=1)},
        lambda ops, a: ops.cross_entropy_kl_forward_backward(
            a["loss"], a["logits"], a["teacher"], a["targets"], 0.25, 2.0, 0.5
        ),
        ("loss", "logits"),
        wide=("loss",),
        tolerance=8e-6,
    )


def updates(n: int) -> Iterator[Case]:
    arrays = {name: normal(n, seed=i) for i, name in enumerate("pgm")}
    knobs = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
    yield Case(
        f"adamw_update/n={n}",
        arrays | {"v": normal(n, seed=3) ** 2},
        lambda ops, a: ops.adamw_update(*(a[x] for x in "pgmv"), step=3, lr=1e-3, **knobs),
        ("p", "m", "v"),
        bf16=False,
    )

    def squares(ops: Any, a: Arrays) -> None:
        ops.sum_of_squares(a["partial"], a["g"], 4096)

    yield Case(
        f"sum_of_squares/n={n}",
        {"partial": nothing(-(-n // 4096)), "g": arrays["g"]},
        squares,
        ("partial",),
        wide=("partial",),
    )


def muon(rows: int, cols: int) -> Iterator[Case]:
    yield Case(
        f"muon_update/{rows}x{cols}",
        {name: normal(rows, cols, seed=i) for i, name in enumerate("pgm")},
        lambda ops, a: ops.muon_update(
            *(a[name] for name in "pgm"),
            lr=0.02,
            momentum=0.95,
            weight_decay=0.1,
            grad_scale=0.5,
            scratch=scratch(ops, ops.muon_scratch(rows, cols, a["p"].dtype)),
        ),
        ("p", "m"),
        bf16=False,
        tolerance=2e-5,
    )


def ties(rows: int, n: int) -> Array:
    """(rows, n) float32 that become halves of whole numbers, and 127 in every group, once they are transformed: exact, and
    their quotients end in one half.
    """
    block = hadamard_block(n)
    transformed = np.random.default_rng(n).integers(-253, 254, (rows, n)) / 2
    transformed[:, ::GROUP] = 127
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.kron([[1, 1], [1, -1]], matrix)
    return (transformed.reshape(-1, block) @ matrix / block).reshape(rows, n).astype(np.float32)


def fake_quant(rows: int, n: int) -> Iterator[Case]:
    """Rows of every kind, of heads too; the last has a block so small beside the others that all its codes are 0."""
    x = normal(2 * rows, n)
    x[rows:] = ties(rows, n)
    x[0, :GROUP] = 0
    x[rows - 1, -hadamard_block(n) :] *= np.float32(1e-24)
    if rows > 1:
        x[1] *= 2.0**-76  # below the smallest group that has a scale
    for name, quantize in (
        ("activations", lambda ops, a: ops.fake_quant_activations(a["x"])),
        ("queries", lambda ops, a: ops.fake_quant_heads(a["x"], True)),
        ("value_heads", lambda ops, a: ops.fake_quant_heads(a["x"], False)),
        ("weights", lambda ops, a: ops.fake_quant_weights(a["out"], a["x"])),
    ):
        arrays, output = ({"out": nothing(*x.shape), "x": x}, "out") if name == "weights" else ({"x": x}, "x")
        yield Case(f"fake_quant_{name}/rows={rows},n={n}", arrays, quantize, (output,), exact=True, bf16=False)


def small_cases() -> Iterator[Case]:
    """Every op at sizes that a simulator can do in seconds: odd ones, and multiples of the kernels' vectors of 8."""
    yield from embedding(9, 5, 7)
    yield from embedding(1, 33, 3)
    yield from linear(5, 7, 3)
    yield from rmsnorm(1, 1)
    yield from rmsnorm(5, 33)
    yield from rmsnorm(3, 70)
    yield from rmsnorm(9, 264)
    for shape in ((2, 2, 5, 1, 6), (1, 1, 1, 3, 2), (1, 2, 3, 2, 10), (1, 2, 3, 2, 32)):
        yield from rope(*shape)
        yield from qk_norm(*shape)
        yield from heads(*shape)
    for shape in ((2, 2, 5, 1, 6), (1, 1, 1, 3, 2), (1, 2, 11, 2, 4), (1, 1, 24, 1, 8)):
        yield from attention(*shape)
    yield from swiglu(3, 7)
    yield from swiglu(1, 1)
    yield from swiglu(3, 24)
    yield from cross_entropy(5, 11)
    yield from cross_entropy(2, 300)
    yield from cross_entropy(3, 600)
    yield from updates(301)
    for rows, cols in ((6, 6), (4, 9), (9, 4), (16, 24)):
        yield from muon(rows, cols)
    yield from fake_quant(3, 70)
    yield from fake_quant(2, 32)
    yield from fake_quant(3, 128)
    yield from fake_quant(2, 96)  # blocks of 32 in groups of 64
    yield from fake_quant(1, 320)  # more than a warp holds at once of a head
    yield from fake_quant(1, 3)
    yield from fake_quant(2, 12)
    yield from fake_quant(1, 24)
    yield from fake_quant(1, 48)


def large_cases() -> Iterator[Case]:
    """Every op at sizes of a real model, odd where kernels might care."""
    yield from embedding(4099, 768, 1009)
    yield from linear(1030, 768, 2304)
    yield from rmsnorm(2049, 768)
    yield from rmsnorm(65, 1000)
    yield from rope(3, 4, 257, 3, 64)
    yield from qk_norm(3, 4, 257, 3, 64)
    yield from heads(3, 4, 257, 3, 64)
    yield from attention(2, 4, 515, 3, 64)
    yield from attention(1, 2, 130, 1, 80)
    yield from attention(2, 4, 515, 3, 64, prefix="flash_")
    yield from attention(1, 2, 130, 1, 32, prefix="flash_")
    yield from swiglu(515, 2048)
    yield from cross_entropy(129, 50257)
    yield from updates(1_000_003)
    yield from muon(768, 2304)
    yield from muon(2048, 768)
    yield from fake_quant(515, 768)
    yield from fake_quant(33, 100)
