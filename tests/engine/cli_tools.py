"""What the tests of the command line share: processes, and models that talk for long."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from reference import fixtures

from pyengine import cpu_watch

TEMPLATE = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def command(*arguments: object) -> list[str]:
    """argv of a process of its own."""
    return [sys.executable, "-m", "pyengine", *map(str, arguments)]


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what steers pyengine, and with `changes`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYENGINE_")}
    return {**clean, "PYTHONUTF8": "1", **changes}


def isolate(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """For commands that run in this process: no model, thread count or instruction set from outside, and a cache of their own."""
    for name in ("PYENGINE_MODEL", "PYENGINE_NUM_THREADS", "PYENGINE_ISA", "PYENGINE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYENGINE_CACHE", str(cache))
    # What this machine has too few CPUs for is no matter here (test_cpu_watch.py); the commands put their own `say` in.
    monkeypatch.setattr(cpu_watch._state, "said", {"threads", "throttling"})
    monkeypatch.setattr(cpu_watch, "say", cpu_watch.say)


def run_process(
    directory: Path, *arguments: object, input: str = "", env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end in `directory` (not the checkout, whose package is not built)."""
    return subprocess.run(
        command(*arguments),
        cwd=directory,
        env=environment() if env is None else env,
        input=input,
        capture_output=True,
        text=True,
        timeout=250,
    )


def write_talker(directory: Path, n_ctx: int = 1 << 18) -> Path:
    """A Hugging Face directory like tiny_model's, with a chat template and a context that is not soon full."""
    fixture = fixtures.load("llama_tied")
    fixture.hf_config["max_position_embeddings"] = n_ctx
    fixtures.write_hf_dir(fixture, directory)
    settings: dict[str, Any] = {
        "chat_template": TEMPLATE,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory
