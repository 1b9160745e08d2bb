"""`pyengine freeze`: a checkpoint in, a frozen file out."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli import UsageError, options
from pyengine.cli.progress import ProgressLine
from pyengine.cli.terminal import say, warn
from pyengine.cli.text_file import Text, first_tokens
from pyengine.errors import ExistingFileError, InvalidArgumentError, PyEngineError
from pyengine.files import is_safetensors
from pyengine.format.reader import FrozenFile
from pyengine.hub import fetch, is_hub_name, parse

if TYPE_CHECKING:
    from pyengine.eval.quality import Quality
    from pyengine.freeze.float_forward import TokenIds
    from pyengine.freeze.sources import SourceModel

QUALITY_TOKENS = 1024

EPILOG = """\
examples:
  pyengine freeze SmolLM2-135M-Instruct.Q4_1.gguf -o smollm2.safetensors
  pyengine freeze ./Qwen2.5-0.5B-Instruct/ --lora ./adapter/:0.5 -o tuned.safetensors --name "Qwen2.5 0.5B"
  pyengine freeze hf:HuggingFaceTB/SmolLM2-135M-Instruct -o smollm2.safetensors
  pyengine freeze stories15M.bin --tokenizer tokenizer.bin -o stories.safetensors
  pyengine freeze ./Qwen2.5-0.5B-Instruct/ -o qwen.safetensors --quality my-text.txt

--quality says what int8 costs on a text of yours: the frozen file against its source in float32, in windows of 512 tokens. The
divergence KL(float32 || int8) of the next token's distribution, mean and of the worst token; the loss on the text and its
difference with the paired standard error; how often both have the same most probable token where float32's two best logits are
more than 0.5 apart. float32 is a forward pass of the source in NumPy that streams its weights: no matrix is ever whole in memory,
and what grows with --quality-tokens is a few times 4 bytes for each token and column of the widest matrix.

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
    add("--quality", metavar="TEXT", help="then say what int8 costs on a UTF-8 text file; - reads stdin")
    add(
        "--quality-tokens",
        type=options.positive,
        metavar="N",
        help=f"of at most so many tokens of TEXT ({QUALITY_TOKENS:,})",
    )
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
    raise InvalidArgumentError(f"{source} is already frozen")


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.quality_tokens is not None and args.quality is None:
        raise UsageError("--quality-tokens needs --quality TEXT")
    with contextlib.ExitStack() as stack:
        text = None if args.quality is None else stack.enter_context(quality_text(args.quality))
        find_source(args)
        if text is None:
            run_freeze(args)
            return 0
        source = stack.enter_context(opened_source(args))
        windows = text_windows(source, text, args.quality_tokens or QUALITY_TOKENS)  # a text that will not do is told first
        run_freeze(args)
        show_quality(measured(args, source, windows), windows.shape[1])
    return 0


def find_source(args: argparse.Namespace) -> None:
    """Make args.source a path, fetched from the hub if it is a name there, and refuse what cannot be frozen to args.output."""
    if is_hub_name(args.source):
        place = parse(args.source)
        args.name = args.name or place.label
        args.source = fetch(place)
    args.source = Path(args.source)
    if not args.source.exists():
        raise FileNotFoundError(2, "there is no such file or directory", str(args.source))
    if args.output.is_dir():
        raise ExistingFileError(f"{args.output} is a directory; -o names the file to write")
    if args.output.exists() and not args.force:
        raise ExistingFileError(f"{args.output} exists; --force replaces it")
    refuse_frozen(args.source)


def source_options(args: argparse.Namespace) -> dict[str, Any]:
    """What freeze and open_source are told alike."""
    return {"name": args.name, "tokenizer": args.tokenizer, "n_ctx": args.ctx_size}


