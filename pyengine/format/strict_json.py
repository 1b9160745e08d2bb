"""JSON from strangers: an object without duplicate keys, NaN or Infinity, or a ModelFormatError."""

from __future__ import annotations

import json
from typing import Any

from ..errors import ModelFormatError


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
