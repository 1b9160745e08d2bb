"""A short run of the state machine over the C API under each sanitizer, and that it would notice."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from fuzz import capi

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", params=capi.SANITIZERS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    if reason := capi.reason_to_skip(request.param, directory):
        pytest.skip(reason)
    return capi.build(request.param, directory)


def test_eight_threads_keep_every_contract(program: Path) -> None:
    counts, finding = capi.run_round(program, seed=0, number=0, operations=250)
    assert finding is None, finding.text
    print(program.name, counts)
    assert counts["operations"] == 8 * 250
    assert min(counts.values()) > 0  # forwards, comparisons of bits, refusals, requests that failed


def test_a_round_can_be_run_again(program: Path) -> None:
    """One thread depends on nothing but its seed."""
    runs = [subprocess.run([program, "7", "1", "300"], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    other = subprocess.run([program, "8", "1", "300"], capture_output=True, text=True, check=True)
    assert other.stdout != runs[0].stdout


def test_wrong_arguments_of_the_program(program: Path) -> None:
    assert subprocess.run([program, "1", "0", "5"], capture_output=True).returncode == 2
