"""The command line: the way in, generate, freeze and the small commands. Signals and terminals: test_cli_terminal.py."""

from __future__ import annotations

import importlib
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engine import cli_tools
from engine.cli_tools import isolate, run_process
from reference import fixtures

import pyengine
from pyengine import _core
from pyengine.cli import COMMANDS, UsageError, elsewhere, main
from pyengine.cli.options import unescape
from pyengine.format.reader import FrozenFile

GREEDY = ("--temp", "0", "--ignore-eos")
HEAVY = ("numpy", "jinja2", "gguf", "pyengine.freeze", "pyengine.text.chat", "subprocess", "asyncio")


@pytest.fixture(autouse=True)
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path / "cache")


@pytest.fixture()
def isa_restored() -> Any:
    active = _core.active_isa()
    yield
    _core.select_isa(active)


def set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


def output(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr) of a command that must end with `code`."""
    capsys.readouterr()
    returned = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert returned == code, captured.err
    return captured.out, captured.err


def error(capsys: pytest.CaptureFixture[str], *arguments: object, code: int) -> str:
    """The one line of a command that must fail with `code` and say nothing else."""
    out, err = output(capsys, *arguments, code=code)
    assert out == ""
    assert err.startswith("pyengine: error: ") and err.count("\n") == 1
    return err


# -------------------------------------------------------------------- the way in


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys)[0]
    assert all(f"  {name} " in text for name in COMMANDS)
    assert output(capsys, "--help")[0] == output(capsys, "help")[0] == text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--version")[0] == f"pyengine {pyengine.__version__}\n"


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'pyengine generate'?" in error(capsys, "generat", code=2)
    assert "did you mean 'pyengine generate'?" in error(capsys, "help", "generat", code=2)
    assert "a model named by pyengine generate -m MODEL" in error(capsys, "model.gguf", code=2)
    assert "--help" in error(capsys, "qqq", code=2)
    assert "'pyengine chat -m MODEL'" in error(capsys, "run", "llama", code=2)
    assert "pyengine generate -m …" in error(capsys, "-m", "model.safetensors", code=2)


def test_what_is_said_of_other_programs_names_what_is_here() -> None:
    assert not elsewhere.COMMANDS.keys() & COMMANDS.keys()
    assert {word for text in elsewhere.COMMANDS.values() for word in re.findall(r"'pyengine (\w+)", text)} <= COMMANDS.keys()
    its_own = {name: text for name, text in elsewhere.SERVER_OPTIONS.items() if name not in elsewhere.OPTIONS}
    for command, table in (("generate", elsewhere.OPTIONS), ("serve", its_own)):
        known = importlib.import_module(f"pyengine.cli.{command}").parser()._option_string_actions
        assert not table.keys() & known.keys()
        for text in table.values():
            assert all(option in known for option in re.findall(r"^use (-[-\w]+)", text)), text


def test_what_is_after_two_dashes_is_a_prompt(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pyengine.Engine(tiny_model) as engine:
        expected = engine.generate("-ngl", temperature=0, max_tokens=20, ignore_eos=True).text.removesuffix("\n")
    assert output(capsys, "generate", "-m", tiny_model, "-n", 20, *GREEDY, "--", "-ngl")[0] == expected + "\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "train"])
def test_help_has_examples_that_its_own_parser_accepts(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, name, "--help")[0]
    assert output(capsys, "help", name)[0] == text
    lines = text.partition("examples:\n")[2].partition("\n\n")[0].splitlines()
    parser = importlib.import_module(f"pyengine.cli.{name}").parser()
    n_parsed = 0
    for line in lines:
        words = shlex.split(line)
        begin = words.index("pyengine")
        end = next((i for i in range(begin, len(words)) if words[i] in ("|", ">", "&&")), len(words))
        assert words[begin + 1] == name
        parser.parse_args(words[begin + 2 : end])
        n_parsed += 1
    assert 2 <= n_parsed <= 5


def test_an_error_that_nobody_expected(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(argv: object) -> int:
        raise KeyError("two\nlines")

    monkeypatch.setattr("pyengine.cli.dispatch", fail)
    assert "internal error, please report it: KeyError" in error(capsys, code=1)
    monkeypatch.setenv("PYENGINE_TRACEBACK", "1")
    assert "Traceback (most recent call last)" in output(capsys, code=1)[1]


# -------------------------------------------------------------------- generate


def test_generate_prints_what_the_engine_says(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pyengine.Engine(tiny_model) as engine:
        expected = engine.generate("hello you", temperature=0, max_tokens=20, ignore_eos=True).text
    out, err = output(capsys, "generate", "-m", tiny_model, "hello you", "-n", 20, *GREEDY)
    assert out == expected + ("" if expected.endswith("\n") else "\n")
    assert err == ""


def test_four_ways_to_give_a_prompt(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-m", tiny_model, "-n", 12, "--json", *GREEDY)
    file = tmp_path / "prompt.txt"
    file.write_text("hello\n")

    def tokens(*prompt: object) -> Any:
        return json.loads(output(capsys, "generate", *options, *prompt)[0])["tokens"]

    set_stdin(monkeypatch, b"hello\n")
    assert tokens("hello") == tokens("-p", "hello") == tokens("-f", file) == tokens("-") != tokens("hello\n")
    set_stdin(monkeypatch, b"hello\n")
    assert tokens("-f", "-") == tokens("hello")
    assert tokens("hello\n") == tokens(r"hello\n", "-e")
    # Text as other systems write it is the same text.
    for data in (b"hello\r\n", b"\xef\xbb\xbfhello\n", b"\xef\xbb\xbfhello\r\n", b"hello"):
        file.write_bytes(data)
        set_stdin(monkeypatch, data)
        assert tokens("-f", file) == tokens("-") == tokens("hello")
    file.write_bytes(b"a\r\nb\r\n\r\n")
    assert tokens("-f", file) == tokens("a\nb\n")


def test_generate_json_is_the_result(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("generate", "-m", tiny_model, "-p", "hi", "-n", 7, "--temp", "0.9", "--top-k", 50, "-s", 5, "--json")
    result = json.loads(output(capsys, *arguments)[0])
    with pyengine.Engine(tiny_model) as engine:
        expected = engine.generate("hi", max_tokens=7, temperature=0.9, top_k=50, seed=5).to_dict()
    assert result.pop("timings").keys() == expected.pop("timings").keys()
    assert result == expected


def test_beams_are_those_of_the_engine(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pyengine.Engine(tiny_model) as engine:
        beams = engine.beam_search("hello you", beam_width=3, n=3, max_tokens=9, length_penalty=0.5, ignore_eos=True)
    arguments = ("generate", "-m", tiny_model, "hello you", "-n", 9, "--beams", 3, "--length-penalty", 0.5, *GREEDY)
    out, err = output(capsys, *arguments, "-v")
    assert out.removesuffix("\n") == beams[0].text.removesuffix("\n") and err.count("nats, 9 tokens, end: length\n") == 3
    hypotheses = json.loads(output(capsys, *arguments, "--json")[0])["hypotheses"]
    assert hypotheses == [beam.to_dict() for beam in beams]
    assert "beam_width must be in [1, 32], not 33" in error(capsys, *arguments, "--beams", 33, code=1)
    assert "--seed would have no effect" in error(capsys, *arguments, "--seed", 0, code=2)


def test_a_broken_word_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "generate", "Once upon a ti", "--token-healing", "-n", 1, "--temp", 0)[0] == "me\n"


def test_beams_are_held_to_a_grammar(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("llguidance", reason="the extra guide is not installed")
    grammar = 'start: "b" ("c" | "d")'
    out, _ = output(capsys, "generate", "-m", tiny_model, "hello you", "--beams", 4, "--grammar", grammar, "--json")
    texts = [one["text"] for one in json.loads(out)["hypotheses"]]
    assert set(texts) == {"bc", "bd"}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"a\nb\x41\u00e9\101\\n", "a\nbA\u00e9A\\n"),
        (r"\N{BULLET}\U0001F600", "\u2022\U0001f600"),
        (r"\q\é\→ → é", r"\q\é\→ → é"),  # what is no escape stays as it is written
        ("one\\\ntwo", "onetwo"),
    ],
)
def test_escapes_are_those_of_a_python_literal(text: str, wanted: str) -> None:
    assert unescape(text) == wanted


@pytest.mark.parametrize("text", [r"\x4", r"\u12", r"\U00110000", r"\N{no such name}", r"\N", "a\\"])
def test_half_an_escape_is_wrong_usage(text: str) -> None:
    with pytest.raises(UsageError, match="--escape"):
        unescape(text)


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (("--top-p", "0.5", "--min-p", "0.01"), {"top_p": 0.5, "min_p": 0.01}),
        (("--typical", "0.7"), {"typical_p": 0.7}),
        (("--temp", "1", "--repeat-penalty", "1.5"), {"temperature": 1.0, "repetition_penalty": 1.5}),
        (("--presence-penalty", "2", "--frequency-penalty", "3"), {"presence_penalty": 2.0, "frequency_penalty": 3.0}),
        (("--repeat-penalty", "2", "--repeat-last-n", "3"), {"repetition_penalty": 2.0, "repeat_last_n": 3}),
        (("--no-repeat-ngram-size", "1", "--bad-word", r"\x6f", "-e"), {"no_repeat_ngram_size": 1, "bad_words": ["o"]}),
        (
            ("--temp", "2", "--top-nsigma", "1", "--dynatemp-range", "1", "--dynatemp-exp", "2"),
            {"temperature": 2.0, "top_n_sigma": 1.0, "dynatemp_range": 1.0, "dynatemp_exponent": 2.0},
        ),
        (("--top-n-sigma", "0.5", "--temp", "2"), {"top_n_sigma": 0.5, "temperature": 2.0}),  # both spellings are llama.cpp's
        (("--xtc-probability", "1", "--xtc-threshold", "0.01"), {"xtc_probability": 1.0, "xtc_threshold": 0.01}),
        (
            ("--dry-multiplier", "9", "--dry-base", "2", "--dry-allowed-length", "1", "--dry-sequence-breaker", "none"),
            {"dry_multiplier": 9.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": ()},
        ),
        (("--stop", "a", "--stop", "e", "--stop", "i"), {"stop": ["a", "e", "i"]}),
        (("-n", "-1", "--stop", r"\x6f", "-e"), {"max_tokens": None, "stop": "o"}),
        (("--ignore-eos", "-c", "40", "-n", "-2"), {"max_tokens": None, "ignore_eos": True}),
    ],
)
def test_sampling_options_arrive(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], options: dict[str, Any]
) -> None:
    given = ("generate", "-m", tiny_model, "-p", "hello hello", "-n", 24, "-s", 11, "--json", *arguments)
    result = json.loads(output(capsys, *given)[0])
    with pyengine.Engine(tiny_model, n_ctx=40 if "-c" in arguments else 0) as engine:
        expected = engine.generate("hello hello", **{"max_tokens": 24, "seed": 11, **options})
    assert (result["tokens"], result["finish_reason"]) == (expected.tokens, expected.finish_reason)


def test_special_tokens_are_parsed_on_demand(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def n_prompt(*arguments: str) -> Any:
        out = output(capsys, "generate", "-m", tiny_model, "-n", 1, "--json", "-p", "</s></s>", *arguments)[0]
        return json.loads(out)["timings"]["prompt_tokens"]

    assert n_prompt("--special") + 6 == n_prompt()  # "</s>" is four bytes, twice


def test_verbose_and_environment(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, isa_restored: None
) -> None:
    monkeypatch.setenv("PYENGINE_MODEL", str(tiny_model))
    monkeypatch.setenv("PYENGINE_NUM_THREADS", "3")
    quiet = output(capsys, "generate", "hello", "-n", 9, *GREEDY)
    out, err = output(capsys, "generate", "hello", "-n", 9, "-v", "--isa", "scalar", *GREEDY)
    assert quiet == (out, "")
    assert "output: 9 tokens" in err and "scalar, 3 threads" in err and "end: length" in err and err.count("\n") == 1
    assert ", 1 threads" in output(capsys, "generate", "hello", "-n", 9, "-v", "-t", 1)[1]
    monkeypatch.setenv("PYENGINE_NUM_THREADS", "many")
    assert "PYENGINE_NUM_THREADS is 'many'" in error(capsys, "generate", "hello", code=1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "no prompt"),
        (("a", "-p", "b"), "more than one prompt"),
        (("a", "--temp", "-1"), "temperature must be in"),
        (("a", "--top-p", "nan"), "top_p must not be NaN"),
        (("a", "--top-p", "x"), "--top-p: 'x' is not a number ("),
        (("a", "-s", "1.5"), "-s/--seed: '1.5' is not a whole number ("),
        (("a", "-n", "0"), "max_tokens"),
        (("a", "-s", str(2**64)), "seed must be in"),
        (("a", "--stop", ""), "stop must not hold an empty string"),
        (("a", "-t", "0"), "-t/--threads: 0 is not a whole number from 1"),
        (("a", "-t", "two"), "-t/--threads: two is not a whole number from 1"),
        (("a", "--kv-dtype", "f64"), "--kv-dtype"),
        (("a", "--wat"), "unrecognized arguments: --wat"),
        (("a", "-e", "--stop", r"\x4"), "--escape"),
        (("a", "b"), "unrecognized arguments: b; a prompt of several words is put in quotes"),
        (("caf\udce9",), "the prompt is no text in this terminal's encoding"),
        (("a", "-ngl", "99"), "there is no option -ngl: the engine computes on CPUs"),
        (("a", "-hf", "org/name"), "there is no option -hf: use -m hf:ORG/NAME"),
        (("a", "--mirostat", "2"), "there is no option --mirostat: there is no such sampler here"),
        (("a", "--json-schema", "{type: string}"), "--json-schema is no JSON: Expecting property name"),
        (("a", "--grammar", "@"), "--grammar @FILE: the file's name is missing"),
        (("a", "--speculative", "often"), "'often' is not auto, off, or a number from 0 to 24"),
        (("a", "--beams", "0"), "--beams: 0 is not a whole number from 1"),
        (("a", "--beams", "2", "--temp", "0.5"), "--temp would have no effect: --beams"),
        (("a", "--beams", "2", "--xtc-probability", "0.5"), "--xtc-probability would have no effect: --beams"),
        (("a", "--beams", "2", "--token-healing"), "--token-healing would have no effect: --beams"),
        (("a", "--beams", "2", "--speculative", "off"), "--speculative would have no effect: --beams"),
        (("a", "--length-penalty", "2"), "give --beams, too"),
        (("a", "--num-beams", "2"), "there is no option --num-beams: use --beams"),
        (("a", "--speculative", "off", "--draft-model", "b"), "--draft-model would have no effect"),
    ],
)
def test_wrong_usage_is_named(
    tiny_model: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in error(capsys, "generate", "-m", tiny_model, *arguments, code=2)


def test_refusals_are_named(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no model at" in error(capsys, "generate", "-m", tmp_path / "absent", "a", code=1)
    (tmp_path / "note").write_text("a note")
    assert "6 bytes: neither a frozen file of pyengine nor" in error(capsys, "info", tmp_path / "note", code=1)
    (tmp_path / "text").write_text("no model, but some words that are one")
    assert "neither a frozen file of pyengine nor another" in error(capsys, "info", tmp_path / "text", code=1)
    assert "'pyengine --version' tells it" in error(capsys, "version", code=2)
    assert "holds 512" in error(capsys, "generate", "-m", tiny_model, "a", "-c", 513, code=1)
    assert "600 tokens" in error(capsys, "generate", "-m", tiny_model, "é" * 300, code=1)
    assert "absent" in error(capsys, "generate", "-m", tiny_model, "-f", tmp_path / "absent", code=1)
    assert "this machine runs" in error(capsys, "generate", "-m", tiny_model, "a", "--isa", "quantum", code=1)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    latin = str(tmp_path / "latin")
    for arguments in (("-f", latin), ("a", "--grammar", f"@{latin}"), ("a", "--json-schema", f"@{latin}")):
        assert "byte 3 is 0xe9" in error(capsys, "generate", "-m", tiny_model, *arguments, code=1)
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(tiny_model.read_bytes()[:-64])
    assert "damaged.safetensors: " in error(capsys, "generate", "-m", damaged, "a", code=1)


def test_no_model_at_all(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pyengine.opening.DEFAULT_MODEL", tmp_path / "absent")
    assert "-m PATH or PYENGINE_MODEL" in error(capsys, "generate", "a", code=2)


def test_generate_imports_nothing_heavy(tiny_model: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pyengine.cli import main\n"
        "code = main(sys.argv[1:])\n"
        f"print(code, [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "generate", "-m", str(tiny_model), "hello", "-n", "4", "--temp", "1", "--stop", "q"],
        cwd=tmp_path, env=cli_tools.environment(), capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert done.stderr == "0 []\n"


def test_a_process_of_its_own(tiny_model: Path, tmp_path: Path) -> None:
    done = run_process(tmp_path, "generate", "-m", tiny_model, "-", "-n", 5, *GREEDY, input="hello")
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("\n")
    failed = run_process(tmp_path, "generate", "-m", tiny_model)
    assert (failed.returncode, failed.stdout) == (2, "") and failed.stderr.startswith("pyengine: error: no prompt")


# -------------------------------------------------------------------- embed


def test_embed_prints_a_vector_a_text(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["hello", "hello you", "a"]
    with pyengine.Engine(tiny_model) as engine:
        expected = {
            options: engine.embed(texts, pooling=options[1], normalize=options[0]).tolist()
            for options in ((True, None), (False, None), (True, "mean"))
        }
    (tmp_path / "texts").write_bytes(b"hello\r\n\nhello you\na")
    set_stdin(monkeypatch, b"hello\nhello you\n\na\n")
    for given in (texts, ["-"], ["-f", tmp_path / "texts"]):
        lines = output(capsys, "embed", "-m", tiny_model, *given)[0].splitlines()
        assert [json.loads(line) for line in lines] == expected[True, None]
    raw = output(capsys, "embed", "-m", tiny_model, "--raw", *texts)[0].splitlines()
    assert [json.loads(line) for line in raw] == expected[False, None]
    whole = json.loads(output(capsys, "embed", "-m", tiny_model, "--pooling", "mean", "--json", *texts)[0])
    assert whole == {"model": str(tiny_model), "vectors": expected[True, "mean"]}
    # More texts than are computed together: the same vectors, in order.
    many = output(capsys, "embed", "-m", tiny_model, *(texts * 30))[0].splitlines()
    assert [json.loads(line) for line in many] == expected[True, None] * 30


def test_embed_refuses(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").write_bytes(b"\n \n")
    for arguments, words in (
        ((), "give texts"),
        (("a", "-f", tmp_path / "empty"), "give texts"),
        (("a", "b\udce9"), "text 2 is no text in this terminal's encoding"),
    ):
        assert words in error(capsys, "embed", "-m", tiny_model, *arguments, code=2)
    assert "has no line that is not empty" in error(capsys, "embed", "-m", tiny_model, "-f", tmp_path / "empty", code=1)
    assert "text 2: the prompt has 600 tokens" in error(capsys, "embed", "-m", tiny_model, "a", "é" * 300, code=1)


# -------------------------------------------------------------------- freeze


@pytest.fixture()
def checkpoint(tmp_path: Path) -> Path:
    return fixtures.write_hf_dir(fixtures.load("llama_tied"), tmp_path / "hf")


def test_freeze_and_its_refusals(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.safetensors"
    assert output(capsys, "freeze", checkpoint, "-o", out, "--name", "Tiny") == ("", "")
    with FrozenFile.open(out) as frozen:
        assert frozen.metadata["name"] == "Tiny"
    first = out.read_bytes()
    assert "--force replaces it" in error(capsys, "freeze", checkpoint, "-o", out, code=1)
    assert output(capsys, "freeze", checkpoint, "-o", out, "--force") == ("", "")
    assert out.read_bytes() != first  # the name is another
    assert "is a directory" in error(capsys, "freeze", checkpoint, "-o", tmp_path, code=1)
    assert "no such file" in error(capsys, "freeze", tmp_path / "absent", "-o", tmp_path / "x", code=1)
    (tmp_path / "text.gguf").write_text("some words that are no model at all")
    assert "text.gguf: " in error(capsys, "freeze", tmp_path / "text.gguf", "-o", tmp_path / "x", code=1)
    assert "already frozen" in error(capsys, "freeze", out, "-o", tmp_path / "x", code=1)
    assert "-o/--output" in error(capsys, "freeze", checkpoint, code=2)


def test_an_interrupt_before_the_command_line_is_read_leaves_no_traceback(tmp_path: Path) -> None:
    """Ctrl-C comes while modules are imported: of the command line, of a command, of the engine."""
    installed = "importlib.metadata.entry_points(group='console_scripts', name='pyengine')"
    starts = ("runpy.run_module('pyengine', run_name='__main__')", f"(script,) = {installed}; sys.exit(script.load()())")
    for name, start in itertools.product(("pyengine.cli", "pyengine.cli.info", "pyengine.format.reader"), starts):
        code = f"""
