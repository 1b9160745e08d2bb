"""Freezing: any supported checkpoint -> one frozen int8 file (csrc/FORMAT.md).

``freeze`` finds out by content what the source is, maps its tensors to their frozen places and streams them through the
quantizer; memory stays bounded by a few megabytes of weights and one matrix's scales. ``freeze_cached`` does it once per source.
``pyengine.freeze`` is both this package and, being callable, the function.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..arguments import INT32_MAX, integer
from ..errors import InvalidArgumentError, ModelFormatError, system_errors
from ..files import is_safetensors, open_regular, path_of

if TYPE_CHECKING:
    from .lora import Adapter
    from .sources import SourceModel

Progress = Callable[[int, int, str], None]

__all__ = ["freeze", "freeze_cached", "frozen_cache_path", "open_source"]


PathLike = str | os.PathLike[str]


def _source_kind(path: Path) -> str:
    """One of "hf", "gguf", "safetensors" and "llama2c", by content. Raises ModelFormatError for what is no regular file."""
    if path.is_dir():
        return "hf"
    with open_regular(path) as file:
        magic = file.read(4)
    if magic == b"GGUF":
        return "gguf"
    return "safetensors" if path.suffix == ".safetensors" or is_safetensors(path) else "llama2c"


def _source_files(kind: str, path: Path, tokenizer: Path | None) -> list[Path]:
    """Every file that decides what a source freezes to, whether it is there or not."""
    if kind == "hf":
        from .hf import files_of

        return files_of(path)
    if kind == "gguf":
        from .gguf_split import part_paths

        return part_paths(path)
    return [path] if tokenizer is None else [path, tokenizer]


def _checked_source(source: PathLike, tokenizer: PathLike | None) -> tuple[str, Path, Path | None]:
    """(kind, path of the source, path of the tokenizer). Raises InvalidArgumentError for a tokenizer that nothing would read."""
    path = Path(path_of(source))
    kind = _source_kind(path)
    if kind == "safetensors":
        raise ModelFormatError(f"{path}: weights alone; give the directory with config.json and tokenizer.json")
    if tokenizer is not None and kind != "llama2c":
        raise InvalidArgumentError(f"{path} has a tokenizer of its own; only llama2.c checkpoints are given one")
    return kind, path, None if tokenizer is None else Path(path_of(tokenizer))


def open_source(
    source: PathLike,
    *,
    name: str | None = None,
    tokenizer: PathLike | None = None,
    lora: Sequence[Adapter] = (),
    n_ctx: int | None = None,
) -> SourceModel:
    """Open a checkpoint of any supported kind; only its headers are read. Close the result.

    A directory is Hugging Face's, a file that starts with ``GGUF`` is GGUF (any part of a split one stands for all), another one
    is a llama2.c legacy checkpoint and needs ``tokenizer``, the path of its tokenizer.bin. ``lora``: adapters to be merged into
    the weights of a directory (lora.py). ``n_ctx`` as in ``freeze``. Raises ModelFormatError, UnsupportedModelError,
    InvalidArgumentError, and MissingFileError or its like for what the system refuses.
    """
    with system_errors():
        kind, path, tokenizer_path = _checked_source(source, tokenizer)
        if kind == "hf":
            from .hf import load_hf

            return load_hf(path, name, lora, n_ctx)
        if lora:
            raise InvalidArgumentError(f"{path} is no Hugging Face directory: adapters are merged into the weights of one")
        if kind == "gguf":
            from .gguf_model import load_gguf

            return load_gguf(path, name, n_ctx)
        from .llama2c import load_llama2c

        return load_llama2c(path, name, tokenizer_path, n_ctx)


def _tensor_chunks(model: SourceModel) -> Iterator[tuple[str, Iterable[Any]]]:
    """Every tensor of the file in order, as a stream of buffers. Scales follow the codes they come from."""
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


def _refuse_own_source(output: Path, files: Iterable[Path]) -> None:
    """An output that is one of the source's files, under whatever name, or would be read as one the next time."""
    if os.path.lexists(output) and not os.path.isfile(output):
        raise InvalidArgumentError(f"{output} is not a regular file: it cannot be replaced")
    for path in files:
        same_name = path.name == output.name and os.path.samefile(path.parent, output.parent)
        if same_name or (os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output)):
            raise InvalidArgumentError(
                f"{output} is part of the source ({path.name}): give the frozen file another name"
            )


