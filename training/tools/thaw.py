"""A Hugging Face folder of the values that a frozen file's int8 codes stand for.

    python training/tools/thaw.py model.safetensors FOLDER

For models whose float32 masters are not at hand: the folder can be scored beside the engine
(paired_losses.py), tuned further (--init-from) or distilled from (--teacher). Freezing it gives the
same codes and scales. Llama models without biases, with or without QK-norm; the reader follows csrc/FORMAT.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from pyengine_training.arena import Arena, parameter_shapes
from pyengine_training.checkpoint import ATTACHMENTS, write_hf_folder
from pyengine_training.errors import ConfigError, TrainingError
from pyengine_training.files import atomic_directory, load_safetensors
from pyengine_training.gguf_source import trainable_config
from pyengine_training.ops.cpu.fake_quant import weight_values

VERSIONS = ("3", "4")  # whose codes are of transformed rows; they differ in attention alone
Tensors = dict[str, Any]


def rows_of(codes: Any, scales: Any, rows: int, columns: int) -> Any:
    """Panels of codes (panel, group, k4, row, k) and scales (panel, group, row) -> float32 (rows, columns)."""
    n_panels, n_groups = codes.shape[:2]
    by_row = codes.transpose(0, 3, 1, 2, 4).reshape(n_panels * 16, n_groups * 64)
    return weight_values(by_row[:rows, :columns], scales.transpose(0, 2, 1).reshape(n_panels * 16, n_groups)[:rows])


def matrix(tensors: Tensors, name: str, shape: tuple[int, ...]) -> Any:
    """A matrix without its padding; gate and up, which alternate by panels, one under the other."""
    codes = tensors[name + ".codes"]
    n_panels, n_groups = codes.shape[:2]
    scales = tensors[name + ".scales"][: n_panels * n_groups * 16].reshape(n_panels, n_groups, 16)
    if name.endswith("w_gate_up"):
        return np.concatenate([rows_of(codes[i::2], scales[i::2], shape[0] // 2, shape[1]) for i in (0, 1)])
    return rows_of(codes, scales, *shape)


def format_version(frozen: Path) -> Any:
    """Of a safetensors file; None where it says nothing."""
    with open(frozen, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return header.get("__metadata__", {}).get("format_version")


def thaw(frozen: Path, folder: Path) -> None:
    """Write the folder. ConfigError when it exists or the model is none that the trainer knows."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already")
    tensors = load_safetensors(frozen)
    if "config.json" not in tensors or "golden.json" not in tensors:
        raise ConfigError(f"{frozen} is not a frozen file (pyengine freeze makes one)")
    if format_version(frozen) not in VERSIONS:
        raise ConfigError(f"{frozen} has format_version {format_version(frozen)!r}, this reads {' and '.join(VERSIONS)}")
    stored = json.loads(tensors["config.json"].tobytes())
    if stored["kinds"] != {"default": "int8_g64"}:
        raise ConfigError(f"{frozen}: this reads int8_g64 matrices only, not {stored['kinds']}")
    config = trainable_config(stored, tensors["rope.0.inv_freq"], frozen)
    params = Arena(parameter_shapes(config))
    for name, view in params.views.items():
        view[...] = tensors[name][: view.shape[0]] if view.ndim == 1 else matrix(tensors, name, view.shape)
    eos = (stored.get("eos_token_ids") or [None])[0]
    with atomic_directory(folder) as temporary:
        write_hf_folder(
            temporary,
            params,
            config,
            tokenizer=None,
            bos=stored.get("bos_token_id"),
            eos=eos,
            attachments=temporary,  # its own files, written below
        )
        for name in set(ATTACHMENTS) & set(tensors):
            (temporary / name).write_bytes(tensors[name].tobytes().rstrip(b"\n" if name.endswith(".jinja") else b" "))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("frozen", type=Path)
    parser.add_argument("folder", type=Path, help="new folder")
    args = parser.parse_args()
    try:
        thaw(args.frozen, args.folder)
    except TrainingError as error:
        raise SystemExit(f"error: {error}") from error
    print(args.folder)


if __name__ == "__main__":
    main()
