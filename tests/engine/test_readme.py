"""The README says what is so: its example runs, its links lead somewhere, and CI runs its test command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from pyengine.cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(printed) > 100 and printed.rstrip().endswith(", 4096)")


def test_links_lead_somewhere() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "pyengine").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_ci_runs_the_readmes_commands() -> None:
    commands = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0].split("\n")
    ci = (ROOT / ".ci" / "run").read_text()
    install, generate = commands[0].split(" && ")
    extras, test = commands[1].split(" && ")
    assert install == "pip install ."
    for command in (generate, extras, test):
        assert re.search(rf"^\s*(\([^)]*)?{re.escape(command)}", ci, re.MULTILINE), f"CI does not run: {command}"


def test_the_card_is_that_of_the_model_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    models = ROOT / "pyengine" / "models"
    card, file = (models / "README.md").read_text(), models / "default.safetensors"
    assert main(["info", "--json", "-m", str(file)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert card.startswith(f"# default.safetensors: {facts['name']}\n")
    assert f"| parameters | {facts['parameters']:,}, int8; {file.stat().st_size / 1e6:.1f} MB" in card
    assert facts["name"] in (ROOT / "docs" / "serving.md").read_text()  # its example asks for it by name
