"""What a run was asked for: flags over a file of options, each one used or refused."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from .chat import is_chat
from .config import load_options
from .errors import ConfigError, DataError
from .flags import LENGTHS, MODEL_OPTIONS, train_parser
from .preference import is_preference
from .text import FINEST_SHARE, HELD_OUT, PARQUET

# about this process or this call, not about the run
PAPER = ("ranks", "gpu", "nodes", "rate")  # of --plan alone
PROCESS = (
    *(
        "config",
        "run_dir",
        "resume",
        "plan",
        "dry_run",
        "threads",
        "shard_optimizer",
        "device",
        "comm",
        "precision",
        "tensorboard",
    ),
    *PAPER,
)
SIZES = ("depth", *MODEL_OPTIONS, "qk_norm")
TEXT = ("data", "tokenizer", "vocab_size", "drop_unfinished", "train_on", "held_out", "column")


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """File options under flags, by field name; what was not given is absent."""
    flags = {name: value for name, value in vars(options).items() if value is not None and value is not False}
    values: dict[str, Any] = _of_file(options.config) if options.config else {}
    if any(name in flags for name in LENGTHS):  # a flag replaces the file's length, whichever it was
        values = {name: value for name, value in values.items() if name not in LENGTHS}
    values.update((name, value) for name, value in flags.items() if name not in PROCESS)
    for name in LISTS:
        if isinstance(values.get(name), str):
            try:
                values[name] = [float(w) for w in values[name].split(",")]
            except ValueError as error:
                raise ConfigError(f"{flag(name)}: {values[name]!r} is no list of numbers") from error
    for name, value in values.items():
        for n in value if isinstance(value, list) else [value]:
            if isinstance(n, int) and abs(n) > LARGEST:
                raise ConfigError(f"{flag(name)} is too large: no number may be beyond 2^63 - 1")
    given = [name for name in LENGTHS if name in values]
    if len(given) > 1:
        raise ConfigError(f"{_flags(given)} are one length too many: give one of them")
    for name in ("tokens", "budget_minutes"):
        if name in values and not 0 < _number(name, values[name]) < math.inf:
            raise ConfigError(f"{flag(name)} is {values[name]}; it must be positive")
    return values


LARGEST = (1 << 63) - 1  # of integers: much larger ones are no float
LISTS = ("data_weights", "decay_data_weights", "held_out")  # of numbers, as text with commas or as they are


def _of_file(path: Path) -> dict[str, Any]:
    """Options of a file, each of the kind that its flag has. JSON's null is an option that is not given, and a number without a
    fraction an integer, however it is written (1e3)."""
    values = load_options(path)
    actions = {action.dest: action for action in train_parser()._actions if action.dest not in (*PROCESS, "help")}
    unknown = sorted(set(values) - set(actions))
    if unknown:
        raise ConfigError(f"{path}: unknown option(s) {', '.join(unknown)}")
    values = {name: value for name, value in values.items() if value is not None}
    if isinstance(values.get("data"), str):
        values["data"] = [values["data"]]
    for name, value in values.items():
        if actions[name].type is int and isinstance(value, float) and value.is_integer():
            values[name] = int(value)
        expected = _mismatch(actions[name], values[name])
        if expected:
            raise ConfigError(f"{path}: {name} is {value!r}; expected {expected}")
    return values


def _mismatch(action: argparse.Action, value: Any) -> str:
    """What an option of a file should be; "" if it is that."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if action.nargs == 0:
        return "" if isinstance(value, bool) else "true or false"
    if action.dest in LISTS:
        numbers = value if isinstance(value, list) else [value]
        fits = isinstance(value, str) or all(type(n) in (int, float) for n in numbers)
        return "" if fits else "numbers, as a list or as text with commas"
    if action.dest == "data":
        return "" if isinstance(value, list) and all(isinstance(path, str) for path in value) else "a path, or a list of paths"
    if action.choices:
        return "" if value in action.choices else f"one of {', '.join(action.choices)}"
    if action.type is int:
        return "" if number and isinstance(value, int) else "an integer"
    if action.type is float:
        return "" if number else "a number"
    return "" if isinstance(value, str) else "a path" if action.type is Path else "a text"


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{flag(name)} is {value!r}; expected a number")
    return float(value)


