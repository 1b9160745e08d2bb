"""`pyengine eval`: how well a model predicts a text, in windows that slide over it, or how it does on a task."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli import UsageError, options
from pyengine.cli.progress import ProgressLine
from pyengine.cli.terminal import say, warn
from pyengine.cli.text_file import Text, first_tokens
from pyengine.errors import InvalidArgumentError

if TYPE_CHECKING:
    from pyengine.engine import Engine

EPILOG = f"""\
examples:
  pyengine eval -m model.safetensors text.txt
  pyengine eval -m model.safetensors text.txt --ctx 2048 --stride 2048 --json
  pyengine eval -m model.safetensors --task hellaswag.jsonl --limit 200

The text is cut into windows of --ctx tokens that begin every --stride tokens. Each token is scored once, in the first window
that holds it: with a smaller stride a token sees more of what comes before it, and the work grows. Bits per byte compare models
with different tokenizers, perplexities do not.

A task has an example a line: {{"context": ..., "choices": [...], "answer": 2}} is multiple choice (acc: the most likely choice
is the answer; acc_norm, acc_bytes: by log-likelihood per character, per byte), {{"context": ..., "target": ...}} asks for words
(acc: the target is what the model would say; its perplexity). Numbers are those of lm-evaluation-harness, with standard errors.

{options.ENVIRONMENT}"""


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("eval", EPILOG)
    add = parser.add_argument
    add("file", type=Path, nargs="?", help="a UTF-8 text file; - reads stdin")
    add("--task", metavar="FILE", help="examples in JSONL, instead of a text; - reads stdin")
    add("--delimiter", default=" ", metavar="TEXT", help="between a context and what follows (a space)")
    add(
        "--ctx",
        type=options.positive,
        default=512,
        metavar="N",
        help="tokens of a window (512, or the context if that is less)",
    )
    add(
        "--stride",
        type=options.positive,
        metavar="N",
        help="tokens from a window's begin to the next one's (half of --ctx)",
    )
    add("--limit", type=options.positive, metavar="N", help="only the first N tokens of the text, or examples of the task")
    add("--json", action="store_true", help="one JSON object")
    options.add_model_options(parser)
    add("--kv-dtype", choices=("int8", "f32"), default="int8", help="keys and values; f32: to compare with")
    return parser


@dataclass
class Tally:
    """Sums over scored tokens. nll: negative log-likelihood in nats; n_bytes: bytes of text that they spell."""

    nll: float = 0.0
    n_tokens: int = 0
    n_bytes: int = 0

    def facts(self) -> dict[str, Any]:
        return {
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "nll": self.nll,
            "nll_per_token": self.nll / self.n_tokens,
            "perplexity": math.exp(min(self.nll / self.n_tokens, 700)),
            "bits_per_byte": self.nll / math.log(2) / self.n_bytes if self.n_bytes else None,
        }


def windows(n_tokens: int, ctx: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, end, first token not scored before) of each window over n_tokens."""
    scored = 0
    for begin in range(0, n_tokens, stride):
        end = min(begin + ctx, n_tokens)
        if end > scored:
            yield begin, end, scored
        scored = end
        if end == n_tokens:
            return


def score_windows(engine: Engine, tokens: Sequence[int], ctx: int, stride: int) -> Iterator[Tally]:
    """The tally after each window. Where the model wants BOS, every window begins with it, within its ctx tokens."""
    tokenizer = engine.tokenizer
    bos = [tokenizer.bos_id] if tokenizer.adds_bos and tokenizer.bos_id is not None else []
    tally = Tally()
    for begin, end, first in windows(len(tokens), ctx - len(bos), min(stride, ctx - len(bos))):
        score = engine.score([*bos, *tokens[begin:end]], start=len(bos) + first - begin)
        new = [(token, value) for token, value in zip(score.tokens, score.logprobs, strict=True) if value is not None]
        tally.nll -= math.fsum(value for _, value in new)
        tally.n_tokens += len(new)
        tally.n_bytes += sum(len(tokenizer.token_bytes(token)) for token, _ in new)
        yield tally


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if (args.file is None) == (args.task is None):
        raise UsageError("give a text file or --task FILE")
    return run_task(args) if args.task is not None else run_text(args)


def run_task(args: argparse.Namespace) -> int:
    from pyengine.eval.tasks import evaluate, read_task

    with contextlib.ExitStack() as stack:
        name = args.task
        stream = options.stdin().buffer if name == "-" else stack.enter_context(open(name, "rb"))
        try:
            # by bytes: only "\n" ends a line, and a text may hold what else Unicode calls the end of one
            task = read_task((line.decode("utf-8") for line in stream), name, args.limit)
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"{name} is no UTF-8 text: {error.reason}") from None
        engine = stack.enter_context(options.open_engine(args))
        line = stack.enter_context(ProgressLine("eval"))
        metrics = evaluate(engine, task, delimiter=args.delimiter, progress=line.update)
        n_cut = int(metrics.pop("n_cut").value)
        facts: dict[str, Any] = {"model": str(engine.path), "task": name, "kind": task.kind, "examples": len(task.examples)}
    if n_cut:
        warn(f"pyengine: warning: {n_cut} contexts did not fit and lost their beginning")
    if args.json:
        import json

        values = {key: metric.value for key, metric in metrics.items()}
        errors = {f"{key}_stderr": metric.stderr for key, metric in metrics.items()}
        print(json.dumps({**facts, "n_cut": n_cut, **values, **errors}))
        return 0
    for key, metric in metrics.items():
        spread = "" if metric.stderr is None else f" ± {metric.stderr:.4f}"
        say(f"{key + ':':12} {metric.value:.4f}{spread}")
    say(f"{'examples:':12} {len(task.examples)}")
    return 0


def run_text(args: argparse.Namespace) -> int:
    stride = args.stride or max(1, args.ctx // 2)
    if args.ctx < 2 or stride > args.ctx:
        raise UsageError(f"--ctx is {args.ctx} and --stride {stride}: expected ctx >= 2 and stride <= ctx")
    with contextlib.ExitStack() as stack:
        name = str(args.file)
        file = options.stdin().buffer if name == "-" else stack.enter_context(open(name, "rb"))
        engine = stack.enter_context(options.open_engine(args))
        line = stack.enter_context(ProgressLine("eval"))
        ctx = min(args.ctx, engine.n_ctx)
        tokens = first_tokens(partial(engine.tokenize, add_bos=False), Text(file, name), args.limit)
        if len(tokens) < 2:
            raise InvalidArgumentError(f"{args.file} has {len(tokens)} tokens, nothing to predict")
        tally = Tally()
        for tally in score_windows(engine, tokens, ctx, min(stride, ctx)):
            if tally.n_tokens:
                line.update(tally.n_tokens, len(tokens), f"perplexity {tally.facts()['perplexity']:.4f}")
        facts = {
            "model": str(engine.path),
            "file": str(args.file),
            "ctx": ctx,
            "stride": min(stride, ctx),
            **tally.facts(),
        }
    if args.json:
        import json

        print(json.dumps(facts))
        return 0
    per_byte = "" if facts["bits_per_byte"] is None else f", {facts['bits_per_byte']:.4f} bits per byte"
    print(f"perplexity {facts['perplexity']:.4f}{per_byte} ({facts['tokens']} tokens, {facts['nll']:.2f} nats, "
          f"windows of {ctx} every {facts['stride']})")  # fmt: skip
    return 0
