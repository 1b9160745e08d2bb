"""The probes of the machine's limits: numbers that can be, and errors that say what is wrong."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import pytest

import pyengine
from pyengine import _core, _probe
from pyengine.cli.roofline import Roofline, Work
from pyengine.errors import InvalidArgumentError, UnsupportedISAError
from pyengine.format.inventory import count_macs


@pytest.mark.parametrize("isa", _core.available_isas())
def test_every_table_has_a_probe(isa: str) -> None:
    peak = _probe.int8_peak(isa, 1, 0.01)
    assert 1e7 < peak < 1e14  # MACs a second: from an emulator to what no core will do


def test_unknown_tables_are_refused() -> None:
    with pytest.raises(UnsupportedISAError, match="no int8 probe of 'mmx'"):
        _probe.int8_peak("mmx", 1)


@pytest.mark.parametrize("n_bytes", [64, 64 * 5, (1 << 18) + 64, 3 << 18])  # ends of units and of unrolled loops
@pytest.mark.parametrize("n_threads", [1, 2])
def test_reading_ends_where_the_buffer_does(n_bytes: int, n_threads: int) -> None:
    # whole pages, so that what is read is the end of the mapping when n_bytes is a multiple of the page size
    with mmap.mmap(-1, n_bytes) as buffer, memoryview(buffer) as view:
        bandwidth = _probe.read_bandwidth(view[:n_bytes], n_threads, 0.0)
    assert math.isfinite(bandwidth) and bandwidth > 0


@pytest.mark.parametrize("cut", [slice(0, 0), slice(0, 100), slice(4, 68)])
def test_partial_cache_lines_are_refused(cut: slice) -> None:
    refused = pytest.raises(InvalidArgumentError, match="cache lines")
    with mmap.mmap(-1, 4096) as buffer, memoryview(buffer) as view, view[cut] as part, refused:
        _probe.read_bandwidth(part, 1)


@pytest.mark.parametrize("n_threads", [0, -1, 257])
def test_thread_counts_are_checked(n_threads: int) -> None:
    with pytest.raises(ValueError, match="n_threads"):
        _probe.int8_peak("scalar", n_threads)
    with pytest.raises(ValueError, match="n_threads"):
        _probe.read_bandwidth(bytes(64), n_threads)


def test_roofline_counts_what_a_forward_does(tiny_model: Path) -> None:
    with pyengine.Engine(tiny_model, n_threads=1) as engine:
        c = engine.config
        roofline = Roofline(engine)
        q_dim, kv_dim = c["n_heads"] * c["head_dim"], c["n_kv_heads"] * c["head_dim"]
        qkv, rest = c["dim"] * (q_dim + 2 * kv_dim), c["dim"] * q_dim + 3 * c["dim"] * c["hidden_dim"]
        rows = 5 * c["n_layers"] - 3  # those that want nothing leave the last layer
        assert count_macs(roofline.config, 5, 2) == 5 * c["n_layers"] * qkv + rows * rest + 2 * c["vocab_size"] * c["dim"]
        # tied embeddings are the output matrix: every weight is read
        assert c["tie_embeddings"] and roofline.weights.nbytes == _weight_bytes(engine)
        bound = roofline.bound(Work(1, 1), "read")
        assert bound.limit == "read" and bound.tokens_per_second > 0
        assert roofline.bound(Work(512, 1), "int8").limit == "int8"
        assert roofline.nearest(Work(1, 1)) in ("read", "int8")
        roofline.close()


def test_roofline_leaves_out_embeddings_that_are_not_read(tmp_path: Path) -> None:
    from reference import fixtures

    from pyengine.freeze import freeze

    freeze(fixtures.write_hf_dir(fixtures.load("llama_untied"), tmp_path / "hf"), tmp_path / "model.safetensors")
    with pyengine.Engine(tmp_path / "model.safetensors") as engine:
        roofline = Roofline(engine)
        tensors = engine._file.tensors
        embeddings = tensors["tok_embeddings.codes"][1] + tensors["tok_embeddings.scales"][1]
        assert roofline.weights.nbytes == _weight_bytes(engine) - embeddings
        roofline.close()


def _weight_bytes(engine: pyengine.Engine) -> int:
    return sum(size for name, (_, size) in engine._file.tensors.items() if not name.endswith((".json", ".jinja")))
