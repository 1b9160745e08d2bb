"""A run as its folder describes it: model, configuration, texts and tokenizer, opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from . import runfolder
from .arena import Arena
from .checkpoint import write_hf_folder
from .config import ModelConfig, TrainConfig, model_config_from_json, stored, train_config_from_json
from .data import FROM_THE_BEGINNING, BatchSource, Corpus, Phase, Reader, validation_batches
from .lora import LoraConfig
from .preference import Pairs, PairSource
from .teacher_cache import TeacherCache
from .text import load_tokenizer
from .validation import HeldOut


@dataclass
class Run:
    """Everything a run needs, opened. corpora[0] is the one whose validation is the run's."""

    folder: Path
    model: ModelConfig
    config: TrainConfig
    corpora: list[Corpus]  # empty where there are pairs
    tokenizer: Any
    bos: int | None
    eos: int | None
    attachments: Path | None  # a fine-tuned model's own tokenizer and generation files
    teacher: tuple[ModelConfig, Arena] | None = None
    reader: Reader = FROM_THE_BEGINNING
    lora: LoraConfig | None = None
    cache: TeacherCache | None = None  # instead of a teacher
    pairs: Pairs | None = None  # of answers, to learn a preference from

    def fingerprint(self) -> str:
        sources = [self.pairs] if self.pairs else self.corpora
        return "+".join(source.fingerprint() for source in sources)

    def source(self) -> BatchSource | PairSource:
        c = self.config
        if self.pairs:
            return PairSource(self.pairs, c.batch_size, c.seq_len, c.seed, c.dpo_beta, self.reader)
        return BatchSource(
            [corpus.train for corpus in self.corpora],
            self.phases(),
            batch_size=c.batch_size,
            seq_len=c.seq_len,
            seed=c.seed,
            reader=self.reader,
            masked=c.attention == "document",
            eos=self.eos,
            packing=c.packing,
            cache=self.cache,
        )

    def phases(self) -> list[Phase]:
        """Mixtures of the texts by row: those before this run's reader began, the trunk's, the decay's."""
        c, reader = self.config, self.reader
        phases = list(reader.past)
        if not phases or phases[-1].weights != c.data_weights:
            phases.append(Phase(reader.row, c.data_weights))
        if c.decay_data_weights:
            first = reader.row + max(0, c.decay_start - reader.step) * c.batch_size
            phases.append(Phase(first, c.decay_data_weights))
        return phases

    def write_model(self, folder: Path, params: Arena) -> None:
        """The Hugging Face files of the current parameters."""
        write_hf_folder(
            folder,
            params,
            self.model,
            tokenizer=self.tokenizer,
            bos=self.bos,
            eos=self.eos,
            attachments=self.attachments,
        )

    def validations(self, rows: int) -> list[HeldOut]:
        """The first eval_documents held-out documents of each text that has some, or so many held-out pairs."""
        c = self.config
        if self.pairs:
            return [HeldOut("pairs", list(self.pairs.validation(rows, c.seq_len, c.dpo_beta, c.eval_documents)))]
        eos, found = self.eos if self.eos is not None else 0, []
        for corpus in self.corpora:
            split = corpus.validation
            limit = min(c.eval_documents, len(split.length))
            if limit:
                batches = list(validation_batches(split, rows, c.seq_len, eos, limit))
                found.append(HeldOut(corpus.folder.name, batches, int(split.n_bytes[:limit].sum())))
        return found


NEEDED = {"model": dict, "train": dict, "corpora": list, "bos": int | None, "eos": int | None}  # of run.json


def open_run(folder: Path) -> Run:
    """The run that run.json describes."""
    values = runfolder.read_run(folder, NEEDED)
    attachments = Path(values["attachments"]) if values.get("attachments") else None
    teacher = None
    if values.get("teacher") and not values.get("teacher_cache"):
        teacher = checkpoints.load_model(Path(values["teacher"]))
    model = model_config_from_json(values["model"])
    return Run(
        folder=folder,
        model=model,
        config=train_config_from_json(stored(values["train"])),
        corpora=[Corpus(folder / path, model.vocab_size) for path in values["corpora"]],
        tokenizer=load_tokenizer(folder / "tokenizer.json"),
        bos=values["bos"],
        eos=values["eos"],
        attachments=attachments,
        teacher=teacher,
        lora=LoraConfig.from_json(values["lora"]) if values.get("lora") else None,
        cache=TeacherCache(Path(values["teacher_cache"])) if values.get("teacher_cache") else None,
        pairs=Pairs(folder / values["pairs"]) if values.get("pairs") else None,
        reader=Reader.from_json(values["reader"]) if values.get("reader") else FROM_THE_BEGINNING,
    )
