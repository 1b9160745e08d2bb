"""Options that several commands share, and what is made of them: parsers, engines, sampling parameters."""

from __future__ import annotations

import argparse
import os
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from pyengine.cli import UsageError
from pyengine.cli.parser import Parser as Parser
from pyengine.cli.parser import count_list as count_list
from pyengine.cli.parser import natural as natural
from pyengine.cli.parser import positive as positive
from pyengine.cli.parser import seconds as seconds
from pyengine.errors import (
    InvalidArgumentError,
    MissingFileError,
    ModelFormatError,
    PyEngineError,
    UnsupportedISAError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from pyengine.engine import Engine
    from pyengine.sampling import SamplingParams

ENVIRONMENT = """\
environment:
  PYENGINE_MODEL        the model, when there is no -m
  PYENGINE_NUM_THREADS  threads, when there is no -t
  PYENGINE_ISA          instruction set: amx, avx512vnni, avxvnni, avx2, neon_i8mm, neon_dotprod or scalar
  PYENGINE_CACHE        where checkpoints that -m names are kept frozen
"""


# -------------------------------------------------------------------- declared


FOUR_WAYS = "give it as an argument, with -p TEXT, with -f FILE, or - to read stdin"


def add_prompt_options(parser: argparse.ArgumentParser, help: str) -> None:
    """The prompt in one of four ways, for `read_prompt`."""
    parser.add_argument("prompt", nargs="?", help=f"{help}; - reads it from stdin")
    parser.add_argument("-p", "--prompt", dest="prompt_option", metavar="TEXT", help="the same, as an option")
    parser.add_argument("-f", "--file", metavar="FILE", help="the same, from FILE: UTF-8 text, less its final newline")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """-m, -t, --isa: which model, and what runs it."""
    group = parser.add_argument_group("model")
    add_model_option(group)
    add_threads_option(group)
    add_isa_option(group)


def add_model_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "-m",
        "--model",
        metavar="PATH",
        help="a frozen file, or a Hugging Face directory, GGUF file, llama2.c checkpoint or hf:org/name[@revision][:file] that "
        "is frozen once into the cache; default: PYENGINE_MODEL, else the small model that ships with the package",
    )
    parser.add_argument(
        "--tokenizer", metavar="FILE", help="tokenizer.bin of a llama2.c checkpoint; all other models have their own"
    )


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """A model by itself, for commands that take nothing else of the kind; `take_model_argument` makes it that of -m."""
    parser.add_argument("path", nargs="?", help="the model, instead of -m")


def take_model_argument(args: argparse.Namespace) -> None:
    if args.path is None:
        return
    if args.model is not None:
        raise UsageError("the model is named twice: as an argument and with -m")
    args.model = args.path


def add_threads_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "-t", "--threads", type=positive, metavar="N", help="threads; default: what the container allows"
    )


def add_isa_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--isa", metavar="NAME", help="instruction set; default: PYENGINE_ISA, else the best ('pyengine doctor')"
    )


def add_context_options(parser: argparse.ArgumentParser) -> None:
    """-c, --kv-dtype: what a context holds and how."""
    group = parser.add_argument_group("context")
    group.add_argument(
        "-c", "--ctx-size", type=positive, metavar="N", help="positions of the context; default: the model's"
    )
    group.add_argument(
        "--kv-dtype", choices=("int8", "f32"), default="int8", help="keys and values; f32: to compare with"
    )


def add_lora_option(parser: argparse._ActionsContainer, help: str, *, many: bool = False) -> None:
    """--lora: args.lora is a Lora, with `many` a list of them; None if it is not given."""
    parser.add_argument("--lora", action="append" if many else _Once, type=Lora.parse, metavar="[NAME=]DIR[:SCALE]", help=help)


def add_prompt_cache_option(parser: argparse._ActionsContainer, help: str, *, many: bool = False) -> None:
    """--prompt-cache: args.prompt_cache is a path, with `many` a list of them; None if it is not given."""
    parser.add_argument("--prompt-cache", action="append" if many else "store", metavar="FILE", help=help)


