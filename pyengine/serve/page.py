"""The page at /: one static file, which asks nothing of any other address."""

from __future__ import annotations

import base64
import functools
import hashlib
import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyengine.serve.app import App
    from pyengine.serve.exchange import Exchange

PAGE = os.path.join(os.path.dirname(__file__), "page.html")


@functools.cache
def _page() -> tuple[bytes, list[tuple[bytes, bytes]]]:
    """The file, and headers under which a browser runs this script, this style and nothing else."""
    with open(PAGE, "rb") as file:
        data = file.read()

    def hashes(tag: bytes) -> bytes:
        found = re.findall(rb"<%s>(.*?)</%s>" % (tag, tag), data, re.DOTALL)
        return b" ".join(b"'sha256-" + base64.b64encode(hashlib.sha256(one).digest()) + b"'" for one in found)

    policy = b"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    policy += b"frame-ancestors 'none'; script-src %s; style-src %s" % (hashes(b"script"), hashes(b"style"))
    return data, [
        (b"content-security-policy", policy),
        (b"x-content-type-options", b"nosniff"),
        (b"referrer-policy", b"no-referrer"),
        (b"cache-control", b"no-cache"),
    ]


async def page(app: App, exchange: Exchange) -> None:
    data, headers = _page()
    await exchange.reply(200, data, b"text/html; charset=utf-8", headers)
