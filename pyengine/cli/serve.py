"""`pyengine serve`: an OpenAI-compatible server, with a page."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pyengine.cli import UsageError, options
from pyengine.cli.errors import MissingExtraError
from pyengine.errors import InvalidArgumentError, MissingFileError, PyEngineError

if TYPE_CHECKING:
    from pyengine.engine import Engine
    from pyengine.serve.models import Models
    from pyengine.serve.server import Runner
    from pyengine.serve.settings import Settings
    from pyengine.serve.siblings import Siblings

    NamedPaths = list[tuple[str | None, argparse.Namespace]]  # the name, and options with one model

EPILOG = f"""\
Open the address that it prints in a browser for a chat; programs use the same address with /v1.

examples:
  pyengine serve
  pyengine serve -m model.safetensors --lora poems=adapters/poems --port 9000
  pyengine serve -m small=a.safetensors -m large=b.gguf
  pyengine serve -m large.gguf --draft-model small.gguf
  PYENGINE_API_KEY=secret pyengine serve --host 0.0.0.0

{options.ENVIRONMENT}  PYENGINE_API_KEY      the key that callers must give, when there is no --api-key-file
"""

LOOPBACK = ("localhost", "127.0.0.1", "::1")


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("serve", EPILOG, is_server=True)
    group = parser.add_argument_group("models")
    group.add_argument(
        "-m",
        "--model",
        action="append",
        metavar="[NAME=]PATH",
        help="a model, under a name of yours or its own; may be repeated, and the first answers requests that name none. "
        "Default: PYENGINE_MODEL, else the small model that ships with the package",
    )
    options.add_lora_option(
        group,
        "an adapter (LoRA, PEFT's directory) beside the one model, answered for under its own name; its product is multiplied by "
        "SCALE; may be repeated",
        many=True,
    )
    options.add_prompt_cache_option(
        group,
        "a beginning of prompts, computed before by the one model (--prompt-cache of generate and chat, Engine.save_prefix), at "
        "which requests without cache_salt go on; may be repeated",
        many=True,
    )
    options.add_threads_option(group)
    options.add_isa_option(group)
    _add_speculation_options(parser)
    options.add_context_options(parser)
    _add_load_options(parser)
    _add_access_options(parser)
    return parser


def _add_speculation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("speculation", "tokens that are guessed ahead change no byte of an answer")
    group.add_argument(
        "--draft-model",
        action="append",
        metavar="[NAME=]PATH",
        help="a smaller model with the same vocabulary that guesses for the model of that name, or for the only one",
    )
    group.add_argument(
        "--speculative",
        type=options.speculative,
        default="auto",
        metavar="MODE",
        help="auto (default), off, or at most so many tokens a step",
    )


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--processes",
        type=options.positive,
        metavar="N",
        help="processes that share the address and the mapped models, each on CPUs of its own; limits are for each "
        "of them, unless they say otherwise. Default: this one",
    )
    group.add_argument("--parallel", type=options.positive, metavar="N", help="outputs computed together; default: 64")
    group.add_argument(
        "--max-queue-tokens",
        type=options.positive,
        metavar="N",
        help="prompt tokens that may wait; more are told to come back later. Default: 65536",
    )
    group.add_argument(
        "--max-kv-bytes", type=options.positive, metavar="N", help="memory for keys and values of a model"
    )
    group.add_argument(
        "--max-stored-responses",
        type=options.natural,
        metavar="N",
        help="responses that are kept for previous_response_id, in memory, for all processes together; 0 = none. Default: 1000",
    )
    group.add_argument(
        "--max-stored-bytes", type=options.positive, metavar="N", help="bytes of these together; default: 64 MiB"
    )
    group.add_argument("--max-body-bytes", type=options.positive, metavar="N", help="longest request; default: 4 MiB")
    group.add_argument(
        "--drain-timeout",
        type=options.seconds,
        metavar="S",
        help="seconds for running requests at the end; default: 30",
    )


def _origin(text: str) -> str:
    """argparse type: an origin as browsers write it ("null" of a file), or all; another text would never be equal to one."""
    from urllib.parse import urlsplit

    try:
        scheme, place, *_ = urlsplit(text)
    except ValueError:  # [ without ]
        scheme = place = ""
    if text not in ("*", "null") and (not place or text != f"{scheme}://{place}"):
        raise argparse.ArgumentTypeError(f"{text!r} is no origin, as in https://a.example or http://localhost:3000")
    return text


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("access")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on; default: this machine only")
    group.add_argument("--port", type=int, default=8080, metavar="N", help="default: 8080; 0 = any free one")
    group.add_argument("--api-key-file", metavar="FILE", help="keys, one a line; callers must give one of them")
    group.add_argument("--insecure", action="store_true", help="listen to other machines without a key")
    group.add_argument(
        "--cors-origin",
        type=_origin,
        action="append",
        metavar="ORIGIN",
        help="pages of this origin may call; '*' = all",
    )
    group.add_argument(
        "--log-format", choices=("line", "json", "none"), default="line", help="a line on stderr for every request"
    )


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    settings = _settings(args)
    options.check_draft_model(args)
    named = _named_paths(args)
    if args.prompt_cache and len(named) > 1:
        raise UsageError("--prompt-cache: keys and values are of one model, and -m names several")
    if args.lora and len(named) > 1:
        raise UsageError("--lora: adapters are for one model, and -m names several")
    try:
        from pyengine.serve import server
    except ImportError as error:
        raise MissingExtraError(f"{error.name} is missing: pip install 'pyengine-lm[serve]'") from None
    if args.processes is not None:
        return _run_processes(args, settings, named)
    sock = server.listen(args.host, args.port)
    _runner(args, settings, named, sock, None).run(lambda models: _announce(models, sock))
    return 0


def _runner(
    args: argparse.Namespace, settings: Settings, named: NamedPaths, sock: socket.socket, siblings: Siblings | None
) -> Runner:
    from pyengine.serve.app import App
    from pyengine.serve.server import Runner

    options.show_warnings()
    options.select_isa(args.isa)
    return Runner(App(settings, siblings), sock, lambda: _load(args, named))


def _run_processes(args: argparse.Namespace, settings: Settings, named: NamedPaths) -> int:
    from pyengine.cli.errors import report

    if not hasattr(os, "sched_setaffinity") or not hasattr(socket, "SO_REUSEPORT"):
        raise PyEngineError("--processes needs an operating system that pins processes to CPUs")
    from pyengine.serve import server
    from pyengine.serve.processes import Child, Parent, shares
    from pyengine.serve.shared_store import Links
    from pyengine.serve.siblings import Siblings, new_family

    cpus = sorted(os.sched_getaffinity(0))
    if args.processes > len(cpus):
        raise InvalidArgumentError(f"--processes {args.processes}: there are {len(cpus)} CPUs, and every process has its own")
    server.reserve(args.host, args.port).close()  # nobody else has it, not even to share
    reserved = server.reserve(args.host, args.port, shared=True)
    port, family, links = reserved.getsockname()[1], new_family(), Links(args.processes)

    def work(child: Child) -> int:
        def started(models: Models) -> None:
            if child.number == 0:
                _tell_of_templates(models)
            child.ready()

        try:
            sock = server.listen(args.host, port, shared=True)
            reserved.close()
            siblings = Siblings(family, child.number, args.processes, links.of(child.number))
            runner = _runner(args, settings, named, sock, siblings)
            child.when_orphaned(runner.stop)
            runner.run(started)
        except Exception as error:
            return report(error)
        return 0

    def ready(pids: Sequence[int]) -> None:
        links.close()
        numbers = " ".join(map(str, pids))
        text = f"pyengine: {len(pids)} processes ({numbers}) at {server.url(reserved)}; Ctrl-C ends them"
        print(text, file=sys.stderr, flush=True)

    return Parent(shares(cpus, args.processes), work).run(ready)


def _settings(args: argparse.Namespace) -> Settings:
    from pyengine.serve.settings import Settings

    if not 0 <= args.port < 65536:
        raise UsageError(f"--port {args.port}: a port is a number from 0 to 65535")
    keys = _api_keys(args.api_key_file)
    is_loopback = args.host in LOOPBACK
    if not is_loopback and not keys and not args.insecure:
        raise UsageError(
            f"--host {args.host} lets other machines in: set a key (PYENGINE_API_KEY or --api-key-file), or say --insecure"
        )
    given: dict[str, Any] = {
        "max_queue_tokens": args.max_queue_tokens,
        "max_body_bytes": args.max_body_bytes,
        "max_stored_responses": args.max_stored_responses,
        "max_stored_bytes": args.max_stored_bytes,
        "drain_timeout": args.drain_timeout,
    }
    return Settings(
        api_keys=keys,
        cors_origins=tuple(args.cors_origin or ()),
        hosts=LOOPBACK if is_loopback and not keys else (),
        log_format=args.log_format,
        **{name: value for name, value in given.items() if value is not None},
    )


def _api_keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        key = os.environ.get("PYENGINE_API_KEY", "").strip()
        return (key,) if key else ()
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        keys = tuple(line.strip() for line in file if line.strip())
    if not keys:
        raise InvalidArgumentError(f"--api-key-file {path} holds no key")
    return keys


def _named_paths(args: argparse.Namespace) -> NamedPaths:
    """(name or None, options with one model each). Raises UsageError, and MissingFileError for a model that is not there."""
    named = []
    for name, path in map(_named, args.model or [None]):
        if path == "":
            raise UsageError(f"-m {name or ''}{'=' if name else repr('')}: there is no path")
        one = argparse.Namespace(**{**vars(args), "model": path, "draft_model": None})
        _check_there(options.model_name(one))
        named.append((name, one))
    for name, path in map(_named, args.draft_model or ()):
        _check_there(path)
        chosen = [one for other, one in named if name in (other, None)]
        if len(chosen) != 1:
            names = ", ".join(str(other) for other, _ in named if other is not None) or "none"
            raise UsageError(
                f"--draft-model {name or path}: say for which model, NAME=PATH; models with -m NAME=...: {names}"
            )
        if chosen[0].draft_model is not None:
            raise UsageError(f"--draft-model {path}: its model has one, {chosen[0].draft_model}")
        chosen[0].draft_model = path
    return named


def _named(text: str | None) -> tuple[str | None, str | None]:
    """(name or None, path) of [NAME=]PATH."""
    if text is None or "=" not in text or os.path.exists(text):
        return None, text
    name, _, path = text.partition("=")
    return name, path


def _check_there(path: str | None) -> None:
    if path is not None and not path.startswith("hf:") and not os.path.exists(path):
        from pyengine.opening import no_model_at

        raise MissingFileError(no_model_at(path))


def _load(args: argparse.Namespace, named: NamedPaths) -> Models:
    from pyengine.serve.models import Models, ServedModel, model_name

    limits: dict[str, Any] = {"speculative": args.speculative}
    if args.parallel is not None:
        limits["max_sequences"] = args.parallel
    if args.max_kv_bytes is not None:
        limits["max_kv_bytes"] = args.max_kv_bytes
    models: dict[str, ServedModel] = {}
    for name, one in named:
        engine: Engine = options.open_engine(one, **limits)
        name = name or model_name(os.fspath(engine.path), engine.metadata)
        if name in models:
            raise PyEngineError(f"two models are called {name!r}: name them with -m NAME=PATH")
        for lora in args.lora or ():
            with options.naming(lora.path):
                lora.load(engine)
        for prefix in args.prompt_cache or ():
            engine.load_prefix(prefix)
        models[name] = ServedModel(name, engine)
    return Models(models.values())


def _tell_of_templates(models: Models) -> None:
    for model in models:
        if not model.has_template:
            print(
                f"pyengine: {model.name} has no chat template: it was not made to talk, and chats go on with what they say",
                file=sys.stderr,
            )


def _announce(models: Models, sock: socket.socket) -> None:
    from pyengine.serve.server import url

    _tell_of_templates(models)
    names = ", ".join(models.names())
    print(f"pyengine: {names} at {url(sock)} (the API at {url(sock)}/v1); Ctrl-C ends it", file=sys.stderr, flush=True)
