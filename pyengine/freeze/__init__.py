"""Freezing: any supported checkpoint -> one frozen int8 file (csrc/FORMAT.md).

``freeze`` finds out by content what the source is, maps its tensors to their frozen places and
streams them through the quantizer; memory stays bounded by a few megabytes of weights and one
matrix's scales. ``freeze_cached`` does it once per source. ``pyengine.freeze`` is both this package
and, being callable, the function.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..errors import ModelFormatError

if TYPE_CHECKING:
    import os

    from .sources import SourceModel

Progress = Callable[[int, int, str], None]

__all__ = ["freeze", "freeze_cached", "frozen_cache_path", "open_source"]


def open_source(
    source: str | os.PathLike[str],
    *,
    name: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> SourceModel:
    """Open a checkpoint of any supported kind; only its headers are read. Close the result.

    A directory is Hugging Face's, a file that starts with ``GGUF`` is GGUF, another one is a
    llama2.c legacy checkpoint and needs ``tokenizer``, the path of its tokenizer.bin.
    """
    path = Path(source)
    if path.is_dir():
        from .hf import load_hf

        return load_hf(path, name)
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic == b"GGUF":
        from .gguf_model import load_gguf

        return load_gguf(path, name)
    if path.suffix == ".safetensors":
        raise ModelFormatError(f"{path}: weights alone; give the directory with config.json and tokenizer.json")
    from .llama2c import load_llama2c

    return load_llama2c(path, name, tokenizer)


def _tensor_chunks(model: SourceModel) -> Iterator[tuple[str, Iterable[Any]]]:
    """Every tensor of the file in order, as a stream of buffers. Scales follow the codes they come
    from.
    """
    from ..format.inventory import inventory
    from ..format.quantize import QuantizedMatrix

    for weight in inventory(model.config):
        if weight.is_matrix:
            matrix = QuantizedMatrix(model.matrices[weight.name])
            yield f"{weight.name}.codes", matrix
            yield f"{weight.name}.scales", [matrix.scales]
        else:
            yield weight.name, [checked_vector(weight.name, model.vectors[weight.name]())]


def checked_vector(name: str, values: Any) -> Any:
    """A float32 vector, finite."""
    import numpy as np

    if not np.isfinite(values).all():
        raise ModelFormatError(f"tensor {name!r}: a value is not finite")
    return np.ascontiguousarray(values, "<f4")


def freeze(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    name: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Path:
    """Freeze the checkpoint ``source`` into the file ``output`` and return its path.

    ``progress(done_bytes, total_bytes, tensor_name)`` is called after each tensor. At the end the
    engine runs the complete file once, for its golden outputs; only then does the file get its name.
    An existing one is replaced only with ``overwrite``. Raises UnsupportedModelError for what is
    not implemented, ModelFormatError for damage.
    """
    from ..format.writer import FrozenWriter
    from ..golden import compute_json
    from .tokenizer import compact_tokenizer_json

    output = Path(output)
    model = open_source(source, name=name, tokenizer=tokenizer)
    try:
        riders = {**model.riders, "tokenizer.json": compact_tokenizer_json(model.riders["tokenizer.json"])}
        with FrozenWriter(
            output,
            model.config,
            riders,
            name=model.name,
            source=model.source,
            golden=compute_json,
            overwrite=overwrite,
        ) as writer:
            for tensor, chunks in _tensor_chunks(model):
                writer.write(tensor, chunks)
                if progress:
                    progress(writer.bytes_written, writer.total_bytes, tensor)
    finally:
        model.close()
    return output


def frozen_cache_path(source: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> Path:
    """Where ``freeze_cached`` keeps the frozen form of ``source``; changes whenever the source
    does.
    """
    from .cache import cache_path

    return cache_path(source, tokenizer)


def freeze_cached(
    source: str | os.PathLike[str],
    progress: Progress | None = None,
    *,
    tokenizer: str | os.PathLike[str] | None = None,
) -> Path:
    """Freeze ``source`` into the cache unless it is there, and return the frozen file's path.

    Of several processes that race one freezes and the others wait for it.
    """
    from .cache import locked

    path = frozen_cache_path(source, tokenizer)
    if not path.exists():
        with locked(path):
            if not path.exists():
                freeze(source, path, tokenizer=tokenizer, progress=progress)
    return path


class _CallableModule(ModuleType):
    """Importing any submodule binds the package to the name ``pyengine.freeze``: let both readings
    work.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        return freeze(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
