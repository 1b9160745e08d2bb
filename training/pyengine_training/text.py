"""Reading text: documents, the train/validation split, and the byte-level BPE tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from .errors import DataError, MissingLibraryError

END_OF_TEXT = "<|endoftext|>"  # id 0 of a tokenizer trained here: begins and ends every document
HELD_OUT = 0.02  # share of the documents
FINEST_SHARE = 10**9  # shares differ by at least 1 / this
COLUMN = "text"  # of a parquet file
# where no separator lines exist, a document ends at the first blank line after so many characters,
PARAGRAPH_DOCUMENT = 4096
LINES_DOCUMENT = 4 * PARAGRAPH_DOCUMENT  # or at the first line end after these,
LONG_LINE = 4 * LINES_DOCUMENT  # and a line is cut that is longer than this
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
LINE_END = re.compile("\r\n?")
LINE = re.compile("[^\n]*\n|[^\n]+")  # str.splitlines ends lines at U+2028, U+0085 and others, too, which are text
LARGEST_VOCABULARY = 1 << 20  # that is trained here
SENTENCE_ENDS = tuple(".!?\"')]’”…")


def read_documents(path: Path, *, drop_unfinished: bool = False, column: str = COLUMN) -> Iterator[str]:
    """Documents of a .txt, .jsonl or .parquet file, stripped, empty ones left out.

    In text, lines that consist of ``<|endoftext|>`` separate documents and are never part of one; a text without such
    lines is cut into documents of a few thousand bytes at blank lines, where those are far apart at line ends, and in
    very long lines at spaces. In .jsonl each line is an object with "text"; in .parquet each row of ``column``
    is a document. A byte order mark is no text, every kind of line end becomes a newline, and a lone surrogate becomes U+FFFD.
    drop_unfinished leaves out documents that do not end
    like a sentence (stories cut short). Raises DataError when the file is unreadable, not UTF-8, or malformed.
    """
    readers = {".jsonl": lambda: _read_jsonl(path), PARQUET: lambda: _read_parquet(path, column)}
    for document in readers.get(path.suffix, lambda: _read_text(path))():
        document = document.strip()
        if document and not (drop_unfinished and not document.endswith(SENTENCE_ENDS)):
            yield document


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) without a byte order mark, line ends as newlines."""
    number = 0
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                for part in LINE.findall(LINE_END.sub("\n", line)) if "\r" in line else [line]:
                    yield number, part
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        wide = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        reason = "it begins as UTF-16 does; save it as UTF-8" if wide else error.reason
        raise DataError(f"{path}: not UTF-8 (line {number}): {reason}") from error


def _pieces(line: str) -> Iterator[str]:
    """A line, cut at spaces where it is longer than LONG_LINE."""
    begin = 0
    while len(line) - begin > LONG_LINE:  # of what is left nothing is copied: a line may be the whole file
        end = line.rfind(" ", begin + 1, begin + LONG_LINE) + 1 or begin + LONG_LINE
        yield line[begin:end]
        begin = end
    yield line[begin:]


def _read_text(path: Path) -> Iterator[str]:
    separated = any(line.strip() == END_OF_TEXT for _, line in _lines(path))
    lines: list[str] = []
    size = 0
    for _, line in _lines(path):
        at_end = line.strip() == END_OF_TEXT
        for piece in [line] if separated else _pieces(line):
            limit = LINES_DOCUMENT if piece.strip() else PARAGRAPH_DOCUMENT
            if at_end or (not separated and size >= limit):
                yield "".join(lines)
                lines, size = [], 0
            if not at_end:
                lines.append(piece.replace(END_OF_TEXT, " "))  # never text, also inside a line
                size += len(piece)
    yield "".join(lines)


