"""A few seconds of fuzzing, the same inputs every time, and the harness on a target that has every fault."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fuzz import mutations, runner
from fuzz.cases import Finding, generator
from fuzz.faulty_target import FAULTS, FaultyTarget
from fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
EXECUTIONS = {
    "frozen": 80,
    "gguf": 150,
    "hf": 80,
    "llama2c": 50,
    "tokenizer": 100,
    "template": 100,
    "parameters": 200,
    "serve": 20,
}
FAULTY = FaultyTarget.name


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_but_our_errors_leaves(name: str) -> None:
    result = runner.run_target(name, seed=0, executions=EXECUTIONS[name])
    print(f"{name}: {result.executions} executions: {dict(result.outcomes.most_common())}")
    assert not result.findings, "\n".join(
        f"{f.kind} in {f.where}, input {f.index}:\n{f.text}" for f in result.findings.values()
    )
    assert result.executions == EXECUTIONS[name]
    assert (
        result.outcomes["ran"] > result.executions // 20
    )  # inputs that are refused at the door test nothing behind it


@pytest.mark.parametrize("name", TARGETS)
def test_an_input_can_be_made_again(name: str, tmp_path: Path) -> None:
    """From its seed and index alone, in another process and after other inputs."""
    first = runner.make_target(name, tmp_path)
    made = [ascii(first.make(generator(name, 5, index))) for index in range(8)]
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom pathlib import Path\nfrom fuzz import runner\n"
        "print(ascii(runner.case_of(sys.argv[2], 5, 7, Path(sys.argv[3]))[1]))"
    )
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-P", "-c", code, str(ROOT / "tests"), name, scratch]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == made[7]
    assert len(set(made)) == len(made)


# ---------------------------------------------------------------------------- the harness itself


@pytest.fixture(scope="module")
def faulty() -> runner.Result:
    return runner.run_target(FAULTY, seed=1, executions=40, cpu_seconds=0.2)


def test_every_fault_is_found_and_none_ends_the_run(faulty: runner.Result) -> None:
    assert faulty.executions == faulty.outcomes.total() == 40
    kinds = {finding.kind for finding in faulty.findings.values()}
    assert kinds == {"KeyError", "MemoryError", "death by SIGABRT", "exit code 3", "more than 0.2 CPU seconds"}


def test_findings_name_the_input(faulty: runner.Result) -> None:
    stages = {"KeyError": "exception", "MemoryError": "memory", "death by SIGABRT": "abort", "exit code 3": "exit"}
    for finding in faulty.findings.values():
        _, case = runner.case_of(FAULTY, finding.seed, finding.index, Path())
        assert case.arguments == stages.get(finding.kind, "loop")


def test_findings_are_saved_with_seed_and_files(faulty: runner.Result, tmp_path: Path) -> None:
    finding = next(iter(faulty.findings.values()))
    place = runner.save(finding, tmp_path)
    assert Finding(**json.loads((place / "finding.json").read_text())) == finding
    assert len((place / "file").read_bytes()) == 3
    assert (place / "arguments.txt").read_text().strip().strip("'") in FAULTS


def test_a_run_may_begin_anywhere(faulty: runner.Result) -> None:
    late = runner.run_target(FAULTY, seed=1, first=28, executions=12, cpu_seconds=0.2)
    assert late.executions == 12
    assert {finding.index for finding in late.findings.values()} <= set(range(28, 40))
    assert {finding.kind for finding in late.findings.values()} <= {
        finding.kind for finding in faulty.findings.values()
    }


def test_mutations_leave_the_seed_as_it_was() -> None:
    document = {"a": [1, {"b": "x"}], "c": 2.5}
    before = json.dumps(document)
    changed = [json.dumps(mutations.mutated(generator("m", 0, i), document)) for i in range(200)]
    assert json.dumps(document) == before and len(set(changed)) > 100


def command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_the_command_line_counts_and_replays(tmp_path: Path) -> None:
    done = command_line("gguf", "--executions", "20", "--seed", "7", "--save", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 7" in done.stdout and "20 executions" in done.stdout and "0 findings" in done.stdout
    again = command_line("--replay", "gguf:7:3")
    assert "m.gguf" in again.stdout
