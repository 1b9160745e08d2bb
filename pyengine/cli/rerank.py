"""`pyengine rerank`: documents in, ordered by how well they answer a query."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from pyengine.cli import options
from pyengine.cli.terminal import say
from pyengine.errors import ContextFullError

EPILOG = f"""\
examples:
  pyengine rerank -m reranker.safetensors -q "capital of China" "Beijing is." "Gravity is a force."
  pyengine rerank -m reranker.safetensors -q "how to cook rice" -f recipes.txt -k 10
  pyengine rerank -m reranker.safetensors -q "how to cook rice" --json - < recipes.txt

A line of output is a document: its score from 0 to 1, its place among those that were given (from 0), and its text; the best
comes first. With -f or - every line that is not empty is a document. The score is how likely the model is to say that the
document answers the query: models like Qwen3-Reranker are trained for it, other chat models may be asked.

{options.ENVIRONMENT}"""


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("rerank", EPILOG)
    add = parser.add_argument
    add("texts", nargs="*", metavar="DOCUMENT", help="a document in quotes; - reads them from stdin, one a line")
    add("-q", "--query", required=True, metavar="TEXT", help="what the documents are to answer")
    add("-f", "--file", metavar="FILE", help="the documents, one a line")
    add("-k", "--top-n", type=options.positive, metavar="N", help="print so many of them; default: all")
    add("--instruction", metavar="TEXT", help="what the query is for; default: to find passages that answer a web search query")
    add("--max-tokens-per-doc", type=options.positive, metavar="N", help="read so much of each document; default: all")
    add("--truncate", action="store_true", help="read as much of a document as fits the context, instead of an error")
    add("--json", action="store_true", help="one JSON object: model, results")
    options.add_model_options(parser)
    options.add_lora_option(parser, "an adapter (LoRA, PEFT's directory) beside the model; its product is multiplied by SCALE")
    options.add_context_options(parser)
    return parser


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    documents = options.read_texts(args)
    for name in ("query", "instruction"):
        options.checked_text(getattr(args, name) or "", f"--{name}")
    with options.open_engine(args) as engine:
        try:
            ranked = engine.rerank(
                args.query,
                documents,
                instruction=args.instruction,
                top_n=args.top_n,
                max_tokens_per_doc=args.max_tokens_per_doc,
                truncate=args.truncate,
                adapter=None if args.lora is None else args.lora.load(engine),
            )
        except ContextFullError as error:
            words = str(error).replace("max_tokens_per_doc or truncate", "--max-tokens-per-doc or --truncate")
            raise ContextFullError(words) from None
        if args.json:
            print(json.dumps({"model": str(engine.path), "results": [asdict(one) for one in ranked]}))
        for one in ranked if not args.json else ():
            say(f"{one.score:.6f}  {one.index}  {one.document}")
    return 0
