"""The command `pyengine serve`, over real sockets."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5, "seed": 1}


@contextmanager
def server(*options: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server on a free port; (its process, the port) once it is ready."""
    import os

    command = [sys.executable, "-I", "-m", "pyengine", "serve", "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if " at http://" in line:
                break
        else:
            raise AssertionError("".join(lines))
        yield process, int(line.split("http://")[1].split(" ")[0].rsplit(":", 1)[1])
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def post(port: int, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request("POST", path, json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    try:
        connection.request("GET", path)
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def test_the_command_answers_streams_and_ends(chat_model: Path) -> None:
    with server("-m", f"mine={chat_model}", "--log-format", "json") as (process, port):
        status, whole = post(port, "/v1/chat/completions", HELLO)
        assert status == 200 and whole["model"] == "mine"
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/chat/completions", json.dumps({**HELLO, "stream": True}))
        response = connection.getresponse()
        assert response.getheader("content-type", "").startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.read().decode().split("\n\n") if line]
        parts = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
        assert lines[-1] == "[DONE]" and "".join(parts) == whole["choices"][0]["message"]["content"]
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None
        log = [json.loads(line) for line in process.stderr]
        assert [entry["status"] for entry in log] == [200, 200] and log[0]["model"] == "mine"
        assert process.wait() == 0


def test_a_running_stream_ends_before_the_server_does(chat_model: Path) -> None:
    with server("-m", str(chat_model)) as (process, port):
        body = {**HELLO, "max_tokens": 400, "ignore_eos": True, "stream": True}
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        response = connection.getresponse()
        response.readline()
        process.send_signal(signal.SIGINT)
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()
        assert process.wait() == 0


def test_a_client_that_resets_its_connection_is_noticed(chat_model: Path) -> None:
    with server("-m", str(chat_model)) as (process, port):
        with socket.create_connection(("127.0.0.1", port)) as client:
            body = json.dumps(
                {"prompt": "a", "max_tokens": 450, "ignore_eos": True, "n": 64, "temperature": 1}
            ).encode()
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n\r\n" % len(body)
            )
            client.sendall(body)
        assert process.stderr is not None
        assert "aborted=True" in process.stderr.readline()
        with socket.create_connection(("127.0.0.1", port)) as nonsense:
            nonsense.sendall(b"\x16\x03\x01 what\r\n\r\n")
            assert nonsense.recv(100).startswith(b"HTTP/1.1 400")
        assert post(port, "/v1/chat/completions", HELLO)[0] == 200


def test_keys_from_a_file_and_from_the_environment(chat_model: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\n\ntwo\n")
    with server("-m", str(chat_model), "--api-key-file", str(tmp_path / "keys")) as (_, port):
        assert post(port, "/v1/chat/completions", HELLO)[0] == 401
        assert post(port, "/v1/chat/completions", HELLO, authorization="Bearer two")[0] == 200
    with server("-m", str(chat_model), "--host", "0.0.0.0", PYENGINE_API_KEY="three") as (_, port):
        assert post(port, "/v1/chat/completions", HELLO, authorization="Bearer one")[0] == 401
        assert post(port, "/v1/chat/completions", HELLO, authorization="Bearer three")[0] == 200


def test_what_is_wrong_at_the_start_is_one_clear_line(
    chat_model: Path, tool_model: Callable[..., Path], tmp_path: Path
) -> None:
    other_model = tool_model("mistral", ("[TOOL_CALLS]",))
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            (["--port", port], 1, "another server has it"),
            (["--port", "99999"], 2, "from 0 to 65535"),
            (["-m", str(tmp_path / "nothing")], 1, "there is no model at"),
            (["-m", str(tmp_path / "bad.safetensors"), "--port", "0"], 1, "bad.safetensors"),
            (["--host", "0.0.0.0"], 2, "--insecure"),
            (["model.gguf"], 2, "a model is given with -m model.gguf"),
            (["--no-such-option"], 2, "unrecognized arguments: --no-such-option ("),
            (["--api-key=secret"], 2, "there is no option --api-key: keys are taken from PYENGINE_API_KEY"),
            (["-ngl", "99"], 2, "there is no option -ngl: the engine computes on CPUs"),
            (["--lora-modules", "a=b"], 2, "there is no option --lora-modules: use --lora NAME=DIR"),
            (["--speculative", "often"], 2, "'often' is not auto, off, or a number from 0 to 24"),
            (["--speculative", "25"], 2, "'25' is not auto, off, or a number from 0 to 24"),
            (["--speculative", "0", "--draft-model", str(chat_model)], 2, "--draft-model would have no effect"),
            (["-m", str(chat_model), "--draft-model", str(tmp_path / "nothing")], 1, "there is no model at"),
            (["-m", f"a={chat_model}", "--draft-model", f"b={chat_model}"], 2, "for which model, NAME=PATH"),
            (["-m", f"a={chat_model}", "-m", f"b={chat_model}", "--draft-model", str(chat_model)], 2, "NAME=...: a, b"),
            (["-m", str(chat_model), *2 * ["--draft-model", str(chat_model)]], 2, "its model has one"),
            (["-m", str(chat_model), "--draft-model", str(other_model), "--port", "0"], 1, "another vocabulary"),
            (["--max-stored-responses", "-1"], 2, "-1 is not a whole number from 0"),
            (["-m", "name="], 2, "-m name=: there is no path"),
            (["-m", ""], 2, "-m '': there is no path"),
            (["--cors-origin", "https://a.example/"], 2, "'https://a.example/' is no origin"),
            (["--cors-origin", "a.example"], 2, "'a.example' is no origin"),
            (["--cors-origin", "http://["], 2, "'http://[' is no origin"),
            (["--drain-timeout", "nan"], 2, "nan is not a number of seconds"),
            (["--api-key-file", str(tmp_path / "empty")], 1, "holds no key"),
            (["--api-key-file", str(tmp_path / "nothing")], 1, "No such file"),
            (["-m", f"a={chat_model}", "-m", f"a={chat_model}", "--port", "0"], 1, "two models are called 'a'"),
        ]
        for options, code, words in cases:
            command = [sys.executable, "-I", "-m", "pyengine", "serve", *options]
            result = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert (result.returncode, result.stdout) == (code, ""), result
            assert words in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_draft_model_guesses_and_changes_no_byte(chat_model: Path) -> None:
    answers = []
    for options in (["--speculative", "off"], ["--draft-model", f"a={chat_model}"]):  # itself: it knows
        with server("-m", f"a={chat_model}", *options) as (_, port):
            status, answer = post(port, "/v1/chat/completions", {**HELLO, "max_tokens": 40, "ignore_eos": True})
            assert status == 200
            answers.append(answer["choices"])
            assert ("draft_n" in answer["timings"]) == ("--draft-model" in options)
            metrics = get(port, "/metrics")
            for name, field in (("draft", "draft_n"), ("accepted", "draft_n_accepted")):
                line = (
                    f'vllm:spec_decode_num_{name}_tokens_total{{model_name="a"}} {answer["timings"].get(field, 0)}.0\n'
                )
                assert line in metrics, metrics
    assert answers[0] == answers[1]


def test_several_models_have_a_route_each(chat_model: Path, tiny_model: Path) -> None:
    with server("-m", f"a={chat_model}", "-m", f"b={tiny_model}") as (_, port):
        assert post(port, "/v1/chat/completions", HELLO)[1]["model"] == "a"
        assert post(port, "/v1/chat/completions", {**HELLO, "model": "b"})[1]["model"] == "b"
        assert post(port, "/v1/chat/completions", {**HELLO, "model": "c"})[0] == 404