def load_prompt_cache(args: argparse.Namespace, engine: Engine) -> bool:
    """Read the file of --prompt-cache if it is given and there. Whether it is to be written when the prompt has been computed."""
    if args.prompt_cache is None:
        return False
    if args.lora is not None:
        raise UsageError("--prompt-cache: keys and values of a prompt with an adapter are not kept; leave out one of the two")
    if not os.path.exists(args.prompt_cache):
        folder = os.path.dirname(args.prompt_cache) or "."
        if not args.prompt_cache or not os.path.isdir(folder):  # said now, and not when all has been computed
            raise MissingFileError(f"--prompt-cache {args.prompt_cache!r}: there is no directory to write it to")
        return True
    engine.load_prefix(args.prompt_cache)
    return False


class _Once(argparse.Action):
    """Stores its value; a second one is refused, for one of the two would have no effect."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            raise argparse.ArgumentError(self, "there is one adapter to a text; it is given twice")
        setattr(namespace, self.dest, values)


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Everything that SamplingParams knows and that people type."""
    group = parser.add_argument_group(
        "output", "what is not given is as the model's generation_config.json says, else greedy"
    )
    add = group.add_argument
    add(
        "-n",
        "--max-tokens",
        "--predict",
        "--n-predict",
        type=int,
        metavar="N",
        help="at most N tokens; default: to the end of text or context",
    )
    add("-s", "--seed", type=int, metavar="N", help="same seed, same text; default, and -1: a new one each time")
    add(
        "--temp",
        "--temperature",
        dest="temperature",
        type=float,
        metavar="X",
        help="0 = always the most probable token",
    )
    add("--top-k", type=int, metavar="K", help="only the K most probable tokens; 0 = off")
    add("--top-p", type=float, metavar="P", help="only the most probable tokens that reach mass P; 1 = off")
    add("--min-p", type=float, metavar="P", help="only tokens at least P times as probable as the first; 0 = off")
    add(
        "--typical",
        dest="typical_p",
        type=float,
        metavar="P",
        help="the most typical tokens that reach mass P; 1 = off",
    )
    add(
        "--repeat-penalty",
        dest="repetition_penalty",
        type=float,
        metavar="X",
        help="against tokens of prompt and output; 1 off",
    )
    add("--presence-penalty", type=float, metavar="X", help="against tokens of the output; 0 = off")
    add("--frequency-penalty", type=float, metavar="X", help="the same, for each time they came; 0 = off")
    add("--repeat-last-n", type=int, metavar="N", help="these three look at the last N tokens; default, and -1: at all")
    add("--no-repeat-ngram-size", type=int, metavar="N", help="no N tokens come twice, prompt included; 0 = off")
    add("--bad-word", dest="bad_words", action="append", metavar="TEXT", help="TEXT may not come; may be repeated")
    add("--top-nsigma", dest="top_n_sigma", type=float, metavar="X", help="only logits X deviations below the first; 0 = off")
    add("--dynatemp-range", type=float, metavar="X", help="the temperature follows the entropy by so much up and down; 0 = off")
    add("--dynatemp-exp", dest="dynatemp_exponent", type=float, metavar="X", help="exponent of the entropy in that; default 1")
    add("--xtc-probability", type=float, metavar="P", help="how often the likeliest tokens are left out, all but one; 0 = off")
    add("--xtc-threshold", type=float, metavar="P", help="which have at least the probability P; default 0.1")
    add("--dry-multiplier", type=float, metavar="X", help="against repeated passages: X * base^(length - allowed); 0 = off")
    add("--dry-base", type=float, metavar="X", help="default 1.75")
    add("--dry-allowed-length", type=int, metavar="N", help="the shortest passage that counts, in tokens; default 2")
    add("--dry-penalty-last-n", type=int, metavar="N", help="looks at the last N tokens; default, and -1: at all; 0 = off")
    add(
        "--dry-sequence-breaker",
        dest="dry_sequence_breakers",
        action="append",
        metavar="TEXT",
        help="no passage reaches over TEXT; may be repeated, none = there is none; default: newline, colon, \", *",
    )
    add("--stop", action="append", metavar="TEXT", help="end before TEXT comes; may be repeated")
    add("--ignore-eos", action="store_true", default=None, help="go on after the model's end of text")
    add("--timeout", type=float, metavar="S", help="end after S seconds, with what there is")
    add("--json-schema", metavar="JSON", help="the text is JSON of this schema; @FILE reads one")
    add("--grammar", metavar="TEXT", help="the text is of this grammar, Lark's or llama.cpp's (GBNF); @FILE reads one")
    add(
        "--speculative",
        type=speculative,
        metavar="MODE",
        help="guess tokens ahead, which changes no byte: auto (default), off, or at most so many a step",
    )
    add(
        "--draft-model",
        metavar="PATH",
        help="a smaller model with the same vocabulary that guesses, too: worth it beside one several times its size",
    )
    add(
        "-e",
        "--escape",
        action="store_true",
        help=r"\n, \t and the like in prompt, stop texts, bad words and breakers are escapes, as in Python",
    )


