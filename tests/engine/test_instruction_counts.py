"""Instructions of small fixed workloads, counted by callgrind: a slower kernel is seen without a clock.

What was counted when it was last looked at is in instruction_counts.json, for one compiler version. Whoever changes a kernel on
purpose records anew, and the diff shows what it brought:

    python tests/engine/test_instruction_counts.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from engine.core_build import build, gcc_version, need

RECORDED = Path(__file__).with_name("instruction_counts.json")
TOLERANCE = 0.03  # other versions of the C library copy and fill in other ways
TABLES = ("scalar", "avx2")  # valgrind knows no AVX-512


def count(table: str, directory: Path) -> dict[str, int]:
    """Instructions of each workload, what it calls included. Skips where this CPU or valgrind cannot run the table."""
    need("valgrind", "callgrind_annotate")
    program, profile = build("count_instructions") / "count_instructions", directory / f"{table}.callgrind"
    command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={profile}", str(program), table]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode == 77:
        pytest.skip(f"no {table} under valgrind on this CPU")
    assert ran.returncode == 0, ran.stderr
    command = ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(profile)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*([\d,]+) .*\bwork_(\w+) \[", text, re.MULTILINE)
    return {workload: int(number.replace(",", "")) for number, workload in sorted(found, key=lambda pair: pair[1])}


@pytest.mark.parametrize("table", TABLES)
def test_instruction_counts_are_those_recorded(table: str, tmp_path: Path) -> None:
    recorded = json.loads(RECORDED.read_text())
    if (version := gcc_version()) != recorded["gcc"]:
        pytest.skip(f"recorded with gcc {recorded['gcc']}, this is gcc {version}")
    counted, expected = count(table, tmp_path), recorded["tables"][table]
    assert counted.keys() == expected.keys()
    moved = {
        name: f"{expected[name]:,} -> {n:,} ({n / expected[name] - 1:+.1%})"
        for name, n in counted.items()
        if abs(n / expected[name] - 1) > TOLERANCE
    }
    assert not moved, f"{table}: {moved}; if that is meant, record: python {Path(__file__).name}"


def main() -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        tables = {table: count(table, Path(directory)) for table in TABLES}
    RECORDED.write_text(json.dumps({"gcc": gcc_version(), "tables": tables}, indent=2) + "\n")
    print(RECORDED.read_text())


if __name__ == "__main__":
    main()
