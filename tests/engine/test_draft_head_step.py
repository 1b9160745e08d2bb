"""One step of a draft head in C: the bits are those of csrc/FORMAT.md section 10, on every instruction set."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from engine.draft_heads import Tensors, random_head
from engine.freeze_models import LLAMA, write_hf
from engine.frozen_parts import FrozenParts
from reference import frozen_reader
from reference.draft_head import DraftHead
from reference.spec_f32 import Spec

from pyengine import _core
from pyengine.errors import InvalidArgumentError, ModelFormatError, PyEngineError
from pyengine.format.draft_head import attach_draft
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze

SHAPES = {  # dim, hidden_dim, tokens: whole groups and panels, and none of them whole
    "whole": (64, 128, 48),
    "ragged": (40, 27, 33),
    "wide": (96, 200, 300),
}


class Case(NamedTuple):
    path: Path
    head: Tensors
    reference: DraftHead


@pytest.fixture(scope="module", params=SHAPES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    dim, hidden_dim, n_tokens = SHAPES[request.param]
    directory = tmp_path_factory.mktemp("head")
    config = LLAMA | {"hidden_size": dim, "num_hidden_layers": 1}
    plain = freeze(write_hf(directory / "hf", config), directory / "plain.safetensors")
    head = random_head(dim, config["vocab_size"], hidden_dim=hidden_dim, n_tokens=n_tokens)
    return Case(
        attach_draft(plain, directory / "headed.safetensors", head), head, DraftHead(Spec(*frozen_reader.read(plain)), head)
    )


@pytest.fixture(params=_core.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    _core.select_isa(request.param)
    yield request.param
    _core.select_isa(None)


def opened(path: Path, n_threads: int = 1) -> _core.DraftHead:
    file = FrozenFile.open(path)
    model = _core.Model(file.config, file.buffer, file.weights, n_threads)
    assert file.config.draft_head is not None
    return _core.DraftHead(model, file.config.draft_head, file.draft_weights, n_threads)


def logits_of(head: _core.DraftHead, n: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    with memoryview(head) as view:
        return np.array(view).reshape(n, head.stride)[:, : len(head.vocab)]


@pytest.mark.parametrize("n_threads", [1, 2])
def test_a_step_is_that_of_the_specification(case: Case, isa: str, n_threads: int) -> None:
    rng = np.random.default_rng(3)
    head, vocab = opened(case.path, n_threads), case.head["draft.vocab"]
    dim = len(case.head["draft.mlp_norm"])
    for n in (1, 2, 5, 11):
        states = rng.standard_normal((n, dim)).astype(np.float32)
        expected = states.copy()
        flat = states.reshape(-1)
        for _ in range(3):  # its own states are the next inputs
            tokens = rng.integers(0, 300, n)
            expected, known = case.reference.step(expected, tokens)
            assert head.step(tokens.tolist(), flat) == bytes(n)
            np.testing.assert_array_equal(states, expected)
            assert head.vocab.tolist() == vocab.tolist()
            np.testing.assert_array_equal(logits_of(head, n), known)
    assert head.memory() > 0


def test_a_row_that_fails_does_not_disturb_others(case: Case) -> None:
    head = opened(case.path)
    dim = len(case.head["draft.mlp_norm"])
    states = np.random.default_rng(4).standard_normal((3, dim)).astype(np.float32)
    alone = states.copy()
    for bad in (np.inf, -np.inf, np.nan, np.float32(3e38)):
        rows = alone.copy()
        rows[1, 3] = bad
        assert head.step([5, 6, 7], rows.reshape(-1)) == b"\0\1\0"
        found = rows[[0, 2]], logits_of(head, 3)[[0, 2]]
        expected, _ = case.reference.step(alone, [5, 6, 7])
        np.testing.assert_array_equal(found[0], expected[[0, 2]])


def test_what_a_step_cannot_take_is_refused(case: Case) -> None:
    head = opened(case.path)
    dim = len(case.head["draft.mlp_norm"])
    with pytest.raises(BufferError):
        memoryview(head)
    for tokens, n in (([], 0), ([1], 0), ([1, 2], 1)):
        with pytest.raises(ValueError, match="values of states"):
            head.step(tokens, np.zeros(n * dim, np.float32))
    for token in (-1, 300):
        with pytest.raises(InvalidArgumentError, match="outside the vocabulary"):
            head.step([token], np.zeros(dim, np.float32))
    with pytest.raises(InvalidArgumentError, match="65 rows"):
        head.step([1] * 65, np.zeros(65 * dim, np.float32))
    head.step([1], np.zeros(dim, np.float32))
    with memoryview(head), pytest.raises(PyEngineError, match="still looked at"):
        head.step([1], np.zeros(dim, np.float32))


def changed(data: bytes, item: str, values: dict[int, Any]) -> bytes:
    array = np.frombuffer(data, item).copy()
    for i, value in values.items():
        array[i] = value
    return array.tobytes()


@pytest.mark.parametrize(
    ("name", "item", "values"),
    [
        ("vocab", "<i4", {0: -1}),
        ("vocab", "<i4", {3: 0}),
        ("vocab", "<i4", {0: 2**31 - 1}),
        ("vocab", "<i4", dict.fromkeys(range(33), 299)),
        ("w_in.codes", "i1", {17: -128}),
        ("output.scales", "<f2", {1: np.inf}),
        ("mlp_norm", "<f4", {2: np.nan}),
    ],
)
def test_values_that_the_format_forbids_are_refused(
    case: Case, tmp_path: Path, name: str, item: str, values: dict[int, Any]
) -> None:
    parts = FrozenParts(case.path.read_bytes())
    full = f"extra.draft.{name}"
    path = tmp_path / "bad.safetensors"
    path.write_bytes(parts.build({full: changed(parts.parts[full], item, values)}))
    with pytest.raises(ModelFormatError, match=full):
        opened(path)


def test_the_core_checks_names_sizes_and_numbers_itself(case: Case) -> None:
    file = FrozenFile.open(case.path)
    model = _core.Model(file.config, file.buffer, file.weights, 1)
    spec, tensors = file.config.draft_head, file.draft_weights
    assert spec is not None
    last = list(tensors)[-1]
    wrong = [
        (spec, {name: entry for name, entry in tensors.items() if name != last}),
        (spec, {**tensors, "extra.draft.more": tensors[last]}),
        (spec, dict(reversed(tensors.items()))),
        (spec, {**tensors, last: (tensors[last][0], tensors[last][1], "f32")}),
        (spec, {**tensors, last: (tensors[last][0], tensors[last][1] - 64, "i32")}),
        (spec, {**tensors, last: (len(file.buffer) - 32, tensors[last][1], "i32")}),
        (spec._replace(vocab_size=301), tensors),
        (spec._replace(hidden_dim=0), tensors),
    ]
    for bad_spec, bad_tensors in wrong:
        with pytest.raises(ModelFormatError):
            _core.DraftHead(model, bad_spec, bad_tensors, 1)
    with pytest.raises(InvalidArgumentError, match="n_threads"):
        _core.DraftHead(model, spec, tensors, 257)