_SAMPLING = (
    "max_tokens", "seed", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "repeat_last_n", "no_repeat_ngram_size", "bad_words", "top_n_sigma", "dynatemp_range",
    "dynatemp_exponent", "xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length",
    "dry_penalty_last_n", "dry_sequence_breakers", "stop", "ignore_eos", "timeout", "speculative",
)  # fmt: skip

# -------------------------------------------------------------------- understood


class Lora(NamedTuple):
    """An adapter beside a model, as the command line names it."""

    name: str | None  # None: the directory's
    path: str
    scale: float

    @classmethod
    def parse(cls, text: str) -> Lora:
        """argparse type: [NAME=]DIR[:SCALE]."""
        from pyengine.freeze import lora

        name, rest = None, text
        if "=" in text and not os.path.exists(text):
            name, _, rest = text.partition("=")
        try:
            path, scale = lora.parse(rest)
        except InvalidArgumentError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return cls(name, os.fspath(path), scale)

    def load(self, engine: Engine) -> str:
        """Load it; its name."""
        return engine.load_adapter(self.path, name=self.name, scale=self.scale).name


def speculative(text: str) -> Any:
    """argparse type: "auto", "off" or a number, as SamplingParams takes it."""
    from pyengine.sampling import MAX_DRAFT, check_speculative

    value = {"max_draft": int(text)} if text.isascii() and text.isdigit() else text
    try:
        check_speculative(value)
    except InvalidArgumentError:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, off, or a number from 0 to {MAX_DRAFT}") from None
    return value


def check_draft_model(args: argparse.Namespace) -> None:
    """Raises UsageError if nothing may be guessed, and a draft model is to guess."""
    from pyengine.sampling import check_speculative

    if args.draft_model and args.speculative is not None and not check_speculative(args.speculative).max_draft:
        raise UsageError("--draft-model would have no effect: --speculative says that nothing is guessed")


# A backslash and what belongs to it, whole or not: Python then says what is missing.
_ESCAPE = re.compile(
    r"\\(N\{[^}]*\}?|x[0-9a-fA-F]{0,2}|u[0-9a-fA-F]{0,4}|U[0-9a-fA-F]{0,8}|[0-7]{1,3}|.|$)", re.DOTALL
)


def unescape(text: str) -> str:
    r"""Escapes as in a Python literal, unknown ones as they are written. Raises UsageError for half an escape."""
    import warnings

    def meant(escape: re.Match[str]) -> str:
        return escape[0].encode("ascii").decode("unicode_escape") if escape[0].isascii() else escape[0]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown escapes
            return _ESCAPE.sub(meant, text)
    except UnicodeDecodeError as error:
        raise UsageError(f"--escape: {error.reason} in {text!r}") from None


