"""training/tools: the numbers of a model report."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")
pytest.importorskip("pyengine._core", reason="the engine's extension is not built")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.config import ModelConfig
from pyengine_training.model import Worker
from pyengine_training.text import read_documents, train_tokenizer

TOOLS = Path(__file__).resolve().parents[2] / "training" / "tools"


@pytest.fixture(scope="module")
def model_report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("model_report", TOOLS / "model_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_report"] = module
    spec.loader.exec_module(module)
    return module


def test_repetition_and_known_words(model_report: ModuleType) -> None:
    assert model_report.repeated_share(["a", "b", "c", "d", "e", "f"]) == 0
    assert model_report.repeated_share(["a", "b", "c", "d", "a", "b", "c", "d"]) == pytest.approx(1 / 5)
    assert model_report.repeated_share(["a"]) == 0
    found = model_report.text_statistics(["The cat sat.", "A dgo."], {"the", "cat", "sat", "a"})
    assert found["known_words"] == pytest.approx(4 / 5) and found["words"] == 2.5


def test_float32_scores_are_the_trainers(model_report: ModuleType, stories: Path, tmp_path: Path) -> None:
    """Read back through the freeze package (gate and up alternating by panel), scored alike."""
    model = ModelConfig(300, 64, 2, 2, 1, 32, 88, 48)
    params = Arena(parameter_shapes(model))
    initialize(params, model, seed=5)
    documents = list(read_documents(stories))[:40]
    folder = tmp_path / "hf"
    folder.mkdir()
    tokenizer = train_tokenizer(read_documents(stories), 300)
    checkpoints.write_hf_folder(folder, params, model, tokenizer=tokenizer, bos=0, eos=0)
    scorer = model_report.float32_scorer(folder, None)
    worker = Worker(model, 1, 48, training=False)
    for text in documents[:3]:
        ids = tokenizer.encode(text).ids[:48]
        tokens, targets = np.zeros((1, 48), np.int64), np.full((1, 48), -1)
        tokens[0, : len(ids) - 1], targets[0, : len(ids) - 1] = ids[:-1], ids[1:]
        wanted = -float(worker.evaluate(params, tokens, targets, False).sum())
        assert scorer(ids) == pytest.approx(wanted, rel=1e-6)


def test_long_documents_are_scored_in_windows(model_report: ModuleType) -> None:
    """Every token after the first counts once."""

    class Stub:
        n_ctx = 5

        def tokenize(self, text: str) -> list[int]:
            return list(range(len(text)))

    seen: list[Any] = []

    def score(ids: list[int]) -> float:
        seen.extend(ids[1:])
        return -math.log(2) * (len(ids) - 1)

    assert model_report.document_bits(Stub(), "x" * 14, score) == pytest.approx(13)
    assert seen == list(range(1, 14))
