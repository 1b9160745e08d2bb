"""The commands that look at models and machines: info, verify, bench, eval, doctor."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.cli_tools import isolate, run_process, write_talker
from reference import fixtures

import pyengine
from pyengine import _core
from pyengine.cli import main
from pyengine.cli.eval import windows
from pyengine.cli.info import tokenizer_facts
from pyengine.cli.text_file import Text, first_tokens
from pyengine.errors import InvalidArgumentError
from pyengine.format.inventory import count_parameters, inventory
from pyengine.format.kv import kv_bytes_per_position
from pyengine.format.reader import FrozenFile

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. Ünïcödé too.\n" * 3


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path / "cache")


@pytest.fixture()
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed in silence; its stdout."""

    def run(*arguments: object, code: int = 0, err: str = "") -> str:
        returned = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert (returned, err in captured.err) == (code, True), captured.err
        assert err or not captured.err
        return captured.out

    return run


@pytest.fixture()
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy.safetensors"
    path.write_bytes(tiny_model.read_bytes())
    return path


# -------------------------------------------------------------------- info

# Models with LayerNorms, or with norms without weights.
FOLDED_NORMS = {"cohere", "cohere2", "gpt_neox", "nanochat", "nemotron", "olmo", "phi2", "stablelm", "starcoder2"}


def n_values(name: str, weight: np.ndarray) -> int:
    """How many weights a tensor stands for: a byte of MXFP4 is two, and its scales are none, nor is a constant."""
    if name.endswith(("_scales", "act_fn.eps")):
        return 0
    return 2 * weight.size if name.endswith("_blocks") else weight.size


@pytest.mark.parametrize("name", fixtures.names())
def test_parameters_and_kv_bytes_are_the_real_ones(name: str, tmp_path: Path) -> None:
    fixture = fixtures.load(name)
    path = pyengine.freeze(fixtures.write_hf_dir(fixture, tmp_path / "hf"), tmp_path / "x.safetensors")
    with FrozenFile.open(path) as frozen:
        config = frozen.config
    if name in FOLDED_NORMS:  # their vectors are folded into others, and tied embeddings become two matrices
        real = sum(weight.size for weight in fixture.hf_weights.values() if weight.ndim == 2)
        copy = 0 if fixture.hf_weights.keys() & {"lm_head.weight", "embed_out.weight"} else config.vocab_size * config.dim
        assert sum(math.prod(weight.shape) for weight in inventory(config) if weight.is_matrix) == real + copy
    else:
        assert count_parameters(config) == sum(n_values(key, weight) for key, weight in fixture.hf_weights.items())
    for kv_dtype in ("int8", "f32"):
        with pyengine.Engine(path, kv_dtype=kv_dtype) as engine:  # type: ignore[arg-type]
            engine.generate([2], max_tokens=1)
            assert engine.memory()["kv"] == 256 * kv_bytes_per_position(config, kv_dtype)  # one page


def test_info(tiny_model: Path, run: Callable[..., str]) -> None:
    facts = json.loads(run("info", "-m", tiny_model, "--json"))
    assert facts["file_bytes"] == tiny_model.stat().st_size
    assert facts["config"]["dim"] == 64 and facts["config"]["eos_token_ids"] == [1]
    tokenizer = facts["tokenizer"]
    assert (tokenizer["kind"], tokenizer["vocab_size"], tokenizer["n_special_tokens"]) == (
        "BPE",
        fixtures.TOKENIZER_SIZE,
        3,
    )
    assert tokenizer["bos"] == {"id": 0, "text": "<s>"} and tokenizer["eos"] == [{"id": 1, "text": "</s>"}]
    assert facts["chat_template"] is False and "tensors" not in facts
    assert facts["memory_bytes_full_context"] == facts["weight_bytes"] + 512 * facts["kv_bytes_per_position"]
    text = run("info", tiny_model)
    assert f"{facts['parameters']:,}" in text and "</s> (1)" in text and "512 positions" in text


def test_info_lists_tensors(tiny_model: Path, run: Callable[..., str]) -> None:
    with FrozenFile.open(tiny_model) as frozen:
        tensors = dict(frozen.tensors)
    listed = json.loads(run("info", tiny_model, "--tensors", "--json"))["tensors"]
    assert {tensor["name"]: (tensor["offset"], tensor["bytes"]) for tensor in listed} == tensors
    text = run("info", tiny_model, "--tensors")
    assert all(re.search(rf"{offset} +{size}  {re.escape(name)}\n", text) for name, (offset, size) in tensors.items())


