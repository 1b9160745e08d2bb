"""`pyengine train --help` teaches: every option has a line, every example is a command that parses."""

from __future__ import annotations

import argparse
import dataclasses
import shlex

import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")

from pyengine_training.__main__ import COMMANDS, main
from pyengine_training.config import CHOICES, TrainConfig
from pyengine_training.flags import EPILOG, train_parser


def test_every_option_says_what_it_is_for() -> None:
    actions = [a for a in train_parser()._actions if not isinstance(a, argparse._HelpAction)]
    for action in actions:
        said = (action.help or "").partition(" (default")[0]
        assert len(said.split()) >= 2, action.option_strings
    names = {action.dest for action in actions}
    assert {f.name for f in dataclasses.fields(TrainConfig)} - names == {"extra"}
    for name, choices in CHOICES.items():
        assert next(a.choices for a in actions if a.dest == name) == choices


def test_what_is_not_given_is_left_to_the_run() -> None:
    """A default in the parser would win over a file of options, and over a parent's."""
    given = vars(train_parser().parse_args(["--run-dir", "r"]))
    left = {name for name, value in given.items() if value not in (None, False)}
    assert left == {"run_dir", "device"}


def test_examples_parse() -> None:
    lines = EPILOG.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(lines) >= 3
    for line in lines:
        words = shlex.split(line)
        assert words[:2] == ["pyengine", "train"]
        train_parser().parse_args(words[2:])


def test_a_text_without_its_option_is_told_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--run-dir", "r", "mine.txt"])
    assert "unrecognized arguments: mine.txt; a text is given with --data mine.txt (" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: " in text and command in EPILOG + " train"


def test_a_word_that_is_no_choice_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "--run-dir", "r", "--optimizer", "sgd"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "--optimizer" in err and "muon" in err and "adamw" in err
