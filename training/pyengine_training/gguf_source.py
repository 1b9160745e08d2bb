"""A model out of a GGUF file, as the Hugging Face folder that training begins from.

What lies in the file is what ``pyengine freeze`` would take from it, read by the same code (of the package ``pyengine``):
quantized blocks as the float32 numbers that they stand for, rows of q and k in transformers' order, tokenizer and chat template.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .arena import Arena, parameter_shapes
from .checkpoint import ATTACHMENTS, read_model_config, write_hf_folder
from .config import ModelConfig
from .errors import CheckpointError, MissingLibraryError
from .files import atomic_directory

PLAIN_LAYERS = {"window": 0, "rope": 0, "norm": "rmsnorm", "activation": "swiglu"}
UNKNOWN = (
    "qkv_bias", "o_bias", "gate_up_bias", "down_bias", "output_bias", "qk_norm_all_heads", "attention_softcap", "logits_softcap",
    "n_experts", "attention_sinks", "qk_norm_after_rope", "requires",
)  # fmt: skip
PANEL = 16  # rows of gate, then as many of up: how the frozen layout fuses them


def trainable_config(stored: Mapping[str, Any], inv_freq: Any, where: Path) -> ModelConfig:
    """The trainer's configuration of a frozen model's (csrc/FORMAT.md, section 2), which has RoPE's frequencies, not its base.

    Raises CheckpointError that names what the trainer does not know.
    """
    for name in UNKNOWN:
        if stored.get(name):
            raise CheckpointError(f"{where}: the model has {name}, which the trainer does not know")
    if stored["layers"] != PLAIN_LAYERS:
        raise CheckpointError(f"{where}: the trainer knows layers {PLAIN_LAYERS} only, not {stored['layers']}")
    half = stored["head_dim"] // 2
    base = float(f"{float(inv_freq[half - 1]) ** (-half / (half - 1)):.6g}") if half > 1 else 10000.0
    if not np.allclose(inv_freq[:half], base ** (-np.arange(half) / half), rtol=1e-5):
        raise CheckpointError(f"{where}: the model's RoPE is scaled, which the trainer does not know")
    names = {field.name for field in dataclasses.fields(ModelConfig)} & set(stored)
    return ModelConfig(**{name: stored[name] for name in names}, rope_theta=base)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The freezer's view of a GGUF file. Its errors are CheckpointErrors here."""
    try:
        from pyengine.errors import PyEngineError
        from pyengine.freeze import open_source
    except ImportError as error:
        raise MissingLibraryError(
            f"{path}: a GGUF file is read by the package pyengine, which is not installed: pip install pyengine-lm"
        ) from error
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path}: neither a Hugging Face folder nor a GGUF file")
        with contextlib.closing(open_source(path)) as source:
            yield source
    except PyEngineError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error


def _config(source: Any, path: Path) -> ModelConfig:
    return trainable_config(source.config.to_document(), source.vectors["rope.0.inv_freq"](), path)


def model_config_of(path: Path) -> ModelConfig:
    """ModelConfig of a Hugging Face folder or a GGUF file."""
    if not path.is_file():
        return read_model_config(path)
    with _opened(path) as source:
        return _config(source, path)


def model_folder(path: Path, unpacked: Path) -> Path:
    """``path`` if it is a folder; of a GGUF file the folder ``unpacked``, which is written."""
    if not path.is_file():
        return path
    with _opened(path) as source, atomic_directory(unpacked) as temporary:
        config = _config(source, path)
        params = Arena(parameter_shapes(config))
        for name, view in params.views.items():
            view[...] = source.vectors[name]() if view.ndim == 1 else _matrix(source.matrices[name], name, view.shape)
        if not np.isfinite(params.flat).all():
            raise CheckpointError(f"{path}: a weight is infinite or NaN")
        bos, eos = source.config.bos_token_id, (source.config.eos_token_ids or (None,))[0]
        # attachments: the folder itself, which has none yet
        write_hf_folder(temporary, params, config, tokenizer=None, bos=bos, eos=eos, attachments=temporary)
        for name in set(ATTACHMENTS) & set(source.attachments):
            (temporary / name).write_bytes(source.attachments[name])
    return unpacked


def _matrix(rows: Any, name: str, shape: tuple[int, ...]) -> Any:
    """float32 (out, in) of a frozen matrix's source; gate and up, which alternate by panels there, one under the other."""
    values = rows.read_rows(0, rows.rows)
    if not name.endswith("w_gate_up"):
        return values
    panels = values.reshape(-1, 2, PANEL, shape[1])
    half = shape[0] // 2
    return np.concatenate([panels[:, side].reshape(-1, shape[1])[:half] for side in (0, 1)])
