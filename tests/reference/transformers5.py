"""The models of data/transformers5/cases.npz (make_transformers5.py says what it holds), as directories."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .fixtures import tokenizer_json, write_safetensors

DATA = Path(__file__).parent / "data" / "transformers5" / "cases.npz"
TOKENS = [(7 * i * i + 3 * i + 11) % 263 for i in range(40)]
LOGIT_STEP = 4


@dataclass(frozen=True)
class Case:
    name: str
    config: dict[str, Any]  # config.json
    shapes: dict[str, list[int]]
    logits: NDArray[np.float32]  # (2, n): every LOGIT_STEP-th of the last two positions


def case_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, NDArray[np.float32]]:
    """Values by the tensor's name and shape, such that every part matters."""
    return {name: _values(name, shape) for name, shape in shapes.items()}


def _values(name: str, shape: Sequence[int]) -> NDArray[np.float32]:
    noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
    if len(shape) == 1:
        is_gain = name.endswith("weight")
        return (np.float32(1) + np.float32(0.25) * noise) if is_gain else np.float32(0.3) * noise
    deviation = 0.5 if "embed" in name or "wte" in name else 1.2 / float(shape[-1]) ** 0.5
    return (np.float32(deviation) * noise).astype(np.float32)


@cache
def cases() -> dict[str, Case]:
    with np.load(DATA, allow_pickle=False) as file:
        return {
            case["name"]: Case(**case, logits=file[f"logits/{case['name']}"]) for case in json.loads(str(file["cases"]))
        }


def write_case(case: Case, directory: Path) -> Path:
    """Make `directory` with config.json, model.safetensors and tokenizer.json, and return it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(case.config))
    write_safetensors(directory / "model.safetensors", case_weights(case.shapes))
    (directory / "tokenizer.json").write_text(tokenizer_json())
    return directory