def sampling_params(args: argparse.Namespace, **more: Any) -> SamplingParams:
    """SamplingParams of the options, and of parameters that a command has itself. Raises UsageError naming the parameter."""
    from pyengine.sampling import SamplingParams

    check_draft_model(args)
    options: dict[str, Any] = {name: getattr(args, name) for name in _SAMPLING} | more
    if options["max_tokens"] is not None and options["max_tokens"] in (-1, -2):  # llama-cli's "no limit"
        options["max_tokens"] = None
    if options["dry_sequence_breakers"] == ["none"]:
        options["dry_sequence_breakers"] = []
    for name in ("stop", "bad_words", "dry_sequence_breakers") if args.escape else ():
        if options[name]:
            options[name] = [unescape(text) for text in options[name]]
    if args.json_schema is not None and args.grammar is not None:
        raise UsageError("--json-schema and --grammar: give one of them")
    for name, option, text in (("json", "--json-schema", args.json_schema), ("grammar", "--grammar", args.grammar)):
        if text is not None:
            options["structured_outputs"] = {name: _text_or_file(option, text)}
    if args.json_schema is not None:
        _check_json(args.json_schema, options["structured_outputs"]["json"])
    try:
        return SamplingParams(**options)
    except InvalidArgumentError as error:
        raise UsageError(str(error)) from None


def read_prompt(args: argparse.Namespace) -> str | None:
    """The prompt that was given in one of the four ways, None if none was. Raises UsageError for several,
    InvalidArgumentError for a file that is no UTF-8."""
    given = [value for value in (args.prompt, args.prompt_option, args.file) if value is not None]
    if not given:
        return None
    if len(given) > 1:
        raise UsageError(f"more than one prompt: {FOUR_WAYS}")
    if args.file is None and given[0] != "-":
        text = checked_text(given[0], "the prompt")
        return unescape(text) if args.escape else text
    is_hole = getattr(args, "suffix", None) is not None
    return prompt_text("-" if args.file is None else args.file, whole=is_hole)


def read_suffix(args: argparse.Namespace) -> str | None:
    """What --suffix says, None if it is not given. Raises UsageError, InvalidArgumentError for a file that is no UTF-8."""
    if args.suffix is None:
        return None
    if args.special:
        raise UsageError("--special would have no effect: around a hole all text is plain")
    if args.suffix.startswith("@"):
        try:
            return _text_or_file("--suffix", args.suffix, whole=True)
        except FileNotFoundError:  # code begins with @ where something is decorated
            raise UsageError(f"--suffix {args.suffix}: there is no such file; a text that begins with @ goes into one") from None
    text = checked_text(args.suffix, "the suffix")
    return unescape(text) if args.escape else text


def checked_text(text: str, name: str) -> str:
    """A text of the command line. Raises UsageError if its bytes were no text in the encoding of the locale."""
    if any("\ud800" <= character <= "\udfff" for character in text):  # how Python shows such bytes
        raise UsageError(f"{name} is no text in this terminal's encoding; UTF-8 can be read from a file")
    return text


def read_texts(args: argparse.Namespace) -> list[str]:
    """args.texts, or the lines of args.file or stdin that are not empty. Raises UsageError for none and for two ways at once,
    InvalidArgumentError for a file without a line or that is no UTF-8."""
    from_stdin = args.texts == ["-"]
    if bool(args.texts) == (args.file is not None):
        raise UsageError("give texts, each in quotes, or a file with one a line: -f FILE, or - to read stdin")
    if args.texts and not from_stdin:
        return [checked_text(text, f"text {number}") for number, text in enumerate(args.texts, 1)]
    texts = [line for line in prompt_text("-" if from_stdin else args.file).split("\n") if line.strip()]
    if not texts:
        raise InvalidArgumentError(f"{args.file or 'stdin'} has no line that is not empty")
    return texts


