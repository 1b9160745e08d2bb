"""The server's tests skip, and say why, where its packages are not installed."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

MISSING = [name for name in ("uvicorn", "httptools", "prometheus_client") if find_spec(name) is None]

collect_ignore = [] if not MISSING else ["client.py"]


@pytest.fixture(autouse=True)
def _needs_the_extra(request: pytest.FixtureRequest) -> None:
    if MISSING and "async_engine" not in request.module.__name__:
        pytest.skip(f"the extra serve is not installed: {', '.join(MISSING)} missing")


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a chat template (ChatML) and a byte-level tokenizer."""
    import json

    from reference import fixtures

    from pyengine.freeze import freeze

    directory = tmp_path_factory.mktemp("chat_model")
    hf = fixtures.write_hf_dir(fixtures.load("llama_tied"), directory / "hf")
    path = Path(hf) / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    config["chat_template"] = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    path.write_text(json.dumps(config))
    freeze(hf, directory / "chat.safetensors")
    return directory / "chat.safetensors"
