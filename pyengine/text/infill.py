"""Filling in the middle: the texts around a hole -> token ids of a prompt that a code model goes on from with what belongs there.

Models learn it from documents that were cut in three and put together in another order, with tokens of their own where the
parts begin; each family has its spellings and its order (`FAMILIES`). A tokenizer belongs to the first family whose tokens
it has. That says how to ask, not whether the model was trained to answer: general models share vocabularies with coders.

The texts are text: what spells a special token in them stays plain, whether the tokenizer's file calls the token special or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pyengine.arguments import shown
from pyengine.errors import ContextFullError, InvalidArgumentError
from pyengine.text.prompts import check_length

if TYPE_CHECKING:
    from pyengine.text.tokenizer import Tokenizer


class Family(NamedTuple):
    """How models of one kind were trained. Tokens by their spelling; of a tuple, the first one that a tokenizer has.

    prefix, suffix  the tokens before the text in front of the hole, and before the text behind it
    middle          the token before what fills it; None: what comes last goes on without one
    suffix_first    the suffix comes before the prefix
    repository      before the name of a repository
    file            before a file: its name, a line end, its text
    line_end        what ends a repository's name and a file; "" = the next token does
    name_inside     the name of the file with the hole stands behind `prefix`, not in front of it
    ends            further tokens that end a filling
    """

    prefix: str
    suffix: str
    middle: str | None
    suffix_first: bool = False
    repository: tuple[str, ...] = ()
    file: tuple[str, ...] = ()
    line_end: str = ""
    name_inside: bool = False
    ends: tuple[str, ...] = ()

    @property
    def needed(self) -> list[str]:
        """The tokens without which nothing is filled."""
        return [token for token in (self.prefix, self.suffix, self.middle) if token is not None]


FAMILIES = (
    Family(  # Qwen2.5-Coder, Qwen3-Coder; CodeGemma (file_separator), Granite 4 (filename, reponame)
        "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>",
        repository=("<|repo_name|>", "<|reponame|>"), file=("<|file_sep|>", "<|file_separator|>", "<|filename|>"),
        line_end="\n", ends=("<|fim_pad|>",),
    ),
    Family(  # StarCoder2; StarCoder, Granite Code, Granite 3 (filename, reponame); Stable Code, CodeQwen1.5
        "<fim_prefix>", "<fim_suffix>", "<fim_middle>",
        repository=("<repo_name>", "<reponame>"), file=("<file_sep>", "<filename>"), name_inside=True, ends=("<fim_pad>",),
    ),
    Family("<fim-prefix>", "<fim-suffix>", "<fim-middle>", ends=("<fim-pad>",)),  # SantaCoder
    Family("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek Coder
    Family("▁<PRE>", "▁<SUF>", "▁<MID>", ends=("▁<EOT>",)),  # CodeLlama
    Family("<[fim-prefix]>", "<[fim-suffix]>", "<[fim-middle]>", suffix_first=True),  # Seed-Coder
    Family("[PREFIX]", "[SUFFIX]", None, suffix_first=True, ends=("[MIDDLE]",)),  # Codestral
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hole:
    """What is known around a hole.

    prefix, suffix  the texts in front of it and behind it
    files           (name, text) of other files that may help, the most helpful one last
    filename        of the file that has the hole; "" = not known
    repository      its name, "" = not known. Models without a token for it are not told

    Raises InvalidArgumentError for what is no text.
    """

    prefix: str
    suffix: str
    files: Sequence[tuple[str, str]] = ()
    filename: str = ""
    repository: str = ""

    def __post_init__(self) -> None:
        for name in ("prefix", "suffix", "filename", "repository"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise InvalidArgumentError(f"{name} must be text, not {shown(value)}")
        if not isinstance(self.files, (list, tuple)):
            raise InvalidArgumentError(f"files is a list of (name, text), not {shown(self.files)}")
        for item in self.files:
            is_pair = isinstance(item, (tuple, list)) and len(item) == 2
            if not is_pair or not all(isinstance(part, str) for part in item):
                raise InvalidArgumentError(f"files is a list of (name, text), which {shown(item)} is not")

    @property
    def texts(self) -> list[str]:
        """All that has to be tokenized."""
        return [self.prefix, self.suffix, self.filename, self.repository, *(part for item in self.files for part in item)]


class Infill:
    """How one model is asked to fill holes. Any thread may use it.

    tokenizer   the model's
    model_name  what an error calls the model

    Attributes: `family`, `end_ids`, the tokens that end a filling beside the model's own.
    Raises InvalidArgumentError, with what is missing, for a tokenizer of no family.
    """

    def __init__(self, tokenizer: Tokenizer, model_name: str) -> None:
        self._tokenizer = tokenizer
        self.family = family = _family_of(tokenizer, model_name)
        self._repository = self._first_of(family.repository)
        self._file = self._first_of(family.file)
        marks = [*family.needed, *family.ends, *family.repository, *family.file]
        found = (tokenizer.token_id(mark) for mark in marks)
        self.end_ids = tuple(dict.fromkeys(id_ for id_ in found if id_ is not None))
        self._apart = frozenset(self.end_ids)

    def _first_of(self, spellings: tuple[str, ...]) -> int | None:
        ids = (self._tokenizer.token_id(spelling) for spelling in spellings)
        return next((id_ for id_ in ids if id_ is not None), None)

    def ids(self, hole: Hole, n_ctx: int) -> list[int]:
        """Token ids of the prompt, behind BOS if the model wants it. Raises ContextFullError for what does not fit n_ctx."""
        check_length(self._tokenizer, "".join(hole.texts), n_ctx)
        family, bos = self.family, self._tokenizer.bos_id
        before, inside = self._context(hole)
        prefix = self._mark(family.prefix) + self._text(inside + hole.prefix, goes_on=False)
        suffix = self._mark(family.suffix) + self._text(hole.suffix)
        parts = suffix + prefix if family.suffix_first else prefix + suffix
        ids = [bos] if bos is not None and self._tokenizer.adds_bos else []
        ids += before + parts + self._mark(family.middle)
        if len(ids) > n_ctx:
            raise ContextFullError(f"the texts around the hole have {len(ids)} tokens, the context holds {n_ctx}")
        return ids

    def prefix_end(self, ids: Sequence[int]) -> int:
        """Where the text in front of the hole ends in a prompt that `ids` made; behind the last token of any other prompt."""
        family = self.family
        middle = self._mark(family.middle)
        behind = middle if family.suffix_first else self._mark(family.suffix)  # what follows that text
        if not middle or list(ids[-1:]) != middle or behind[0] not in ids:
            return len(ids)
        return len(ids) - 1 - list(reversed(ids)).index(behind[0])

    def _context(self, hole: Hole) -> tuple[list[int], str]:
        """What stands before the file with the hole, as ids, and before its text, as text: other files, and names."""
        family, inside = self.family, f"{hole.filename}\n" if hole.filename else ""
        if self._file is None:  # files without a token between them are one text
            return [], "".join(f"{name}\n{_lines(text)}" for name, text in hole.files) + inside
        ids: list[int] = []
        if hole.repository and self._repository is not None:
            ids += [self._repository, *self._text(hole.repository + family.line_end)]
        if not (ids or hole.files or hole.filename):
            return [], ""
        for name, text in hole.files:
            body = _lines(text) if family.line_end else text
            ids += [self._file, *self._text(f"{name}\n{body}")]
        ids.append(self._file)
        if family.name_inside:
            return ids, inside
        return ids + self._text(inside), ""

    def _mark(self, spelling: str | None) -> list[int]:
        id_ = None if spelling is None else self._tokenizer.token_id(spelling)
        return [] if id_ is None else [id_]

    def _text(self, text: str, *, goes_on: bool = True) -> list[int]:
        return self._tokenizer.encode_inside(text, apart=self._apart, goes_on=goes_on)


def _family_of(tokenizer: Tokenizer, model_name: str) -> Family:
    missing = ""
    for family in FAMILIES:
        lacks = [token for token in family.needed if tokenizer.token_id(token) is None]
        if not lacks:
            return family
        if len(lacks) < len(family.needed) and not missing:
            there = ", ".join(token for token in family.needed if token not in lacks)
            missing = f"its tokenizer has {there}, but not {', '.join(lacks)}"
    known = ", ".join(family.prefix for family in FAMILIES)
    missing = missing or f"its tokenizer has no tokens that mark a prefix and a suffix ({known}, …)"
    raise InvalidArgumentError(f"{model_name} does not fill in the middle: {missing}; use a model that was trained for it")


def _lines(text: str) -> str:
    return text if text.endswith("\n") else text + "\n"