def test_info_refuses_two_models(tiny_model: Path, run: Callable[..., str]) -> None:
    assert run("info", tiny_model, "-m", tiny_model, code=2, err="named twice") == ""


# -------------------------------------------------------------------- verify


def test_verify_an_intact_file(tiny_model: Path, run: Callable[..., str]) -> None:
    assert f"golden outputs on {_core.active_isa()} are right" in run("verify", "-m", tiny_model)
    active = _core.active_isa()
    facts = json.loads(run("verify", "-m", tiny_model, "--all-isas", "--json", "-t", 2))
    assert facts["ok"] and facts["isas"] == _core.available_isas() and facts["differences"] == []
    assert _core.active_isa() == active


def test_verify_names_a_damaged_tensor(copy: Path, run: Callable[..., str]) -> None:
    with FrozenFile.open(copy) as frozen:
        offset = frozen.tensors["layers.1.wo.codes"][0]
    content = bytearray(copy.read_bytes())
    content[offset + 5] ^= 1
    copy.write_bytes(content)
    assert run("verify", "-m", copy, code=1, err="tensor layers.1.wo.codes: its SHA-256") == ""
    facts = json.loads(run("verify", "-m", copy, "--json", code=1, err="layers.1.wo.codes"))
    assert not facts["ok"] and len(facts["differences"]) == 1


def replace_attachment(path: Path, name: str, content: bytes) -> None:
    """Change a attachment in place and make its checksum right, as somebody would who hides what he did."""
    with FrozenFile.open(path) as frozen:
        tensors, sums = dict(frozen.tensors), json.loads(frozen.attachment("checksums.json") or b"")
    data = bytearray(path.read_bytes())

    def put(name: str, content: bytes) -> bytes:
        offset, size = tensors[name]
        data[offset : offset + size] = content.ljust(size)
        return bytes(data[offset : offset + size])

    sums[name] = hashlib.sha256(put(name, content)).hexdigest()
    put("checksums.json", json.dumps(sums, indent=0).encode())
    path.write_bytes(data)


def test_verify_names_golden_outputs_that_differ(copy: Path, run: Callable[..., str]) -> None:
    with FrozenFile.open(copy) as frozen:
        golden = json.loads(frozen.attachment("golden.json") or b"")
    golden["logits_sha256"] = "0" * 64
    replace_attachment(copy, "golden.json", json.dumps(golden).encode())
    assert run("verify", "-m", copy, code=1, err=f"golden.json: logits_sha256 differs on {_core.active_isa()}") == ""
    replace_attachment(copy, "golden.json", b"{}")
    assert run("verify", "-m", copy, code=1, err="no golden outputs") == ""


# -------------------------------------------------------------------- bench


def test_bench_json(tiny_model: Path, run: Callable[..., str]) -> None:
    arguments = ("-p", "8,16", "-n", "4", "-d", "0,300", "-b", "1,3", "-t", "1,2", "-r", "2")
    facts = json.loads(run("bench", "-m", tiny_model, *arguments, "--json"))
    labels = ["pp8", "pp16", "pp8 @ d300", "pp16 @ d300", "tg4", "tg4 x3", "tg4 @ d300", "tg4 x3 @ d300"]
    rows = facts["tests"]
    assert [(row["test"], row["threads"]) for row in rows] == [(label, n) for n in (1, 2) for label in labels]
    for row in rows:
        assert len(row["samples"]) == 2 and all(sample > 0 for sample in row["samples"])
        assert row["mean"] == pytest.approx(sum(row["samples"]) / 2) == row["median"]
        assert row["isa"] == _core.active_isa()
        assert row["limit"] in ("read", "int8") and len(row["bounds"]) == 2
        shares = [sample / bound for sample, bound in zip(row["samples"], row["bounds"], strict=True)]
        assert row["of_limit"] == pytest.approx(sum(shares) / 2)
    assert facts["load_ms"] > 0 and facts["first_token_ms"] > facts["load_ms"] and facts["peak_rss_mib"] > 1


def test_bench_table(tiny_model: Path, run: Callable[..., str]) -> None:
    header, rule, *rows, blank, start = run("bench", "-m", tiny_model, "-p", 8, "-n", 2, "-r", 1).splitlines()
    assert header == "| model | size | params | threads | isa | test | t/s | median | of limit |"
    assert [row.split(" | ")[5] for row in rows] == ["pp8", "tg2"]
    assert all(re.search(r" \| \d+% (read|int8) \|$", row) for row in rows)
    assert header.count("|") == rule.count("|") == rows[0].count("|") and blank == ""
    assert re.fullmatch(r"load \d+ ms, process start to first token \d+ ms, peak RSS \d+ MiB", start)


