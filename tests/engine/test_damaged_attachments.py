"""Attachments and metadata of a frozen file that are not what they should be: every way of using the file ends well or with
one of our errors, and never with what Python happened to stumble over. (tests/fuzz looks for what is not listed here.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine.freeze_models import write_hf
from engine.frozen_parts import FrozenParts

import pyengine
from pyengine import golden
from pyengine.cli.info import describe, text_lines
from pyengine.cli.verify import golden_outputs
from pyengine.errors import PyEngineError
from pyengine.format.reader import FrozenFile, verify_checksums
from pyengine.freeze import freeze

MESSAGES = [{"role": "user", "content": "a <|end|> b"}]
HUGE = 10**400

# ---------------------------------------------------------------------------- every way of using a file


def with_frozen(action: Callable[[FrozenFile], object]) -> Callable[[Path], object]:
    def run(path: Path) -> None:
        with FrozenFile.open(path) as frozen:
            action(frozen)

    return run


def with_engine(action: Callable[[pyengine.Engine], object]) -> Callable[[Path], object]:
    def run(path: Path) -> None:
        with pyengine.Engine(path, n_threads=1) as engine:
            action(engine)

    return run


def recompute(path: Path) -> None:
    expected, computed = golden_outputs(path), golden.compute(path, 1)
    assert computed.keys() and [expected.get(key) == value for key, value in computed.items()]


WAYS: dict[str, Callable[[Path], object]] = {
    "info": with_frozen(lambda frozen: text_lines(describe(frozen, True))),
    "checksums": with_frozen(lambda frozen: list(verify_checksums(frozen))),
    "golden": recompute,
    "generate": with_engine(lambda engine: engine.generate([1, 2, 3], max_tokens=3)),
    "defaults": with_engine(lambda engine: engine.generate([1, 2, 3], max_tokens=2, temperature=0.5)),
    "text": with_engine(lambda engine: engine.generate("a <|end|> b", max_tokens=2).text),
    "chat": with_engine(lambda engine: engine.chat(MESSAGES, max_tokens=2)),
    "score": with_engine(lambda engine: engine.score("ab").perplexity),
    "preload": lambda path: pyengine.Engine(path, preload_tokenizer=True).close(),
    "freeze": lambda path: freeze(path, path.with_suffix(".again")),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> FrozenParts:
    directory = tmp_path_factory.mktemp("attachments")
    source = write_hf(directory / "hf")
    settings = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.7, "top_k": 5}))
    (source / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    return FrozenParts(freeze(source, directory / "m.safetensors").read_bytes())


def use(tmp_path: Path, data: bytes) -> dict[str, str]:
    """way -> "well" or the error's class; any other exception fails the test."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    ends = {}
    for name, way in WAYS.items():
        try:
            way(path)
            ends[name] = "well"
        except PyEngineError as error:
            ends[name] = type(error).__name__
            assert str(error)
    return ends


def test_the_good_file_is_good(tmp_path: Path, good: FrozenParts) -> None:
    ends = use(tmp_path, good.build())
    assert ends.pop("freeze") == "ModelFormatError"  # a frozen file is no checkpoint
    assert set(ends.values()) == {"well"}


# ---------------------------------------------------------------------------- damage

ATTACHMENTS = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "golden.json",
    "checksums.json",
]
TEXTS = [b"", b"\xff\xfe\xff", b"\xed\xa0\x80", b"[]", b"null", b"1", b'"x"', b"true", b"{}", b"{", b"NaN", b"1e999", b"[" * 5000,
         b'{"a":' * 5000, b'{"a":1,"a":2}', b"\xef\xbb\xbf{}", b'{"a":"\\ud800"}', b"-" * 100, b"9" * 5000]  # fmt: skip


@pytest.mark.parametrize("attachment", ATTACHMENTS)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_attachments_that_are_no_documents(tmp_path: Path, good: FrozenParts, attachment: str, text: bytes) -> None:
    ends = use(tmp_path, good.build({attachment: text}))
    if attachment in ("config.json", "tokenizer.json"):
        assert ends["text"] != "well"


VALUES = [
    None,
    True,
    -1,
    0,
    2**31,
    HUGE,
    -HUGE,
    0.5,
    1e308,
    "",
    "x",
    "\ud800",
    "\0",
    [],
    [{}],
    [HUGE],
    {},
    {"a": {}},
    {"content": 5},
]
KEYS = {
    "tokenizer_config.json": ["bos_token", "eos_token", "add_bos_token", "tokenizer_class", "x"],
    "generation_config.json": [
        "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "eos_token_id", "max_length",
        "max_new_tokens",
        "do_sample", "x",
    ],
    "golden.json": ["tokens", "greedy", "logits_sha256", "x"],
    "checksums.json": ["norm", "config.json", "x"],
}  # fmt: skip


@pytest.mark.parametrize(("attachment", "key"), [(attachment, key) for attachment, keys in KEYS.items() for key in keys])
def test_values_of_any_type(tmp_path: Path, good: FrozenParts, attachment: str, key: str) -> None:
    document = json.loads(good.attachment(attachment))
    for value in VALUES:
        use(tmp_path, good.build({attachment: json.dumps(document | {key: value}).encode()}))


def places(document: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a document but the vocabulary."""
    found: list[tuple[Any, Any]] = []
    waiting = [document]
    while waiting:
        container = waiting.pop()
        keys = (
            list(container)
            if isinstance(container, dict)
            else range(len(container))
            if isinstance(container, list)
            else []
        )
        found += [(container, key) for key in keys]
        waiting += [container[key] for key in keys if key != "vocab"]
    return found


@pytest.mark.parametrize("attachment", ["tokenizer.json", "config.json"])
@pytest.mark.parametrize("value", [None, -1, HUGE, "x", [], {}, [[1]], "gone"], ids=range(8))
def test_any_part_of_the_tokenizer_and_the_config(tmp_path: Path, good: FrozenParts, attachment: str, value: Any) -> None:
    for i in range(len(places(json.loads(good.attachment(attachment))))):
        document = json.loads(good.attachment(attachment))
        container, key = places(document)[i]
        if value == "gone":
            del container[key]
        else:
            container[key] = value
        path = tmp_path / "m.safetensors"
        path.write_bytes(good.build({attachment: json.dumps(document).encode()}))
        for way in ("info", "text"):
            try:
                WAYS[way](path)
            except PyEngineError as error:
                assert str(error)


@pytest.mark.parametrize(
    "template", [b"\xff", b"{{", b"{% for %}", b"{{ 1/0 }}", b"\xed\xa0\x80", b"{{ messages }}" * 3, b"\x1b[2J"]
)
def test_templates_that_are_none(tmp_path: Path, good: FrozenParts, template: bytes) -> None:
    ends = use(tmp_path, good.build({"chat_template.jinja": template}))
    assert ends["text"] == "well"


@pytest.mark.parametrize(
    "changes",
    [
        {"format_version": 2},
        {"format_version": "99"},
        {"format": None},
        {"name": 5},
        {"name": "\ud800"},
        {"x": "\0" * 9},
    ],
)
def test_metadata(tmp_path: Path, good: FrozenParts, changes: dict[str, Any]) -> None:
    metadata: dict[str, Any] = good.metadata | changes
    use(tmp_path, good.build(metadata={key: value for key, value in metadata.items() if value is not None}))
