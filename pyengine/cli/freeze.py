"""`pyengine freeze`: a checkpoint in, a frozen file out."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from pyengine.cli import UsageError, options
from pyengine.cli.progress import ProgressLine
from pyengine.cli.terminal import warn
from pyengine.errors import PyEngineError
from pyengine.files import is_safetensors
from pyengine.format.reader import FrozenFile
from pyengine.hub import fetch, is_hub_name, parse

EPILOG = """\
examples:
  pyengine freeze SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2.safetensors
  pyengine freeze ./Qwen2.5-0.5B-Instruct/ --lora ./adapter/:0.5 -o tuned.safetensors --name "Qwen2.5 0.5B"
  pyengine freeze hf:HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2.safetensors
  pyengine freeze stories15M.bin --tokenizer tokenizer.bin -o stories.safetensors

The output appears under its name only when it is whole and has computed its golden outputs; Ctrl-C leaves nothing behind.
"""


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("freeze", EPILOG)
    add = parser.add_argument
    add("source", help="a Hugging Face directory, a GGUF file, a llama2.c checkpoint or hf:org/name[@revision][:file]")
    add(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="the frozen file, by custom with .safetensors at its end",
    )
    add("--name", help="the model's name in the file; default: the source's own")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.bin of a llama2.c checkpoint")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="DIR[:SCALE]",
        help="merge an adapter in PEFT's layout into the weights of a Hugging Face directory; may be repeated",
    )
    add(
        "-c",
        "--ctx-size",
        type=options.positive,
        metavar="N",
        help="positions of the frozen model; default: the checkpoint's own (LongRoPE: its shorter table's)",
    )
    add("--force", action="store_true", help="replace OUT if it exists")
    return parser


def refuse_frozen(source: Path) -> None:
    """Freezing twice is a slip of the hand; say so instead of what the file lacks as a checkpoint."""
    try:
        if source.is_dir() or not is_safetensors(source):
            return
        with FrozenFile.open(source):
            pass
    except PyEngineError:  # freeze says what is wrong
        return
    raise UsageError(f"{source} is already frozen")


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    name = args.name
    if is_hub_name(args.source):
        place = parse(args.source)
        name = name or place.label
        args.source = fetch(place)
    args.source = Path(args.source)
    if not args.source.exists():
        raise FileNotFoundError(2, "there is no such file or directory", str(args.source))
    if args.output.is_dir():
        raise UsageError(f"{args.output} is a directory; -o names the file to write")
    if args.output.exists() and not args.force:
        raise UsageError(f"{args.output} exists; --force replaces it")
    refuse_frozen(args.source)
    from pyengine.freeze import freeze
    from pyengine.freeze.lora import parse as parse_adapter

    started = time.monotonic()
    with ProgressLine("freezing") as line, options.naming(args.source):
        freeze(
            args.source,
            args.output,
            name=name,
            tokenizer=args.tokenizer,
            lora=[parse_adapter(text) for text in args.lora],
            n_ctx=args.ctx_size,
            progress=line.update,
            overwrite=args.force,
        )
    if sys.stderr.isatty():
        size = args.output.stat().st_size / 2**20
        warn(f"{args.output}: {size:.1f} MiB in {time.monotonic() - started:.1f} s")
    return 0
