"""Low-rank adapters in PEFT's layout: read and checked, and merged into a model's matrices while it is frozen. (Beside a frozen
model: pyengine/adapters.py.)

    W + s (alpha / r) B A      W (out, in), A (r, in), B (out, r); alpha / sqrt(r) with use_rslora; s is the caller's

in float64, rounded to float32 once. B A is the sum of its r outer products in their order, so it is the same on every machine;
several adapters are added in the order in which they are given. What this does not say is refused by name: DoRA, biases, whole
modules, ranks or alphas by pattern, embeddings.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..arguments import shown
from ..errors import InvalidArgumentError, MissingFileError, ModelFormatError, UnsupportedModelError
from ..files import path_of, read_regular
from ..format.strict_json import parse_json_object
from .fields import Fields
from .safetensors import SafetensorsReader

if TYPE_CHECKING:
    from ..format.quantize import Float32Array, RowSource
    from .build import TensorReader

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_RANK = 4096
_MAX_CONFIG_BYTES = 1 << 20
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
# Keys of adapter_config.json that change what an adapter computes, and the values with which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "lora_bias": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}


class Adapter(NamedTuple):
    """A directory with an adapter, and what its product is multiplied by beside its own alpha / r."""

    path: Path
    scale: float = 1.0


def adapter(given: str | os.PathLike[str] | tuple[str | os.PathLike[str], float]) -> Adapter:
    """A directory, or (directory, scale). Raises InvalidArgumentError."""
    path, scale = given if isinstance(given, tuple) and len(given) == 2 else (given, 1.0)
    if type(scale) not in (int, float) or not abs(scale) <= sys.float_info.max:  # NaN is not; no float is made of an integer
        raise InvalidArgumentError(f"the scale of an adapter must be a finite number, not {shown(scale)}")
    return Adapter(Path(path_of(path)), float(scale))


def parse(text: str) -> Adapter:
    """DIR or DIR:scale, as the command line has it."""
    directory, colon, last = text.rpartition(":")
    try:
        scale = float(last) if colon else None
    except ValueError:
        scale = None
    return adapter(text if scale is None or os.path.exists(text) else (directory, scale))


class Product(NamedTuple):
    """One matrix's share of an adapter, float64: a (r, in), b (out, r); scale has alpha / r in it."""

    a: npt.NDArray[np.float64]
    b: npt.NDArray[np.float64]
    scale: float

    def rows(self, start: int, stop: int) -> npt.NDArray[np.float64]:
        """(stop - start, in) of scale * b a."""
        out = np.zeros((stop - start, self.a.shape[1]))
        for k in range(len(self.a)):
            out += self.b[start:stop, k, None] * self.a[k]
        return out * self.scale


class AdaptedRows:
    """A matrix's rows with what adapters add to them."""

    def __init__(self, source: RowSource, products: Sequence[Product]) -> None:
        self.name, self.rows, self.columns = source.name, source.rows, source.columns
        self._source, self._products = source, products

    def read_rows(self, start: int, stop: int) -> Float32Array:
        rows = self._source.read_rows(start, stop).astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # whoever quantizes says that a value is not finite
            for product in self._products:
                rows += product.rows(start, stop)
            return rows.astype(np.float32)


class AdaptedTensors:
    """A reader whose matrices are merged with adapters. Raises ModelFormatError for adapters of another model,
    UnsupportedModelError for what they ask for beyond low-rank products, InvalidArgumentError for a directory without one."""

    def __init__(self, reader: TensorReader, adapters: Sequence[Adapter]) -> None:
        self._reader = reader
        self._products: dict[str, list[Product]] = {}
        for one in adapters:
            for name, product in products(one, reader.shapes.get).items():
                self._products.setdefault(name, []).append(product)
        self._unused = set(self._products)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._reader.shapes

    def matrix(self, name: str) -> RowSource:
        rows = self._reader.matrix(name)
        if name not in self._products:
            return rows
        self._unused.discard(name)
        return AdaptedRows(rows, self._products[name])

    def vector(self, name: str) -> Float32Array:
        return self._reader.vector(name)

    def check_all_used(self) -> None:
        """Nothing of an adapter may be lost: a tied output matrix is not read, for one."""
        if self._unused:
            raise UnsupportedModelError(
                f"an adapter changes {min(self._unused)!r}, which this model shares or does not use"
            )


# -------------------------------------------------------------------- reading


def files_of(one: Adapter) -> list[Path]:
    return [one.path / CONFIG, one.path / WEIGHTS]