def read_json_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines of a .jsonl file that are not empty."""
    return ((number, line) for number, line in _lines(path) if line.strip())


def _read_jsonl(path: Path) -> Iterator[str]:
    for number, line in read_json_lines(path):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f'{path}: line {number} is no object with "text"') from error
        if not isinstance(text, str):
            raise DataError(f'{path}: "text" of line {number} is not a string')
        yield LONE_SURROGATE.sub("\ufffd", text).replace(END_OF_TEXT, " ")


PARQUET = ".parquet"
ROWS = 1000  # of a parquet file that are read at a time


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise MissingLibraryError(f"{path}: parquet needs pyarrow: pip install 'pyengine-lm[parquet]'") from error
    number = 0
    try:
        with ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"{path}: no column {column!r}; it has {', '.join(names) or 'none'}: --column")
            for batch in file.iter_batches(ROWS, columns=[column]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    if not isinstance(text, str):
                        raise DataError(f"{path}: row {number} of column {column!r} is no text ({type(text).__name__})")
                    yield _plain(text)
    except (OSError, ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from error


def _plain(text: str) -> str:
    """Without lone surrogates, other line ends, and the separator."""
    return LONE_SURROGATE.sub("\ufffd", LINE_END.sub("\n", text)).replace(END_OF_TEXT, " ")


# ---- held-out documents ------------------------------------------------------------------------------------------


def is_validation(document: str, share: float = HELD_OUT) -> bool:
    """That share of all documents, by their content: the same text is on the same side in every run."""
    part = Fraction(share).limit_denominator(FINEST_SHARE)  # 0.02 is 1 / 50
    digest = hashlib.sha256(document.encode()).digest()
    return int.from_bytes(digest, "big") % part.denominator < part.numerator


def labelled(documents: Iterable[str], share: float = HELD_OUT) -> Iterator[tuple[str, bool]]:
    """(document, whether it is held out). Neither side is ever empty, unless there is no text at all, or share is 0.

    Where all documents fall on one side the last one changes it, and a text that is one document is cut near its end.
    """
    if share == 0:
        yield from ((document, False) for document in documents)
        return
    last: dict[bool, str] = {}  # one of each side is kept back
    seen = {False: False, True: False}
    for document in documents:
        side = is_validation(document, share)
        if side in last:
            yield last[side], side
            seen[side] = True
        last[side] = document
    if len(last) == 2:
        yield last[False], False
        yield last[True], True
    for side, document in last.items() if len(last) == 1 else ():
        if seen[side]:
            yield document, not side
        else:
            at = len(document) * 9 // 10
            at = document.rfind(" ", len(document) // 2, at) + 1 or at
            yield document[:at].rstrip() or document, False
            yield document[at:], True


def split_documents(path: Path, *, drop_unfinished: bool = False) -> tuple[list[str], list[str]]:
    """(documents to train on, held-out ones) of a text, as every run splits it."""
    sides: tuple[list[str], list[str]] = ([], [])
    for document, held_out in labelled(read_documents(path, drop_unfinished=drop_unfinished)):
        sides[held_out].append(document)
    return sides


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer (``tokenizers.Tokenizer``) whose encode() puts END_OF_TEXT (id 0)
    first.

    Raises DataError when the text is too small for vocab_size.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    if not 257 < vocab_size <= LARGEST_VOCABULARY:
        raise DataError(f"vocab_size is {vocab_size}; it must lie in 258..{LARGEST_VOCABULARY}")
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


def end_token(tokenizer: Any, path: Path) -> tuple[int | None, int]:
    """BOS and EOS of a tokenizer.json that was given: its tokenizer_config.json's, else END_OF_TEXT for both.

    Raises DataError where neither names an end token.
    """
    config = path.with_name("tokenizer_config.json")
    named: dict[str, Any] = {}
    if config.exists():
        try:
            named = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{config}: {error}") from error

    def id_of(name: str) -> int | None:
        token = named.get(name, END_OF_TEXT)
        token = token.get("content") if isinstance(token, dict) else token
        found: int | None = tokenizer.token_to_id(token) if isinstance(token, str) else None
        return found

    eos = id_of("eos_token")
    if eos is None:
        raise DataError(f"{path}: no token that ends a document: neither {config.name}'s eos_token nor {END_OF_TEXT}")
    return id_of("bos_token"), eos


def document_ids(ids: list[int], eos: int | None) -> list[int]:
    """A document's tokens as they are stored: with the model's end token.

    Where every document begins with that token (as with the tokenizers trained here), the next one's ends it.
    """
    return ids if eos is None or (ids and eos in (ids[0], ids[-1])) else [*ids, eos]


def tokenizer_config(tokenizer: Any, max_seq_len: int, bos: int | None, eos: int | None) -> dict[str, Any]:
    """tokenizer_config.json for a tokenizer that has none."""
    bos_token, eos_token = (None if token is None else tokenizer.id_to_token(token) for token in (bos, eos))
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_bos_token": bool(bos is not None and tokenizer.encode("a").ids[:1] == [bos]),
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
    }