import importlib.metadata, runpy, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise KeyboardInterrupt

sys.meta_path.insert(0, Interrupt())
sys.argv = ["pyengine", "info"]
{start}
"""
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=cli_tools.environment(), capture_output=True, text=True, timeout=250
        )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", ""), (name, start)


def test_an_interrupted_freeze_leaves_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pyengine.cli.progress.ProgressLine.update", interrupt)
    (tmp_path / "out").mkdir()
    assert output(capsys, "freeze", checkpoint, "-o", tmp_path / "out" / "x", code=130) == ("", "")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_checkpoint_as_model_is_frozen_into_the_cache_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = output(capsys, "generate", "-m", checkpoint, "hello", "-n", 5, *GREEDY)
    files = list((tmp_path / "cache").glob("*.safetensors"))
    times = [file.stat().st_mtime_ns for file in files]
    assert output(capsys, "generate", "-m", checkpoint, "hello", "-n", 5, *GREEDY) == first
    assert len(files) == 1 and [file.stat().st_mtime_ns for file in files] == times


# -------------------------------------------------------------------- train


def test_train_is_a_door(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def trainer(argv: list[str]) -> int:
        seen.append(argv)
        return 7

    monkeypatch.setattr("pyengine.cli.train.find_spec", lambda name: SimpleNamespace(name=name))
    monkeypatch.setattr("pyengine.cli.train.import_module", lambda name: SimpleNamespace(main=trainer))
    output(capsys, "train", "--steps", "3", "--help", code=7)
    assert seen == [["--steps", "3", "--help"]]


def test_the_trainers_errors_are_lines_like_all_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "neither a run folder" in error(capsys, "runs", tmp_path / "absent", code=1)


@pytest.mark.parametrize("missing", ["numba", "pyengine_training"])
def test_train_names_the_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr("pyengine.cli.train.find_spec", lambda name: None if name == missing else SimpleNamespace())
    assert "pip install 'pyengine-lm[train]'" in error(capsys, "train", code=1)


def test_serve_names_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import pyengine.serve

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    for name in ("server", "connection"):
        monkeypatch.delitem(sys.modules, f"pyengine.serve.{name}", raising=False)
        monkeypatch.delattr(pyengine.serve, name, raising=False)
    assert "uvicorn is missing: pip install 'pyengine-lm[serve]'" in error(capsys, "serve", "--port", 0, code=1)


def test_a_directory_that_is_no_model_names_what_may_be_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert error(capsys, "generate", "-m", tmp_path, "hi", code=1).endswith(f"{tmp_path} has no config.json\n")
    for name in ("b.gguf", "a.safetensors", "model.safetensors", "notes.txt"):
        (tmp_path / name).touch()
    words = error(capsys, "generate", "-m", tmp_path, "hi", code=1)
    assert words.endswith(f"{tmp_path} has no config.json; a model may be a file in it: a.safetensors, b.gguf\n")