def products(one: Adapter, shape_of: Callable[[str], tuple[int, ...] | None]) -> dict[str, Product]:
    """What an adapter adds, by the name of the model's tensor; ``shape_of`` says which shape that has, None if there is none of
    that name. Raises as AdaptedTensors does."""
    config = _config(one.path)
    rank, alpha = config.integer("r"), config.number("lora_alpha")
    if not 1 <= rank <= MAX_RANK or not math.isfinite(alpha):
        raise ModelFormatError(f"{one.path}: r is {rank}, lora_alpha {alpha}")
    scale = one.scale * alpha / (math.sqrt(rank) if config.flag("use_rslora", False) else rank)
    if not (one.path / WEIGHTS).exists():
        raise UnsupportedModelError(f"{one.path} has no {WEIGHTS}; pickled adapters (.bin) are never read")
    reader = SafetensorsReader([one.path / WEIGHTS])
    try:
        modules = _modules(one.path, reader.shapes)
        _check_targets(one.path, config, modules)
        out = {}
        for module, names in modules.items():
            tensor = f"{module}.weight"
            _check_shapes(one.path, tensor, [reader.shapes[names[side]] for side in "AB"], rank, shape_of(tensor))
            a, b = (_whole(reader.matrix(names[side])) for side in "AB")
            out[tensor] = Product(a, b, scale)
        return out
    finally:
        reader.close()


def _near(path: Path) -> str:
    """Where a training run's adapter is, of which the run's folder or its merged model was named."""
    for one in (path / "adapter", path.parent / "adapter"):
        if (one / CONFIG).is_file():
            return f"; {one} is one"
    return ""


def _config(path: Path) -> Fields:
    try:
        document = parse_json_object(read_regular(path / CONFIG, _MAX_CONFIG_BYTES), CONFIG)
    except MissingFileError:
        reason = f"it has no {CONFIG}" if path.exists() else "there is no such directory"
        raise InvalidArgumentError(f"{path} is no adapter: {reason}{_near(path)}") from None
    kind = document.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{path}: adapters of type {kind!r:.80} are not implemented, only LORA")
    for key, neutral in _NEUTRAL.items():
        if document.get(key) not in neutral:
            raise UnsupportedModelError(f"{path}: {key} = {document[key]!r:.80} is not implemented")
    return Fields(document, CONFIG)


def _modules(path: Path, names: Sequence[str] | dict[str, Any]) -> dict[str, dict[str, str]]:
    """Module -> {"A": name of its tensor, "B": ...}."""
    modules: dict[str, dict[str, str]] = {}
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            raise UnsupportedModelError(f"{path}: tensor {name!r:.200} is no low-rank matrix of a linear layer")
        if match[2] in modules.setdefault(match[1], {}):
            raise ModelFormatError(f"{path}: {match[1]} has two matrices {match[2]}")
        modules[match[1]][match[2]] = name
    for module, sides in modules.items():
        if len(sides) != 2:
            raise ModelFormatError(f"{path}: {module} has a matrix {min(sides)} only")
    if not modules:
        raise ModelFormatError(f"{path}: {WEIGHTS} is empty")
    return modules


def _check_targets(path: Path, config: Fields, modules: dict[str, Any]) -> None:
    """A file that lacks what its configuration names is not whole."""
    targets = config.raw("target_modules")
    for target in targets if isinstance(targets, list) else ():
        if not any(module == target or module.endswith(f".{target}") for module in modules):
            raise ModelFormatError(f"{path}: {CONFIG} names the module {target!r:.80}, {WEIGHTS} has none")


def _check_shapes(
    path: Path, tensor: str, found: list[tuple[int, ...]], rank: int, base: tuple[int, ...] | None
) -> None:
    if base is None:
        raise ModelFormatError(f"{path}: the adapter changes {tensor!r:.200}, which the model does not have")
    if len(base) != 2 or 0 in base:
        raise ModelFormatError(f"{path}: the adapter changes {tensor!r:.200}, which is no matrix but {list(base)}")
    wanted = [(rank, base[1]), (base[0], rank)]
    if found != wanted:
        a, b = (list(shape) for shape in found)
        raise ModelFormatError(
            f"{path}: {tensor!r} is {list(base)} and r {rank}; the adapter's matrices are {a} and {b}"
        )


def _whole(rows: RowSource) -> npt.NDArray[np.float64]:
    values = rows.read_rows(0, rows.rows).astype(np.float64)
    if not np.isfinite(values).all():
        raise ModelFormatError(f"tensor {rows.name!r}: a value is not finite")
    return values
