"""`pyengine generate`: a prompt in, its continuation out, as it comes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyengine.cli import EXIT_INTERRUPTED, UsageError, options, terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyengine.engine import Engine
    from pyengine.results import Generation, Piece

EPILOG = f"""\
examples:
  pyengine generate -m model.safetensors "The capital of France is" --temp 0 -n 20
  pyengine generate -m model.gguf -f prompt.txt --temp 0.8 --top-p 0.95 --seed 7 > story.txt
  pyengine generate -m model.safetensors -f book.txt --prompt-cache book.kv -n 200
  echo "def fibonacci(n):" | pyengine generate -m model.safetensors - --stop '\\n\\n' --escape

{options.ENVIRONMENT}"""


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("generate", EPILOG)
    add = parser.add_argument
    options.add_prompt_options(parser, "the text to continue")
    add("--special", action="store_true", help="special tokens that the prompt spells (<|im_start|>) are those tokens")
    add("--json", action="store_true", help="one JSON object at the end: text, tokens, reason, seed, timings")
    add("-v", "--verbose", action="store_true", help="timings on stderr afterwards")
    options.add_model_options(parser)
    options.add_lora_option(parser, "an adapter (LoRA, PEFT's directory) beside the model; its product is multiplied by SCALE")
    options.add_context_options(parser)
    options.add_prompt_cache_option(
        parser,
        "what was computed of the prompt: read from FILE if it is there, else written there in the end. Another prompt goes on "
        "from what it shares with it; no byte of the output changes",
    )
    options.add_sampling_options(parser)
    return parser


def timings_line(result: Generation, engine: Engine) -> str:
    """What --verbose prints."""
    t = result.timings
    cached = f" ({t.cached_tokens} cached)" if t.cached_tokens else ""
    drafted = f" ({t.accepted_tokens} of {t.drafted_tokens} drafted)" if t.drafted_tokens else ""
    return (
        f"prompt: {t.prompt_tokens} tokens{cached}, {t.prompt_tokens_per_second:.1f} tokens/s | "
        f"output: {t.generated_tokens} tokens{drafted}, {t.tokens_per_second:.1f} tokens/s | "
        f"first token: {t.time_to_first_token * 1e3:.0f} ms | end: {result.finish_reason} | seed: {result.seed} | "
        f"{engine.isa}, {engine.n_threads} threads"
    )


def write_stream(pieces: Iterator[Piece]) -> Generation | None:
    """Write the pieces to stdout as they come, and a final newline, also when Ctrl-C ends them. Returns the result, None after
    Ctrl-C."""
    last = "\n"
    try:
        for piece in pieces:
            if piece.text:
                last = piece.text  # before it is written: an interrupt may fall between any two lines
                terminal.write(piece.text)
            if piece.result is not None:
                return piece.result
    except KeyboardInterrupt:
        pass
    finally:
        if not last.endswith("\n"):
            terminal.write("\n")
    return None


def write_json(pieces: Iterator[Piece]) -> Generation | None:
    """Write one JSON object: the result, or after Ctrl-C what there is of it."""
    import json

    text, tokens, result = "", [], None
    try:
        for piece in pieces:
            text += piece.text
            tokens += [] if piece.token is None else [piece.token]
            result = piece.result
    except KeyboardInterrupt:
        print(json.dumps({"text": text, "tokens": tokens, "finish_reason": "cancelled"}))
        return None
    assert result is not None  # the last piece of a stream carries it
    print(json.dumps(result.to_dict()))
    return result


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    params = options.sampling_params(args)
    prompt = options.read_prompt(args)
    if prompt is None:
        raise UsageError(f"no prompt: {options.FOUR_WAYS}")
    options.tolerant_stdout()
    with options.open_engine(args) as engine:
        adapter = None if args.lora is None else args.lora.load(engine)
        ids = engine.prompt_ids(prompt, parse_special=args.special)
        keep = options.load_prompt_cache(args, engine)
        pieces = engine.stream(ids, params, adapter=adapter)
        result = write_json(pieces) if args.json else write_stream(pieces)
        if result is None:
            return EXIT_INTERRUPTED
        if args.verbose:
            terminal.warn(timings_line(result, engine))
        if keep:
            engine.save_prefix(ids, args.prompt_cache)
    return 0
