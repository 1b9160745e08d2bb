"""Streams of server-sent events: what a request says about them."""

from __future__ import annotations

from dataclasses import dataclass

from pyengine.serve.errors import bad_request
from pyengine.serve.fields import Fields

COMMENT = b": still at work\n\n"


@dataclass(frozen=True, slots=True)
class StreamOptions:
    include_usage: bool = False


def stream_options(fields: Fields) -> StreamOptions | None:
    """None if the answer is wanted whole. Raises HTTPError."""
    wanted = fields.boolean("stream")
    options = fields.object_("stream_options")
    if options is None:
        return StreamOptions() if wanted else None
    if not wanted:
        raise bad_request("stream_options needs stream = true", "stream_options")
    out = StreamOptions(options.boolean("include_usage"))
    options.refuse("include_obfuscation", "events are not padded", False)
    options.refuse("continuous_usage_stats", "usage comes once, at the end", False)
    options.end()
    return out
