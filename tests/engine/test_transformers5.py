"""Directories as transformers 5 writes them mean what it computes: names of tensors and keys, RoPE by kind of layer, ties, models
that see; and architectures that other ones' folds are enough for.

The float32 forward of the source is compared, which reads what freezing reads."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from reference.transformers5 import LOGIT_STEP, TOKENS, cases, write_case

from pyengine.freeze import open_source
from pyengine.freeze.float_forward import FloatForward


@pytest.mark.parametrize("name", cases())
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    case = cases()[name]
    with contextlib.closing(open_source(write_case(case, tmp_path / "hf"))) as source:
        forward = FloatForward(source)
        logits = forward.logits(forward.states(np.array([TOKENS]))[0, -2:])[:, ::LOGIT_STEP]
    assert np.abs(logits - case.logits).max() < 1e-4 * case.logits.std()
