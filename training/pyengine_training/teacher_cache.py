"""A teacher's soft targets for every token of a text, on disk: computed once, read by any number of students and epochs.

For each token of the training split, in document order: the teacher's k likeliest next tokens at temperature tau, their
probabilities, and the probability of all others together, float16. The teacher reads every document (every piece of seq_len
tokens, as rows are packed from) by itself, so a student must do so too: attention "document".

A folder has one cache for each text: N.ids (tokens, k) uint16 or uint32, N.probs (tokens, k + 1) float16, and manifest.json.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arena import Arena
from .config import ModelConfig, TrainConfig
from .data import Corpus, file_sha256
from .distill import SoftTargets, check_teacher
from .errors import ConfigError, DataError
from .files import atomic_directory, read_json, write_json
from .model import Worker
from .packing import RowPacker
from .threads import share_out, single_threaded_blas

Array = NDArray[Any]
TOP_K = 32
ROWS = 4  # that a thread's teacher reads at a time
FORMAT_VERSION = 1


class TeacherCache:
    """The caches of a run's texts, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = read_json(folder / "manifest.json")
        if values.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{folder}: format_version {values.get('format_version')} (this program reads {FORMAT_VERSION})"
            )
        self.values = values
        self.ids: list[Array] = []
        self.probs: list[Array] = []
        k, counts, kind = values.get("k"), values.get("tokens"), values.get("dtype")
        numbers = [k, *counts] if isinstance(counts, list) else [0]
        if not all(type(n) is int and n > 0 for n in numbers) or kind not in ("uint16", "uint32"):
            raise DataError(f"{folder / 'manifest.json'} is damaged: it needs k, tokens and dtype")
        for number, tokens in enumerate(counts):
            for found, name, dtype, width in ((self.ids, "ids", kind, k), (self.probs, "probs", "float16", k + 1)):
                path = folder / f"{number}.{name}"
                if not path.exists() or path.stat().st_size != tokens * width * np.dtype(dtype).itemsize:
                    raise DataError(f"{path}: missing or of the wrong size")
                found.append(np.memmap(path, dtype, "r", shape=(tokens, width)))

    def rows(self, corpora: Sequence[int], positions: Array) -> SoftTargets:
        """Of rows of a batch: positions (rows, seq_len) int64 of their tokens in the text's training split."""
        ids = np.stack([self.ids[c][at] for c, at in zip(corpora, positions, strict=True)])
        probs = np.stack([self.probs[c][at] for c, at in zip(corpora, positions, strict=True)])
        return SoftTargets(ids, probs)


def description(teacher: Path, corpora: Sequence[Corpus], config: TrainConfig, k: int) -> dict[str, Any]:
    """What a cache must have been made for."""
    return {
        "format_version": FORMAT_VERSION,
        "teacher": {path.name: file_sha256(path) for path in sorted(teacher.glob("*.safetensors"))},
        "texts": [corpus.fingerprint() for corpus in corpora],
        "tokens": [corpus.train.n_tokens for corpus in corpora],
        "seq_len": config.seq_len,
        "tau": config.distill_tau,
        "k": k,
    }


def check_cache(folder: Path, wanted: dict[str, Any]) -> None:
    """Raise ConfigError, naming what differs, for a cache that was made for something else."""
    found = TeacherCache(folder).values
    differing = [name for name, value in wanted.items() if found.get(name) != value]
    if differing:
        raise ConfigError(f"{folder}: made for another {', '.join(differing)}: give a folder that does not exist yet")


