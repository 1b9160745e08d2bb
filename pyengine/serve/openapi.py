"""/openapi.json: what this server takes and answers, written from the tables by which requests are checked."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from pyengine import __version__
from pyengine.serve import (
    anthropic_fields,
    chat,
    completions,
    embeddings,
    infill,
    ollama_fields,
    rerank,
    response_fields,
    stored_responses,
    tokens,
)
from pyengine.serve.fields import STRING, Table, schema_of
from pyengine.serve.routes import ROUTES

if TYPE_CHECKING:
    from pyengine.serve.app import App
    from pyengine.serve.exchange import Exchange

BODIES: dict[str, Table] = {
    "/infill": infill.FIELDS,
    "/tokenize": tokens.TOKENIZE,
    "/detokenize": tokens.DETOKENIZE,
    "/api/chat": ollama_fields.CHAT,
    "/api/embed": ollama_fields.EMBED,
    "/api/generate": ollama_fields.GENERATE,
    "/api/show": ollama_fields.SHOW,
    "/v1/chat/completions": chat.FIELDS,
    "/v1/completions": completions.FIELDS,
    "/v1/embeddings": embeddings.FIELDS,
    "/v1/messages": anthropic_fields.FIELDS,
    "/v1/messages/count_tokens": anthropic_fields.COUNT,
    "/v1/rerank": rerank.FIELDS,
    "/v1/reranking": rerank.FIELDS,
    "/v2/rerank": rerank.FIELDS,
    "/v1/responses": response_fields.FIELDS,
    "/v1/responses/input_tokens": response_fields.FIELDS,
}
_ONE_RESPONSE = "/v1/responses/{id}"
_DELETE_RESPONSE = f"DELETE {_ONE_RESPONSE}"  # whose answer is none of the path's GET
QUERIES: dict[str, Table] = {
    "/props": {"model": STRING},
    _ONE_RESPONSE: stored_responses.RETRIEVE,
    _DELETE_RESPONSE: stored_responses.DELETE,
    f"{_ONE_RESPONSE}/input_items": stored_responses.INPUT_ITEMS,
}
_WORDS = {
    "/": "The page.",
    "/health": "Whether requests are taken.",
    "/metrics": "Metrics for Prometheus.",
    "/props": "A model's template, context and defaults.",
    "/openapi.json": "This document.",
    "/infill": "What belongs between two texts, in llama.cpp's form.",
    "/tokenize": "Text, or messages, to token ids.",
    "/detokenize": "Token ids to text.",
    "/api/chat": "The assistant's answer to messages, in ollama's form.",
    "/api/embed": "A vector for each input, in ollama's form.",
    "/api/generate": "The answer to a prompt, in ollama's form.",
    "/api/ps": "The models, in ollama's form.",
    "/api/show": "One model, in ollama's form.",
    "/api/tags": "The models, in ollama's form.",
    "/api/version": "Which version of ollama's form this is.",
    "/v1/models": "The models.",
    "/v1/models/{id}": "One model.",
    "/v1/chat/completions": "The assistant's answer to messages.",
    "/v1/completions": "Prompts, continued.",
    "/v1/embeddings": "A vector for each input.",
    "/v1/messages": "The assistant's answer to messages, in Anthropic's form.",
    "/v1/messages/count_tokens": "How many tokens the prompt of such a request has.",
    "/v1/rerank": "Documents by how well they answer a query.",
    "/v1/reranking": "The same, by llama.cpp's name.",
    "/v2/rerank": "The same, by Cohere's name.",
    "/v1/responses": "A response to text or messages.",
    "/v1/responses/input_tokens": "How many tokens the prompt of such a request has.",
    _ONE_RESPONSE: "A response that is kept.",
    _DELETE_RESPONSE: "Keep it no longer.",
    f"{_ONE_RESPONSE}/input_items": "What it was computed from.",
}
_JSON, _TEXT, _EVENTS, _LINES = "application/json", "text/plain", "text/event-stream", "application/x-ndjson"


def _object(*needed: str, **properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": [*needed, *properties]}


def _array(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _const(value: str | bool) -> dict[str, Any]:
    return {"const": value}


_INTEGER, _STRING = {"type": "integer"}, {"type": "string"}
_MODEL = _object(id=_STRING, object=_const("model"), created=_INTEGER, owned_by=_STRING, max_model_len=_INTEGER)
_MODEL["properties"] |= {"parent": _STRING, "root": _STRING}  # of an adapter
_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_VECTOR = {"anyOf": [_array({"type": "number"}), _STRING]}
_EMBEDDING = _object(object=_const("embedding"), index=_INTEGER, embedding=_VECTOR)


_RANKED = _object(index=_INTEGER, relevance_score={"type": "number"})
_RANKING = _object("usage", id=_STRING, model=_STRING, results=_array(_RANKED))


def _outputs(kind: str, **choice: dict[str, Any]) -> dict[str, Any]:
    reason = {"enum": ["stop", "length", "tool_calls"]}
    choices = _array(_object("logprobs", index=_INTEGER, finish_reason=reason, **choice))
    return _object(id=_STRING, object=_const(kind), created=_INTEGER, model=_STRING, choices=choices, usage=_USAGE)


_RESPONSE = _object("output", "usage", id=_STRING, object=_const("response"), status=_STRING, store={"type": "boolean"})
_CARD = _object(name=_STRING, model=_STRING, size=_INTEGER, digest=_STRING, details=_object())
ANSWERS: dict[str, dict[str, Any]] = {
    "/api/chat": _object(model=_STRING, created_at=_STRING, message=_object("content"), done=_const(True), done_reason=_STRING),
    "/api/embed": _object(model=_STRING, embeddings=_array(_array({"type": "number"})), prompt_eval_count=_INTEGER),
    "/api/generate": _object(model=_STRING, created_at=_STRING, response=_STRING, done=_const(True), done_reason=_STRING),
    "/api/ps": _object(models=_array(_CARD)),
    "/api/show": _object(template=_STRING, details=_object(), model_info=_object(), capabilities=_array(_STRING)),
    "/api/tags": _object(models=_array(_CARD)),
    "/api/version": _object(version=_STRING),
    "/health": _object(status={"enum": ["ok", "starting", "draining"]}),
    "/props": _object("n_ctx", "vocab_size", "chat_template", "default_generation_settings", model=_STRING),
    "/openapi.json": _object("openapi", "info", "paths"),
    "/infill": {"type": "object"},  # response_fields says what it has
    "/tokenize": _object("tokens", count=_INTEGER, max_model_len=_INTEGER),
    "/detokenize": _object(content=_STRING, prompt=_STRING),
    "/v1/models": _object(object=_const("list"), data=_array(_MODEL)),
    "/v1/models/{id}": _MODEL,
    "/v1/chat/completions": _outputs("chat.completion", message=_object("content", role=_const("assistant"))),
    "/v1/completions": _outputs("text_completion", text=_STRING),
    "/v1/embeddings": _object("usage", object=_const("list"), data=_array(_EMBEDDING), model=_STRING),
    "/v1/rerank": _RANKING,
    "/v1/reranking": _RANKING,
    "/v2/rerank": _RANKING,
    "/v1/messages": _object(
        "stop_reason",
        "stop_sequence",
        id=_STRING,
        type=_const("message"),
        content=_array(_object(type=_STRING)),
        usage=_object(),
    ),
    "/v1/messages/count_tokens": _object(input_tokens=_INTEGER),
    "/v1/responses": _RESPONSE,
    "/v1/responses/input_tokens": _object(object=_const("response.input_tokens"), input_tokens=_INTEGER),
    _ONE_RESPONSE: _RESPONSE,
    _DELETE_RESPONSE: _object(id=_STRING, object=_const("response"), deleted={"const": True}),
    f"{_ONE_RESPONSE}/input_items": _object(
        "first_id",
        "last_id",
        object=_const("list"),
        data=_array(_object(id=_STRING, type=_STRING)),
        has_more={"type": "boolean"},
    ),
}
_NULLABLE = {"type": ["string", "null"]}
_ERROR = _object(
    error={
        **_object("param", "code", message=_STRING, type=_STRING),
        "properties": {
            "message": _STRING,
            "type": _STRING,
            "param": _NULLABLE,
            "code": _NULLABLE,
        },
    }
)
_ANTHROPIC_ERROR = _object(type=_const("error"), request_id=_STRING, **_ERROR["properties"])
_OLLAMA_ERROR = _object(error=_STRING, param=_NULLABLE, code=_NULLABLE)
_ERRORS = {
    "400": "A field that is wrong or not supported: `param` names it.",
    "401": "No key, or a wrong one.",
    "403": "A page of another site, or another host's name.",
    "404": "No such model, or response.",
    "408": "The body took too long.",
    "413": "The body is too long.",
    "415": "The body is compressed.",
    "429": "The queue is full: `retry-after` says when to try again.",
    "500": "An error of the engine.",
    "503": "Starting, ending, or too much at a time.",
}


def _answers(path: str) -> dict[str, Any]:
    takes_body = path in BODIES
    forms = {"/v1/messages": "AnthropicError", "/api/": "OllamaError"}
    error = next((name for begin, name in forms.items() if path.startswith(begin)), "Error")
    content: dict[str, Any] = {_JSON: {"schema": ANSWERS[path]}} if path in ANSWERS else {}
    if takes_body and "stream" in BODIES[path]:
        content[_LINES if path.startswith("/api/") else _EVENTS] = {"schema": _STRING}
    if path == "/metrics":
        content[_TEXT] = {"schema": _STRING}
    if path == "/":
        content["text/html"] = {"schema": _STRING}
    answers: dict[str, Any] = {"200": {"description": "The answer.", "content": content}}
    for status, words in _ERRORS.items():
        if takes_body or status not in ("408", "413", "415", "429"):
            answers[status] = {
                "description": words,
                "content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{error}"}}},
            }
    if path == "/health":
        answers["503"] = answers["200"]
    return answers


def _operation(path: str, method: str) -> dict[str, Any]:
    path = f"{method} {path}" if f"{method} {path}" in _WORDS else path
    operation: dict[str, Any] = {"summary": _WORDS[path], "responses": _answers(path)}
    if path in BODIES:
        schema = {"$ref": f"#/components/schemas/{_name(path)}"}
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": schema}}}
    parameters = [
        {"name": name, "in": "query", "required": False, "schema": kind.schema}
        for name, kind in QUERIES.get(path, {}).items()
    ]
    if "{id}" in path:
        parameters.append({"name": "id", "in": "path", "required": True, "schema": _STRING})
    return operation | ({"parameters": parameters} if parameters else {})


def _name(path: str) -> str:
    """Of a schema: "/v1/chat/completions" -> "ChatCompletionsRequest"."""
    return "".join(part.capitalize() for part in path.removeprefix("/v1").split("/")) + "Request"


@cache
def document() -> dict[str, Any]:
    paths = {path: {method.lower(): _operation(path, method) for method in methods} for path, methods in ROUTES.items()}
    return {
        "openapi": "3.1.0",
        "info": {"title": "pyengine", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {
                "Error": _ERROR,
                "AnthropicError": _ANTHROPIC_ERROR,
                "OllamaError": _OLLAMA_ERROR,
                **{_name(path): schema_of(table) for path, table in BODIES.items()},
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


async def openapi(app: App, exchange: Exchange) -> None:
    await exchange.reply_json(document())
