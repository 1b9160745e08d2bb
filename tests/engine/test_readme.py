"""The README says what is so: its example runs, its links lead somewhere, its numbers are those of docs/performance.md, and CI
runs its test command."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyengine_training.flags import train_parser

from pyengine.cli import main
from pyengine.freeze.arch import ARCHITECTURES

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert len(printed) > 100 and printed.rstrip().endswith(", 4096)")


def test_links_lead_somewhere() -> None:
    documents = [ROOT / "README.md", ROOT / "HACKING.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "pyengine").rglob("*.md")]
    for document in documents:
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]+))?\)", document.read_text()):
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name} links to {path}"
            assert not anchor or anchor in anchors(target.read_text()), f"{document.name} links to {path}#{anchor}"


def test_the_table_of_models_has_every_architecture() -> None:
    table = (ROOT / "docs" / "models.md").read_text()
    names = {name for one in ARCHITECTURES for name in (one.hf, one.gguf) if name}
    assert not {name for name in names if f"`{name}`" not in table}


def test_the_map_names_files_that_are_there() -> None:
    """docs/architecture.md says in which order to read them: one that was renamed, or is gone, would end the walk."""
    there = {path.name for folder in ("pyengine", "csrc", "training", "tests") for path in (ROOT / folder).rglob("*.*")}
    named = set(re.findall(r"\b\w+\.(?:pyx|py|c|h)\b", (ROOT / "docs" / "architecture.md").read_text()))
    assert len(named) > 100 and named <= there, f"docs/architecture.md names {sorted(named - there)}"


def anchors(document: str) -> list[str]:
    """What GitHub calls the headings of a page in its address."""
    headings = re.findall(r"^#+ (.*)$", document, re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def rows(document: str) -> list[list[str]]:
    """The cells of every table's rows."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in document.splitlines() if line.startswith("|")]


def test_a_measured_row_stands_as_it_is_among_all_that_was_measured() -> None:
    """So that a number of the README is measured again, or corrected, in both places."""
    every = rows((ROOT / "docs" / "performance.md").read_text())
    measured = [row[1:] for row in rows(README) if re.search(r"\d", row[-1])]
    assert len(measured) > 10
    for numbers in measured:
        assert any(row[-len(numbers) :] == numbers for row in every), f"docs/performance.md has no row {numbers}"


def test_ci_runs_the_readmes_commands() -> None:
    commands = re.findall(r"```\n(.*?)```", README, re.DOTALL)[0].split("\n")
    ci = (ROOT / ".ci" / "run").read_text()
    install, generate = commands[0].split(" && ")
    extras, test = commands[1].split(" && ")
    assert install == "pip install ."
    for command in (generate, extras, test):
        assert re.search(rf"^\s*(\([^)]*)?{re.escape(command)}", ci, re.MULTILINE), f"CI does not run: {command}"


def commands(document: str) -> Iterator[list[str]]:
    """Of pyengine's in the blocks of a document, their words; not those in which something is left out or filled in."""
    for block in re.split(r"^```.*\n", document, flags=re.MULTILINE)[1::2]:
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|[|;]", line):
                if re.match(r"\s*([A-Z_]+=\S+ )*pyengine ", part) and not re.search(r"[…$<]", part):
                    words = shlex.split(part.partition(" > ")[0], comments=True)
                    yield words[words.index("pyengine") + 1 :]


def test_commands_of_the_documents_are_what_the_commands_take() -> None:
    n_parsed = 0
    for document in (ROOT / "README.md", ROOT / "HACKING.md", *(ROOT / "docs").glob("*.md")):
        for name, *arguments in commands(document.read_text()):
            if name != "train":
                importlib.import_module(f"pyengine.cli.{name}").parser().parse_args(arguments)
            elif arguments[0].startswith("-"):  # the trainer's other commands have parsers of their own
                train_parser().parse_args(arguments)
            n_parsed += 1
    assert n_parsed > 40


def test_the_card_is_that_of_the_model_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    models = ROOT / "pyengine" / "models"
    card, file = (models / "README.md").read_text(), models / "default.safetensors"
    assert main(["info", "--json", "-m", str(file)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert card.startswith(f"# default.safetensors: {facts['name']}\n")
    assert f"| parameters | {facts['parameters']:,}, int8; {file.stat().st_size / 1e6:.1f} MB" in card
    assert facts["name"] in (ROOT / "docs" / "serving.md").read_text()  # its example asks for it by name
