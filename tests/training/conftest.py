"""Shared by the tests of the trainer: finding it in a bare checkout, and tiny models and texts."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("pyengine_training") is None:  # not installed: the bare checkout
    sys.path.insert(0, str(ROOT / "training"))


@pytest.fixture
def tiny_sizes() -> dict[str, Any]:
    """A model with several query heads to a key, two layers, and no dimension that is a quantization group."""
    return {
        "vocab_size": 48,
        "dim": 40,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 10,
        "hidden_dim": 72,
        "max_seq_len": 24,
    }


def make_story(generator: random.Random) -> str:
    """A few sentences with enough regularity to be learnt."""
    names = ["Tom", "Mia", "Ben", "Lily", "Sam", "Zoë"]
    things = ["ball", "cake", "boat", "kite", "stone", "little dog"]
    verbs = ["found", "lost", "saw", "made", "wanted", "threw"]
    lines = []
    for _ in range(generator.randint(2, 9)):
        name, verb, thing = (generator.choice(x) for x in (names, verbs, things))
        lines.append(f"{name} {verb} a {thing}. {name} was happy with the {thing}.")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 600 short documents with separator lines."""
    generator = random.Random(3)
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    text = "\n<|endoftext|>\n".join(make_story(generator) for _ in range(600))
    path.write_text(text + "\n<|endoftext|>\n", encoding="utf-8")
    return path
