"""What a client is told when something is wrong: a status and OpenAI's error object."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from pyengine.errors import (
    BusyError,
    ContextFullError,
    InvalidArgumentError,
    NotFiniteError,
    OutOfMemoryError,
    PyEngineError,
    TemplateError,
)
from pyengine.sampling import SamplingParams

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}

_WORD = re.compile(r"\w+")
_PARAMETERS = frozenset(field.name for field in fields(SamplingParams))

MAX_TEXT = 2000  # characters of a message or a path: they quote what came, which may be all of a body


class HTTPError(Exception):
    """An answer with a status from 400 on.

    param        the field that is wrong, as a path into the request ("messages[0].content")
    code         a word for programs
    retry_after  seconds after which to try again
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = _cut(message)
        self.param = None if param is None else _cut(param)
        self.code = code
        self.headers = headers
        if retry_after is not None:
            # OpenAI's clients obey both, the finer one first
            milliseconds = max(1, round(retry_after * 1000))
            self.headers += (
                (b"retry-after", b"%d" % max(1, -(-milliseconds // 1000))),
                (b"retry-after-ms", b"%d" % milliseconds),
            )

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        """In the form of /v1/messages, with `param` and `code` beside it."""
        kind = _ANTHROPIC_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        error = {"type": kind, "message": self.message, "param": self.param, "code": self.code}
        return {"type": "error", "error": error, "request_id": request_id}

    def ollama_body(self) -> dict[str, Any]:
        """In the form of /api, with `param` and `code` beside it."""
        return {"error": self.message, "param": self.param, "code": self.code}


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + "…"


def shutting_down() -> HTTPError:
    return HTTPError(503, "the server is shutting down", code="shutting_down", retry_after=5.0)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> HTTPError:
    return HTTPError(400, message, param=param, code=code)


@contextlib.contextmanager
def told_of(param: str) -> Iterator[None]:
    """What the engine raises in this block comes from the field `param`."""
    try:
        yield
    except PyEngineError as error:
        raise http_error(error, param) from None


def parameter_in(message: str) -> str | None:
    """The sampling parameter that a message of the engine's is about: it names it first. Fields have these names."""
    word = _WORD.match(message)
    if word is not None and word[0] in _PARAMETERS:
        return word[0]
    return "structured_outputs" if "structured_outputs" in message else None


def http_error(error: BaseException, param: str | None = None) -> HTTPError:
    """What an exception of the engine means to a client; `param` is the field that it came from."""
    if isinstance(error, HTTPError):
        return error
    if isinstance(error, ContextFullError):
        return bad_request(str(error), param, "context_length_exceeded")
    if isinstance(error, (InvalidArgumentError, TemplateError)):
        return bad_request(str(error), param or parameter_in(str(error)))
    if isinstance(error, NotFiniteError):  # this text, or these penalties: the same request fails again
        return bad_request(str(error), param, "not_finite")
    if isinstance(error, (OutOfMemoryError, MemoryError)):
        return HTTPError(503, str(error) or "out of memory", code="out_of_memory", retry_after=5.0)
    if isinstance(error, BusyError):
        return HTTPError(503, str(error), code="overloaded", retry_after=5.0)
    if isinstance(error, PyEngineError):
        return HTTPError(500, str(error), code="engine_error")
    return HTTPError(500, "internal error; the server's log has more", code="internal_error")
