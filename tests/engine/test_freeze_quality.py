"""`freeze --quality`: the float32 forward of a source is transformers' and the float64 oracle's, it reads each weight of a layer
once, and the numbers are those of a direct computation."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.cli_tools import run_process
from reference import fixtures, gguf_fixtures
from reference.oracle import Oracle, kl_divergence, log_softmax

from pyengine import Engine
from pyengine.cli import main
from pyengine.cli.freeze import show_quality
from pyengine.errors import InvalidArgumentError, ModelFormatError
from pyengine.eval import quality
from pyengine.freeze import open_source, sources
from pyengine.freeze.float_forward import FloatForward
from pyengine.freeze.sources import SourceModel

# A share of a row's norm: test_oracle.py derives it for float32 against float64. Both sides are float32 here.
TOLERANCE = 2 * 2.0**-24 * 12 * 4 * 2
TEXT = "The quick brown fox said hello to the lazy dog, and hello again; but nobody heard it.\n" * 8


def oracle_of(fixture: fixtures.Fixture) -> Oracle:
    return Oracle(fixtures.canonical_config(fixture), fixtures.canonical_weights(fixture), quantized=False)


def row_errors(got: Any, wanted: Any) -> Any:
    """|got - wanted| / |wanted| of every row."""
    return np.linalg.norm(got - wanted, axis=-1) / np.linalg.norm(wanted, axis=-1)


def float32_logits(model: SourceModel, token_ids: Any) -> Any:
    forward = FloatForward(model)
    return forward.logits(forward.states(np.array(token_ids, np.int64)[None])[0])


# ---------------------------------------------------------------------------- the forward


@pytest.mark.parametrize("name", fixtures.names())
def test_float32_forward_is_transformers_and_the_oracles(name: str, tmp_path: Path) -> None:
    fixture = fixtures.load(name)
    oracle = oracle_of(fixture)
    apart = [np.abs(w).max() for key, w in oracle.weights.items() if key.endswith(".key_bias")]
    tolerance = TOLERANCE + 2 * 2.0**-24 * max(apart, default=0.0)
    directory = fixtures.write_hf_dir(fixture, tmp_path / "hf")
    with contextlib.closing(open_source(directory, n_ctx=fixtures.n_ctx(fixture))) as model:
        logits = float32_logits(model, fixture.token_ids)
    assert logits.dtype == np.float32
    assert row_errors(logits[fixture.rows], fixture.logits).max() < tolerance
    assert row_errors(logits, oracle.logits(fixture.token_ids)).max() < tolerance


def test_windows_do_not_see_one_another_and_blocks_change_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks of rows, down to two panels: a matrix product may round otherwise, and does nothing else."""
    fixture = fixtures.load("qwen3_moe")
    ids = np.array(fixture.token_ids[:48], np.int64)
    with contextlib.closing(open_source(fixtures.write_hf_dir(fixture, tmp_path / "hf"))) as model:
        wanted = [float32_logits(model, window) for window in (ids[:24], ids[24:])]
        monkeypatch.setattr(sources, "_BLOCK_ELEMENTS", 1)
        forward = FloatForward(model)
        states = forward.states(ids.reshape(2, 24))
        for window, logits in zip(states, wanted, strict=True):
            assert row_errors(forward.logits(window), logits).max() < TOLERANCE


class CountedRows:
    """A row source that counts how often each of its rows is read."""

    def __init__(self, source: Any) -> None:
        self.name, self.rows, self.columns = source.name, source.rows, source.columns
        self._source, self.read = source, Counter[int]()

    def read_rows(self, start: int, stop: int) -> Any:
        self.read.update(range(start, stop))
        return self._source.read_rows(start, stop)


def test_weights_of_a_layer_are_read_once_for_all_windows(tmp_path: Path) -> None:
    fixture = fixtures.load("llama_untied")
    with contextlib.closing(open_source(fixtures.write_hf_dir(fixture, tmp_path / "hf"))) as model:
        counted = {name: CountedRows(source) for name, source in model.matrices.items()}
        model.matrices.update(counted)
        ids = np.array(fixture.token_ids[:48], np.int64).reshape(3, 16)
        layers: list[int] = []
        FloatForward(model).states(ids, layers.append)
    assert layers == list(range(1, model.config.n_layers + 1))
    for name, source in counted.items():
        if name.startswith("layers."):
            assert source.read == Counter(range(source.rows)), name
    assert counted["tok_embeddings"].read == Counter(set(ids.reshape(-1).tolist()))
    assert not counted["output"].read