def make_cache(
    folder: Path,
    wanted: dict[str, Any],
    corpora: Sequence[Corpus],
    model: ModelConfig,
    params: Arena,
    threads: int,
    say: Callable[[str], None] = lambda _text: None,
) -> None:
    """Compute a new cache, atomically; the same bits for any ``threads``. wanted: its :func:`description`; say: progress."""
    dtype = np.dtype(np.uint16 if model.vocab_size <= 1 << 16 else np.uint32)
    k, seq_len, tau = int(wanted["k"]), int(wanted["seq_len"]), float(wanted["tau"])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(folder) as temporary, single_threaded_blas(), ThreadPoolExecutor(threads) as pool:
        workers = [Worker(model, ROWS, seq_len + 1, training=False) for _ in range(threads)]
        for number, corpus in enumerate(corpora):
            n = corpus.train.n_tokens
            ids = np.memmap(temporary / f"{number}.ids", dtype, "w+", shape=(n, k))
            probs = np.memmap(temporary / f"{number}.probs", np.float16, "w+", shape=(n, k + 1))
            packer = RowPacker(corpus.train, seq_len, seed=0, packing="best-fit")
            rows = packer.rows_in_epoch(0)

            def work(
                teacher: Worker, first: int, ids: Array = ids, probs: Array = probs, packer: RowPacker = packer
            ) -> None:
                _read(teacher, params, packer, first, tau, ids, probs)

            def done(count: int, number: int = number, rows: int = rows) -> None:
                say(f"teacher: {min(rows, count * ROWS):,} of {rows:,} rows of text {number + 1} of {len(corpora)} read")

            share_out(pool, workers, range(0, rows, ROWS), work, done)
            ids.flush()
            probs.flush()
        write_json(temporary / "manifest.json", {**wanted, "dtype": dtype.name})


def _read(teacher: Worker, params: Arena, packer: RowPacker, first: int, tau: float, ids: Array, probs: Array) -> None:
    """Rows ``first`` to ``first + ROWS`` of the text's first epoch: soft targets for the pieces that are whole there."""
    tokens, starts, positions = np.zeros((3, ROWS, packer.width), np.int64)
    positions -= 1
    for i in range(min(ROWS, packer.rows_in_epoch(0) - first)):
        packer.fill(tokens[i], first + i, starts[i], None, positions[i], whole=True)
    teacher.forward(params, tokens, starts=starts)
    flat, k = positions.ravel(), ids.shape[1]
    for rows in teacher.counted(flat):
        hidden = teacher.xn_final[rows]
        logits = teacher.logits[: len(hidden)]
        teacher.ops.linear_forward(logits, hidden, teacher.output_matrix(params))
        ids[flat[rows]], probs[flat[rows]] = likeliest(logits, k, tau)


def likeliest(logits: Array, k: int, tau: float) -> tuple[Array, Array]:
    """ids (N, k) of the k largest of each row, largest first, and their probabilities and the rest's (N, k + 1) float16."""
    scaled = (logits - logits.max(axis=1, keepdims=True)) / np.float32(tau)
    p = np.exp(scaled, dtype=np.float64)
    p /= p.sum(axis=1, keepdims=True)
    ids = np.argpartition(-p, k - 1, axis=1)[:, :k] if k < p.shape[1] else np.tile(np.arange(k), (len(p), 1))
    chosen = np.take_along_axis(p, ids, axis=1)
    order = np.argsort(-chosen, axis=1, kind="stable")
    ids, chosen = np.take_along_axis(ids, order, axis=1), np.take_along_axis(chosen, order, axis=1)
    np.put_along_axis(p, ids, 0, axis=1)
    return ids, np.concatenate([chosen, p.sum(axis=1, keepdims=True)], axis=1).astype(np.float16)


def prepare_cache(
    folder: Path,
    teacher: Path,
    corpora: Sequence[Corpus],
    student: ModelConfig,
    config: TrainConfig,
    k: int,
    threads: int,
    say: Callable[[str], None] = lambda _text: None,
) -> None:
    """Make the cache, or see that the one which is there was made for this run. Raises ConfigError where it cannot be."""
    from .checkpoint import load_model, read_model_config

    model = read_model_config(teacher)
    check_teacher(model, student, config.seq_len)
    if not 1 <= k <= model.vocab_size:
        raise ConfigError(f"--teacher-top-k is {k}; it must lie in 1..{model.vocab_size}, the vocabulary")
    wanted = description(teacher, corpora, config, k)
    if (folder / "manifest.json").exists():
        check_cache(folder, wanted)
        return
    if folder.exists():
        raise ConfigError(f"{folder} exists and is no teacher's cache")
    make_cache(folder, wanted, corpora, *load_model(teacher), threads, say)
