"""What stands before the first step: tokenizer, text, sizes and run.json of a new run or of a branch."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from . import runfolder, train
from .chat import TRAIN_ON, ChatFormat, is_chat
from .comm import together
from .config import ModelConfig, TrainConfig, model_from_depth, stored, to_json, train_config_from_json
from .data import Corpus, Reader, file_sha256, prepare_corpus
from .device import Device, Machine
from .errors import CheckpointError, ConfigError, DataError
from .flags import MODEL_OPTIONS, SWITCH
from .gguf_source import model_config_of, model_folder
from .lora import parse as parse_lora
from .options import data_paths, held_out_shares
from .plan import batch_rows, estimated_step_seconds, make_plan
from .preference import Pairs, is_preference, prepare_pairs, store_reference
from .ranks import check_ranks
from .run import open_run
from .scale import CARDS, predict
from .teacher_cache import TOP_K, prepare_cache
from .text import COLUMN, end_token, labelled, load_tokenizer, read_documents, train_tokenizer
from .threads import available_threads
from .trainer import check_sizes

VOCABULARY = 4096
ADAMW_LR = 3e-3  # of a run without Muon
ADAMW_BETA2, SHORT_DECAY = 0.95, 0.3  # where AdamW trains everything, or a model that has learnt already
FINE_TUNING_LR, FINE_TUNING_MUON_LR = 3e-4, 2e-3  # of a model that has learnt already
LORA_LR = 1e-3
PREFERENCE_LR, PREFERENCE_LORA_LR = 1e-5, 1e-4  # AdamW's: the loss pulls as long as it is let
DISTILL_ALPHA = 0.5  # where a teacher is given and no share


# ---- options to configurations -----------------------------------------------------------------------------------


def train_config(values: dict[str, Any], base: dict[str, Any], done: tuple[int, int] = (0, 0)) -> TrainConfig:
    """The knobs: values over base. done: steps and tokens that a parent has behind it."""
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    chosen = {**base, **{k: v for k, v in values.items() if k in names}}
    config = train_config_from_json(chosen)
    if (
        "quantize_fraction" in values
        and config.quantize == "decay"
        and config.quantize_fraction > config.decay_fraction
    ):
        raise ConfigError(
            f"quantize_fraction ({config.quantize_fraction}) exceeds decay_fraction ({config.decay_fraction}): int8 is "
            "simulated in the last part of the decay"
        )
    if "tokens" in values:
        left = float(values["tokens"]) - done[1]
        steps = done[0] + max(1, round(left / (config.batch_size * config.seq_len)))
        config = dataclasses.replace(config, steps=steps)
    return config


def model_config(values: dict[str, Any], vocab_size: int, seq_len: int) -> ModelConfig:
    """A new model's sizes."""
    try:
        base = model_from_depth(int(values.get("depth", 4)), vocab_size, seq_len)
        sizes: dict[str, Any] = {name: int(values[name]) for name in MODEL_OPTIONS if name in values}
    except (TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"a size is no integer: {error}") from error
    if "dim" in sizes and "head_dim" not in sizes and sizes.get("n_heads", 0) > 0:
        sizes["head_dim"] = sizes["dim"] // sizes["n_heads"]
    if values.get("qk_norm", "off") not in SWITCH:
        raise ConfigError(f"qk_norm is {values['qk_norm']!r}; choose from {SWITCH}")
    return dataclasses.replace(base, **sizes, qk_norm=values.get("qk_norm") == "on")


def base_options(values: dict[str, Any], paths: Sequence[Path]) -> dict[str, Any]:
    """Defaults that depend on what was given."""
    base: dict[str, Any] = {"data_weights": [1.0] * len(paths)}
    for name in ("init_from", "teacher"):
        if values.get(name):
            context = model_config_of(Path(values[name])).max_seq_len
            base["seq_len"] = min(base.get("seq_len", TrainConfig.seq_len), context)
    sizes = values.get("seq_len", base.get("seq_len", TrainConfig.seq_len)), values.get("shards", 1)
    if (
        "tokens" in values
        and not {"init_from", "batch_size"} & set(values)
        and all(type(n) is int and n > 0 for n in sizes)
    ):
        base["batch_size"] = max(sizes[1], min(TrainConfig.batch_size, batch_rows(values["tokens"], sizes[0])))
        base["shards"] = min(base["batch_size"], TrainConfig.shards)
    if values.get("optimizer") == "adamw":
        base["lr"] = ADAMW_LR
    if values.get("optimizer") == "adamw" or values.get("init_from"):
        base.update(beta2=ADAMW_BETA2, decay_fraction=SHORT_DECAY)
    if values.get("decay_data_weights"):
        base["decay_fraction"] = SHORT_DECAY  # it is when the mixture changes, too
    if values.get("init_from"):
        base.update(lr=LORA_LR if values.get("lora") else FINE_TUNING_LR, muon_lr=FINE_TUNING_MUON_LR)
        base["quantize_fraction"] = 0.0  # few steps: all of the decay
    if any(is_preference(path) for path in paths if path.is_file()):
        base.update(lr=PREFERENCE_LORA_LR if values.get("lora") else PREFERENCE_LR, optimizer="adamw")
        base["weight_decay"] = 0.0
    if values.get("teacher"):
        base["distill_alpha"] = DISTILL_ALPHA
    return base


