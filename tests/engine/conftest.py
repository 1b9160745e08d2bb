"""Shared by the tests of the engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine.speculation_tools import assert_nothing_is_held

from pyengine import Engine


@pytest.fixture
def engine(tiny_model: Path) -> Iterator[Engine]:
    """Without guesses, so that a test can count its steps. Some files have another one, of their own."""
    with Engine(tiny_model, speculative="off") as engine:
        yield engine
        assert_nothing_is_held(engine.check_integrity())
