"""The frozen model file: configuration, table of tensors, reader (csrc/FORMAT.md, sections 1 and
2).

``FrozenFile.open`` validates everything before anything uses the file, and reads nothing but its
header and its ``config.json``: this is the start-up path, so it imports neither numpy nor the
tokenizer and takes milliseconds. The file comes from strangers; whatever is wrong with it is a
``ModelFormatError`` that says what and where.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from .errors import ModelFormatError

FORMAT_VERSION = "1"
ALIGNMENT = 64
PANEL_ROWS = 16
GROUP_COLUMNS = 64

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 256
MAX_DIM = 1 << 20
MAX_LAYERS = 4096
MAX_RIDER_BYTES = 512 << 20
MAX_POSITIONS = 1 << 24  # above it, positions are no longer exact in float32

GOLDEN_BYTES = 8192  # reserved for golden.json: it is computed from the finished file
REQUIRED_RIDERS = ("config.json", "tokenizer.json", "golden.json", "checksums.json")
RIDERS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "golden.json",
    "checksums.json",
)

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


def pad(n: int, multiple: int) -> int:
    """n rounded up to a multiple."""
    return -(-n // multiple) * multiple


# ---------------------------------------------------------------------------- JSON from strangers


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} occurs twice")
    return document


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def parse_json_object(text: bytes | str, what: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or Infinity; ``what`` names it in errors."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"{what} is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ModelFormatError(f"{what} is not a JSON object")
    return document


# ---------------------------------------------------------------------------- configuration

_INT_RANGES = {
    "dim": (1, MAX_DIM),
    "hidden_dim": (1, MAX_DIM),
    "n_layers": (1, MAX_LAYERS),
    "n_heads": (1, 65_536),
    "n_kv_heads": (1, 65_536),
    "head_dim": (2, 512),
    "vocab_size": (1, 1 << 24),
    "max_seq_len": (1, MAX_POSITIONS),
    "sliding_window": (0, MAX_POSITIONS),
}
_FLAGS = ("tie_embeddings", "qkv_bias", "o_bias", "qk_norm")
_MAX_EOS_TOKENS = 256


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ModelFormatError(f"config: {name} must be an integer in {low}..{high}, not {value!r:.80}")


@dataclass(frozen=True)
class FrozenConfig:
    """The shape of a model, as in the rider ``config.json``. Every field is checked on
    construction.

    ``sliding_window`` 0 means none; lengths are in positions, ``norm_eps`` is added to a mean
    square.
    """

    architecture: str
    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    sliding_window: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not 1 <= len(self.architecture) <= 256:
            raise ModelFormatError("config: architecture must be a string of 1..256 characters")
        for name, (low, high) in _INT_RANGES.items():
            _check_int(name, getattr(self, name), low, high)
        for name in _FLAGS:
            if type(getattr(self, name)) is not bool:
                raise ModelFormatError(f"config: {name} must be true or false")
        if self.head_dim % 2:
            raise ModelFormatError(f"config: head_dim must be even, not {self.head_dim}")
        if self.n_heads % self.n_kv_heads:
            raise ModelFormatError(f"config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.q_dim > MAX_DIM:
            raise ModelFormatError(f"config: n_heads * head_dim {self.q_dim} exceeds {MAX_DIM}")
        eps = self.norm_eps
        if type(eps) not in (float, int) or not math.isfinite(eps) or not 1e-30 <= eps <= 1:
            raise ModelFormatError(f"config: norm_eps must be in 1e-30..1, not {eps!r:.80}")
        if self.bos_token_id is not None:
            _check_int("bos_token_id", self.bos_token_id, 0, self.vocab_size - 1)
        eos = self.eos_token_ids
        if not isinstance(eos, (tuple, list)) or len(eos) > _MAX_EOS_TOKENS:
            raise ModelFormatError(f"config: eos_token_ids must list <= {_MAX_EOS_TOKENS} ids")
        for token in eos:
            _check_int("eos_token_ids", token, 0, self.vocab_size - 1)
        object.__setattr__(self, "eos_token_ids", tuple(eos))

    @property
    def q_dim(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.n_kv_heads * self.head_dim

    @classmethod
    def from_json(cls, text: bytes | str) -> FrozenConfig:
        """Parse ``config.json``. A missing or an unknown key is an error, like any bad value."""
        document = parse_json_object(text, "config.json")
        names = [field.name for field in fields(cls)]
        if unknown := sorted(document.keys() - set(names)):
            raise ModelFormatError(f"config: unknown key {unknown[0]!r:.80}")
        if missing := [name for name in names if name not in document]:
            raise ModelFormatError(f"config: key {missing[0]!r} is missing")
        return cls(**document)

    def to_json(self) -> str:
        document = asdict(self)
        document["eos_token_ids"] = list(self.eos_token_ids)
        return json.dumps(document, indent=1)


# ---------------------------------------------------------------------------- table of tensors


class TensorSpec(NamedTuple):
    """What the file must hold under a name: safetensors dtype, stored shape, size with padding."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def _vector_spec(n: int, dtype: str) -> TensorSpec:
    item = DTYPE_BYTES[dtype]
    nbytes = pad(n * item, ALIGNMENT)
    return TensorSpec(dtype, (nbytes // item,), nbytes)


def _add_matrix(specs: dict[str, TensorSpec], name: str, n_panels: int, columns: int) -> None:
    n_groups = -(-columns // GROUP_COLUMNS)
    codes = n_panels * n_groups * PANEL_ROWS * GROUP_COLUMNS
    shape = (n_panels, n_groups, GROUP_COLUMNS // 4, PANEL_ROWS, 4)
    specs[f"{name}.codes"] = TensorSpec("I8", shape, codes)
    specs[f"{name}.scales"] = _vector_spec(n_panels * n_groups * PANEL_ROWS, "F16")


def _panels(rows: int) -> int:
    return -(-rows // PANEL_ROWS)


def expected_tensors(config: FrozenConfig) -> dict[str, TensorSpec]:
    """Name -> spec of every weight tensor of such a model, in file order. Riders follow them."""
    c = config
    qkv_rows = c.q_dim + 2 * c.kv_dim
    specs: dict[str, TensorSpec] = {}
    _add_matrix(specs, "tok_embeddings", _panels(c.vocab_size), c.dim)
    for i in range(c.n_layers):
        layer = f"layers.{i}"
        specs[f"{layer}.attention_norm"] = _vector_spec(c.dim, "F32")
        _add_matrix(specs, f"{layer}.wqkv", _panels(qkv_rows), c.dim)
        if c.qkv_bias:
            specs[f"{layer}.wqkv.bias"] = _vector_spec(qkv_rows, "F32")
        if c.qk_norm:
            specs[f"{layer}.q_norm"] = _vector_spec(c.head_dim, "F32")
            specs[f"{layer}.k_norm"] = _vector_spec(c.head_dim, "F32")
        _add_matrix(specs, f"{layer}.wo", _panels(c.dim), c.q_dim)
        if c.o_bias:
            specs[f"{layer}.wo.bias"] = _vector_spec(c.dim, "F32")
        specs[f"{layer}.ffn_norm"] = _vector_spec(c.dim, "F32")
        _add_matrix(specs, f"{layer}.w_gate_up", 2 * _panels(c.hidden_dim), c.dim)
        _add_matrix(specs, f"{layer}.w_down", _panels(c.dim), c.hidden_dim)
    specs["norm"] = _vector_spec(c.dim, "F32")
    if not c.tie_embeddings:
        _add_matrix(specs, "output", _panels(c.vocab_size), c.dim)
    specs["rope.inv_freq"] = _vector_spec(c.head_dim // 2, "F32")
    return specs


# ---------------------------------------------------------------------------- safetensors header


class SafetensorsEntry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    begin: int  # absolute offsets in the file
    end: int


class SafetensorsHeader(NamedTuple):
    metadata: dict[str, str]
    entries: dict[str, SafetensorsEntry]  # in the order of the header
    data_start: int


def _checked_entry(name: str, raw: Any, data_start: int, data_bytes: int) -> SafetensorsEntry:
    label = f"tensor {name!r:.280}"
    if not 1 <= len(name.encode("utf-8", "surrogatepass")) <= MAX_NAME_BYTES:
        raise ModelFormatError(f"{label}: the name must have 1..{MAX_NAME_BYTES} bytes")
    if not isinstance(raw, dict) or raw.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFormatError(f"{label}: needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise ModelFormatError(f"{label}: unknown dtype {dtype!r:.80}")
    if not isinstance(shape, list) or len(shape) > 8:
        raise ModelFormatError(f"{label}: shape must be a list of at most 8 sizes")
    nbytes = DTYPE_BYTES[dtype]
    for size in shape:
        if type(size) is not int or not 0 <= size < 1 << 48:
            raise ModelFormatError(f"{label}: bad size in shape: {size!r:.80}")
        nbytes *= size
    if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        raise ModelFormatError(f"{label}: data_offsets must be two integers")
    begin, end = offsets
    if not 0 <= begin <= end <= data_bytes:
        raise ModelFormatError(f"{label}: bytes {begin}..{end} lie outside the file's {data_bytes} data bytes")
    if end - begin != nbytes:
        raise ModelFormatError(f"{label}: its shape needs {nbytes} bytes, it has {end - begin}")
    return SafetensorsEntry(dtype, tuple(shape), data_start + begin, data_start + end)


def parse_safetensors_header(buffer: Any, file_bytes: int) -> SafetensorsHeader:
    """Parse and check the header of any safetensors file.

    ``buffer`` is a slice-able view of at least the header's bytes. Checked: the caps, JSON without
    duplicate keys, dtype, shape against size, every range inside the file, no hole, no overlap,
    nothing after the last tensor.
    """
    if file_bytes < 8:
        raise ModelFormatError(f"the file has {file_bytes} bytes: not a safetensors file")
    header_bytes = int.from_bytes(buffer[:8], "little")
    if not 2 <= header_bytes <= MAX_HEADER_BYTES:
        raise ModelFormatError(f"header length {header_bytes} is not in 2..{MAX_HEADER_BYTES}: not a safetensors file")
    data_start = 8 + header_bytes
    if data_start > file_bytes:
        raise ModelFormatError(f"truncated: the header ends at {data_start} of {file_bytes} bytes")
    document = parse_json_object(bytes(buffer[8:data_start]), "safetensors header")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ModelFormatError("__metadata__ must map strings to strings")
    if len(document) > MAX_TENSORS:
        raise ModelFormatError(f"{len(document)} tensors, at most {MAX_TENSORS} are allowed")
    data_bytes = file_bytes - data_start
    entries = {name: _checked_entry(name, raw, data_start, data_bytes) for name, raw in document.items()}
    cursor = data_start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != cursor:
            kind = "overlaps the tensor before it" if entry.begin < cursor else "leaves a hole"
            raise ModelFormatError(f"tensor {name!r} {kind}: begins at {entry.begin}, not {cursor}")
        cursor = entry.end
    if cursor != file_bytes:
        raise ModelFormatError(f"the tensors end at {cursor}, the file at {file_bytes} bytes")
    return SafetensorsHeader(metadata, entries, data_start)


# ---------------------------------------------------------------------------- reader


def _check_riders(entries: dict[str, SafetensorsEntry], names: list[str]) -> None:
    order = [name for name in RIDERS if name in entries]
    if unknown := [name for name in names if name not in RIDERS]:
        raise ModelFormatError(f"unknown tensor {unknown[0]!r}")
    if missing := [name for name in REQUIRED_RIDERS if name not in entries]:
        raise ModelFormatError(f"tensor {missing[0]!r} is missing")
    if names != order:
        raise ModelFormatError(f"the riders are out of order: {', '.join(names)}")
    for name in names:
        entry = entries[name]
        size = entry.end - entry.begin
        if entry.dtype != "U8" or len(entry.shape) != 1 or size % ALIGNMENT or not size:
            raise ModelFormatError(f"rider {name!r} must be U8, 1-D, a multiple of 64 bytes")
        if size > MAX_RIDER_BYTES:
            raise ModelFormatError(f"rider {name!r} has {size} bytes, more than {MAX_RIDER_BYTES}")


def _check_weights(entries: dict[str, SafetensorsEntry], config: FrozenConfig) -> None:
    """Compare with the table: same names in the same order, same dtypes, shapes and sizes."""
    expected = expected_tensors(config)
    names = [name for name in entries if name not in RIDERS]
    if unknown := [name for name in names if name not in expected]:
        raise ModelFormatError(f"unknown tensor {unknown[0]!r} for this configuration")
    if missing := [name for name in expected if name not in entries]:
        raise ModelFormatError(f"tensor {missing[0]!r} is missing")
    if names != list(expected) or list(entries)[: len(names)] != names:
        raise ModelFormatError("the tensors are not in the order of the format")
    for name, spec in expected.items():
        entry = entries[name]
        if (entry.dtype, entry.shape) != spec[:2]:
            raise ModelFormatError(
                f"tensor {name!r} is {entry.dtype} {list(entry.shape)}, the configuration needs "
                f"{spec.dtype} {list(spec.shape)}"
            )


class FrozenFile:
    """A validated frozen file: ``config``, ``metadata``, ``buffer`` and where each tensor lies in
    it.

    ``tensors`` maps a name to (offset, size) in bytes of ``buffer``; offsets are multiples of 64
    and ``buffer`` begins on a page. Use as a context manager or call ``close``; views taken from
    ``buffer`` stay valid until they are released.
    """

    def __init__(self, path: str, buffer: mmap.mmap) -> None:
        """Validate ``buffer``; ``open`` is the usual way in."""
        header = parse_safetensors_header(buffer, len(buffer))
        entries = header.entries
        if header.metadata.get("format") != "pyengine":
            raise ModelFormatError("not a frozen pyengine file (freeze the model first)")
        version = header.metadata.get("format_version")
        if version != FORMAT_VERSION:
            raise ModelFormatError(f"format_version {version!r:.80}, this reads {FORMAT_VERSION!r}")
        if header.data_start % ALIGNMENT:
            raise ModelFormatError("the tensors do not start on a multiple of 64 bytes")
        cursor = header.data_start
        for name, entry in entries.items():
            if entry.begin != cursor or (entry.end - cursor) % ALIGNMENT:
                raise ModelFormatError(f"tensor {name!r} is out of order or not padded to 64 bytes")
            cursor = entry.end
        _check_riders(entries, [name for name in entries if name in RIDERS])
        self.path = path
        self.buffer = buffer
        self.metadata = header.metadata
        self.tensors = {name: (e.begin, e.end - e.begin) for name, e in entries.items()}
        self.config = FrozenConfig.from_json(self.rider("config.json") or b"")
        _check_weights(entries, self.config)

    @classmethod
    def open(cls, path: str | os.PathLike[str], use_mmap: bool = True) -> FrozenFile:
        """Map (or, with ``use_mmap=False``, copy) and validate a file.

        A file that is truncated while it is mapped kills the process with SIGBUS: a copy is immune.
        Raises ModelFormatError for whatever is wrong with the content and OSError as ``open`` does.
        """
        path = os.fspath(path)
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ModelFormatError(f"{path}: not a regular file")
        with open(path, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise ModelFormatError(f"{path}: {size} bytes: not a frozen pyengine file")
            if use_mmap:
                buffer = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
            else:
                # An anonymous map and not bytes: it is page-aligned, which the kernels count on.
                buffer = mmap.mmap(-1, size)
                with memoryview(buffer) as view:
                    done = 0
                    while done < size and (n := file.readinto(view[done : done + (1 << 28)])):
                        done += n
                if done < size:
                    raise ModelFormatError(f"{path}: shrank to {done} bytes while it was read")
        try:
            return cls(path, buffer)
        except ModelFormatError as error:
            buffer.close()
            raise ModelFormatError(f"{path}: {error}") from None

    def rider(self, name: str) -> bytes | None:
        """The bytes of a JSON or text rider without its padding, or None when the file has none."""
        if name not in self.tensors or name not in RIDERS:
            return None
        offset, size = self.tensors[name]
        return bytes(self.buffer[offset : offset + size]).rstrip(b"\n" if name.endswith(".jinja") else b" ")

    def check_codes(self) -> None:
        """Refuse code -128, which the format does not have. Reads every weight: not part of
        ``open``.
        """
        for name, (offset, size) in self.tensors.items():
            if name.endswith(".codes") and self.buffer.find(b"\x80", offset, offset + size) >= 0:
                raise ModelFormatError(f"{self.path}: tensor {name!r} holds the code -128")

    def close(self) -> None:
        # When somebody still holds a view, the map goes with the last view.
        with contextlib.suppress(BufferError):
            self.buffer.close()

    def __enter__(self) -> FrozenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def verify_checksums(frozen: FrozenFile) -> Iterator[tuple[str, bool]]:
    """Yield (tensor name, whether its SHA-256 is the one on file) for every tensor but
    checksums.json.
    """
    import hashlib

    sums = parse_json_object(frozen.rider("checksums.json") or b"", "checksums.json")
    with memoryview(frozen.buffer) as view:
        for name, (offset, size) in frozen.tensors.items():
            if name != "checksums.json":
                with view[offset : offset + size] as part:
                    yield name, hashlib.sha256(part).hexdigest() == sums.get(name)


# The writer lives beside its only other reader of this table; importing it is not part of start-up.
def __getattr__(name: str) -> Any:
    if name == "FrozenWriter":
        from .freeze.writer import FrozenWriter

        return FrozenWriter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
