"""Requests that schemathesis makes from the OpenAPI document, right and wrong ones: answers that the document allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")
pytest.importorskip("schemathesis", minversion="4.32", reason="schemathesis 4.32 is not installed")

import schemathesis

from pyengine import Engine
from pyengine.serve.app import App
from pyengine.serve.models import Models, ServedModel
from pyengine.serve.routes import ROUTES
from pyengine.serve.settings import Settings

CHECKS = [  # not that all that fits the document is accepted: what a model can take is not said in it
    getattr(schemathesis.checks, name)
    for name in (
        "allow_header_conformance", "content_type_conformance", "negative_data_rejection", "not_a_server_error",
        "response_schema_conformance", "status_code_conformance",
    )
]  # fmt: skip
RIGHT, WRONG = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
PATHS = [(path, method) for path, methods in ROUTES.items() for method in methods]
OPERATIONS = [(*one, RIGHT) for one in PATHS] + [(*one, WRONG) for one in PATHS if one[1] == "POST"]
N_EXAMPLES = 20  # of each kind and endpoint


@pytest.fixture(scope="module")
def api(chat_model: Path) -> Iterator[Any]:
    with Engine(chat_model, n_ctx=64, max_sequences=8) as engine:
        app = App(Settings(log_format="none"))
        app.start(Models([ServedModel("tiny", engine)]))
        yield schemathesis.openapi.from_asgi("/openapi.json", app)


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS, ids=str)
def test_answers_are_those_of_the_document(api: Any, path: str, method: str, mode: Any) -> None:
    operation = api[path][method]

    @given(operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=N_EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    def check(case: Any) -> None:
        body = case.body
        if isinstance(body, dict) and isinstance(body.get("n"), int) and 2 < body["n"] <= 1024:
            body["n"] = 2  # as right as more of them, and sooner done
        case.call_and_validate(checks=CHECKS)

    check()
