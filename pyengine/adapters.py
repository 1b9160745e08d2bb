"""Low-rank adapters (LoRA) beside a frozen model: PEFT's directories, read, checked and given to the core.

    y = W x + s (alpha / r) B (A x)        csrc/FORMAT.md section 11

W stays the model's int8 matrix; A and B are float32, and x is the float32 row that W's quantized input is made from. The
file format's checks are those of `freeze --lora` (freeze/lora.py). What a freezer folded into W's rows (Granite's multipliers,
Gemma 2's query scale) is linear, so it multiplies the adapter's product too: m (W + s B A) = m W + (m s) B A.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from pyengine import fork
from pyengine.arguments import number, shown
from pyengine.errors import InvalidArgumentError, ModelFormatError, PyEngineError, UnsupportedModelError, system_errors
from pyengine.run.request import check_salt

if TYPE_CHECKING:
    from pathlib import Path

    from pyengine import _core
    from pyengine.format.config import FrozenConfig
    from pyengine.freeze.lora import Product

DIGEST_BYTES = 16
MAX_NAME = 256


class _Module(NamedTuple):
    """A linear layer that an adapter may change: its matrix in the core, and the freezer's part."""

    matrix: str  # of _core.ADAPTER_MATRICES
    part: str


_MODULES: Mapping[str, _Module] = {
    "self_attn.q_proj": _Module("q", "q"),
    "self_attn.k_proj": _Module("k", "k"),
    "self_attn.v_proj": _Module("v", "v"),
    "self_attn.o_proj": _Module("o", "wo"),
    "self_attn.out_proj": _Module("o", "wo"),
    "mlp.gate_proj": _Module("gate", "gate"),
    "mlp.up_proj": _Module("up", "up"),
    "mlp.down_proj": _Module("down", "down"),
    "feed_forward.w1": _Module("gate", "gate"),
    "feed_forward.w3": _Module("up", "up"),
    "feed_forward.w2": _Module("down", "down"),
}
# Beside a text model's own name: of models that also see (transformers 4 and 5).
_TENSOR = re.compile(r"(?:model|model\.language_model|language_model\.model)\.layers\.(0|[1-9]\d{0,4})\.(.+)\.weight")
# Their freezer multiplies rows of such matrices; a file that does not say by what was frozen before adapters could ask.
_FOLDED = ("Gemma2ForCausalLM", "GraniteForCausalLM", "GraniteMoeForCausalLM")
_FUSED = ("Phi3ForCausalLM",)


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter beside a model.

    rank    the largest of its products
    scale   what it was loaded with, beside its own alpha / r
    digest  of everything that it computes with: equal digests, equal results
    """

    name: str
    path: Path
    scale: float
    rank: int
    n_bytes: int
    digest: bytes
    core: _core.Adapter = field(repr=False, compare=False)


class Adapters:
    """The adapters of one engine, by name. Methods may be called from any thread."""

    def __init__(self, config: FrozenConfig, model: _core.Model) -> None:
        self._config = config
        self._model: _core.Model | None = model
        self._by_name: dict[str, LoadedAdapter] = {}  # changed by single operations only

    def __iter__(self) -> Iterator[LoadedAdapter]:
        return iter(list(self._by_name.values()))

    def load(self, path: str | os.PathLike[str], name: str | None, scale: float | None) -> LoadedAdapter:
        """See Engine.load_adapter."""
        with fork.importing:
            from pyengine.freeze import lora

        scale = 1.0 if scale is None else number("scale", scale)
        given = lora.adapter((path, scale))
        if name is None:
            name = given.path.resolve().name
        self._check_new(name)
        with system_errors():
            products = lora.products(given, lambda tensor: self._shape(tensor))
        model = self._model
        if model is None:
            raise PyEngineError("this engine is closed")
        loaded = _loaded(name, given, self._config, model, _by_place(given.path, products))
        if self._by_name.setdefault(name, loaded) is not loaded:  # by another thread, meanwhile
            raise _taken(name)
        return loaded

    def _check_new(self, name: object) -> None:
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME or not name.isprintable():
            raise InvalidArgumentError(f"an adapter's name is 1 to {MAX_NAME} printable characters, not {shown(name)}")
        if name in self._by_name:
            raise _taken(name)

    def _shape(self, tensor: str) -> tuple[int, int] | None:
        """Of a matrix by its name in Hugging Face's checkpoints, None if there is no such layer. Raises UnsupportedModelError
        for what adapters beside a model cannot change."""
        config = self._config
        if config.architecture in _FUSED or config.extra.get("folded") is False:
            what = f"adapters beside {config.architecture}, whose matrices are fused or otherwise changed, are not implemented"
            raise UnsupportedModelError(f"{what}; merge them with 'pyengine freeze --lora'")
        if config.architecture in _FOLDED and config.folded is None:
            raise UnsupportedModelError("this file does not say what was folded into its matrices: freeze the model again")
        match = _TENSOR.fullmatch(tensor)
        if match is None or match[2] not in _MODULES or (config.n_experts and match[2].startswith("mlp.")):
            kind = "experts" if config.n_experts else "what is no projection of attention or of the MLP"
            raise UnsupportedModelError(f"the adapter changes {shown(tensor)}: adapters beside a model cannot change {kind}")
        layer = int(match[1])
        if layer >= config.n_layers or (config.is_convolution(layer) and match[2].startswith("self_attn.")):
            return None
        dim, hidden, q, kv = config.dim, config.hidden_dim, config.q_dim, config.kv_dim
        shapes = {
            "q": (q, dim),
            "k": (kv, dim),
            "v": (kv, dim),
            "o": (dim, q),
            "gate": (hidden, dim),
            "up": (hidden, dim),
            "down": (dim, hidden),
        }
        return shapes[_MODULES[match[2]].matrix]

    def unload(self, name: str) -> None:
        """See Engine.unload_adapter."""
        self.get(name)
        self._by_name.pop(name, None)

    def get(self, name: str) -> LoadedAdapter:
        """Raises InvalidArgumentError with the names that there are."""
        found = self._by_name.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(self._by_name) or "none"
            raise InvalidArgumentError(f"there is no adapter {shown(name)}; loaded: {known}")
        return found

    def of_request(self, name: str | None, cache_salt: str | None) -> tuple[_core.Adapter | None, bytes]:
        """What a request gets that names an adapter, or None: the adapter, and the salt of its keys and values. Raises
        InvalidArgumentError."""
        if name is None:
            return None, check_salt(cache_salt)
        loaded = self.get(name)
        return loaded.core, check_salt(cache_salt, loaded.digest)

    def close(self) -> None:
        self._by_name.clear()
        self._model = None


def _taken(name: str) -> InvalidArgumentError:
    return InvalidArgumentError(f"there is an adapter called {shown(name)} already")


def _place(tensor: str) -> tuple[int, str]:
    """(layer, module) of a tensor that has a shape."""
    match = _TENSOR.fullmatch(tensor)
    assert match is not None
    return int(match[1]), match[2]


def _by_place(path: Path, products: Mapping[str, Product]) -> dict[tuple[int, str], Product]:
    """Products by (layer, module). Raises ModelFormatError for two of one matrix, which has a name in each kind of model."""
    placed: dict[tuple[int, str], Product] = {}
    for tensor, product in products.items():
        layer, module = _place(tensor)
        if placed.setdefault((layer, module), product) is not product:
            raise ModelFormatError(f"{path}: the adapter changes {module} of layer {layer} twice")
    return placed


def _loaded(
    name: str,
    given: tuple[Path, float],
    config: FrozenConfig,
    model: _core.Model,
    products: Mapping[tuple[int, str], Product],
) -> LoadedAdapter:
    """The products as float32, in the core. Raises ModelFormatError for values that float32 does not hold."""
    import numpy as np

    from pyengine import _core

    path, scale = given
    folded = config.folded or {}
    core, digest = _core.Adapter(model), hashlib.blake2b(digest_size=DIGEST_BYTES)
    for (layer, module), product in sorted(products.items()):
        matrix, part = _MODULES[module]
        with np.errstate(over="ignore", invalid="ignore"):
            a, b = (np.ascontiguousarray(side, np.float32) for side in (product.a, product.b))
            factor = np.float32(product.scale * folded.get(part, 1.0))
        if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(factor)):
            raise ModelFormatError(f"{path}: layer {layer}, {module}: a value or the scale is too large for float32")
        digest.update(f"{layer} {matrix} {len(a)} {float(factor).hex()}\n".encode())
        digest.update(a.tobytes())
        digest.update(b.tobytes())
        core.set(layer, matrix, a, b, float(factor))
    rank = max(len(product.a) for product in products.values())
    return LoadedAdapter(name, path, scale, rank, core.n_bytes, digest.digest(), core)