# ---- text --------------------------------------------------------------------------------------------------------


def reading(values: dict[str, Any]) -> dict[str, Any]:
    """How documents are taken out of a file."""
    return {
        "drop_unfinished": bool(values.get("drop_unfinished")),
        "column": str(values.get("column", COLUMN)),
    }


Say = Callable[[str], None]


def _quietly(_text: str) -> None:
    """Nobody listens."""


def find_tokenizer(values: dict[str, Any], paths: Sequence[Path], say: Say = _quietly) -> Any:
    """The given one, a fine-tuned or teaching model's, a prepared folder's, or one trained on the texts. say: what takes long."""
    for name in ("tokenizer", "init_from", "teacher"):
        if values.get(name):
            path = Path(values[name])
            return load_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    for path in paths:
        if path.is_dir():
            return load_tokenizer(path / "tokenizer.json")

    def documents() -> Iterator[str]:
        for path, share in zip(paths, held_out_shares(values, len(paths)), strict=True):
            found = False
            for text, held_out in labelled(read_documents(path, **reading(values)), share):
                found = True
                if not held_out:
                    yield text
            if not found:
                raise DataError(f"{path}: no document to train on (empty text?)")

    try:
        size = int(values.get("vocab_size", VOCABULARY))
        say(f"training a tokenizer of {size:,} tokens on {', '.join(map(str, paths))}")
        return train_tokenizer(documents(), size)
    except (TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise ConfigError(f"vocab_size is {values.get('vocab_size')!r}; expected an integer") from error


def find_ends(values: dict[str, Any], paths: Sequence[Path], tokenizer: Any) -> tuple[int | None, int | None]:
    """BOS and EOS of what :func:`find_tokenizer` found."""
    for name in ("init_from", "teacher"):
        if values.get(name):
            return checkpoints.special_ids(Path(values[name]))
    given = [Path(values["tokenizer"])] if values.get("tokenizer") else [path for path in paths if path.is_dir()]
    if not given:
        return 0, 0
    path = given[0] / "tokenizer.json" if given[0].is_dir() else given[0]
    return end_token(tokenizer, path)


def prepare_all(
    values: dict[str, Any], paths: Sequence[Path], tokenizer: Any, folder: Path, eos: int | None, say: Say = _quietly
) -> list[str]:
    """Corpora of the texts as paths relative to the run folder, or absolute for prepared ones."""
    corpora = []
    shares = held_out_shares(values, len(paths))
    for number, path in enumerate(paths):
        if path.is_dir():
            Corpus(path).require_tokenizer(tokenizer)
            corpora.append(str(path.resolve()))
            continue
        target = folder / "data" / f"{number}_{path.stem}"
        chat = None
        if is_chat(path):
            if not values.get("init_from"):
                raise DataError(f"{path}: conversations need a model whose template renders them: --init-from")
            chat = ChatFormat(Path(values["init_from"]), tokenizer, values.get("train_on", TRAIN_ON[0]))
        more = {"chat": chat, "held_out": shares[number], "say": say, **reading(values)}
        prepare_corpus(path, target, tokenizer, eos=eos, **more)
        corpora.append(str(target.relative_to(folder)))
    return corpora


PAIRS = "data/pairs"  # in the run folder
UNPACKED = {"init_from": "base", "teacher": "teacher"}  # likewise, of what is given as a GGUF file


def prepare_preferences(
    values: dict[str, Any], source: Path, config: TrainConfig, folder: Path, say: Say = _quietly
) -> TrainConfig:
    """Pairs of answers and their log-probabilities by the model; the config with rows that hold them."""
    model_folder = Path(values["init_from"])
    tokenizer = load_tokenizer(model_folder / "tokenizer.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    prepare_pairs(source, folder, ChatFormat(model_folder, tokenizer), held_out_shares(values, 1)[0])
    pairs = Pairs(folder)
    model, params = checkpoints.load_model(model_folder)
    if "seq_len" not in values:
        config = dataclasses.replace(config, seq_len=pairs.row_length(model.max_seq_len))
    pairs.check(source, config.seq_len)
    check_sizes(model, config)
    of = f"of {len(pairs.table):,} pairs are scored by the model as it is"
    store_reference(pairs, model, params, config.seq_len, available_threads(), lambda done: say(f"{done:,} {of}"))
    return config


# ---- runs --------------------------------------------------------------------------------------------------------


def new_run(values: dict[str, Any], folder: Path, arguments: Sequence[str]) -> None:
    """Tokenizer, data, sizes, run.json of a run that begins here."""
    with contextlib.closing(runfolder.Log(folder / "log.txt")) as log:
        _new_run(values, folder, arguments, log)


def _new_run(values: dict[str, Any], folder: Path, arguments: Sequence[str], log: runfolder.Log) -> None:
    paths = data_paths(values)
    held_out_shares(values, len(paths))
    for name, unpacked in UNPACKED.items():
        if values.get(name):
            values = {**values, name: model_folder(Path(values[name]), folder / unpacked)}
    config = train_config(values, base_options(values, paths))
    if values.get("lora"):
        parse_lora(str(values["lora"]), Path(values["init_from"]))  # before the text is read
    if not values.get("init_from"):
        model_config(values, VOCABULARY, config.seq_len)  # sizes that cannot work, before minutes of tokenizing
    tokenizer = find_tokenizer(values, paths, log.report)
    bos, eos = find_ends(values, paths, tokenizer)
    attachments = Path(values["init_from"]).resolve() if values.get("init_from") else None
    model = (
        checkpoints.read_model_config(attachments)
        if attachments
        else model_config(values, tokenizer.get_vocab_size(), config.seq_len)
    )
    if tokenizer.get_vocab_size() > model.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, the model {model.vocab_size}")
    pairs = attachments is not None and is_preference(paths[0])
    if pairs:
        config = prepare_preferences(values, paths[0], config, folder / PAIRS, log.report)
    corpora = [] if pairs else prepare_all(values, paths, tokenizer, folder, eos, log.report)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    extra = {
        "command": shlex.join(["pyengine", "train", *arguments]),
        "init_from": str(attachments) if attachments else None,
        "data": [{"name": p.name, "sha256": file_sha256(p)} for p in paths if p.is_file()],
    }
    config = dataclasses.replace(config, extra=extra)
    lora = parse_lora(str(values["lora"]), attachments) if values.get("lora") and attachments else None
    run_values: dict[str, Any] = {
        "lora": lora.to_json() if lora else None,
        "model": to_json(model),
        "train": to_json(config),
        "corpora": corpora,
        "pairs": PAIRS if pairs else None,
        "bos": bos,
        "eos": eos,
        "attachments": str(attachments) if attachments else None,
        "teacher": str(Path(values["teacher"]).resolve()) if values.get("teacher") else None,
    }
    if values.get("teacher_cache"):
        cache, teacher = Path(values["teacher_cache"]).resolve(), Path(values["teacher"])
        texts = [Corpus(folder / path, model.vocab_size) for path in corpora]
        k = int(values.get("teacher_top_k", TOP_K))
        prepare_cache(cache, teacher, texts, model, config, k, available_threads(), log.report)
        run_values["teacher_cache"] = str(cache)
    runfolder.write_run(folder, run_values)


def branch(values: dict[str, Any], folder: Path, arguments: Sequence[str]) -> None:
    """run.json of a run that starts from another run's checkpoint, with its text; flags change the schedule."""
    checkpoint = Path(values["branch_from"]).resolve()
    if not (checkpoint / "state.json").exists():
        raise CheckpointError(f"{checkpoint} is no checkpoint: give RUN/trunk or RUN/checkpoints/step_…")
    state = checkpoints.read_state(checkpoint, checkpoints.STATE)
    origin = runfolder.run_of(checkpoint)
    if origin is None:
        raise CheckpointError(
            f"{checkpoint}: its run.json is not beside it; branch from a checkpoint in its run folder"
        )
    parent = open_run(origin)
    if parent.pairs:
        raise ConfigError("--branch-from continues runs on text: start from this run's final/ with --init-from")
    run_values = runfolder.read_run(origin)
    if not run_values.get("teacher") and {"distill_alpha", "distill_tau"} & set(values):
        raise ConfigError("--distill-alpha, --distill-tau would have no effect: the parent has no teacher")
    if run_values.get("teacher_cache") and "distill_tau" in values:
        raise ConfigError("--distill-tau is that of the parent's cached teacher and cannot change")
    base = stored(state["train"])
    base["extra"] = {
        **{name: value for name, value in base.get("extra", {}).items() if name != "budget"},  # it was the parent's
        "command": shlex.join(["pyengine", "train", *arguments]),
        "parent_command": base.get("extra", {}).get("command"),
    }
    done = int(state["step"]), int(state["tokens"])
    config = train_config(values, base, done)
    if config.steps <= done[0] and "budget_minutes" not in values:
        raise ConfigError(f"--steps counts from the beginning: the checkpoint has done {done[0]} already")
    row = checkpoints.reader_position(state) // config.seq_len
    past = tuple(phase for phase in parent.phases() if phase.first_row < row)
    run_values.update(
        corpora=[str((origin / path).resolve()) for path in run_values["corpora"]],
        train=to_json(config),
        parent=str(checkpoint),
        reader=Reader(step=done[0], row=row, past=past).to_json(),
    )
    shutil.copyfile(origin / "tokenizer.json", folder / "tokenizer.json")
    runfolder.write_run(folder, run_values)


def apply_budget(folder: Path, minutes: float, machine: Machine) -> None:
    """Replace the steps of run.json by those that fit into minutes, after what a parent has done. On every rank."""
    with together(machine.comm):
        run = open_run(folder)
        parent = runfolder.read_run(folder).get("parent")
        before = 0.0 if parent is None else float(checkpoints.read_state(Path(parent))["seconds"])
    with contextlib.closing(runfolder.Log(folder / "log.txt", speaks=machine.comm.rank == 0)) as log:
        log.say("measuring what a step takes here; in a new installation this compiles the kernels first, up to a minute")
    budget, fitting = train.measured_budget(run, minutes, machine, before)
    steps = run.reader.step + fitting
    extra = {**run.config.extra, **dataclasses.replace(budget, planned=steps).stored()}
    if machine.comm.rank == 0:
        runfolder.replace_config(folder, dataclasses.replace(run.config, steps=steps, extra=extra))
    machine.comm.gather(None)


def dry_run(values: dict[str, Any], options: argparse.Namespace) -> None:
    """Print the plan without side effects; tokens of texts are guessed."""
    paths = data_paths(values)
    config = train_config(values, base_options(values, paths))
    if values.get("init_from"):
        model = model_config_of(Path(values["init_from"]))
    else:
        model = model_config(values, _vocabulary(values, paths), config.seq_len)
    tokens = 0.0
    for path in paths:  # about four bytes a token; exact once the text is tokenized
        tokens += Corpus(path).train.n_tokens if path.is_dir() else path.stat().st_size / 4
    epochs = [config.steps * config.batch_size * config.seq_len / max(1.0, tokens)]
    threads = max(1, min(options.threads or available_threads(), config.shards))
    lora = parse_lora(str(values["lora"]), Path(values["init_from"])) if values.get("lora") else None
    seconds = estimated_step_seconds(model, config, threads, lora) if options.device == "cpu" else None
    memory = Device.of(options).memory_bytes(model, config, threads, lora=lora)
    for line in make_plan(model, config, epochs, threads, seconds, memory, lora).lines(model, config):
        print(line)


def activations_on_a_card(model: ModelConfig, config: TrainConfig) -> int:
    """Bytes of a micro-batch's forward and backward: bfloat16, but float32 in a run that simulates int8 at some time."""
    from .model import activation_bytes

    rows = config.batch_size // config.shards
    whole = activation_bytes(model, rows, config.seq_len, config.recompute)
    return whole if config.quantized_steps else whole // 2


def plan_on_paper(values: dict[str, Any], options: argparse.Namespace) -> None:
    """Print what a run would take on many cards. Nothing is read."""
    ranks = 1 if options.ranks is None else options.ranks
    card = CARDS[options.gpu or "h100"]
    nodes = options.nodes or -(-ranks // card.per_node)
    if nodes > ranks:
        raise ConfigError(f"{ranks} ranks on {nodes} machines: give at least one rank for each machine")
    config = train_config(values, {})
    check_ranks(ranks, config)
    model = model_config(values, int(values.get("vocab_size", VOCABULARY)), config.seq_len)
    sharded = {"shard_optimizer": options.shard_optimizer, "activations": activations_on_a_card(model, config)}
    scale = predict(model, config, card, ranks=ranks, nodes=nodes, **sharded)
    print(f"{'model':12}{model.n_params():,} parameters, steps of {config.batch_size} x {config.seq_len} tokens")
    print("\n".join(scale.lines(options.rate)))
    print("            on paper: no GPU of this program has trained with another one yet")


def _vocabulary(values: dict[str, Any], paths: Sequence[Path]) -> int:
    """Of the tokenizer that a run would use; one that does not exist yet has as many tokens as it is asked for."""
    if values.get("teacher") and Path(values["teacher"]).is_file():
        # a GGUF file, whose tokenizer its model's table holds
        return model_config_of(Path(values["teacher"])).vocab_size
    given = any(values.get(name) for name in ("tokenizer", "teacher")) or any(path.is_dir() for path in paths)
    if given:
        return int(find_tokenizer(values, paths).get_vocab_size())
    return int(values.get("vocab_size", VOCABULARY))
