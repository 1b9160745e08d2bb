"""Reading text: documents, the train/validation split, and the byte-level BPE tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import DataError

END_OF_TEXT = "<|endoftext|>"  # id 0 of a tokenizer trained here: begins and ends every document
VALIDATION_EVERY = 50
# bytes at least of a document made of paragraphs, where no separator lines exist
PARAGRAPH_DOCUMENT = 4096
SENTENCE_ENDS = tuple(".!?\"')]’”…")


def read_documents(path: Path, *, drop_unfinished: bool = False) -> Iterator[str]:
    """Documents of a .txt or .jsonl file, stripped, empty ones left out.

    In text, lines that consist of ``<|endoftext|>`` separate documents and are never part of one; a
    text without such lines is cut at blank lines into documents of a few thousand bytes. In .jsonl
    each line is an object with "text". drop_unfinished leaves out documents that do not end like a
    sentence (stories cut short). Raises DataError when the file is unreadable, not UTF-8, or
    malformed.
    """
    source = _read_jsonl(path) if path.suffix == ".jsonl" else _read_text(path)
    for document in source:
        document = document.strip()
        if document and not (drop_unfinished and not document.endswith(SENTENCE_ENDS)):
            yield document


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (near line {number + 1}): {error.reason}") from error


def _read_text(path: Path) -> Iterator[str]:
    separated = any(line.strip() == END_OF_TEXT for _, line in _lines(path))
    lines: list[str] = []
    size = 0
    for _, line in _lines(path):
        stripped = line.strip()
        at_end = stripped == END_OF_TEXT
        if at_end or (not separated and not stripped and size >= PARAGRAPH_DOCUMENT):
            yield "".join(lines)
            lines, size = [], 0
        if not at_end:
            lines.append(line.replace(END_OF_TEXT, " "))  # never text, also inside a line
            size += len(line)
    yield "".join(lines)


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f'{path}: line {number} is no object with "text"') from error
        if not isinstance(text, str):
            raise DataError(f'{path}: "text" of line {number} is not a string')
        yield text.replace(END_OF_TEXT, " ")


def is_validation(document: str) -> bool:
    """One document in VALIDATION_EVERY, by its content: the same text is on the same side in every run."""
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest, "big") % VALIDATION_EVERY == 0


def split_documents(path: Path, *, drop_unfinished: bool = False) -> tuple[list[str], list[str]]:
    """(documents to train on, held-out ones) of a text, as every run splits it."""
    sides: tuple[list[str], list[str]] = ([], [])
    for document in read_documents(path, drop_unfinished=drop_unfinished):
        sides[is_validation(document)].append(document)
    return sides


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer (``tokenizers.Tokenizer``) whose encode() puts END_OF_TEXT (id 0)
    first.

    Raises DataError when the text is too small for vocab_size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if not 257 < vocab_size <= 1 << 16:
        raise DataError(f"vocab_size is {vocab_size}; it must lie in 258..65536 (tokens are uint16)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text supports a vocabulary of only {tokenizer.get_vocab_size()} tokens, "
            f"not {vocab_size}: give more text or a smaller vocabulary"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    return tokenizer


def load_tokenizer(path: Path) -> Any:
    """Read a tokenizer.json."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{path}: {error}") from error


def tokenizer_config(max_seq_len: int) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer trained here."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
