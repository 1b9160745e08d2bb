"""What `pyengine serve` was told."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Settings:
    """Limits and manners of a server.

    api_keys          who may; none = everybody
    cors_origins      whose pages may, besides our own; "*" = everybody's
    hosts             names under which a browser may know us; none = any (a rebound name could otherwise reach loopback)
    max_queue_tokens  tokens of prompts that wait for their first output token; beyond: 429
    max_exchanges     requests at a time, of any kind; beyond: 503
    max_body_bytes, max_bodies_bytes   of one request, and of all that are being read
    max_stored_responses, max_stored_bytes   of responses that are kept for GET and previous_response_id, for all processes
                      together; 0 responses: none are
    body_timeout      seconds in which a body must be complete
    write_timeout     seconds after which a client that takes nothing of an answer is let go
    comment_interval  seconds between signs of life on a silent stream
    drain_timeout     seconds for running requests after SIGTERM
    log_format        "line", "json" or "none"
    """

    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    max_queue_tokens: int = 65536
    max_exchanges: int = 1024
    max_body_bytes: int = 4 << 20
    max_bodies_bytes: int = 64 << 20
    max_stored_responses: int = 1000
    max_stored_bytes: int = 64 << 20
    body_timeout: float = 60.0
    write_timeout: float = 60.0
    comment_interval: float = 4.0
    drain_timeout: float = 30.0
    log_format: str = "line"
