"""Tokens on disk, and batches from them.

Every document lies in memory-mapped shards (uint16, or uint32 where the vocabulary needs it) as the model's tokenizer gives
it, with the model's end token behind it; where the same token begins and ends documents it is stored once, and the next
document's ends the one before. A batch is a pure function of (seed, step): resuming needs no reader state, and any rank can
make any row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .chat import ChatFormat
from .errors import CheckpointError, DataError
from .files import atomic_directory, read_json, write_json
from .packing import RowPacker
from .text import COLUMN, HELD_OUT, document_ids, labelled, read_documents

if TYPE_CHECKING:
    from .distill import SoftTargets
    from .teacher_cache import TeacherCache

Array = NDArray[Any]
FORMAT_VERSION = 1
SHARD_TOKENS = 1 << 26
ENCODE_BATCH = 2000


# ---- writing -----------------------------------------------------------------------------------------------------


class _SplitWriter:
    """Shards of one split: NAME_00000.bin (tokens) and NAME_00000.npy (documents: start, tokens, bytes)."""

    def __init__(self, folder: Path, name: str, shard_tokens: int, dtype: Any) -> None:
        self.folder, self.name, self.shard_tokens, self.dtype = folder, name, shard_tokens, dtype
        self.shards: list[dict[str, Any]] = []
        self.tokens: list[Array] = []
        self.counted: list[Array] = []  # of conversations: which tokens are to be learnt
        self.documents: list[tuple[int, int, int]] = []
        self.size = self.total = 0  # tokens of the shard, of all shards

    def add(self, ids: Sequence[int], n_bytes: int, counted: Array | None = None) -> None:
        if counted is not None:
            self.counted.append(np.asarray(counted, np.uint8))
        self.documents.append((self.size, len(ids), n_bytes))
        self.tokens.append(np.asarray(ids, self.dtype))
        self.size += len(ids)
        self.total += len(ids)
        if self.size >= self.shard_tokens:
            self.flush()

    def flush(self) -> None:
        if not self.documents:
            return
        stem = f"{self.name}_{len(self.shards):05d}"
        tokens = np.concatenate(self.tokens)
        tokens.tofile(self.folder / f"{stem}.bin")
        np.save(self.folder / f"{stem}.npy", np.asarray(self.documents, np.int64))
        self.shards.append(
            {
                "stem": stem,
                "tokens": int(tokens.size),
                "documents": len(self.documents),
                "bytes": int(sum(d[2] for d in self.documents)),
                "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            }
        )
        if self.counted:
            counted = np.concatenate(self.counted)
            counted.tofile(self.folder / f"{stem}.mask")
            self.shards[-1]["mask_sha256"] = hashlib.sha256(counted.tobytes()).hexdigest()
        self.tokens, self.counted, self.documents, self.size = [], [], [], 0


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """What a prepared text remembers of its tokenizer."""
    return hashlib.sha256(tokenizer.to_str().encode()).hexdigest()


def prepare_corpus(
    source: Path,
    folder: Path,
    tokenizer: Any,
    *,
    eos: int | None = 0,
    chat: ChatFormat | None = None,
    drop_unfinished: bool = False,
    column: str = COLUMN,
    held_out: float = HELD_OUT,
    shard_tokens: int = SHARD_TOKENS,
    say: Callable[[str], None] = lambda _text: None,
) -> None:
    """Tokenize a text into ``folder`` (shards and manifest.json), atomically. eos: the model's end token.
    chat: how the conversations of a file of "messages" become text; column: of a parquet file; held_out: share of the documents;
    say: progress.

    What is held out for validation is what :func:`.text.labelled` says. Raises DataError for an empty text.
    """
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    documents = labelled(read_documents(source, drop_unfinished=drop_unfinished, column=column), held_out)
    folder.parent.mkdir(parents=True, exist_ok=True)
    found = False
    with atomic_directory(folder) as temporary:
        train = _SplitWriter(temporary, "train", shard_tokens, dtype)
        validation = _SplitWriter(temporary, "validation", shard_tokens, dtype)
        if chat is not None:
            found = _add_conversations(source, chat, train, validation, held_out)
        while chat is None and (chunk := list(islice(documents, ENCODE_BATCH))):
            texts = [text for text, _ in chunk]
            for (text, aside), encoding in zip(chunk, tokenizer.encode_batch(texts), strict=True):
                (validation if aside else train).add(document_ids(encoding.ids, eos), len(text.encode()))
                found = True
            say(f"{source}: {train.total + validation.total:,} tokens")
        if not found:
            raise DataError(f"{source}: no document to train on (empty text?)")
        train.flush()
        validation.flush()
        manifest = {
            "format_version": FORMAT_VERSION,
            "source": source.name,
            "source_bytes": source.stat().st_size,
            "source_sha256": file_sha256(source),
            "drop_unfinished": drop_unfinished,
            "held_out": held_out,
            "dtype": dtype.name,
            "tokenizer_sha256": tokenizer_sha256(tokenizer),
            "splits": {"train": train.shards, "validation": validation.shards},
        }
        write_json(temporary / "manifest.json", manifest)


def _add_conversations(
    source: Path, chat: ChatFormat, train: _SplitWriter, validation: _SplitWriter, share: float
) -> bool:
    """Conversations and which of their tokens count; whether there was one. They lie in memory while they are split."""
    spans = {conversation.text: conversation for conversation in chat.conversations(source)}
    if len(spans) == 1:
        raise DataError(f"{source}: one conversation alone; validation needs another one")
    counted_at_all = not spans
    for text, held_out in labelled(spans, share):
        ids, counted = chat.encode(spans[text])
        counted_at_all = counted_at_all or bool(counted[1:].any())
        (validation if held_out else train).add(ids, len(text.encode()), counted)
    if not counted_at_all:
        raise DataError(f"{source}: no conversation in which the assistant says anything: there is nothing to learn")
    return bool(spans)


# ---- reading -----------------------------------------------------------------------------------------------------


def _document_table(path: Path, n_tokens: int) -> Array:
    """(documents, 3) int64: start, tokens, bytes of each document of a shard, which has n_tokens."""
    try:
        table: Array = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != 3:
        raise DataError(f"{path} is damaged: int64 (documents, 3) expected")
    start, length, _ = table.T
    if len(table) and (table.min() < 0 or (start > n_tokens - length).any()):
        raise DataError(f"{path} is damaged: a document lies outside its shard of {n_tokens} tokens")
    return table


@dataclass(frozen=True)
class Split:
    """n documents of one split, in order. A document's tokens begin with BOS where the tokenizer puts it there."""

    tokens: Sequence[Array]  # per shard (its tokens,) uint16 or uint32, memory-mapped
    shard: Array  # (n,) int64: which shard a document lies in,
    start: Array  # (n,) int64: where it begins there,
    length: Array  # (n,) int64: and how many tokens it has
    n_bytes: Array  # (n,) int64: of its text, UTF-8
    counted: Sequence[Array] = ()  # per shard (its tokens,) uint8: which tokens are to be learnt; empty: all
    vocab_size: int | None = None  # ids are smaller; None: nobody has said, and nothing is checked

    @property
    def n_tokens(self) -> int:
        return int(self.length.sum())

    def document(self, index: int, begin: int = 0, count: int | None = None) -> Array:
        """Token ids of a document: (count,) from ``begin`` on, None: all that follow. Raises DataError for one that the model
        does not have: what comes after it checks no index."""
        start, length = int(self.start[index]), int(self.length[index])
        found = self.tokens[int(self.shard[index])][start + begin : start + (length if count is None else begin + count)]
        if self.vocab_size is not None and found.size and int(found.max()) >= self.vocab_size:
            raise DataError(
                f"document {index} of a prepared text has token {int(found.max())}, the model {self.vocab_size}: its .bin "
                "file is damaged; prepare the text again"
            )
        return found

    def learnt(self, index: int) -> Array | None:
        """Which tokens of a document count as targets; None: all."""
        if not self.counted:
            return None
        start = int(self.start[index])
        return self.counted[int(self.shard[index])][start : start + int(self.length[index])]


