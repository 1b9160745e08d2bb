"""The server's tests skip, and say why, where its packages are not installed."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
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


TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SHOWN = "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}"
CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ OPENING }}{{ c.function | tojson }}{% endfor %}{% endfor %}"
NAMED_CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' + c.function.arguments | tojson }}{% endfor %}{% endfor %}"
)
CODER_CALLS = (
    "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ '<tool_call>\n<function=' + c.function.name + '>\n' }}"
    "{% for key, value in c.function.arguments | items %}{{ '<parameter=' + key + '>\n' }}{{ value | string }}"
    "{{ '\n</parameter>\n' }}{% endfor %}{{ '</function>\n</tool_call>' }}{% endfor %}{% endfor %}"
)
# In the manner of the models' own: the tools, the calls so far, the conversation.
TOOL_TEMPLATES = {
    "qwen": SHOWN + CALLS.replace("OPENING", "'<tool_call>'") + TURNS,
    "mistral": SHOWN + CALLS.replace("OPENING", "'[TOOL_CALLS]'") + TURNS,
    "llama": SHOWN + CALLS.replace("OPENING", "'<|python_tag|>'") + TURNS,
    "qwen_coder": SHOWN + CODER_CALLS + TURNS,
    "mistral_named": SHOWN + NAMED_CALLS + TURNS,
    "xml": SHOWN + CALLS.replace("OPENING", "'<tool_call><arg_key>'") + TURNS,
    "without_tools": "{# no tools #}" + TURNS,
}


def make_chat_model(directory: Path, template: str, special: tuple[str, ...] = (), n_ctx: int = 512) -> Path:
    """A tiny random Llama with a chat template and a byte-level tokenizer, whose last ids are the special tokens given."""
    from reference import fixtures

    from pyengine.freeze import freeze

    hf = Path(fixtures.write_hf_dir(fixtures.load("llama_tied"), directory / "hf"))
    path = hf / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    config["chat_template"] = template
    path.write_text(json.dumps(config))
    path = hf / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text())
    model = tokenizer["model"]
    for text in special:  # each in the place of a token of two bytes
        last = max(model["vocab"], key=model["vocab"].__getitem__)
        tokenizer["added_tokens"].append(
            {**tokenizer["added_tokens"][0], "id": model["vocab"].pop(last), "content": text}
        )
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) != last]
    path.write_text(json.dumps(tokenizer))
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": n_ctx}))
    freeze(hf, directory / "chat.safetensors")
    return directory / "chat.safetensors"


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose template does not show tools."""
    return make_chat_model(tmp_path_factory.mktemp("chat_model"), TURNS)


@pytest.fixture(scope="session")
def tool_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[str, ...]], Path]:
    """A model with one of TOOL_TEMPLATES and special tokens."""

    @cache
    def make(template: str, special: tuple[str, ...]) -> Path:
        return make_chat_model(tmp_path_factory.mktemp("tool_model"), TOOL_TEMPLATES[template], special, 4096)

    return make
