"""Engine.infill: its prompt, what ends it, the cache, many at once, streams; the command line and the llama-cpp-python shim."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine.cli_tools import isolate
from reference import fixtures

from pyengine import AsyncEngine, Engine, SamplingParams
from pyengine.cli import main
from pyengine.compat.llama_cpp import Llama
from pyengine.errors import ContextFullError, InvalidArgumentError
from pyengine.freeze import freeze

MARKS = ("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<fim_pad>", "<repo_name>", "<file_sep>")
PREFIX, SUFFIX = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))\n"
SHORT: dict[str, Any] = {"max_tokens": 8, "temperature": 0}


def freeze_coder(directory: Path, marks: tuple[str, ...] = MARKS) -> Path:
    """A tiny random Llama whose last tokens are those of StarCoder2."""
    hf = Path(fixtures.write_hf_dir(fixtures.load("llama_tied"), directory / "hf"))
    path = hf / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text())
    model = tokenizer["model"]
    for text in marks:  # each in the place of a token of two bytes
        last = max(model["vocab"], key=model["vocab"].__getitem__)
        tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": model["vocab"].pop(last), "content": text})
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) != last]
    path.write_text(json.dumps(tokenizer))
    freeze(hf, directory / "coder.safetensors")
    return directory / "coder.safetensors"


@pytest.fixture(scope="module")
def coder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return freeze_coder(tmp_path_factory.mktemp("coder"))


@pytest.fixture(scope="module")
def engine(coder: Path) -> Iterator[Engine]:
    with Engine(coder, n_threads=1) as engine:
        yield engine


def mark(engine: Engine, text: str) -> int:
    return engine.tokenizer.special_tokens[text]


def laid_out(engine: Engine, prefix: str, suffix: str) -> list[int]:
    """StarCoder2's format, put together by hand."""
    bos = [engine.tokenizer.bos_id] if engine.tokenizer.adds_bos else []
    before, behind = (engine.tokenize(text, add_bos=False) for text in (prefix, suffix))
    pre, suf, mid = (mark(engine, text) for text in MARKS[:3])
    return [*bos, pre, *before, suf, *behind, mid]


def test_a_filling_is_what_follows_the_prompt(engine: Engine) -> None:
    ids = engine.infill_ids(PREFIX, SUFFIX)
    assert ids == laid_out(engine, PREFIX, SUFFIX)
    filled, wanted = engine.infill(PREFIX, SUFFIX, **SHORT), engine.generate(ids, **SHORT)
    assert (filled.text, filled.tokens) == (wanted.text, wanted.tokens)
    assert engine.infill(PREFIX, SUFFIX, SamplingParams(**SHORT)).tokens == wanted.tokens
    with engine.infill(PREFIX, SUFFIX, stream=True, **SHORT) as pieces:
        assert [piece.token for piece in pieces] == wanted.tokens
    sampled = engine.infill(PREFIX, SUFFIX, max_tokens=4, temperature=1, seed=5, n=3)
    assert [one.tokens for one in sampled] == [  # type: ignore[attr-defined]
        one.tokens for one in engine.generate(ids, max_tokens=4, temperature=1, seed=5, n=3)  # type: ignore[attr-defined]
    ]


def test_many_holes_together_are_each_as_alone(engine: Engine) -> None:
    prefixes, suffixes = [PREFIX, "", "x = "], [SUFFIX, "y", ""]
    together = engine.infill(prefixes, suffixes, **SHORT)
    assert [one.tokens for one in together] == [
        engine.infill(prefix, suffix, **SHORT).tokens for prefix, suffix in zip(prefixes, suffixes, strict=True)
    ]