def test_a_source_that_overflows_float32_is_said_to(tmp_path: Path) -> None:
    fixture = fixtures.load("llama_tied")
    fixture.hf_weights["model.norm.weight"] = np.full_like(fixture.hf_weights["model.norm.weight"], 3e38, np.float32)
    with (
        contextlib.closing(open_source(fixtures.write_hf_dir(fixture, tmp_path / "hf", "F32"))) as model,
        pytest.raises(ModelFormatError, match="overflows float32"),
    ):
        float32_logits(model, fixture.token_ids[:4])


# ---------------------------------------------------------------------------- the numbers


def direct(reference: Any, other: Any, windows: Any) -> dict[str, float]:
    """The definitions, over logits (n_windows, length, vocab_size) of both sides."""
    nll = [-np.take_along_axis(log_softmax(side)[:, :-1], windows[:, 1:, None], 2).reshape(-1) for side in (reference, other)]
    kl, ordered = kl_divergence(reference, other), np.sort(reference, axis=-1)
    clear = ordered[..., -1] - ordered[..., -2] > 0.5
    return {
        "n_windows": len(windows), "n_positions": windows.size,
        "kl_mean": kl.mean(), "kl_max": kl.max(), "nll_float32": nll[0].mean(),
        "nll_difference": (nll[1] - nll[0]).mean(), "nll_stderr": (nll[1] - nll[0]).std(ddof=1) / np.sqrt(len(nll[0])),
        "agreement": (reference.argmax(axis=-1) == other.argmax(axis=-1))[clear].mean(), "n_clear": clear.sum(),
    }  # fmt: skip


