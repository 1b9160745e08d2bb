"""One line of the log for every request, on stderr."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from pyengine.serve.exchange import Exchange


def access_line(log_format: str, exchange: Exchange) -> None:
    """log_format: "line", "json" or "none"."""
    if log_format == "none":
        return
    entry: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "client": exchange.client,
        "method": exchange.method,
        "path": exchange.path,
        "status": exchange.status,
        "ms": round((time.monotonic() - exchange.started) * 1e3),
        "id": exchange.id,
        **exchange.notes,
    }
    print(json.dumps(entry) if log_format == "json" else _line(entry), file=sys.stderr, flush=True)


def _line(entry: dict[str, Any]) -> str:
    head = f"{entry.pop('time')} {entry.pop('client')} {entry.pop('method')} {_shown(entry.pop('path'))}"
    head += f" {entry.pop('status')} {entry.pop('ms')}ms"
    return " ".join([head, *(f"{name}={_shown(value)}" for name, value in entry.items())])


def _shown(value: Any) -> str:
    """No newline or escape sequence of a stranger's reaches a terminal."""
    text = str(value)
    return text if text.isascii() and text.isprintable() and " " not in text else json.dumps(text)
