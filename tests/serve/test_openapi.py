"""/openapi.json: every path, every field that is taken or refused, nothing that points nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from serve.client import Client, serving

from pyengine.serve.openapi import BODIES, document
from pyengine.serve.routes import ROUTES


def test_the_document_has_every_path_and_field(chat_model: Path) -> None:
    async def test(client: Client) -> None:
        answer = await client.get("/openapi.json")
        assert answer.status == 200 and answer.json == document()

    serving(chat_model, test)
    paths, schemas = document()["paths"], document()["components"]["schemas"]
    assert set(paths) == set(ROUTES)
    assert {path for path, methods in ROUTES.items() if "POST" in methods} == set(BODIES)
    for path, table in BODIES.items():
        reference = paths[path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert set(schemas[reference.rpartition("/")[2]]["properties"]) == set(table)


def test_every_reference_leads_somewhere() -> None:
    found = []

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(one for name, one in value.items() if name == "$ref")
            value = list(value.values())
        if isinstance(value, list):
            for one in value:
                walk(one)

    walk(document())
    assert found
    for reference in found:
        at: Any = document()
        for name in reference.removeprefix("#/").split("/"):
            at = at[name]
    assert json.loads(json.dumps(document())) == document()


def test_every_field_of_a_table_is_read(chat_model: Path) -> None:
    """With a value that its schema allows: it may be refused, but not for want of a reader."""

    def value(schema: dict[str, Any]) -> Any:
        if "enum" in schema:
            return schema["enum"][0] if schema["enum"] else None
        if "anyOf" in schema:
            return value(schema["anyOf"][0])
        kind = schema.get("type", "object")
        kind = kind[0] if isinstance(kind, list) else kind
        if kind == "object":
            return {name: value(schema["properties"][name]) for name in schema.get("required", ())}
        if kind == "array":
            return [value(schema["items"])] * schema.get("minItems", 0)
        values = {"string": "a", "boolean": False, "integer": schema.get("minimum", 1), "number": schema.get("maximum")}
        return values[kind]

    async def test(client: Client) -> None:
        short = {"max_tokens": 1, "max_output_tokens": 1}
        for path, table in BODIES.items():
            if path == "/tokenize":  # its fields go with text, or with messages
                continue
            body = {
                name: short.get(name, value(kind.schema))
                for name, kind in table.items()
                if kind.is_needed or name in short
            }
            for name, kind in table.items():
                answer = await client.post(path, {**body, name: value(kind.schema)})
                assert answer.status == 200 or b"has no place here" not in answer.body, (path, name)

    serving(chat_model, test)
