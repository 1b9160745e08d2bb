"""Typed access to what strangers wrote: the values of JSON objects and of GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar, cast

from ..errors import ModelFormatError

K = TypeVar("K")
T = TypeVar("T")
REQUIRED: Any = object()


class Fields:
    """Values by key, of the type that is asked for or a ModelFormatError that names the key.

    ``prefix`` comes before every key, in ``values`` and in errors; ``where`` names the document, and ``names`` keys that it calls
    otherwise. None counts as absent. Every getter takes a default for a key that is absent, and without one that is an error.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "", names: Mapping[str, str] | None = None) -> None:
        self._values, self._where, self._prefix, self._names = values, where, prefix, names or {}

    def _named(self, key: str) -> str:
        """Where a key is in what somebody wrote, for errors."""
        return f"{self._where}: {self._prefix}{self._names.get(key, key)}"

    def __contains__(self, key: str) -> bool:
        return self._values.get(self._prefix + key) is not None

    def is_null(self, key: str) -> bool:
        """Whether the key is there and says None."""
        return self._prefix + key in self._values and self.raw(key) is None

    def raw(self, key: str) -> Any:
        """Whatever it is, or None."""
        return self._values.get(self._prefix + key)

    def wrong(self, key: str, wanted: str) -> ModelFormatError:
        return ModelFormatError(f"{self._named(key)} must be {wanted}, not {self.raw(key)!r:.80}")

    def _get(self, key: str, kinds: tuple[type[K], ...], wanted: str, default: T) -> K | T:
        value = self.raw(key)
        if value is None:
            if default is REQUIRED:
                raise ModelFormatError(f"{self._named(key)} is missing")
            return default
        if type(value) not in kinds:  # a bool is no int here
            raise self.wrong(key, wanted)
        return cast(K, value)

    def integer(self, key: str, default: T = REQUIRED) -> int | T:
        return self._get(key, (int,), "an integer", default)

    def number(self, key: str, default: T = REQUIRED) -> float | T:
        """A finite float; integers count."""
        found = self._get(key, (int, float), "a number", default)
        if key not in self:
            return default
        try:
            value = float(cast(float, found))
        except OverflowError:  # JSON has integers of any size
            value = math.inf
        if not math.isfinite(value):
            raise self.wrong(key, "a finite number")
        return value

    def flag(self, key: str, default: T = REQUIRED) -> bool | T:
        return self._get(key, (bool,), "a bool", default)

    def text(self, key: str, default: T = REQUIRED) -> str | T:
        return self._get(key, (str,), "a string", default)

    def table(self, key: str, default: T = REQUIRED) -> dict[str, Any] | T:
        """A JSON object."""
        value = self.raw(key)
        if value is not None and not isinstance(value, dict):
            raise ModelFormatError(f"{self._named(key)} is not an object but {value!r:.80}")
        return self._get(key, (dict,), "an object", default)
