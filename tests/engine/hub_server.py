"""A small server on the loopback that speaks as much of the hub's protocol as fetching a model needs: a repository's listing, and
its files by revision."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """repos: {"org/name": {commit: {file: bytes}}}; refs: {"org/name": {branch: commit}}.

    answers: {part of a path: (status, X-Error-Code or "")}, refused before anything else; cut: files of which half is sent
    requests: (method, path) of what was asked, in order"""

    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refs: dict[str, dict[str, str]] = field(default_factory=dict)
    answers: dict[str, tuple[int, str]] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)
    requests: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""

    def add(self, repo: str, files: dict[str, bytes], branch: str = "main") -> str:
        """A new commit of a branch."""
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.repos.setdefault(repo, {})[commit] = files
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    def fetched(self) -> list[str]:
        """Names of the files whose bytes were asked for."""
        return [path.rpartition("/")[2] for method, path in self.requests if method == "GET" and "/resolve/" in path]


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.0"  # a connection a request: no thread waits for a next one

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append((self.command, path))
            for part, (status, code) in hub.answers.items():
                if part in path:
                    return self.send(status, b"{}", {"X-Error-Code": code} if code else {})
            if path.startswith("/api/models/"):
                repo, _, revision = path.removeprefix("/api/models/").partition("/revision/")
                return self.listing(repo, revision or "main")
            repo, _, rest = path[1:].partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.file(repo, revision, name)

        def commit(self, repo: str, revision: str) -> str | None:
            """Answers with the error if there is no such commit."""
            if repo not in hub.repos:
                self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
                return None
            commit = hub.refs[repo].get(revision, revision)
            if commit not in hub.repos[repo]:
                self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                return None
            return commit

        def listing(self, repo: str, revision: str) -> None:
            commit = self.commit(repo, revision)
            if commit is not None:
                siblings = [{"rfilename": name} for name in hub.repos[repo][commit]]
                self.send(
                    200, json.dumps({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}).encode(), {}
                )

        def file(self, repo: str, revision: str, name: str) -> None:
            commit = self.commit(repo, revision)
            if commit is None:
                return
            data = hub.repos[repo][commit].get(name)
            if data is None:
                return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            headers = {
                "X-Repo-Commit": commit,
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Linked-Size": str(len(data)),
            }
            self.send(200, data[: len(data) // 2] if name in hub.cut and self.command == "GET" else data, headers)

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
