"""One rule for the exit codes of all commands: 2 for words that are wrong whatever they name, 1 for what they name."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine.cli_tools import isolate

from pyengine.cli import COMMANDS, main

# Of each command, words that are right and name "absent", which is not there. doctor reports what is wrong, so nothing is to it.
ABSENT: dict[str, tuple[str, ...]] = {
    "generate": ("-m", "absent", "-p", "a"),
    "chat": ("-m", "absent", "-p", "a"),
    "embed": ("-m", "absent", "a"),
    "rerank": ("-m", "absent", "-q", "a", "b"),
    "serve": ("-m", "absent"),
    "freeze": ("absent", "-o", "out"),
    "info": ("absent",),
    "verify": ("absent",),
    "models": ("rm", "absent"),
    "bench": ("-m", "absent"),
    "eval": ("-m", "model", "absent"),
    "train": ("--data", "absent", "--run-dir", "out"),
    "runs": ("absent",),
    "cost": ("absent",),
}
TRAINING = ("train", "runs", "cost")
# Words that name "latin1", a text that is no UTF-8.
NO_UTF8 = [
    ("generate", "-f", "latin1"),
    ("generate", "-p", "a", "--grammar", "@latin1"),
    ("generate", "-p", "a", "--json-schema", "@latin1"),
    ("chat", "-f", "latin1"),
    ("embed", "-f", "latin1"),
    ("rerank", "-q", "a", "-f", "latin1"),
    ("bench", "-f", "latin1"),
    ("eval", "latin1"),
    ("eval", "--task", "latin1"),
    ("freeze", "absent", "-o", "out", "--quality", "latin1"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a model and a text; all commands run there."""
    isolate(monkeypatch, tmp_path / "cache")
    (tmp_path / "model").write_bytes(tiny_model.read_bytes())
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    monkeypatch.chdir(tmp_path)


def code_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """The exit code, and the one line on stderr."""
    if arguments[0] in TRAINING:
        pytest.importorskip("numba", reason="the training half needs it")
    code = main(arguments)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("pyengine: error: ") and captured.err.count("\n") == 1
    return code, captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_words(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = code_of(capsys, command, *ABSENT.get(command, ()), "--no-such-option")
    assert code == 2 and "--no-such-option" in line


@pytest.mark.parametrize("command", ABSENT)
def test_what_is_not_there(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ABSENT.keys() == COMMANDS.keys() - {"doctor"}
    code, line = code_of(capsys, command, *ABSENT[command])
    assert code == 1 and "absent" in line


@pytest.mark.parametrize("words", NO_UTF8, ids=" ".join)
def test_a_text_that_is_no_utf8(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    model = () if words[0] == "freeze" else ("-m", "model")
    code, line = code_of(capsys, *words, *model)
    assert code == 1 and "latin1 is no UTF-8 text" in line


@pytest.mark.parametrize(
    "words",
    [
        ("eval", "-m", "model", "model", "--ctx", "8", "--stride", "9"),
        ("generate", "-m", "model"),
        ("bench", "-m", "model", "-p", "0", "-n", "0"),
        ("generate", "-m", "model", "a", "--json-schema", "{"),
    ],
    ids=" ".join,
)
def test_words_that_do_not_go_together(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(capsys, *words)[0] == 2
    there = tuple("absent" if word == "model" else word for word in words)
    if words[0] != "bench":  # which opens the model first
        assert code_of(capsys, *there)[0] == 2


@pytest.mark.parametrize(
    "words",
    [
        ("bench", "-m", "model", "-p", "100000"),
        ("bench", "-m", "model", "--isa", "quantum"),
        ("freeze", "model", "-o", "model"),
        ("freeze", "model", "-o", "."),
        ("freeze", "model", "-o", "out"),
        ("embed", "-m", "model", "-f", "."),
        ("serve", "-m", "model", "--api-key-file", "absent"),
    ],
    ids=" ".join,
)
def test_what_the_words_name_will_not_do(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert code_of(capsys, *words)[0] == 1
