"""The benchmark against peers runs without any, says so, and computes its ratios round by round."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "peers.py"
SECTIONS = ("quality", "decode", "decode-4096", "prefill", "prefill-8192", "batch", "start", "rss")


@pytest.fixture(scope="module")
def peers() -> ModuleType:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        spec = importlib.util.spec_from_file_location("peers", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = sys.modules["peers"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads Linux's /proc")
def test_it_runs_without_peers(tiny_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    command = [sys.executable, str(SCRIPT), "--model", str(tiny_model), "--quick", "--repeats", "2", "--threads", "1"]
    ran = subprocess.run(
        [*command, "--only", ",".join(SECTIONS), "--output", str(output)], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.returncode == 0, ran.stderr
    result = json.loads(output.read_text())
    left_out = ("llama.cpp", "ik_llama.cpp", "openvino", "float32")
    assert len(result["rows"]) == len(SECTIONS) - 1  # no quality without float32
    assert all(result["left_out"][kind] == "no model was given" for kind in left_out)
    for row in result["rows"]:
        assert len(row["samples"]["pyengine"]) == (1 if row["work"] == "prefill 300" else 2), row["work"]
        assert all(value > 0 for values in row["samples"].values() for value in values)
    assert [r["of"] for r in result["rows"][0]["ratios"]] == ["of read bandwidth"]
    header, rule, *lines = ran.stdout.splitlines()[: 1 + len(SECTIONS)]
    assert {line.count("|") for line in (header, rule, *lines)} == {7}
    assert str(tmp_path) not in output.read_text()


def test_ratios_are_pairwise_and_against_the_better_peer(peers: ModuleType) -> None:
    samples = {"pyengine": [10.0, 60.0, 30.0], "llama.cpp": [5.0, 20.0, 10.0], "openvino": [1.0, 12.0, 60.0]}
    row = peers.Row("decode", "tok/s", samples)
    assert row.pairwise("pyengine", "llama.cpp") == 3.0  # of 2, 3 and 3; the ratio of the medians is 3 too
    assert row.pairwise("pyengine", "openvino") == 5.0  # of 10, 5 and 0.5; the ratio of the medians is 2.5
    assert row.pairwise("pyengine", "nobody") is None
    row.compare_with_peers(">= 2.0")
    assert [str(ratio) for ratio in row.ratios] == ["5.00 x OpenVINO GenAI int8 (>= 2.0)"]  # whose median is 12, not 10
    memory = peers.Row("peak RSS", "MiB", samples)
    memory.compare_with_peers("", lower=True)  # less is better
    assert str(memory.ratios[0]) == "3.00 x llama.cpp Q8_0"


def test_forms_of_one_engine_share_a_cell(peers: ModuleType) -> None:
    row = peers.Row("prefill", "tok/s", {"pyengine avx2": [1000.0], "pyengine scalar": [2.5], "llama.cpp": [50.0]})
    assert [peers.cell(row, kind) for kind in peers.TITLES] == ["avx2 1,000, scalar 2.5", "50.0", "", ""]
    quality = peers.Row("KL to float32, 512 tokens", "nats", {"pyengine": [0.00684], "openvino": [0.0123]})
    assert [peers.cell(quality, kind) for kind in peers.TITLES] == ["0.0068", "", "", "0.012"]
