"""Fixtures that all tests share, and a header that says what really ran."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# `from reference import oracle`: tests/ is no package, and under --import-mode=importlib nothing
# puts it on the path
sys.path.insert(0, str(HERE))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    """A checkout may be read-only: then hypothesis keeps its examples nowhere."""
    if not os.access(config.rootpath, os.W_OK):
        from hypothesis import settings

        settings.register_profile("read-only", database=None)
        settings.load_profile("read-only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Opt-in tests are skipped with the word that opts in."""
    if config.getoption("--run-slow"):
        return
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --run-slow"))


def pytest_report_header(config: pytest.Config) -> list[str]:
    """The instruction set and thread count that the engine's tests will use."""
    try:
        from pyengine import _core
    except ImportError as error:
        return [f"pyengine: the extension is not importable ({error})"]
    threads = os.environ.get("PYENGINE_NUM_THREADS") or "what the container allows"
    return [
        f"pyengine: {_core.__file__}",
        f"pyengine: ISA {_core.active_isa()} of {', '.join(_core.available_isas())}, threads: {threads}",
    ]


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> Iterator[None]:
    """Ctrl-C is heard, here and in the processes that tests start: under nohup, or in the background of a shell, it is ignored,
    and children inherit that."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What tests freeze on opening lies in a cache of theirs, and not in that of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Directory of test data that is too large or not ours to commit."""
    path = Path(os.environ.get("PYENGINE_TEST_DATA") or HERE.parent.parent / "shared" / "data")
    if not path.is_dir():
        pytest.skip(f"no test data at {path}; PYENGINE_TEST_DATA names the directory")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file."""
    name = os.environ.get("PYENGINE_TEST_MODEL")
    if not name:
        pytest.skip("PYENGINE_TEST_MODEL does not name SmolLM2-135M-Instruct.Q4_1.gguf")
    path = Path(name)
    if not path.is_file():
        pytest.skip(f"PYENGINE_TEST_MODEL names {path}, which is not a file")
    return path


@pytest.fixture(scope="session")
def smollm2_frozen(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, frozen once per session."""
    from pyengine.freeze import freeze

    path = tmp_path_factory.mktemp("smollm2") / "smollm2.safetensors"
    freeze(smollm2_gguf, path)
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frozen file: a two-layer random Llama with a byte-level tokenizer, both from
    reference/fixtures.py."""
    from reference import fixtures

    from pyengine.freeze import freeze

    directory = tmp_path_factory.mktemp("tiny_model")
    freeze(
        fixtures.write_hf_dir(fixtures.load("llama_tied"), directory / "hf"),
        directory / "tiny.safetensors",
    )
    return directory / "tiny.safetensors"
