"""Put a draft head into a frozen file, or take it out (csrc/FORMAT.md, section 10)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidArgumentError, ModelFormatError, system_errors
from ..files import path_of
from .config import DraftHeadSpec, FrozenConfig
from .inventory import ATTACHMENTS, DRAFT_PREFIX, Weight, draft_inventory, stored_draft_tensors
from .quantize import quantize_rows, to_panels
from .reader import FrozenFile
from .writer import FrozenWriter

# Attachments that depend on the tensors, or on the others.
WRITTEN_ANEW = ("config.json", "golden.json", "checksums.json")
Chunks = Iterable[npt.NDArray[Any] | memoryview]
NAMES = ("w_in", "w_gate", "w_up", "w_down", "output", "token_norm", "state_norm", "mlp_norm", "output_norm", "vocab")


def attach_draft(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    tensors: Mapping[str, npt.NDArray[Any]] | None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write the frozen file ``model`` once more, as ``output``, with a draft head in place of its own; None = without one.
    Returns the path of ``output``, which has its name only when it is whole.

    With d = the model's dim, ``tensors`` are, float32, rows = outputs: draft.w_in (d, 2d), draft.w_gate and draft.w_up (m, d),
    draft.w_down (d, m), draft.output (v, d); draft.token_norm, draft.state_norm, draft.mlp_norm and draft.output_norm (d); and
    integers draft.vocab (v), ids of the model's tokens, ascending. A head changes no output, so the golden run stays.

    Raises ModelFormatError for a tensor that does not fit or does not quantize, InvalidArgumentError if ``output`` is the
    model itself, ExistingFileError unless ``overwrite``, and what FrozenFile.open raises.
    """
    source, target = path_of(model), Path(path_of(output))
    with system_errors(), FrozenFile.open(source) as frozen:
        if target.exists() and os.path.samefile(source, target):
            raise InvalidArgumentError(f"{target} is the model itself: name another output")
        extra = {name: value for name, value in frozen.config.extra.items() if name != "draft"}
        head = None if tensors is None else _checked(tensors, frozen.config)
        if head is not None:
            spec = DraftHeadSpec(len(head["w_gate"]), len(head["vocab"]))
            extra["draft"] = spec._asdict()
        config = replace(frozen.config, extra=extra)
        content = {} if head is None else _stored(head, draft_inventory(config))
        with memoryview(frozen.buffer) as view:
            _write(target, frozen, config, content, view, overwrite)
    return target


def _checked(tensors: Mapping[str, npt.NDArray[Any]], config: FrozenConfig) -> dict[str, npt.NDArray[Any]]:
    """Name without "draft." -> float32 array of the right shape; vocab int32."""
    head = {name.removeprefix("draft."): np.asarray(values) for name, values in tensors.items()}
    if head.keys() != set(NAMES):
        wrong = sorted(head.keys() ^ set(NAMES))[0]
        raise ModelFormatError(f"tensor 'draft.{wrong}' is {'missing' if wrong in NAMES else 'not one of a draft head'}")
    d, m, v = config.dim, len(np.atleast_1d(head["w_gate"])), len(np.atleast_1d(head["vocab"]))
    shapes = {"w_in": (d, 2 * d), "w_gate": (m, d), "w_up": (m, d), "w_down": (d, m), "output": (v, d), "vocab": (v,)}
    for name, values in head.items():
        shape = shapes.get(name, (d,))
        if values.shape != shape:
            raise ModelFormatError(f"tensor 'draft.{name}' has shape {list(values.shape)}, expected {list(shape)}")
    vocab = head["vocab"]
    if vocab.dtype.kind not in "iu" or not ((vocab >= 0) & (vocab < config.vocab_size)).all():
        raise ModelFormatError(f"tensor 'draft.vocab' must hold integers in 0..{config.vocab_size - 1}")
    if not (vocab[1:] > vocab[:-1]).all():
        raise ModelFormatError("tensor 'draft.vocab' is not ascending")
    floats = {name: values for name, values in head.items() if name != "vocab"}
    for name, values in floats.items():
        if values.dtype.kind != "f" or not np.isfinite(values).all():
            raise ModelFormatError(f"tensor 'draft.{name}' must hold finite floating point numbers")
    head = {name: np.ascontiguousarray(values, np.float32) for name, values in floats.items()}
    return head | {"vocab": np.ascontiguousarray(vocab, np.int32)}


def _stored(head: Mapping[str, npt.NDArray[Any]], weights: list[Weight]) -> dict[str, Chunks]:
    """Name in the file -> content of every tensor of the head."""
    content: dict[str, Chunks] = {}
    for weight in weights:
        if weight.is_matrix:
            parts = [to_panels(*quantize_rows(head[part.name], weight.name)) for part in weight.parts]
            # Parts of one matrix alternate by panels.
            codes, scales = (np.stack(of_parts, axis=1) for of_parts in zip(*parts, strict=True))
            content |= {f"{weight.name}.codes": [codes], f"{weight.name}.scales": [scales]}
        else:
            content[weight.name] = [head[weight.role]]
    return content


def _write(
    target: Path, frozen: FrozenFile, config: FrozenConfig, head: dict[str, Chunks], view: memoryview, overwrite: bool
) -> None:
    others = {name: tensor for name, tensor in frozen.extra.items() if not name.startswith(DRAFT_PREFIX)}
    attachments = {name: frozen.attachment(name) for name in ATTACHMENTS if name not in WRITTEN_ANEW}
    with FrozenWriter(
        target,
        config,
        {name: content for name, content in attachments.items() if content is not None},
        name=frozen.metadata.get("name", ""),
        source=frozen.metadata.get("source", ""),
        generator=frozen.metadata.get("generator", ""),
        extra=others | stored_draft_tensors(config),
        golden=lambda _: frozen.attachment("golden.json"),
        overwrite=overwrite,
    ) as writer:
        for name in writer.names:
            writer.write(name, head[name] if name in head else _copied(frozen, view, name))


def _copied(frozen: FrozenFile, view: memoryview, name: str) -> Iterator[memoryview]:
    offset, size = frozen.tensors[name]
    with view[offset : offset + size] as part:
        yield part