class Corpus:
    """A prepared folder. vocab_size: of the model that reads it. Raises DataError where it is damaged."""

    def __init__(self, folder: Path, vocab_size: int | None = None) -> None:
        self.folder, self._vocab_size = folder, vocab_size
        try:
            self.manifest: dict[str, Any] = read_json(folder / "manifest.json")
        except CheckpointError as error:
            raise DataError(f"{folder}: not a prepared corpus: {error}") from error
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{folder}: format_version {self.manifest.get('format_version')} (this program reads {FORMAT_VERSION})"
            )
        if self.manifest.get("dtype", "uint16") not in ("uint16", "uint32"):
            raise DataError(
                f"{folder}: tokens of type {self.manifest['dtype']!r} (this program reads uint16 and uint32)"
            )
        try:
            self.train, self.validation = (self._split(name) for name in ("train", "validation"))
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{folder / 'manifest.json'} is damaged: missing or malformed {error}") from error

    def _split(self, name: str) -> Split:
        tokens, shards, tables, counted = [], [], [], []
        dtype = np.dtype(self.manifest.get("dtype", "uint16"))
        for number, entry in enumerate(self.manifest["splits"][name]):
            path = self.folder / f"{entry['stem']}.bin"
            if not path.exists() or path.stat().st_size != dtype.itemsize * entry["tokens"]:
                raise DataError(f"{path}: missing or of the wrong size")
            tokens.append(np.memmap(path, dtype, "r"))
            if "mask_sha256" in entry:
                mask = path.with_suffix(".mask")
                if not mask.exists() or mask.stat().st_size != entry["tokens"]:
                    raise DataError(f"{mask}: missing or of the wrong size")
                counted.append(np.memmap(mask, np.uint8, "r"))
            table = _document_table(path.with_suffix(".npy"), entry["tokens"])
            shards.append(np.full(len(table), number, np.int64))
            tables.append(table)
        table = np.concatenate(tables) if tables else np.zeros((0, 3), np.int64)
        shard = np.concatenate(shards) if shards else np.zeros(0, np.int64)
        return Split(tokens, shard, table[:, 0], table[:, 1], table[:, 2], counted, self._vocab_size)

    def require_tokenizer(self, tokenizer: Any) -> None:
        """Raise DataError unless this is the tokenizer that the text was prepared with: its numbers mean nothing to another."""
        if self.manifest.get("tokenizer_sha256") != tokenizer_sha256(tokenizer):
            raise DataError(f"{self.folder}: prepared with another tokenizer than this model's: give the text itself")

    def fingerprint(self) -> str:
        """Changes when any token of any split does."""
        splits = self.manifest["splits"]
        text = json.dumps([splits["train"], splits["validation"]], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


# ---- batches -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Phase:
    """From global row ``first_row`` on, corpora are mixed with these weights."""

    first_row: int
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Reader:
    """Where a run begins to read: at ``step`` it stands at global row ``row``; ``past`` are the mixtures before."""

    step: int = 0
    row: int = 0
    past: tuple[Phase, ...] = ()

    def to_json(self) -> dict[str, Any]:
        past = [[phase.first_row, list(phase.weights)] for phase in self.past]
        return {"step": self.step, "row": self.row, "past": past}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Reader:
        past = tuple(Phase(int(first), tuple(map(float, weights))) for first, weights in values["past"])
        return Reader(int(values["step"]), int(values["row"]), past)


FROM_THE_BEGINNING = Reader()


class BatchSource:
    """Batches of mixed corpora; batch(step) is a pure function of the constructor's arguments and step."""

    def __init__(
        self,
        splits: Sequence[Split],
        phases: Sequence[Phase],
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        reader: Reader = FROM_THE_BEGINNING,
        masked: bool = False,
        eos: int | None = None,
        packing: str = "restart",
        cache: TeacherCache | None = None,
    ) -> None:
        """masked: documents are kept from each other; eos: the model's end token; packing: see :mod:`.packing`;
        cache: a teacher's soft targets for the texts."""
        self.reader = reader
        for phase in phases:
            if len(phase.weights) != len(splits):
                raise DataError(f"{len(phase.weights)} data weights for {len(splits)} texts: give one each")
            if min(phase.weights) < 0 or sum(phase.weights) <= 0:
                raise DataError(f"data weights {phase.weights} must be >= 0 and not all 0")
        self.phases = [Phase(p.first_row, tuple(w / sum(p.weights) for w in p.weights)) for p in phases]
        self.packers = [RowPacker(split, seq_len, seed + i, eos, packing) for i, split in enumerate(splits)]
        self.batch_size, self.seq_len = batch_size, seq_len
        self._rows = np.empty((batch_size, seq_len + 1), np.int64)
        self._starts = np.empty((batch_size, seq_len + 1), np.int64) if masked else None
        self._counted = np.empty((batch_size, seq_len + 1), bool) if masked else None
        self._positions = np.empty((batch_size, seq_len + 1), np.int64) if cache else None
        self.cache = cache

    @staticmethod
    def _picked(weights: Sequence[float], row: int) -> list[int]:
        """How many of the first ``row`` rows of a phase came from each corpus: evenly spread, no randomness."""
        counts, rest, weight_left = [], row, 1.0
        for weight in weights[:-1]:
            share = weight / weight_left if weight_left > 1e-12 else 0.0
            count = int(rest * min(1.0, share) + 1e-9)
            counts.append(count)
            rest -= count
            weight_left -= weight
        return [*counts, rest]

    def locate(self, row: int) -> tuple[int, int]:
        """Global row -> (corpus, row of that corpus)."""
        base = [0] * len(self.packers)
        for index, phase in enumerate(self.phases):
            last = index + 1 == len(self.phases)
            if last or row < self.phases[index + 1].first_row:
                before = self._picked(phase.weights, row - phase.first_row)
                after = self._picked(phase.weights, row - phase.first_row + 1)
                corpus = next(i for i, n in enumerate(after) if n > before[i])
                return corpus, base[corpus] + before[corpus]
            length = self.phases[index + 1].first_row - phase.first_row
            base = [b + n for b, n in zip(base, self._picked(phase.weights, length), strict=True)]
        raise AssertionError("unreachable")

    def batch(self, step: int) -> tuple[Array, Array, Array | None, SoftTargets | None]:
        """tokens, targets and starts (batch_size, seq_len) int64 of a step, views valid until the next call.

        starts: where each position's document starts; None where documents are not kept from each other. A target
        that does not count is -1. Last a cached teacher's soft targets for the tokens.
        """
        corpora = []
        for i in range(self.batch_size):
            corpus, row = self.locate(self._row(step) + i)
            corpora.append(corpus)
            beside = [None if x is None else x[i] for x in (self._starts, self._counted, self._positions)]
            self.packers[corpus].fill(self._rows[i], row, *beside)
        tokens, targets = self._rows[:, :-1], self._rows[:, 1:]
        soft = None
        if self.cache is not None and self._positions is not None:
            soft = self.cache.rows(corpora, self._positions[:, :-1])
        if self._starts is None or self._counted is None:
            return tokens, targets, None, soft
        return tokens, np.where(self._counted[:, 1:], targets, -1), self._starts[:, :-1], soft

    def _row(self, step: int) -> int:
        """Global row that a step begins with."""
        return self.reader.row + (step - self.reader.step) * self.batch_size

    def epochs(self, step: int) -> list[float]:
        """Passes over each corpus after ``step`` steps, roughly."""
        result = []
        for corpus, packer in enumerate(self.packers):
            rows = self._rows_of(corpus, self._row(step))
            result.append(rows / max(1, packer.rows_in_epoch(0)))
        return result

    def _rows_of(self, corpus: int, row: int) -> int:
        total = 0
        for index, phase in enumerate(self.phases):
            is_last = index + 1 == len(self.phases)
            end = row if is_last else min(row, self.phases[index + 1].first_row)
            if end > phase.first_row:
                total += self._picked(phase.weights, end - phase.first_row)[corpus]
        return total


@dataclass(frozen=True)
class ValidationBatch:
    """tokens, targets (rows, seq_len) int64, target -1 = not counted; is_text marks targets that
    are not the final EOS; documents indexes the document of each row.
    """

    tokens: Array
    targets: Array
    is_text: Array
    documents: Array


def validation_batches(
    split: Split, rows: int, seq_len: int, eos: int, limit: int | None = None
) -> Iterator[ValidationBatch]:
    """Each document alone, from its BOS to its EOS, padded; one longer than seq_len is cut into
    windows that start anew (their first token is conditioned on only the one before it).
    """
    pending: list[tuple[Array, Array | None, int, bool]] = []
    count = len(split.length) if limit is None else min(limit, len(split.length))
    for index in range(count):
        tokens = split.document(index).astype(np.int64)
        learnt = split.learnt(index)
        if learnt is None and (tokens[-1] != eos or len(tokens) == 1):
            tokens = np.append(tokens, eos)  # stored without it: the next document's first token ends it
        for start in range(0, len(tokens) - 1, seq_len):
            window = tokens[start : start + seq_len + 1]
            counted = None if learnt is None else learnt[start : start + seq_len + 1]
            pending.append((window, counted, index, learnt is None and start + len(window) == len(tokens)))
            if len(pending) == rows:
                yield _validation_batch(pending, rows, seq_len)
                pending = []
    if pending:
        yield _validation_batch(pending, rows, seq_len)


def _validation_batch(
    pending: Sequence[tuple[Array, Array | None, int, bool]], rows: int, seq_len: int
) -> ValidationBatch:
    tokens = np.zeros((rows, seq_len), np.int64)
    targets = np.full((rows, seq_len), -1, np.int64)
    is_text = np.zeros((rows, seq_len), bool)
    documents = np.full(rows, -1, np.int64)
    for i, (window, counted, index, ends) in enumerate(pending):
        n = len(window) - 1
        tokens[i, :n], targets[i, :n], documents[i] = window[:-1], window[1:], index
        is_text[i, : n - 1 if ends else n] = True  # the EOS of a document is no text
        if counted is not None:
            targets[i, :n][counted[1:] == 0] = -1
            is_text[i] &= targets[i] >= 0
    return ValidationBatch(tokens, targets, is_text, documents)