def run_freeze(args: argparse.Namespace) -> None:
    from pyengine.freeze import freeze
    from pyengine.freeze.lora import parse as parse_adapter

    started = time.monotonic()
    with ProgressLine("freezing") as line, options.naming(args.source):
        freeze(
            args.source,
            args.output,
            lora=[parse_adapter(text) for text in args.lora],
            progress=line.update,
            overwrite=args.force,
            **source_options(args),
        )
    if sys.stderr.isatty():
        size = args.output.stat().st_size / 2**20
        warn(f"{args.output}: {size:.1f} MiB in {time.monotonic() - started:.1f} s")


# -------------------------------------------------------------------- quality


@contextlib.contextmanager
def quality_text(name: str) -> Iterator[Text]:
    """The text that --quality names, its beginning read. Raises InvalidArgumentError for one that is empty or no UTF-8."""
    with contextlib.ExitStack() as stack:
        text = Text(options.stdin().buffer if name == "-" else stack.enter_context(open(name, "rb")), name)
        text.read(1 << 16)
        if not text.text:
            raise InvalidArgumentError(f"{name} is empty: there is nothing to measure quality on")
        yield text


@contextlib.contextmanager
def opened_source(args: argparse.Namespace) -> Iterator[SourceModel]:
    from pyengine.freeze import open_source
    from pyengine.freeze.lora import adapter
    from pyengine.freeze.lora import parse as parse_adapter

    adapters = [adapter(parse_adapter(text)) for text in args.lora]
    with (
        options.naming(args.source),
        contextlib.closing(open_source(args.source, lora=adapters, **source_options(args))) as source,
    ):
        yield source


def text_windows(source: SourceModel, text: Text, n_tokens: int) -> TokenIds:
    """The windows of the first n_tokens positions: token ids (n_windows, length), each with BOS in front if the model wants it.
    Raises InvalidArgumentError if the text has no whole one."""
    from pyengine.eval.quality import cut_windows, window_length
    from pyengine.format.strict_json import parse_json_object
    from pyengine.text.tokenizer import Tokenizer

    settings, config = source.attachments.get("tokenizer_config.json"), source.config
    tokenizer = Tokenizer(
        source.attachments["tokenizer.json"],
        None if settings is None else parse_json_object(settings, "tokenizer_config.json"),
        bos_token_id=config.bos_token_id,
        vocab_size=config.vocab_size,
    )
    length = window_length(n_tokens, config.max_seq_len)
    bos = tokenizer.bos_id if tokenizer.adds_bos else None
    wanted = n_tokens // length * (length - (bos is not None))
    tokens = first_tokens(partial(tokenizer.encode, add_bos=False), text, wanted)
    windows = cut_windows(tokens, length, bos)
    if not len(windows):
        raise InvalidArgumentError(
            f"{text.name} has {len(tokens)} tokens, too few for a window of {length}; give a longer text, or a smaller "
            "--quality-tokens"
        )
    return windows


def measured(args: argparse.Namespace, source: SourceModel, windows: TokenIds) -> Quality:
    from pyengine.engine import Engine
    from pyengine.eval.quality import measure

    options.show_warnings()
    with ProgressLine("quality") as line, Engine(args.output, n_ctx=windows.shape[1]) as engine:
        return measure(source, engine, windows, line.update)


def show_quality(quality: Quality, length: int) -> None:
    """To stdout, in nats a token."""
    q = quality
    agreement = "none has a clear winner" if q.agreement is None else f"{100 * q.agreement:.2f} %"
    difference = f"{round(q.nll_difference, 4) + 0.0:+.4f} (paired standard error {q.nll_stderr:.4f})"
    facts = {
        "positions": f"{q.n_positions} in {q.n_windows} window{'s' * (q.n_windows > 1)} of {length}",
        "KL(float32 || int8)": f"mean {q.kl_mean:.5f} nats, worst token {q.kl_max:.4f}",
        "loss": f"float32 {q.nll_float32:.4f} nats a token, int8 {difference}",
        "same argmax": f"{agreement} of {q.n_clear} positions where float32's two best logits are more than 0.5 apart",
    }
    for name, fact in facts.items():
        say(f"{name + ':':21}{fact}")
