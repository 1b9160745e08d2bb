"""The options of ``pyengine train``, in groups, each with a line that says what it is for.

Defaults stand in one place, :class:`TrainConfig`; a flag that is not given is None here, so that a
file of options can come between.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from .chat import TRAIN_ON
from .config import CHOICES, TrainConfig
from .device import COMMS, DEVICES, PRECISIONS
from .parser import Parser, at_least, number
from .scale import CARDS
from .teacher_cache import TOP_K

LENGTHS = ("steps", "tokens", "budget_minutes")
MODEL_OPTIONS = ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim")

EPILOG = """\
examples:
  pyengine train --run-dir ~/runs/mine --data mine.txt --budget-minutes 20
  pyengine train --run-dir ~/runs/mine --resume
  pyengine train --run-dir ~/runs/longer --branch-from ~/runs/mine/trunk --steps 5000
  pyengine train --plan --depth 12 --tokens 3e9 --batch-size 512 --shards 64 --ranks 64 --gpu h100 --shard-optimizer
  pyengine train --run-dir ~/runs/tuned --init-from llama_directory --data mine.txt --steps 500 --muon-lr 0.002 --lr 3e-4

RUN/final is what 'pyengine freeze' takes. Ctrl-C writes a checkpoint, --resume goes on from it. If the loss stalls or jumps,
halve both learning rates; if memory does not suffice, raise --shards or set --recompute block.

other commands, each with --help:
  pyengine train draft       a draft head for a frozen model, which guesses its next tokens
  pyengine train prepare     tokenize a text once, for many runs
  pyengine train evaluate    loss and bits per byte of a model, float32 and int8
  pyengine train sample      text from a checkpoint, by the trainer's own forward
  pyengine train snap        a copy whose weights are what the int8 codes stand for
  pyengine train plot        the loss curves of a run and of the runs that it continues
  pyengine runs              runs beside one another, and how they differ
  pyengine cost              what a training was and what running the model is
