"""`pyengine embed`: texts in, a vector for each out."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pyengine.cli import options
from pyengine.cli.progress import ProgressLine
from pyengine.errors import ContextFullError

if TYPE_CHECKING:
    from pyengine.engine import Engine

EPILOG = f"""\
examples:
  pyengine embed -m model.safetensors "a cat" "a small cat" "a prime number"
  pyengine embed -m model.safetensors -f notes.txt > notes.jsonl
  pyengine embed -m model.safetensors --pooling mean --json "a cat"

A line of output is the vector of one text: a JSON array of as many numbers as the model is wide, of length 1 unless --raw. The
product of two such vectors, number by number and added up, says how alike their texts are to the model (1: the same). With -f
or - every line that is not empty is a text.

{options.ENVIRONMENT}"""

AT_ONCE = 64  # texts that are computed together


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("embed", EPILOG)
    add = parser.add_argument
    add("texts", nargs="*", metavar="TEXT", help="a text in quotes; - reads them from stdin, one a line")
    add("-f", "--file", metavar="FILE", help="the texts, one a line")
    add("--pooling", choices=("mean", "last"), help="of the hidden states of all tokens, or the last one; default: the model's")
    add("--prompt-name", metavar="NAME", help="put the model's prompt of that name before each text, mostly query or document")
    add("--raw", action="store_true", help="vectors as they are, not of length 1")
    add("--json", action="store_true", help="one JSON object: model, vectors")
    options.add_model_options(parser)
    options.add_lora_option(parser, "an adapter (LoRA, PEFT's directory) beside the model; its product is multiplied by SCALE")
    options.add_context_options(parser)
    return parser


def checked_ids(engine: Engine, texts: list[str], first: int, prompt: str) -> None:
    """Which text does not fit behind the prompt, if one does not. Raises ContextFullError."""
    for number, text in enumerate(texts, first):
        try:
            engine.prompt_ids(prompt + text)
        except ContextFullError as error:
            raise ContextFullError(f"text {number}: {error}") from None


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from pyengine.embeddings import chosen_prompt

    texts = options.read_texts(args)
    every: list[list[float]] = []
    with options.open_engine(args) as engine, ProgressLine("embedding") as line:
        prompt = chosen_prompt(args.prompt_name, engine.config.get("extra", {}))
        adapter = None if args.lora is None else args.lora.load(engine)
        for begin in range(0, len(texts), AT_ONCE):
            some = texts[begin : begin + AT_ONCE]
            checked_ids(engine, some, begin + 1, prompt)
            vectors = engine.embed(
                some, pooling=args.pooling, prompt_name=args.prompt_name, normalize=not args.raw, adapter=adapter
            ).tolist()
            line.clear()
            for vector in vectors if not args.json else ():
                print(json.dumps(vector))
            every += vectors if args.json else ()
            line.update(begin + len(some), len(texts))
        if args.json:
            print(json.dumps({"model": str(engine.path), "vectors": every}))
    return 0
