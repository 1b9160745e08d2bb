"""Who may: keys, origins, host names."""

from __future__ import annotations

import base64
import hashlib
import hmac
from urllib.parse import urlsplit

from pyengine.serve.errors import HTTPError
from pyengine.serve.exchange import Exchange
from pyengine.serve.settings import Settings


class Access:
    """Checks of one server. Keys are compared by digest, each with each, in a time that does not depend on them."""

    def __init__(self, settings: Settings) -> None:
        self._digests = [_digest(key) for key in settings.api_keys]
        self._origins = settings.cors_origins
        self._hosts = settings.hosts

    def check_host(self, exchange: Exchange) -> None:
        """A request says once for whom it is (RFC 9112, 3.2): of two names a proxy before us may go by the other one. And a page
        of another site may have its name resolve to our address: its browser then calls us by that name."""
        if exchange.n_hosts > 1 or (exchange.n_hosts == 0 and exchange.http_version == "1.1"):
            raise HTTPError(400, f"a request has one host header, this one has {exchange.n_hosts}", code="bad_host")
        if self._hosts and _host_name(exchange.headers.get("host", "")) not in self._hosts:
            raise HTTPError(403, "this host name is not one of this server's", code="unknown_host")

    def cors_headers(self, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        """For a page of another site that may read our answers. Raises HTTPError 403 for one that may not."""
        origin = exchange.headers.get("origin")
        if origin is None or _netloc(origin) == exchange.headers.get("host"):
            return []
        if "*" not in self._origins and origin not in self._origins:
            raise HTTPError(403, "pages of this origin may not use this server (--cors-origin)", code="origin_refused")
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-expose-headers", b"x-request-id, retry-after, retry-after-ms"),
            (b"vary", b"origin"),
        ]

    @staticmethod
    def preflight_headers(exchange: Exchange) -> list[tuple[bytes, bytes]]:
        asked = exchange.headers.get("access-control-request-headers", "")
        return [
            (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
            (b"access-control-allow-headers", asked.encode("latin-1")),
            (b"access-control-max-age", b"600"),
        ]

    def check_key(self, exchange: Exchange) -> bytes | None:
        """The digest of the caller's key, None where none is needed. Raises HTTPError 401."""
        if not self._digests:
            return None
        authorization = exchange.headers.get("authorization")
        given = exchange.headers.get("x-api-key", "") if authorization is None else _given_key(authorization)
        digest = _digest(given)
        equal = [hmac.compare_digest(digest, known) for known in self._digests]  # every one, whichever is right
        if not any(equal):
            # a browser asks its user (the key is the password); programs send a bearer token
            scheme = b'Basic realm="pyengine"' if exchange.path == "/" else b'Bearer realm="pyengine"'
            raise HTTPError(
                401, "wrong or missing API key", code="invalid_api_key", headers=((b"www-authenticate", scheme),)
            )
        return digest


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given_key(authorization: str) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8", "replace").partition(":")[2]
        except ValueError:  # binascii.Error, or letters beyond ASCII
            return ""
    return value.strip() if scheme.lower() == "bearer" else ""


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # [ without ]
        return None


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
