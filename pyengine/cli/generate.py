"""`pyengine generate`: a prompt in, its continuation out, as it comes."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from pyengine.cli import EXIT_INTERRUPTED, UsageError, options, terminal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyengine.engine import Engine
    from pyengine.results import Generation, Piece
    from pyengine.sampling import SamplingParams

EPILOG = f"""\
examples:
  pyengine generate -m model.safetensors "The capital of France is" --temp 0 -n 20
  pyengine generate -m model.gguf -f prompt.txt --temp 0.8 --top-p 0.95 --seed 7 > story.txt
  pyengine generate -m model.safetensors "The capital of France is" --beams 4 -n 20
  pyengine generate -m model.safetensors -f book.txt --prompt-cache book.kv -n 200
  echo "def add(a, b):" | pyengine generate -m coder.gguf - --suffix '\\nprint(add(1, 2))' --stop '\\n\\n' --escape

{options.ENVIRONMENT}"""


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("generate", EPILOG)
    add = parser.add_argument
    options.add_prompt_options(parser, "the text to continue")
    add(
        "--suffix",
        metavar="TEXT",
        help="text that follows a hole: a code model fills what belongs between the prompt and it; @FILE reads a file. "
        "It and the prompt are then taken whole, with the final newline of a file",
    )
    add(
        "--token-healing",
        action="store_true",
        help="a word that the prompt breaks off goes on as the tokenizer would have it: its last tokens are said again",
    )
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
    group = parser.add_argument_group("beam search", "the most probable output that is found, instead of a sampled one")
    group.add_argument("--beams", type=options.positive, metavar="N", help="outputs that go on together; --json has all of them")
    group.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="log-probabilities are compared divided by the number of tokens to the power of X; default: 1",
    )
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


# What chooses or bounds a sampled output, and would not have any effect on beams.
_NOT_OF_BEAMS = {
    "seed": "--seed", "temperature": "--temp", "top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p",
    "typical_p": "--typical", "repetition_penalty": "--repeat-penalty", "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty", "no_repeat_ngram_size": "--no-repeat-ngram-size", "bad_words": "--bad-word",
    "top_n_sigma": "--top-nsigma", "dynatemp_range": "--dynatemp-range", "xtc_probability": "--xtc-probability",
    "dry_multiplier": "--dry-multiplier", "speculative": "--speculative", "draft_model": "--draft-model",
    "token_healing": "--token-healing",
}  # fmt: skip


def check_beams(args: argparse.Namespace) -> None:
    """Raises UsageError for an option that would have no effect."""
    if args.beams is None:
        if args.length_penalty is not None:
            raise UsageError("--length-penalty is of a beam search: give --beams, too")
        return
    for name, option in _NOT_OF_BEAMS.items():
        value = getattr(args, name)
        if value or (name == "seed" and value is not None):  # 0 is off, and a temperature of 0 is what beams have
            raise UsageError(f"{option} would have no effect: --beams finds the most probable output of the model as it is")


def write_beams(engine: Engine, ids: list[int], args: argparse.Namespace, params: SamplingParams, adapter: str | None) -> None:
    """The best output of a beam search, or with --json all; what --verbose says of them."""
    beams = engine.beam_search(
        ids,
        beam_width=args.beams,
        n=args.beams,
        length_penalty=1.0 if args.length_penalty is None else args.length_penalty,
        max_tokens=params.max_tokens,
        stop=params.stop,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
        timeout=params.timeout,
        structured_outputs=params.structured_outputs,
        adapter=adapter,
    )
    if args.json:
        import json

        print(json.dumps({"hypotheses": [beam.to_dict() for beam in beams]}))
    else:
        text = beams[0].text
        terminal.write(text if text.endswith("\n") else text + "\n")
    if args.verbose:
        for beam in beams:
            size = f"{beam.cumulative_logprob:.4f} nats, {len(beam.tokens)} tokens"
            terminal.warn(f"score {beam.score:.4f}: {size}, end: {beam.finish_reason}")


def prompt_ids(engine: Engine, args: argparse.Namespace, prompt: str, suffix: str | None) -> list[int]:
    """Token ids of the prompt, or of the hole between it and a suffix."""
    if suffix is not None:
        return engine.infill_ids(prompt, suffix)
    return engine.prompt_ids(prompt, parse_special=args.special)


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    params = options.sampling_params(args, token_healing=args.token_healing)
    check_beams(args)
    prompt = options.read_prompt(args)
    if prompt is None:
        raise UsageError(f"no prompt: {options.FOUR_WAYS}")
    suffix = options.read_suffix(args)
    options.tolerant_stdout()
    with options.open_engine(args) as engine:
        adapter = None if args.lora is None else args.lora.load(engine)
        ids = prompt_ids(engine, args, prompt, suffix)
        if suffix is not None:
            params = engine.infill_params(params)
        keep = options.load_prompt_cache(args, engine)
        if args.beams is not None:
            write_beams(engine, ids, args, params, adapter)
        else:
            pieces = engine.stream(ids, params, adapter=adapter)
            result = write_json(pieces) if args.json else write_stream(pieces)
            if result is None:
                return EXIT_INTERRUPTED
            if args.verbose:
                terminal.warn(timings_line(result, engine))
        if keep:
            engine.save_prefix(ids, args.prompt_cache)
    return 0
