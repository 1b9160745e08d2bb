"""The files of docs/scaling/ that need Ray: what its engines answer is what an engine alone does."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyengine import Engine

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("uvicorn", reason="the extra serve is not installed")

import ray
from serve.test_server import HELLO, post

from pyengine.serve.server import reserve

SCALING = Path(__file__).parents[2] / "docs" / "scaling"
pytestmark = pytest.mark.filterwarnings("default")  # Ray's own


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """On this machine; its CPUs are numbers that Ray reserves, so their count here says nothing about the machine's. Ray's
    workers import from the directory where it is started, and in a checkout that is the package without its core."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cluster"))
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_rows_of_a_data_set(chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.data", reason="Ray Data is not installed, or pandas")
    prompts = [f"Number {i}" for i in range(7)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": one, "n": 5}) + "\n" for one in prompts))
    options = ["--max-tokens", "6", "--batch", "3"]
    given = [str(chat_model), str(tmp_path / "prompts.jsonl"), str(tmp_path / "answers")]
    monkeypatch.setattr(sys, "argv", ["ray_data.py", *given, *options])
    runpy.run_path(str(SCALING / "ray_data.py"), run_name="__main__")
    lines = [line for path in (tmp_path / "answers").iterdir() for line in path.read_text().splitlines()]
    rows = {row["prompt"]: row for row in map(json.loads, lines)}
    with Engine(chat_model) as engine:
        for prompt, result in zip(prompts, engine.generate(prompts, max_tokens=6), strict=True):
            assert rows[prompt] == {"prompt": prompt, "n": 5, "text": result.text}


@pytest.mark.usefixtures("cluster")
def test_replicas_of_the_server(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve: Any = pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    monkeypatch.setitem(os.environ, "PYENGINE_MODEL", str(chat_model))
    app = runpy.run_path(str(SCALING / "ray_serve.py"), run_name="__main__")["app"]
    with reserve("127.0.0.1", 0, shared=True) as reserved:  # nobody else gets it; Ray listens as one of those who share
        port = reserved.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        try:
            serve.run(app)
            answers = [post(port, "/v1/chat/completions", HELLO, **{"x-session-id": str(i)}) for i in range(6)]
        finally:
            serve.shutdown()
    assert all(status == 200 for status, _ in answers)
    with Engine(chat_model) as engine:
        alone = engine.chat(HELLO["messages"], max_tokens=HELLO["max_tokens"], seed=HELLO["seed"])
    assert {answer["choices"][0]["message"]["content"] for _, answer in answers} == {alone.text}
