"""The frozen file: its header, its weights, a draft head and every attachment."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path

from engine.draft_heads import with_random_head
from engine.frozen_parts import FrozenParts
from fuzz import mutations
from fuzz.cases import Case
from fuzz.targets import seeds
from fuzz.targets.template import template_source
from fuzz.targets.tokenizer import changed_tokenizer
from fuzz.targets.use import use

from pyengine.format.inventory import ATTACHMENTS
from pyengine.freeze import freeze

_F16 = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00]
_F32 = [
    0,
    0x80000000,
    1,
    0x007FFFFF,
    0x3F800000,
    0x41800001,
    0x5F000000,
    0x7F7FFFFF,
    0xFF7FFFFF,
    0x7F800000,
    0xFF800000,
    0x7FC00000,
]
_OPTIONAL = [  # keys of config.json that the seed does not have, or says otherwise
    ("attention_softcap", [0, 50.0, 2.0**-10, 2.0**20, -1, 1e300]),
    ("logits_softcap", [0.0, 30.0, 2.0**-10, 2.0**20, True]),
    ("qk_norm_all_heads", [False, True]),
    ("n_experts", [0, 1, 2, 1024]),
    ("n_experts_used", [0, 1]),
    ("shared_hidden_dim", [0, 1, 64, 1 << 22]),
    ("shared_gated", [False, True]),
    ("gate_up_bias", [False, True]),
    ("down_bias", [False, True]),
    ("output_bias", [False, True]),
    ("attention_sinks", [False, True]),
    ("router_bias", [False, True]),
    ("qk_norm_after_rope", [False, True]),
    ("norm", ["rmsnorm_after", "rmsnorm_around", "rmsnorm_parallel"]),
    ("activation", ["geglu_tanh", "gelu_tanh", "gelu", "relu2", "xielu", "swiglu_clamped"]),
]
_TEXTS = [
    b"[]",
    b"null",
    b"1",
    b'"x"',
    b"{}",
    b"true",
    b"",
    b"\xff\xfe",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"NaN",
    b"1e999",
    b"{",
    b"\xef\xbb\xbf{}",
]


class FrozenFileTarget:
    name = "frozen"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""
        self._path = scratch / "m.safetensors"
        plain = freeze(seeds.write_files(scratch / "hf", seeds.hf_files()), scratch / "plain.safetensors", overwrite=True)
        self._file = FrozenParts(with_random_head(plain, self._path, overwrite=True).read_bytes())
        self._weights = [name for name in self._file.parts if name not in ATTACHMENTS]
        self._attachments = [name for name in self._file.parts if name in ATTACHMENTS]

    def make(self, rng: random.Random) -> Case:
        changes: dict[str, bytes] = {}
        kind = rng.randrange(10)
        if kind in (3, 8):
            for _ in range(rng.randint(1, 4)):
                name = rng.choice(self._weights)
                changes[name] = changed_weights(rng, name, changes.get(name, self._file.parts[name]))
        if 4 <= kind <= 8:
            for _ in range(rng.choice([1, 1, 2])):
                name = rng.choice(self._attachments)
                changes[name] = changed_attachment(rng, name, self._file.attachment(name))
        times = rng.randint(1, 3) if kind < 3 else 0
        data = self._file.build(changes, change_header=lambda header: mutations.mutated(rng, header, times))
        return Case({"m.safetensors": mutations.mutated_bytes(rng, data, 9000) if kind == 9 else data}, rng.random())

    def run(self, case: Case) -> None:
        self._path.write_bytes(case.files["m.safetensors"])
        use(self, self._path, random.Random(case.arguments))


def changed_weights(rng: random.Random, name: str, data: bytes) -> bytes:
    """Extreme values everywhere or in places: codes, float16 scales, float32 vectors."""
    if name.endswith(".codes"):
        item, values = "B", [0, 1, 127, 128, 129, 255]
    elif name.endswith(".scales"):
        item, values = "H", _F16
    else:
        item, values = "I", _F32
    numbers = list(struct.unpack(f"<{len(data) // struct.calcsize(item)}{item}", data))
    if rng.random() < 0.4:
        numbers = [rng.choice(values)] * len(numbers)
    else:
        for _ in range(rng.choice([1, 20, 200])):
            numbers[rng.randrange(len(numbers))] = rng.choice(values)
    return struct.pack(f"<{len(numbers)}{item}", *numbers)


def changed_attachment(rng: random.Random, name: str, content: bytes) -> bytes:
    """The text of a attachment damaged as a document, as bytes, or replaced."""
    if name.endswith(".jinja"):
        return (
            template_source(rng).encode("utf-8", "surrogatepass")
            if rng.random() < 0.8
            else rng.randbytes(rng.randrange(200))
        )
    kind = rng.randrange(10)
    if kind < 7:
        document = json.loads(content)
        if name == "config.json" and rng.random() < 0.3:
            key, values = rng.choice(_OPTIONAL)
            (document["layers"] if key in document["layers"] else document)[key] = rng.choice(values)
        changed = changed_tokenizer(rng, document) if name == "tokenizer.json" else mutations.mutated(rng, document)
        return json.dumps(changed).encode()
    if kind == 7:
        return mutations.mutated_bytes(rng, content)
    if kind == 8:
        return rng.choice(_TEXTS)
    return json.dumps(mutations.value(rng)).encode()