def flag(name: str) -> str:
    """An option as it is typed."""
    return "--" + name.replace("_", "-")


def _flags(names: list[str]) -> str:
    return ", ".join(map(flag, names))


def refuse_sharded_adapters(run: dict[str, Any], options: argparse.Namespace) -> None:
    """ConfigError where a run, or the flags of a new one, have adapters."""
    if options.shard_optimizer and run.get("lora"):
        raise ConfigError("--shard-optimizer has no effect with --lora: every rank keeps the moments of all adapters")


def refuse_unused_here(options: argparse.Namespace, ranks: int) -> None:
    """ConfigError for what would have no effect in this process, be the run new or an old one that goes on."""
    if options.precision is not None and options.device == "cpu":
        raise ConfigError("--precision has no effect on --device cpu, which trains in float32")
    if options.comm is not None and options.device == "cpu":
        raise ConfigError("--comm has no effect on --device cpu: ranks on CPUs exchange their arrays by MPI")
    if options.plan:
        for name in ("resume", "tensorboard", "comm"):
            if getattr(options, name):
                raise ConfigError(f"--{name} has no effect beside --plan, which trains nothing")
        return
    given = [name for name in PAPER if getattr(options, name) is not None]
    if given:
        raise ConfigError(f"{_flags(given)} would have no effect: they describe a --plan")
    if options.tensorboard and options.dry_run:
        raise ConfigError("--tensorboard has no effect beside --dry-run, which trains nothing")
    for name in ("shard_optimizer", "comm"):
        if getattr(options, name) and ranks == 1:
            raise ConfigError(f"{flag(name)} has no effect on one rank: start several with mpiexec")


def refuse_unused(values: dict[str, Any], options: argparse.Namespace) -> None:
    """ConfigError for what was given of a new run and would have no effect, with the reason."""
    if options.plan:
        others = ("init_from", "branch_from", "teacher", *TEXT[:2], *TEXT[3:], "budget_minutes")
        return _refuse(values, others, "--plan computes from sizes, batch and tokens")
    refuse_sharded_adapters(values, options)
    if values.get("checkpoint_minutes"):
        _refuse(values, ("checkpoint_every",), "--checkpoint-minutes says when checkpoints are written")
    if values.get("optimizer") == "adamw":
        _refuse(values, ("muon_lr", "muon_momentum"), "--optimizer adamw does not use Muon")
    if values.get("quantize", "decay") != "decay":
        _refuse(values, ("quantize_fraction",), f"int8 is simulated: {values['quantize']}")
    if values.get("lora"):
        if not values.get("init_from"):
            raise ConfigError(
                "--lora would have no effect: adapters need a model, --init-from or that of the parent run"
            )
        _refuse(
            values,
            ("optimizer", "muon_lr", "muon_momentum", "weight_decay"),
            "adapters are trained by AdamW, undecayed",
        )
    if values.get("branch_from"):
        kept = (*SIZES, *TEXT, "teacher", "init_from", "lora", "seed", "seq_len", "packing", "optimizer")
        return _refuse(
            values,
            (*kept, "teacher_cache", "teacher_top_k"),
            "--branch-from continues its parent's model, text and order of rows",
        )
    if values.get("init_from"):
        _refuse(values, SIZES, "the model comes from --init-from")
        _refuse(values, ("tokenizer", "vocab_size"), "--init-from brings its tokenizer")
    _refuse_of_teacher(values, options)
    return _refuse_of_texts(values, options)


def _refuse_of_teacher(values: dict[str, Any], options: argparse.Namespace) -> None:
    """As refuse_unused, of what a teacher, or none, leaves without effect."""
    if values.get("teacher"):
        _refuse(values, ("tokenizer", "vocab_size"), "the student reads with its teacher's tokenizer")
    else:
        _refuse(values, ("distill_alpha", "distill_tau", "teacher_cache"), "there is no --teacher")
    if values.get("teacher_cache"):
        if options.device == "cuda":
            raise ConfigError(
                "--device cuda does not read a teacher's cache; without --teacher-cache it runs the teacher"
            )
        if values.get("attention", "document") != "document":
            raise ConfigError(
                "--teacher-cache needs --attention document: the teacher has read every document by itself"
            )
    else:
        _refuse(values, ("teacher_top_k",), "there is no --teacher-cache")