"""

# group -> (what it is about, {option: (metavar, help)}); a default is added to the help
Options = dict[str, tuple[str, str]]
GROUPS: list[tuple[str, str, Options]] = [
    (
        "size",
        "--depth alone, or explicit sizes; multiples of 64 waste nothing in the engine",
        {
            "depth": ("D", "the one dial: D layers, width 64 D, heads of 64 (default 4)"),
            "dim": ("N", "width of the residual stream"),
            "n_layers": ("N", "transformer blocks, one after the other"),
            "n_heads": ("N", "query heads"),
            "n_kv_heads": ("N", "key and value heads; divides --n-heads, fewer make a smaller cache"),
            "head_dim": ("N", "numbers a head; even (default 64, or dim / heads where both are given)"),
            "qk_norm": ("", "RMSNorm of every query and key head before RoPE, as in Qwen3 (default off)"),
            "hidden_dim": ("N", "width inside the feed-forward (default: 8/3 dim, rounded up to 64)"),
        },
    ),
    (
        "length and schedule",
        "learning rates rise, stay, and fall to zero in the last part; give one of the three lengths",
        {
            "steps": ("N", "optimizer steps, counted from the beginning of the first run"),
            "tokens": ("X", "train on so many tokens instead; 20 a parameter are balanced"),
            "budget_minutes": ("X", "as many steps as fit, measured at the start; fewer where the machine becomes slower"),
            "warmup_fraction": ("F", "first part of the steps, in which the learning rates rise from zero"),
            "decay_fraction": ("F", "last part, in which they fall to zero, behind the trunk (0.3 with --decay-data-weights)"),
            "decay_shape": ("", "how they fall: a straight line, or half a cosine wave"),
        },
    ),
    (
        "batch and memory",
        "",
        {
            "seq_len": ("N", "tokens a row, and the context of a new model"),
            "packing": (
                "",
                "how documents fill rows: one behind another, the one that a row's end cuts once more; or those that fit best",
            ),
            "attention": (
                "",
                "what a position sees before it: its whole row, or its own document alone",
            ),
            "batch_size": ("N", "rows a step; the gradient is the mean over all their tokens"),
            "shards": (
                "N",
                "parts that the batch is cut into: as many run at once as there are threads, the rest adds up",
            ),
            "recompute": (
                "",
                "made again in the backward instead of kept: nothing, what norms and SwiGLU gave, or whole blocks",
            ),
        },
    ),
    (
        "optimizer",
        "",
        {
            "optimizer": ("", "muon: Muon for the blocks' matrices and AdamW for the rest; adamw: for everything"),
            "muon_lr": ("X", "peak learning rate of Muon, in units of an orthogonal matrix (with --init-from 0.002)"),
            "lr": ("X", "peak learning rate of AdamW: embeddings and norms, or everything (then 0.003; with --init-from lower)"),
            "muon_momentum": ("X", "of Muon: how much of the last direction stays"),
            "beta1": ("X", "of AdamW: how much of the mean gradient stays"),
            "beta2": ("X", "of AdamW: how much of the mean square stays (0.95 where it trains everything, and with --init-from)"),
            "eps": ("X", "of AdamW: keeps a rarely used weight's step finite"),
            "weight_decay": ("X", "pull towards zero, times the learning rate, on matrices only"),
            "clip": ("X", "longest gradient, over all weights; longer ones are scaled down to it"),
        },
    ),
    (
        "int8",
        "",
        {
            "quantize": (
                "",
                "when the engine's own rounding is simulated, so that the weights settle where it costs nothing",
            ),
            "quantize_fraction": (
                "F",
                "last part of the steps that simulates it, at most the decay; 0: all of the decay, and so with --init-from",
            ),
        },
    ),
    (
        "distillation",
        "the loss is (1 - alpha) CE + alpha tau^2 KL(teacher || student)",
        {
            "distill_alpha": ("X", "share of the teacher in the loss; with --teacher and 0 it becomes 0.5"),
            "distill_tau": ("X", "temperature at which teacher and student are compared"),
        },
    ),
    (
        "preferences",
        "of pairs of answers: the loss is -log sigmoid(beta (gain of the chosen answer - gain of the rejected one))",
        {"dpo_beta": ("X", "how strongly the model is held to what it was: larger values hold it more")},
    ),
    (
        "watching and saving",
        "0 turns off what happens every N steps",
        {
            "eval_every": ("N", "steps from one validation to the next"),
            "eval_documents": ("N", "held-out documents of each text that are scored each time"),
            "sample_every": ("N", "steps from one sample in the log to the next; 0 draws none"),
            "sample_prompt": ("TEXT", "what the samples begin with"),
            "sample_tokens": ("N", "tokens of a sample"),
            "checkpoint_every": ("N", "steps from one checkpoint to the next: what a crash can cost"),
            "checkpoint_minutes": ("X", "minutes from one to the next, instead of --checkpoint-every; 0: as that says"),
            "keep_checkpoints": ("N", "newest checkpoints that are kept; 0 keeps all"),
        },
    ),
]

KINDS = {"int": int, "float": float, "str": str}
OTHER_KINDS: dict[str, type] = {"tokens": float, "budget_minutes": float, "qk_norm": str}  # not TrainConfig's
SWITCH = ("on", "off")


def _add(group: Any, name: str, metavar: str, text: str) -> None:
    """One option of GROUPS."""
    fields = {field.name: field for field in dataclasses.fields(TrainConfig)}
    options: dict[str, Any] = {"type": OTHER_KINDS.get(name, int), "metavar": metavar}
    if name in fields:
        options["type"] = KINDS[str(fields[name].type)]
        text = f"{text} (default {fields[name].default})"
    if name in CHOICES or name == "qk_norm":
        options.update(choices=CHOICES.get(name, SWITCH), metavar=None)
    group.add_argument(f"--{name.replace('_', '-')}", help=text, **options)


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run", "a new one, or a start from what exists")
    add, start = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add(
        "--run-dir",
        type=Path,
        metavar="RUN",
        help="the run's folder, outside a source tree; never overwritten",
    )
    start(
        "--resume", action="store_true", help="continue the run in --run-dir after Ctrl-C or a crash, as it was started"
    )
    start(
        "--branch-from",
        type=Path,
        metavar="DIR",
        help="a checkpoint or trunk to continue in this new run, with its data",
    )
    start(
        "--init-from",
        type=Path,
        metavar="MODEL",
        help="a Llama or Qwen3 model to fine-tune, with its tokenizer: a Hugging Face folder or a GGUF file",
    )
    add(
        "--lora",
        metavar="R,ALPHA[,NAME,…]",
        help="with --init-from: learn adapters of rank R beside the named matrices (q_proj, …; default: all) instead of them",
    )
    add(
        "--teacher",
        type=Path,
        metavar="MODEL",
        help="a larger model to distill from: a Hugging Face folder or a GGUF file",
    )
    add(
        "--teacher-cache",
        type=Path,
        metavar="FOLDER",
        help="with --teacher: its likeliest next tokens for the whole text are kept here, computed once; students share it",
    )
    add(
        "--teacher-top-k",
        type=int,
        metavar="K",
        help=f"with --teacher-cache: so many tokens each, the rest taken together (default {TOP_K})",
    )
    add("--config", type=Path, metavar="FILE", help="JSON or TOML of these options, with underscores; flags win")
    add("--seed", type=int, metavar="N", help=f"of weights, batches and samples (default {TrainConfig.seed})")
    add(
        "--plan",
        action="store_true",
        help="print what a run on --ranks cards of kind --gpu would take, from sizes, flags and --tokens alone, and stop",
    )
    add(
        "--tensorboard", action="store_true", help="write metrics.jsonl's numbers for TensorBoard, too: RUN/tensorboard"
    )
    add("--dry-run", action="store_true", help="print the plan (parameters, tokens, memory, FLOPs, time) and stop")


def _add_text(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("text", "a part of each text is held out for validation").add_argument
    add(
        "--data",
        type=Path,
        action="append",
        metavar="TEXT",
        help='.txt, .parquet, .jsonl of {"text": …}, of {"messages": […]} or (alone) of {"prompt": …, "chosen": …, '
        '"rejected": …}, or a prepared folder; repeatable',
    )
    add("--data-weights", metavar="W,…", help="how often rows come from each text, one number a text (default: alike)")
    add(
        "--decay-data-weights",
        metavar="W,…",
        help="the same for the decay, e.g. 1,0: the first alone (default: no change)",
    )
    add(
        "--held-out",
        metavar="S,…",
        help="share of each text's documents that is held out, one for all or one a text (default 0.02; 0: none, "
        "not for the first)",
    )
    add("--column", metavar="NAME", help="of .parquet files: the column with the documents (default text)")
    add("--drop-unfinished", action="store_true", help="leave out documents that do not end like a sentence")
    add("--train-on", choices=TRAIN_ON, help="of conversations: what the assistant says, or all (default assistant)")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="tokens of the tokenizer to train (default 4096); 1000 for a small text",
    )
    add("--tokenizer", type=Path, metavar="FILE", help="use this tokenizer.json instead of training one")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    ranks = "mpiexec -n N pyengine train …: N processes share the batch; the same bits for any N, a power of two"
    add = parser.add_argument_group("machine", ranks).add_argument
    add("--threads", type=at_least(1), metavar="N", help="the result does not depend on it (default: the CPUs allowed here)")
    add("--ranks", type=at_least(1), metavar="N", help="with --plan: how many ranks, one card each (default 1)")
    add("--gpu", choices=sorted(CARDS), help="with --plan: kind of card (default h100)")
    add("--nodes", type=at_least(1), metavar="N", help="with --plan: machines that the ranks lie on (default: 8 cards in each)")
    add("--rate", type=number(0), metavar="PRICE", help="with --plan: of a card's hour, in any currency")
    add(
        "--shard-optimizer",
        action="store_true",
        help="with several ranks: each keeps the moments of its share of the parameters only",
    )
    add("--device", choices=DEVICES, default="cpu", help="what to train on (default cpu)")
    add(
        "--comm",
        choices=COMMS,
        help="with several ranks on --device cuda: gradients from GPU to GPU (nccl), or through the hosts (default nccl)",
    )
    add("--precision", choices=PRECISIONS, help=f"activations on --device cuda (default {PRECISIONS[0]})")


def train_parser() -> argparse.ArgumentParser:
    """Of ``pyengine train``."""
    parser = Parser(
        prog="pyengine train",
        usage="pyengine train --run-dir RUN --data TEXT [options]",
        description="Train a model from text, continue a run, decay a trunk, fine-tune or distill.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_run(parser)
    _add_text(parser)
    for title, description, options in GROUPS:
        group = parser.add_argument_group(title, description or None)
        for name, (metavar, text) in options.items():
            _add(group, name, metavar, text)
    _add_machine(parser)
    return parser