@pytest.mark.parametrize("text", MARKS)
def test_every_token_of_the_format_ends_a_filling(engine: Engine, text: str) -> None:
    id_ = mark(engine, text)
    forced = {**SHORT, "logit_bias": {id_: 1e6}}
    result = engine.infill(PREFIX, SUFFIX, **forced)
    assert (result.text, result.tokens, result.finish_reason, result.stop_reason) == ("", [id_], "stop", id_)
    assert engine.infill(PREFIX, SUFFIX, ignore_eos=True, **forced).tokens == [id_] * 8
    assert engine.generate(engine.infill_ids(PREFIX, SUFFIX), **forced).tokens == [id_] * 8  # no filling: it goes on
    own = engine.infill(PREFIX, SUFFIX, stop_token_ids=[65], **{**SHORT, "logit_bias": {65: 1e6}})
    assert own.stop_reason == 65  # a caller's own stop tokens stay


def test_the_models_own_end_ends_a_filling(engine: Engine) -> None:
    end = engine.eos_token_ids[0]
    result = engine.infill(PREFIX, SUFFIX, **SHORT, logit_bias={end: 1e6})
    assert (result.text, result.finish_reason, result.stop_reason) == ("", "stop", None)


def test_calls_that_begin_alike_share_what_was_computed(engine: Engine) -> None:
    engine.clear_cache()
    first = engine.infill(PREFIX, SUFFIX, **SHORT)
    again = engine.infill(PREFIX, "\n", **SHORT)
    shared = len(laid_out(engine, PREFIX, "")) - 1  # all before the suffix differs: BOS, the prefix and its tokens
    assert first.timings.cached_tokens == 0 and again.timings.cached_tokens >= shared
    engine.clear_cache()
    assert engine.infill(PREFIX, "\n", **SHORT).tokens == again.tokens


def test_other_files_are_told_and_come_first(engine: Engine) -> None:
    files = [("util.py", "def g(): pass\n")]
    ids = engine.infill_ids(PREFIX, SUFFIX, files=files, filename="main.py", repository="shapes")
    said = engine.detokenize(ids, skip_special_tokens=False)
    wanted = "<repo_name>shapes<file_sep>util.py\ndef g(): pass\n<file_sep><fim_prefix>main.py\n"
    assert f"{wanted}{PREFIX}<fim_suffix>{SUFFIX}<fim_middle>" in said
    context: dict[str, Any] = {"files": files, "filename": "main.py", "repository": "shapes"}
    assert engine.infill(PREFIX, SUFFIX, **context, **SHORT).tokens == engine.generate(ids, **SHORT).tokens


def test_awaited_fillings_are_the_same(engine: Engine) -> None:
    wanted = engine.infill(PREFIX, SUFFIX, **SHORT)

    async def ask() -> None:
        async_engine = AsyncEngine(engine)
        assert (await async_engine.infill(PREFIX, SUFFIX, **SHORT)).tokens == wanted.tokens
        many = await async_engine.infill([PREFIX, PREFIX], [SUFFIX, SUFFIX], **SHORT)
        assert [one.tokens for one in many] == [wanted.tokens] * 2
        pieces = [piece async for piece in async_engine.infill_stream(PREFIX, SUFFIX, **SHORT)]
        assert [piece.token for piece in pieces] == wanted.tokens
        id_ = mark(engine, "<fim_pad>")
        pieces = [piece async for piece in async_engine.infill_stream(PREFIX, SUFFIX, **SHORT, logit_bias={id_: 1e6})]
        assert [piece.token for piece in pieces] == [id_]

    asyncio.run(ask())


@pytest.mark.parametrize(
    ("prefix", "suffix", "options"),
    [
        ("a", ["b"], {}), (["a"], "b", {}), (["a"], [], {}), ([], [], {}), (["a", "b"], ["c"], {}), ([1, 2], [3, 4], {}),
        (5, "b", {}), ("a", b"b", {}), (["a"], ["b"], {"stream": True}), ("a", "b", {"files": ["x"]}),
        ("a", "b", {"filename": 5}),
    ],
)  # fmt: skip
def test_what_is_no_hole_is_refused(engine: Engine, prefix: Any, suffix: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=r"prefix|suffix|files|filename"):
        engine.infill(prefix, suffix, **options)