@pytest.fixture(params=["hf", "gguf"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A fixture as a directory or, with q and k permuted as the format has them, as a GGUF file."""
    fixture = fixtures.load("granite")
    if request.param == "hf":
        return fixtures.write_hf_dir(fixture, tmp_path / "hf")
    return gguf_fixtures.write(fixture, tmp_path / "m.gguf")


def assert_close(got: dict[str, float], reference: Any, other: Any, windows: Any) -> None:
    """The numbers that these logits give, if others than ``reference`` of float32, within TOLERANCE of them, were used for them.

    So a log-probability differs by at most 2 d, where d bounds a logit's difference; a paired difference's mean and deviation
    by as much; a KL, whose derivative by a logit is p (log p - log q - KL), by 2 d max |log p - log q| to the first order.
    No winner and no margin is so close to the limit that it would make a difference.
    """
    wanted = direct(reference, other, windows)
    d = TOLERANCE * np.linalg.norm(reference, axis=-1).max()
    kl_bound = 2 * d * (np.abs(log_softmax(reference) - log_softmax(other)).max() + 2 * d)
    ordered = np.sort(reference, axis=-1)
    assert np.abs(ordered[..., -1] - ordered[..., -2] - 0.5).min() > 2 * d
    assert 0 < kl_bound < wanted["kl_mean"] / 4  # there is something to see
    for name, value in wanted.items():
        bound = kl_bound if name.startswith("kl") else 2 * d if name.startswith("nll") else 1e-12
        assert abs(got[name] - value) < bound, name


def printed(out: str) -> dict[str, float]:
    """The numbers of the command's four lines."""
    pattern = (
        r"positions: +(?P<n_positions>\d+) in (?P<n_windows>\d+) windows? of (?P<length>\d+)\n"
        r"KL\(float32 \|\| int8\): +mean (?P<kl_mean>\S+) nats, worst token (?P<kl_max>\S+)\n"
        r"loss: +float32 (?P<nll_float32>\S+) nats a token, int8 (?P<nll_difference>\S+) "
        r"\(paired standard error (?P<nll_stderr>\S+)\)\n"
        r"same argmax: +(?P<agreement>\S+) % of (?P<n_clear>\d+) positions where .* more than 0\.5 apart\n"
    )
    found = re.fullmatch(pattern, out)
    assert found, out
    return {name: float(value) for name, value in found.groupdict().items()}


def test_one_window_and_nothing_lost_are_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    show_quality(quality.Quality(1, 31, 1e-6, 1e-5, 2.0, -4e-5, 1e-5, 1.0, 9), 32)
    out = capsys.readouterr().out
    assert "31 in 1 window of 32" in out and "int8 +0.0000 (" in out


def test_numbers_are_those_of_a_direct_computation(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With float32 logits of a window at a time, and with the oracle's; the head takes 7 rows at a time, a window has 40. What
    is printed is what was measured, and the text's tokens are the engine's."""
    text, out = tmp_path / "text.txt", tmp_path / "m.safetensors"
    text.write_text(TEXT)
    arguments = ["freeze", str(source), "-o", str(out), "--quality", str(text)]
    monkeypatch.setattr(quality, "WINDOW", 40)
    monkeypatch.setattr(quality, "LOGITS_BYTES", 7 * 4 * fixtures.load("granite").hf_config["vocab_size"])
    assert main([*arguments, "--quality-tokens", "130"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    with Engine(out) as engine, contextlib.closing(open_source(source)) as model:
        bos = engine.tokenizer.bos_id if engine.tokenizer.adds_bos else None
        windows = quality.cut_windows(engine.tokenize(TEXT, add_bos=False)[:120], 40, bos)
        reference = np.array([float32_logits(model, window) for window in windows])
        other = np.array([engine.logits(window.tolist()) for window in windows])
        seen: list[tuple[int, int, str]] = []
        got = quality.measure(model, engine, windows, lambda *one: seen.append(one))._asdict()
        steps = model.config.n_layers + 3 * 6  # layers, then blocks of 7 of 40 rows
        assert [(done, total) for done, total, _ in seen] == [(n, steps) for n in range(1, steps + 1)]
    assert_close(got, reference, other, windows)
    oracle = oracle_of(fixtures.load("granite"))
    assert_close(got, np.array([oracle.logits(window) for window in windows]), other, windows)
    shown = printed(captured.out)
    assert (shown.pop("length"), shown["n_positions"], shown["n_windows"]) == (40, 120, 3)
    half_digits = {"kl_mean": 0.5e-5, "agreement": 0.5e-4, "n_windows": 0, "n_positions": 0, "n_clear": 0}
    shown["agreement"] /= 100
    for name, value in shown.items():
        assert abs(value - got[name]) < 1.1 * half_digits.get(name, 0.5e-4) + 1e-12, name


def test_the_text_may_come_through_a_pipe(tmp_path: Path) -> None:
    source = fixtures.write_hf_dir(fixtures.load("olmoe"), tmp_path / "hf")
    done = run_process(
        tmp_path, "freeze", source, "-o", tmp_path / "m", "--quality", "-", "--quality-tokens", 50, input=TEXT
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert printed(done.stdout)["n_positions"] == 50


def test_windows_begin_with_bos_where_the_model_wants_it() -> None:
    assert quality.cut_windows(list(range(10)), 4, None).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert quality.cut_windows(list(range(10)), 4, 99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert quality.cut_windows([1, 2], 4, None).shape == (0, 4)
    assert (quality.window_length(1024, 2048), quality.window_length(1024, 64), quality.window_length(7, 64)) == (512, 64, 7)
    with pytest.raises(InvalidArgumentError, match="at least 3"):
        quality.window_length(2, 64)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("content", "arguments", "code", "message"),
    [
        (b"", [], 1, "is empty"),
        (b"hello hello", [], 1, "tokens, too few for a window of 64"),
        (b"a" * 100 + b"\xff", [], 1, "is no UTF-8 text: byte 100 is 0xff"),
        (b"hello " * 100, ["--quality-tokens", "2"], 1, "at least 3"),
        (b"hello " * 100, ["--quality-tokens", "0"], 2, "not a whole number from 1"),
        (..., [], 1, "Is a directory"),
        (None, [], 1, "No such file"),
    ],
)
def test_a_text_that_will_not_do_is_named_before_anything_is_frozen(
    content: Any, arguments: list[str], code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def no_freeze(*_: object, **__: object) -> None:
        raise AssertionError("frozen")

    monkeypatch.setattr("pyengine.freeze.freeze", no_freeze)
    text, out = tmp_path / "text.txt", tmp_path / "m.safetensors"
    if content is ...:
        text.mkdir()
    elif content is not None:
        text.write_bytes(content)
    fixture = fixtures.load("llama_tied")
    fixture.hf_config["max_position_embeddings"] = 64
    source = fixtures.write_hf_dir(fixture, tmp_path / "hf")
    assert main(["freeze", str(source), "-o", str(out), "--quality", str(text), *arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1
    assert not out.exists()


def test_quality_tokens_alone_mean_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["freeze", str(tmp_path), "-o", str(tmp_path / "x"), "--quality-tokens", "9"]) == 2
    assert "--quality-tokens needs --quality TEXT" in capsys.readouterr().err