def prompt_text(path: str, *, whole: bool = False) -> str:
    """The text of a file, - = standard input, less its final newline unless the `whole` is wanted: around a hole a newline is as
    good as any text. Raises InvalidArgumentError if it is no UTF-8."""
    if path == "-":
        data = stdin().buffer.read()
    else:
        with open(path, "rb") as file:
            data = file.read()
    try:
        text: str = data.decode("utf-8-sig")  # some editors begin a text with a mark of its encoding
    except UnicodeDecodeError as error:
        name = "stdin" if path == "-" else path
        raise InvalidArgumentError(f"{name} is no UTF-8 text: byte {error.start} is {data[error.start]:#04x}") from None
    text = text.replace("\r\n", "\n")
    return text if whole else text.removesuffix("\n")


def _check_json(given: str, text: str) -> None:
    """What is no JSON is most often a shell's doing, and said at once. Raises UsageError, or InvalidArgumentError for the text
    of a file."""
    import json

    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        kind = InvalidArgumentError if given.startswith("@") else UsageError
        raise kind(f"--json-schema is no JSON: {error}") from None


def _text_or_file(option: str, text: str, *, whole: bool = False) -> str:
    if not text.startswith("@"):
        return text
    if text == "@":
        raise UsageError(f"{option} @FILE: the file's name is missing")
    return prompt_text(text[1:], whole=whole)


def model_name(args: argparse.Namespace) -> str | None:
    """-m, else PYENGINE_MODEL, else None: the package's own."""
    return args.model or os.environ.get("PYENGINE_MODEL") or None


def frozen_path(args: argparse.Namespace) -> str:
    """The frozen file that -m means; a checkpoint is frozen into the cache, with progress on a terminal."""
    from pyengine.cli.progress import ProgressLine
    from pyengine.opening import DEFAULT_MODEL, resolve_model

    name = model_name(args)
    if name is None and not os.path.exists(DEFAULT_MODEL):
        raise UsageError("no model: name one with -m PATH or PYENGINE_MODEL (this build ships none)")
    with ProgressLine("freezing into the cache") as line, naming(name):
        return resolve_model(name, line.update, getattr(args, "tokenizer", None))


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Whatever is wrong with a model inside this block, its error names the file."""
    try:
        yield
    except (ModelFormatError, UnsupportedModelError) as error:
        if str(path) in str(error):
            raise
        raise type(error)(f"{path}: {error}") from error


def select_isa(name: str | None) -> None:
    """Use this instruction set from now on. Raises UnsupportedISAError with the ones that there are."""
    if name is None:
        return
    from pyengine import _core

    try:
        _core.select_isa(name)
    except (UnsupportedISAError, InvalidArgumentError):
        raise UnsupportedISAError(f"--isa {name}: this machine runs {', '.join(_core.available_isas())}") from None


def open_engine(args: argparse.Namespace, **more: Any) -> Engine:
    """The engine that the model and context options describe, with further options of Engine. Whoever opens one here has a
    text for it."""
    from pyengine.engine import Engine

    show_warnings()
    select_isa(args.isa)
    options: dict[str, Any] = {"n_threads": args.threads, "preload_tokenizer": True, **more}
    if hasattr(args, "ctx_size"):
        options |= {"n_ctx": args.ctx_size or 0, "kv_dtype": args.kv_dtype}
    if getattr(args, "draft_model", None) is not None:
        options["draft_model"] = args.draft_model
    return Engine(frozen_path(args), **options)


def show_warnings() -> None:
    """What the engine notices about its threads goes to stderr, in the form of an error."""
    from pyengine import cpu_watch
    from pyengine.cli.terminal import warn

    cpu_watch.say = lambda message: warn(f"pyengine: warning: {message}")


def stdin() -> TextIO:
    """Standard input. Raises PyEngineError if whoever started us has closed it."""
    import sys

    if sys.stdin is None:
        raise PyEngineError("standard input is closed")
    return sys.stdin


def tolerant_stdout() -> None:
    """A locale that cannot write a character gets a question mark in its place, and not an exception."""
    import sys

    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")
