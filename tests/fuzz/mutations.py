"""Damage that all targets share: values, JSON documents, bytes, texts."""

from __future__ import annotations

import copy
import random
from typing import Any

# Numbers on both sides of the borders that programs have.
BORDERS = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    257,
    300,
    511,
    512,
    4095,
    4096,
    65_535,
    65_536,
]
BORDERS += [
    2**20,
    2**24,
    2**24 + 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**40,
    2**48,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
]
INTEGERS = [*BORDERS, *(-n for n in BORDERS[1:]), 10**30, 10**400]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    0.5,
    1e-5,
    1e-30,
    1e-45,
    5e-324,
    3.4e38,
    3.5e38,
    1e39,
    1e308,
    -1e308,
    2.0**-64,
    16_777_217.0,
]
NOT_JSON = [float("inf"), float("-inf"), float("nan")]
STRINGS = [
    "",
    "a",
    " ",
    "\0",
    "\x1b[31m",
    "\ud800",
    "\udc80",
    "\ufffd",
    "\u202e",
    "e\u0301",
    "\U0001f600",
    "\U0010ffff",
    "x" * 300,
    "a" * 70_000,
]
STRINGS += [
    "../../etc/passwd",
    "/dev/zero",
    "<s>",
    "<|end|>",
    "<|bos|>",
    "<0x41>",
    "▁",
    "Ġ",
    "%s%n",
    "{{",
    "{%",
    "linear",
    "F16",
    "I8",
]


def words(text: str) -> list[str]:
    """The words of a text: a long list without quotes."""
    return text.split()


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any JSON value, mostly a number at a border."""
    kind = rng.randrange(12)
    if kind < 5:
        return rng.choice(INTEGERS)
    if kind < 7:
        return rng.choice(FLOATS)
    if kind == 7:
        return rng.choice([True, False, None])
    if kind < 10:
        return rng.choice(STRINGS)
    if depth > 3:
        return None
    if kind == 10:
        return [value(rng, depth + 1) for _ in range(rng.choice([0, 1, 2, 3, 40]))]
    keys = ["a", "", "type", "id", "content", "name", "template", "rope_type", "factor"]
    return {rng.choice(keys): value(rng, depth + 1) for _ in range(rng.randrange(4))}


def _places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value in a document; of a long list a few."""
    places, waiting = [], [document]
    while waiting:
        container = waiting.pop()
        if isinstance(container, dict):
            found = [(container, key) for key in container]
        elif isinstance(container, list):
            found = [(container, i) for i in range(min(len(container), 200))]
        else:
            continue
        places += found
        waiting += [container[key] for container, key in found]
    return places


def mutated(rng: random.Random, document: Any, times: int | None = None) -> Any:
    """A copy of a JSON document with a few values deleted, moved, nudged or replaced."""
    document = copy.deepcopy(document)
    for _ in range(rng.randint(1, 3) if times is None else times):
        places = _places(document)
        if not places:
            break
        container, key = rng.choice(places)
        old, kind = container[key], rng.randrange(8)
        if kind == 0:
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(["zz", "", f"{key}x", *container])] = old
        elif kind == 2 and isinstance(container, list):
            container.insert(rng.randrange(len(container) + 1), old)
        elif kind < 5 and type(old) in (int, float):
            container[key] = old + rng.choice([1, -1, 2, 64, -64])
        elif kind == 5:
            other, place = rng.choice(places)
            container[key] = copy.deepcopy(other[place])
        else:
            container[key] = value(rng)
    return document


def mutated_bytes(rng: random.Random, data: bytes, first: int | None = None) -> bytes:
    """Bytes of the first `first` overwritten, the file cut or grown."""
    changed = bytearray(data)
    kind = rng.randrange(6)
    if kind == 0:
        del changed[rng.randrange(len(changed) + 1) :]
    elif kind == 1:
        changed += bytes(rng.choice([1, 63, 64, 65]))
    elif changed:
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(min(first or len(changed), len(changed)))
            changed[at] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256), *b'0123456789"[]{},: -.eE'])
    return bytes(changed)


def text(rng: random.Random, pieces: list[str]) -> str:
    """A short text of pieces, parts of them, and characters that are trouble."""
    cut = [piece[: rng.randrange(len(piece) + 1)] for piece in pieces] + [
        piece[rng.randrange(len(piece) + 1) :] for piece in pieces
    ]
    odd = [
        "\0",
        "\ud800",
        "\ufffd",
        "\u202e",
        "a",
        " ",
        "\n",
        "\r\n",
        "\U0001f600",
        "\ue000",
        "e\u0301",
        "\u00a0",
        "<0x41>",
        "▁",
        "Ġ",
        "ab",
    ]
    return "".join(rng.choice([*pieces, *cut, *odd]) for _ in range(rng.randint(0, 12)))