def test_bench_goes_on_with_a_text(tiny_model: Path, run: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat and the dog and " * 5)
    words = ("bench", "-m", tiny_model, "-f", tmp_path / "text.txt", "-p", 0, "-n", 24, "-r", 1)
    rows = json.loads(run(*words, "--json"))["tests"]
    assert [row["test"] for row in rows] == ["tg24", "tg24 of a text", "tg24 of a text, guesses"]
    assert rows[1]["drafted"] == 0 <= rows[2]["accepted"] <= rows[2]["drafted"]
    assert all(row["samples"][0] > 0 for row in rows)
    assert run("bench", "-m", tiny_model, "-f", tmp_path / "none", "-r", 1, code=1, err="none") == ""
    (tmp_path / "long.txt").write_text("the cat " * 70)
    message = "need a context of"
    assert run("bench", "-m", tiny_model, "-f", tmp_path / "long.txt", "-p", 0, "-n", 24, code=1, err=message) == ""
    assert run("bench", "-m", tiny_model, "-f", tmp_path / "text.txt", "-n", 0, code=2, err="-n is below 2") == ""


def test_bench_measures_what_it_says(tiny_model: Path) -> None:
    from pyengine.cli.bench import Test

    class Recorder:
        """Counts the tokens of each forward; a context whose sequences are fake, in an engine that is."""

        vocab_size = 100

        def __init__(self) -> None:
            self.forwards: list[tuple[int, int]] = []

        def exclusively(self, function: Callable[[Recorder], float]) -> float:
            return function(self)

        @property
        def context(self) -> Recorder:
            return self

        def sequence_new(self) -> object:
            return object()

        def forward(self, tokens: list[int], sequences: list[object], want: bytes) -> None:
            assert len(tokens) == len(sequences) == len(want)
            self.forwards.append((len(tokens), sum(want)))

    with pyengine.Engine(tiny_model) as engine:
        for test, forwards in (
            (Test(7, 0, 0, 1), [(7, 1)]),
            (Test(7, 0, 5, 1), [(5, 1), (7, 1)]),
            (Test(0, 3, 2, 2), [(2, 1), (2, 1), (2, 2), (2, 2), (2, 2)]),
        ):
            recorder = Recorder()
            assert test.run(recorder) >= 0 and recorder.forwards == forwards  # type: ignore[arg-type]
            before = engine.cache_stats()["n_sequences"]
            assert test.run(engine) >= 0 and engine.cache_stats()["n_sequences"] == before == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-p", "0", "-n", "0"), 2, "nothing to measure"),
        (("-p", "513", "-n", "0"), 1, "pp513 needs a context of 513, the model's holds 512"),
        (("-d", "500", "-n", "0", "-p", "20"), 1, "pp20 @ d500 needs a context of 520"),
        (("-t", "0"), 2, "counted from 1"),
        (("-p", "-3"), 2, "-p"),
        (("-r", "0"), 2, "0 is not a whole number from 1"),
    ],
)
def test_bench_refuses(tiny_model: Path, run: Callable[..., str], arguments: tuple[str, ...], code: int, words: str) -> None:
    assert run("bench", "-m", tiny_model, *arguments, code=code, err=words) == ""


# -------------------------------------------------------------------- eval


@pytest.mark.parametrize("ctx", [1, 2, 5, 8])
def test_windows_score_each_token_once(ctx: int) -> None:
    for stride in range(1, ctx + 1):
        for n in range(1, 30):
            scored: list[int] = []
            for begin, end, first in windows(n, ctx, stride):
                assert begin % stride == 0 and begin <= first < end <= min(begin + ctx, n)
                scored += range(first, end)
            assert scored == list(range(n))


