"""Read a frozen file by the letter of csrc/FORMAT.md sections 1 to 3, for spec_f32.Spec.

Nothing is checked (pyengine.format does that) and nothing is imported from the project, so that a
file that both readers understand alike is understood as the page says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .spec_ops import Matrix, Weight

DTYPES = {"I8": np.int8, "F16": np.float16, "F32": np.float32, "U8": np.uint8}


def read(path: Path) -> tuple[dict[str, Any], dict[str, Weight]]:
    """The attachment config.json, and the weights under their unfused names without padding."""
    tensors = _tensors(path.read_bytes())
    config = json.loads(tensors["config.json"].tobytes())
    return config, weights_of(tensors, config)


def weights_of(tensors: Mapping[str, NDArray[Any]], config: dict[str, Any]) -> dict[str, Weight]:
    """Tensors in their stored shapes, scales as float16 -> the weights under their unfused names without padding."""
    weights: dict[str, Weight] = {}
    for name, tensor in tensors.items():
        base, _, kind = name.rpartition(".")
        if kind == "codes":
            weights.update(_matrices(base, tensor, tensors[base + ".scales"], config))
        elif tensor.dtype == np.float32 and not name.startswith("extra."):
            weights.update(_vectors(name, tensor, config))
    return weights


def _tensors(data: bytes) -> dict[str, NDArray[Any]]:
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def _from_panels(codes: NDArray[Any], scales: NDArray[Any]) -> Matrix:
    """codes (n_panels, n_groups, 16, 16, 4), whose axes are panel, group, k4, row and k;
    scales (n_panels, n_groups, 16)."""
    n_panels, n_groups = codes.shape[:2]
    by_row = codes.transpose(0, 3, 1, 2, 4).reshape(n_panels * 16, n_groups, 64)
    return Matrix(by_row, scales.transpose(0, 2, 1).reshape(-1, n_groups).astype(np.float32))


def _rows(matrix: Matrix, begin: int, end: int) -> Matrix:
    return Matrix(matrix.codes[begin:end], matrix.scales[begin:end])


def _matrices(base: str, codes: NDArray[Any], scales: NDArray[Any], config: dict[str, Any]) -> dict[str, Weight]:
    """One stored matrix -> those that it fuses."""
    n_panels, n_groups = codes.shape[:2]
    scales = scales[: n_panels * n_groups * 16].reshape(n_panels, n_groups, 16)
    layer, _, kind = base.rpartition(".")
    n = config["shared_hidden_dim" if layer.endswith(".shared") else "hidden_dim"]
    if kind == "w_gate_up":
        gate, up = (_from_panels(codes[i::2], scales[i::2]) for i in (0, 1))
        return {f"{layer}.w_gate": _rows(gate, 0, n), f"{layer}.w_up": _rows(up, 0, n)}
    matrix = _from_panels(codes, scales)
    if kind == "wqkv":
        begins = _qkv_rows(config)
        return {f"{layer}.{name}": _rows(matrix, begin, end) for name, (begin, end) in begins.items()}
    if kind == "conv_in":
        return {base: _rows(matrix, 0, 3 * config["dim"])}
    n_rows = config["vocab_size"] if not layer else n if kind == "w_up" else config["dim"]
    return {base: _rows(matrix, 0, n_rows)}


def _vectors(name: str, values: NDArray[Any], config: dict[str, Any]) -> dict[str, Weight]:
    layer, _, _ = name.rpartition(".wqkv.bias")
    if layer:
        return {f"{layer}.{k}.bias": values[b:e] for k, (b, e) in _qkv_rows(config).items()}
    layer, _, _ = name.rpartition(".w_gate_up.bias")
    if layer:
        panels, n = values.reshape(-1, 2, 16), config["hidden_dim"]
        return {f"{layer}.w_{half}.bias": panels[:, i].reshape(-1)[:n] for i, half in enumerate(("gate", "up"))}
    if name.endswith(".w_up.bias"):
        return {name: values[: config["hidden_dim"]]}
    if name == "output.bias":
        return {name: values[: config["vocab_size"]]}
    if name.endswith("key_bias"):
        return {name: values[: config["n_kv_heads"] * config["head_dim"]]}
    if name.endswith(("q_norm", "k_norm")) and config.get("qk_norm_all_heads"):
        n_heads = config["n_heads" if name.endswith("q_norm") else "n_kv_heads"]
        return {name: values[: n_heads * config["head_dim"]]}
    if name.endswith(("q_norm", "k_norm")):
        return {name: values[: config["head_dim"]]}
    if name.endswith(".xielu"):
        return {name: values[:3]}
    if name.endswith(".sinks"):
        return {name: values[: config["n_heads"]]}
    if name.endswith(".router.bias"):
        return {name: values[: config["n_experts"]]}
    if name.endswith(".router"):
        return {name: values[: config["n_experts"] * config["dim"]]}
    if name.endswith(".taps"):
        window = config["layers"]["window"]
        taps = window[int(name.split(".")[1])] if isinstance(window, list) else window
        return {name: values[: taps * config["dim"]]}
    return {name: values[: config["head_dim"] // 2 if name.startswith("rope.") else config["dim"]]}


def _qkv_rows(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    q_dim = config["n_heads"] * config["head_dim"]
    kv_dim = config["n_kv_heads"] * config["head_dim"]
    return {
        "wq": (0, q_dim),
        "wk": (q_dim, q_dim + kv_dim),
        "wv": (q_dim + kv_dim, q_dim + 2 * kv_dim),
    }