def _refuse_of_texts(values: dict[str, Any], options: argparse.Namespace) -> None:
    """As refuse_unused, of what the kinds of the texts leave without effect."""
    if not any(Path(path).suffix == PARQUET for path in values.get("data") or []):
        _refuse(values, ("column",), "no text is a .parquet file")
    if any(is_preference(Path(path)) for path in values.get("data") or [] if Path(path).is_file()):
        _refuse_beside_pairs(values, options)
        return
    _refuse(values, ("dpo_beta",), "no text consists of pairs of answers")
    chats = [is_chat(Path(path)) for path in values.get("data") or [] if Path(path).is_file()]
    if not any(chats):
        _refuse(values, ("train_on",), "no text consists of conversations")
    if chats and all(chats):
        _refuse(values, ("drop_unfinished",), "conversations are whole")
    prepared = [Path(path).is_dir() for path in values.get("data") or []]
    if any(prepared):
        _refuse(values, ("tokenizer", "vocab_size"), "a prepared folder brings its tokenizer")
    if prepared and all(prepared):
        _refuse(values, ("drop_unfinished", "held_out"), "the documents of a prepared folder are chosen already")
    if values.get("tokenizer"):
        _refuse(values, ("vocab_size",), "--tokenizer is given")


def _refuse_beside_pairs(values: dict[str, Any], options: argparse.Namespace) -> None:
    """As refuse_unused, for a run that learns from preferences."""
    if len(values["data"]) > 1:
        raise ConfigError("pairs of answers are learnt from alone: give one --data")
    if not values.get("init_from"):
        raise ConfigError("pairs of answers need a model that answers: --init-from")
    if options.device == "cuda":
        raise ConfigError("--device cuda does not learn from preferences; --device cpu does")
    _refuse(
        values, ("teacher", "teacher_cache", "distill_alpha", "distill_tau"), "pairs of answers have their own loss"
    )
    _refuse(values, ("attention", "packing"), "a row is one pair of answers, which do not see each other")
    _refuse(values, ("train_on", "drop_unfinished", "data_weights", "decay_data_weights"), "pairs of answers are whole")
    _refuse(values, ("tokens",), "a step counts pairs, not tokens: give --steps")


def _refuse(values: dict[str, Any], names: tuple[str, ...], reason: str) -> None:
    given = [name for name in names if name in values]
    if given:
        raise ConfigError(f"{_flags(given)} would have no effect: {reason}")


def held_out_shares(values: dict[str, Any], count: int) -> list[float]:
    """Of each of ``count`` texts."""
    given = values.get("held_out", [HELD_OUT])
    given = [given] if isinstance(given, int | float) else given
    shares = [_number("held_out", share) for share in given] if isinstance(given, list) else []
    if len(shares) not in (1, count):
        raise ConfigError(f"--held-out: {len(shares)} shares for {count} texts: give one for all or one each")
    if not all(share == 0 or 1 / FINEST_SHARE <= share <= 0.5 for share in shares) or shares[0] == 0:
        raise ConfigError(f"--held-out is {given}; shares lie in 0..0.5, and the first text's is not 0")
    return shares * count if len(shares) == 1 else shares


def data_paths(values: dict[str, Any]) -> list[Path]:
    """The texts and prepared folders, which must exist."""
    paths = [Path(p) for p in values.get("data") or []]
    if not paths:
        raise ConfigError("--data is missing: give a .txt or .jsonl file, or a prepared folder")
    for path in paths:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
        if path.is_dir() and not (path / "manifest.json").exists():
            raise DataError(f"{path}: a folder without manifest.json; 'pyengine train prepare' makes one from a text")
        if not path.is_dir() and not path.is_file():
            raise DataError(f"{path}: not a regular file")
    return paths