def freeze(
    source: PathLike,
    output: PathLike,
    *,
    name: str | None = None,
    tokenizer: PathLike | None = None,
    lora: Sequence[PathLike | tuple[PathLike, float]] = (),
    n_ctx: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Path:
    """Freeze the checkpoint ``source`` into the file ``output`` and return its path.

    ``lora``: directories with adapters in PEFT's layout, or (directory, scale), merged into the weights of a Hugging Face
    directory. ``n_ctx`` is how many positions the frozen model shall have; None means the checkpoint's own. Of a model with two
    RoPE tables for texts of two lengths (LongRoPE: Phi-3, Phi-4-mini) a file holds one, and None means the shorter one's
    positions. ``progress(done_bytes, total_bytes, tensor_name)`` is called after each tensor. At the end the
    engine runs the complete file once, for its golden outputs; only then does the file get its name.
    An existing one is replaced only with ``overwrite``, and never one that the source is made of.
    Raises UnsupportedModelError for what is not implemented, ModelFormatError for damage, InvalidArgumentError for a wrong
    argument, OutOfMemoryError, and ExistingFileError, MissingFileError or another SystemCallError for what the system refuses.
    """
    from ..format.writer import FrozenWriter
    from ..golden import compute_json
    from .lora import files_of as adapter_files
    from .tokenizer import compact_tokenizer_json

    if name is not None and not isinstance(name, str):
        raise InvalidArgumentError(f"the model's name must be a string, not {type(name).__name__}")
    if progress is not None and not callable(progress):
        raise InvalidArgumentError(f"progress must be callable, not {type(progress).__name__}")
    if n_ctx is not None:
        n_ctx = integer("n_ctx", n_ctx, 1, INT32_MAX)
    output = Path(path_of(output))
    adapters = _checked_adapters(lora)
    with (
        system_errors(),
        contextlib.closing(open_source(source, name=name, tokenizer=tokenizer, lora=adapters, n_ctx=n_ctx)) as model,
    ):
        own = [file for one in adapters for file in adapter_files(one)]
        _refuse_own_source(output, [*_source_files(*_checked_source(source, tokenizer)), *own])
        attachments = {**model.attachments, "tokenizer.json": compact_tokenizer_json(model.attachments["tokenizer.json"])}
        with FrozenWriter(
            output,
            model.config,
            attachments,
            name=_unicode(model.name),
            source=_unicode(model.source),
            golden=compute_json,
            overwrite=overwrite,
        ) as writer:
            for tensor, chunks in _tensor_chunks(model):
                writer.write(tensor, chunks)
                if progress:
                    progress(writer.bytes_written, writer.total_bytes, tensor)
    return output


def _checked_adapters(lora: object) -> list[Adapter]:
    if isinstance(lora, (str, bytes, os.PathLike)) or not isinstance(lora, Sequence):
        raise InvalidArgumentError("lora must be a list of directories, or of (directory, scale)")
    from .lora import adapter

    return [adapter(one) for one in lora]


def _unicode(text: str) -> str:
    """A name as text: what a file name has that is no Unicode becomes U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def frozen_cache_path(source: PathLike, tokenizer: PathLike | None = None, *, name: str | None = None) -> Path:
    """Where ``freeze_cached`` keeps the frozen form of ``source``; changes whenever the source does."""
    from .cache import cache_path

    with system_errors():
        kind, path, tokenizer_path = _checked_source(source, tokenizer)
        files = _source_files(kind, path, tokenizer_path)
        return cache_path(Path(os.path.realpath(path)), [Path(os.path.realpath(file)) for file in files], name)


def freeze_cached(
    source: PathLike, progress: Progress | None = None, *, tokenizer: PathLike | None = None, name: str | None = None
) -> Path:
    """Freeze ``source`` into the cache unless it is there, and return the frozen file's path. ``name``: the model's, instead of
    the source's own.

    Of several processes that race one freezes and the others wait for it. Raises what ``freeze`` does, and SystemCallError for a
    cache directory that others could write to.
    """
    from .cache import Origin, missing

    path = frozen_cache_path(source, tokenizer, name=name)
    origin = Origin(os.path.abspath(source), None if tokenizer is None else os.path.abspath(tokenizer), name)
    with missing(path, origin) as is_missing:
        if is_missing:
            freeze(source, path, name=name, tokenizer=tokenizer, progress=progress)
    return path


class _CallableModule(ModuleType):
    """Importing any submodule binds the package to the name ``pyengine.freeze``: let both readings work."""

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        return freeze(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        """What notebooks and `inspect` show of it."""
        import inspect

        return inspect.signature(freeze)


sys.modules[__name__].__class__ = _CallableModule
