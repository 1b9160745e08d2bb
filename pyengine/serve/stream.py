"""Streams of server-sent events: what a request says about them."""

from __future__ import annotations

from dataclasses import dataclass

from pyengine.serve.errors import bad_request
from pyengine.serve.fields import BOOLEAN, Fields, Table, object_of, refused

COMMENT = b": still at work\n\n"


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """include_usage: in a last chunk; continuous_usage_stats: what there is so far in the others, too."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


STREAM: Table = {
    "stream": BOOLEAN,
    "stream_options": object_of(
        {
            "include_usage": BOOLEAN,
            "include_obfuscation": refused("events are not padded", False),
            "continuous_usage_stats": BOOLEAN,
        }
    ),
}


def stream_options(fields: Fields) -> StreamOptions | None:
    """None if the answer is wanted whole. Raises HTTPError."""
    wanted = fields.take("stream")
    options = fields.take("stream_options")
    if options is None:
        return StreamOptions() if wanted else None
    if not wanted:
        raise bad_request("stream_options needs stream = true", "stream_options")
    usage, is_continuous = options.take("include_usage"), options.take("continuous_usage_stats")
    if is_continuous and not usage:
        where = "stream_options.continuous_usage_stats"
        raise bad_request(f"{where} needs include_usage = true", where)
    return StreamOptions(usage, is_continuous)