def test_what_does_not_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextFullError, match=f"the context holds {engine.n_ctx}"):
        engine.infill("x" * engine.n_ctx, "y")


def test_a_model_that_cannot_is_named_with_what_is_missing(tiny_model: Path, tmp_path: Path) -> None:
    with Engine(tiny_model, n_threads=1) as engine:
        for call in (engine.infill, engine.infill_ids):
            with pytest.raises(InvalidArgumentError, match=r"^tiny.safetensors does not fill in the middle: .*<\|fim_prefix\|>"):
                call("a", "b")  # type: ignore[operator]
    with (
        Engine(freeze_coder(tmp_path, MARKS[:2]), n_threads=1) as engine,
        pytest.raises(InvalidArgumentError, match="has <fim_prefix>, <fim_suffix>, but not <fim_middle>"),
    ):
        engine.infill("a", "b")


# -------------------------------------------------------------------- other doors


@pytest.fixture()
def isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path / "cache")


@pytest.mark.usefixtures("isolated")
def test_the_command_line_fills_a_hole(
    engine: Engine, coder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of files, too, as they are: a newline at the end is a part of the text before a hole or behind it."""
    before = PREFIX + "\n"
    wanted = engine.infill(before, SUFFIX, **SHORT)
    assert SUFFIX.endswith("\n")
    (tmp_path / "before").write_text(before)
    (tmp_path / "after").write_text(SUFFIX)
    cache = str(tmp_path / "prompt.kv")
    escaped = ["-e", "-p", before.replace("\n", "\\n"), "--suffix", SUFFIX.replace("\n", "\\n")]
    of_files = ["-f", str(tmp_path / "before"), "--suffix", f"@{tmp_path / 'after'}", "--prompt-cache", cache]
    for options in (escaped, of_files, of_files):
        capsys.readouterr()
        assert main(["generate", "-m", str(coder), "-t", "1", "--temp", "0", "-n", "8", "--json", *options]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["tokens"] == wanted.tokens
        assert said["timings"]["prompt_tokens"] == wanted.timings.prompt_tokens
    assert said["timings"]["cached_tokens"] > 0  # of the file that the second one wrote


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--suffix", "x", "--special"), 2, "--special would have no effect"),
        (("--suffix", "@"), 2, "--suffix @FILE"),
        (("--suffix", "@property"), 2, "a text that begins with @ goes into one"),
        (("--suffix", "x"), 1, "does not fill in the middle"),
    ],
)
@pytest.mark.usefixtures("isolated")
def test_the_command_line_refuses(
    tiny_model: Path, options: tuple[str, ...], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "-m", str(tiny_model), "-t", "1", "-p", "a", *options]) == code
    captured = capsys.readouterr()
    assert captured.out == "" and words in captured.err and captured.err.count("\n") == 1


def test_the_shim_fills_a_hole(engine: Engine, coder: Path, tiny_model: Path) -> None:
    wanted = engine.infill(PREFIX, SUFFIX, **SHORT).text
    with_defaults: dict[str, Any] = {"temperature": 0.0, "max_tokens": 8}
    llm = Llama(str(coder), n_threads=1, verbose=False)
    assert llm(PREFIX, suffix=SUFFIX, **with_defaults)["choices"][0]["text"] == wanted
    chunks = llm(PREFIX, suffix=SUFFIX, stream=True, **with_defaults)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == wanted
    assert llm(PREFIX, suffix=SUFFIX, echo=True, **with_defaults)["choices"][0]["text"] == PREFIX + wanted
    for options in ({"prompt": [1, 2]}, {"echo": True, "logprobs": 1}):
        with pytest.raises(InvalidArgumentError, match="suffix with"):
            llm(**{"prompt": PREFIX, "suffix": SUFFIX, **with_defaults, **options})
    llm.close()
    llm = Llama(str(tiny_model), n_threads=1, verbose=False)
    with pytest.raises(InvalidArgumentError, match="does not fill in the middle"):
        llm(PREFIX, suffix=SUFFIX)
    llm.close()