def test_eval_of_one_window_is_score(tiny_model: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    facts = json.loads(run("eval", "-m", tiny_model, file, "--json"))
    with pyengine.Engine(tiny_model) as engine:
        score = engine.score(TEXT)
    assert score.tokens[0] != 0  # no BOS: the first token cannot be scored
    assert facts["tokens"] == len(score.tokens) - 1 and facts["bytes"] == len(TEXT.encode()) - 1
    assert facts["nll"] == pytest.approx(-score.total, rel=1e-12)
    assert facts["perplexity"] == pytest.approx(score.perplexity, rel=1e-12)
    assert facts["bits_per_byte"] == pytest.approx(-score.total / math.log(2) / (len(TEXT.encode()) - 1), rel=1e-12)
    assert f"perplexity {score.perplexity:.4f}" in run("eval", "-m", tiny_model, file)
    piped = run_process(tmp_path, "eval", "-m", tiny_model, "-", input=TEXT)
    assert (piped.returncode, piped.stderr) == (0, "") and f"perplexity {score.perplexity:.4f}" in piped.stdout


def test_eval_in_windows(tiny_model: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    facts = json.loads(run("eval", "-m", tiny_model, file, "--ctx", 40, "--stride", 25, "--limit", 100, "--json"))
    with pyengine.Engine(tiny_model) as engine:
        ids = engine.tokenize(TEXT)[:100]
        parts = [(0, 40, 1), (25, 65, 15), (50, 90, 15), (75, 100, 15)]  # begin, end, first scored in the window
        total = sum(sum(v for v in engine.score(ids[a:b]).logprobs[first:] if v is not None) for a, b, first in parts)
    assert facts["tokens"] == 99
    assert facts["nll"] == pytest.approx(-total, rel=1e-12)


def test_eval_reads_no_more_than_its_limit(
    tiny_model: Path, tmp_path: Path, run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(f"é word {number} and another\n" for number in range(200_000))
    file, small = tmp_path / "text.txt", tmp_path / "small.txt"
    file.write_text(text, encoding="utf-8")
    with pyengine.Engine(tiny_model) as engine:
        encode = partial(engine.tokenize, add_bos=False)
        for limit in (2, 50, 30_000):
            with open(file, "rb") as opened:
                tokens = first_tokens(encode, Text(opened, "text"), limit)
                assert opened.tell() <= max(4 << 16, 64 * limit)
            assert tokens == engine.tokenize(text[: 16 * limit + 1000], add_bos=False)[:limit]
        for whole in ("no", "spaceless" * 20_000, "é" * 100_000):
            small.write_text(whole, encoding="utf-8")
            with open(small, "rb") as opened:
                assert first_tokens(encode, Text(opened, "text"), 9) == engine.tokenize(whole, add_bos=False)[:9]
    facts = json.loads(run("eval", "-m", tiny_model, file, "--limit", 50, "--json"))
    assert facts["tokens"] == 49


def test_eval_names_the_byte_that_is_no_text(tmp_path: Path) -> None:
    """Also where it lies behind a part that was read before, or in the middle of a character that was cut."""
    data = "é".encode() * 1000
    for at in (0, 1, 1000, 1001, 1999):
        text = Text(io.BytesIO(data[:at] + b"\xff" + data[at + 1 :]), "x")
        with pytest.raises(InvalidArgumentError, match=rf"byte {at - at % 2} is"):  # of a character cut in two, its first
            while not text.is_whole:
                text.read(7)
    text = Text(io.BytesIO(data[:-1]), "x")
    with pytest.raises(InvalidArgumentError, match="byte 1998 is 0xc3"):
        text.read()


def test_eval_with_bos_scores_every_token(tmp_path: Path, run: Callable[..., str]) -> None:
    path = pyengine.freeze(write_talker(tmp_path / "hf", 512), tmp_path / "x.safetensors")
    file = tmp_path / "text.txt"
    file.write_text(TEXT, encoding="utf-8")
    facts = json.loads(run("eval", "-m", path, file, "--ctx", 32, "--stride", 32, "--json"))
    with pyengine.Engine(path) as engine:
        ids = engine.tokenize(TEXT, add_bos=False)
        scores = [engine.score([0, *ids[begin : begin + 31]]).total for begin in range(0, len(ids), 31)]
    assert facts["tokens"] == len(ids) and facts["bytes"] == len(TEXT.encode())
    assert facts["nll"] == pytest.approx(-sum(scores), rel=1e-12)


def test_eval_refuses(tiny_model: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"ok \xff")
    run("eval", "-m", tiny_model, file, code=1, err="byte 3 is 0xff")
    file.write_bytes(b"a")
    run("eval", "-m", tiny_model, file, code=1, err="has 1 tokens")
    run("eval", "-m", tiny_model, file, "--ctx", 8, "--stride", 9, code=2, err="stride <= ctx")
    run("eval", "-m", tiny_model, tmp_path / "absent", code=1, err="absent")


# -------------------------------------------------------------------- doctor


def test_doctor(run: Callable[..., str], tmp_path: Path) -> None:
    facts: dict[str, Any] = json.loads(run("doctor", "--json"))
    assert facts["isa"]["available"] == _core.available_isas() and facts["isa"]["chosen"] == _core.active_isa()
    assert facts["threads"]["chosen"] == _core.thread_info()["n_default"]
    assert facts["versions"]["pyengine"] == pyengine.__version__ and facts["versions"]["tokenizers"]
    assert {"uvicorn", "llguidance", "huggingface_hub", "numba"} <= facts["versions"].keys()  # None: not installed
    assert facts["cache"] == {"path": str(tmp_path / "cache"), "models": 0, "bytes": 0}
    guesses = facts["speculation"]
    assert guesses["default"] == "auto" and guesses["max_draft"] == 24 and guesses["look_us"] >= 0 <= guesses["read_us"]
    text = run("doctor")
    assert "up to 24 tokens a step" in text
    assert f"chosen: {_core.active_isa()}" in text and str(tmp_path / "cache") in text


def test_doctor_tells_of_tables_that_are_withheld() -> None:
    from pyengine.cli import doctor

    avx512 = ["avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"]
    assert doctor.withheld(avx512, ["avx512vnni", "avx2", "scalar"]) == []
    (warning,) = doctor.withheld([*avx512, "amx_tile", "amx_int8"], ["avx512vnni", "avx2", "scalar"])
    assert warning.startswith("this CPU could run amx") and "refuses the tile registers" in warning
    (warning,) = doctor.withheld(["avx2", "fma", "f16c", "avxvnni"], ["avx2", "scalar"])
    assert warning == "this CPU could run avxvnni, but the compiler of this build did not know it"


def test_doctor_says_why(tmp_path: Path, tiny_model: Path) -> None:
    def doctor(**changes: str) -> tuple[str, str]:
        done = run_process(tmp_path, "doctor", env={**os.environ, **changes})
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    out, err = doctor(PYENGINE_ISA="scalar", PYENGINE_NUM_THREADS="1")
    assert "chosen: scalar (PYENGINE_ISA=scalar)" in out and "1 (PYENGINE_NUM_THREADS=1;" in out
    assert len(_core.available_isas()) == 1 or "would be faster than scalar" in err
    out, err = doctor(PYENGINE_ISA="quantum", PYENGINE_NUM_THREADS="lots", PYENGINE_MODEL="/absent/model")
    assert "chosen: none" in out
    assert "quantum" in err and "'lots'" in err and "/absent/model: there is no such file" in err
    out, err = doctor(PYENGINE_NUM_THREADS="200", PYENGINE_MODEL=str(tiny_model))
    assert "200 is more than" in err and f"{tiny_model} (PYENGINE_MODEL)" in out
    out, err = doctor(PYENGINE_MODEL="hf:org/name")
    assert "hf:org/name (PYENGINE_MODEL)" in out and "hf:org/name" not in err


# -------------------------------------------------------------------- a real model


def test_smollm2_from_freeze_to_answer(smollm2_gguf: Path, tmp_path: Path, run: Callable[..., str]) -> None:
    """The README's first commands."""
    path = tmp_path / "smollm2.safetensors"
    assert run("freeze", smollm2_gguf, "-o", path) == ""
    out = run("generate", "-m", path, "-p", "The capital of France is", "--temp", 0, "-n", 12)
    assert out.lstrip().startswith("Paris")
    assert "134,515,008" in run("info", path)
    assert "are right" in run("verify", "-m", path)
    arguments = ("chat", "-m", path, "--temp", "0", "-n", "24", "-sys", "You are a helpful assistant.")
    done = run_process(tmp_path, *arguments, input="What is the capital of France?\n")
    assert (done.returncode, done.stderr) == (0, "") and "Paris" in done.stdout


def test_doctor_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As in a container whose user has no entry in the list of users."""

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("PYENGINE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "none (0 models" in out and "PYENGINE_CACHE" in err
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    assert main(["generate", "-m", str(tmp_path / "x.gguf"), "a"]) == 1
    assert "there is no home directory" in capsys.readouterr().err


HOSTILE_TOKENIZERS = [
    {}, {"model": 5}, {"model": {"vocab": 5}}, {"model": {"vocab": {"a": []}, "type": []}}, {"model": {"vocab": [5]}},
    {"added_tokens": 5},
    {"added_tokens": [5, {}, {"id": []}, {"id": 1}, {"id": 0, "content": [], "special": "x"}, {"id": True, "content": "x"}]},
]  # fmt: skip


@pytest.mark.parametrize("document", HOSTILE_TOKENIZERS, ids=json.dumps)
def test_info_of_a_tokenizer_that_is_none(tiny_model: Path, document: dict[str, Any]) -> None:
    """It says what it can; opening the model says what is wrong."""
    with FrozenFile.open(tiny_model) as frozen:
        bos, eos = frozen.config.bos_token_id, frozen.config.eos_token_ids
    facts = tokenizer_facts(document, {}, bos, eos)
    assert json.loads(json.dumps(facts)) == facts and isinstance(facts["vocab_size"], int)
