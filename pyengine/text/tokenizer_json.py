"""tokenizer.json is a program of a stranger: what of it may run.

The file names a normalizer, a pre-tokenizer and a model, with their parameters, and the `tokenizers` library does what it says:
thirty normalizers that double the text, a pattern that backtracks for years, an index out of range that is a panic. So components
come from lists of known types, every parameter is checked, and what a text may grow to is bounded. The check runs before the
library sees the file, since loading already normalizes added tokens, and on the library's own account of itself afterwards.

The vocabulary and the merges, nearly all of the file, are data. They are not parsed here: the frozen file has them last, and what
lies before them is found without looking at them (`_head`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from pyengine.arguments import shown
from pyengine.errors import ModelFormatError, UnsupportedModelError
from pyengine.text.patterns import QUADRATIC_PATTERN, check_pattern

MAX_COMPONENTS = 64
MAX_ADDED_TOKENS = 1 << 20
MAX_TOKEN = 4096  # characters of a token; the longest of common vocabularies have about 500
MAX_LITERAL = 64  # characters that a normalizer prepends
MAX_EXPANSION = 256  # characters that may become of one

_VOCABULARY = b'"vocab":{'


class Effect(NamedTuple):
    """What the normalizer and the pre-tokenizer do to a text.

    shrinks_to    at most this many bytes of text become one byte before tokens are looked for; None if there is no such bound
    is_quadratic  whether a run of white space takes time by the square of its length
    """

    shrinks_to: int | None
    is_quadratic: bool


class Account(NamedTuple):
    """What a checked tokenizer.json says of itself.

    effect           see there
    decoder          as in the file
    first_id         the id with which its post-processor begins every text, or None
    last_id          the id with which it ends every text, or None
    tokens_strip     whether added tokens take the white space around them
    unknown_id       of a Unigram model, what stands for what it cannot spell
    """

    effect: Effect
    decoder: Mapping[str, Any] | None
    first_id: int | None
    last_id: int | None
    tokens_strip: bool
    unknown_id: int | None


def check(data: bytes, vocab_size: int | None = None) -> Account:
    """Check the bytes of a tokenizer.json; `vocab_size` is the model's, above which no id may lie.

    Raises ModelFormatError for what is damaged or out of bounds, UnsupportedModelError for components that are not listed."""
    document, highest = _head(data, vocab_size)
    if vocab_size is not None and highest >= vocab_size:
        raise ModelFormatError(f"tokenizer.json has token id {highest}, the model only {vocab_size} embeddings")
    added = _added_tokens(document.get("added_tokens"), vocab_size)
    model = _Object("model", document.get("model"))
    if model.text("type", "BPE") not in ("BPE", "Unigram"):
        raise UnsupportedModelError(f"tokenizer model {shown(model.text('type'))} is not supported")
    check_affixes(model.text("continuing_subword_prefix", ""), model.text("end_of_word_suffix", ""))
    effect = check_components(document.get("normalizer"), document.get("pre_tokenizer"))
    decoder = document.get("decoder")
    if decoder is not None and not isinstance(decoder, dict):
        raise ModelFormatError("tokenizer.json: decoder is no object")
    tokens_strip = any(token.flag("lstrip") or token.flag("rstrip") for token in added)
    unknown_id = None if model.value.get("unk_id") is None else model.integer("unk_id", 0, (1 << 32) - 1)
    first, last = (_end_id(document.get("post_processor"), at) for at in (0, -1))
    return Account(effect, decoder, first, last, tokens_strip, unknown_id)


def check_components(normalizer: Any, pre_tokenizer: Any) -> Effect:
    """Check the two parts that texts go through, as parsed."""
    effect = _Effect()
    _walk("normalizer", normalizer, "normalizers", _NORMALIZERS, effect)
    _walk("pre_tokenizer", pre_tokenizer, "pretokenizers", _PRE_TOKENIZERS, effect)
    if effect.expansion > MAX_EXPANSION:
        raise UnsupportedModelError(
            f"tokenizer.json: a character may become {effect.expansion:g} before tokens are looked for, at most {MAX_EXPANSION}"
        )
    return Effect(None if math.isinf(effect.shrinks_to) else math.ceil(effect.shrinks_to), effect.is_quadratic)


def check_affixes(prefix: str | None, suffix: str | None) -> None:
    """Vocabularies that mark the inside or the end of words are spelled in a way that decoding here does not know."""
    if prefix or suffix:
        raise UnsupportedModelError(
            "tokenizers with a continuing_subword_prefix or an end_of_word_suffix are not supported"
        )


# -------------------------------------------------------------------- the file without its vocabulary


def _head(data: bytes, vocab_size: int | None) -> tuple[dict[str, Any], int]:
    """The document without vocabulary and merges, and the highest id found in the vocabulary (-1 if all are below `vocab_size`).

    A frozen file has them last. Then the rest of the file, which is not parsed, could only replace what lies before: by a second
    key of the same name. Of those only the normalizer matters before the library has loaded the file and can be asked."""
    head, found, tail = data.partition(_VOCABULARY)
    if found and b'"normalizer"' not in tail and not _ESCAPED_LETTER.search(tail):
        try:
            document = json.loads(head + _VOCABULARY + b"}}}")
        except (ValueError, RecursionError):
            pass  # it is in another order, or no JSON
        else:
            model = document.get("model") if isinstance(document, dict) else None
            if isinstance(model, dict) and model.get("vocab") == {}:
                return document, _first_above(tail, vocab_size)
    return _whole(data)


_ESCAPED_LETTER = re.compile(
    rb"\\u00[4-7]"
)  # a key can be spelled with escapes; JSON writers use them for control characters


def _first_above(tail: bytes, vocab_size: int | None) -> int:
    """An id >= vocab_size in the vocabulary, or -1."""
    if vocab_size is None:
        return -1
    digits = str(vocab_size)
    n = len(digits)
    larger = [rb"[1-9]\d{%d,}" % n, digits.encode()]
    for i, digit in enumerate(digits):
        if digit != "9":
            larger.append(digits[:i].encode() + rb"[%d-9]\d{%d}" % (int(digit) + 1, n - i - 1))
    pattern = re.compile(rb'":((?:%s))[,}]' % b"|".join(larger))
    for match in pattern.finditer(tail):
        if not tail.endswith(b"\\", 0, match.start()):  # a quotation mark inside a token, not the end of one
            return int(match[1][:20])
    return -1


def _whole(data: bytes) -> tuple[dict[str, Any], int]:
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelFormatError(f"tokenizer.json is not valid JSON: {error}") from None
    if not isinstance(document, dict) or not isinstance(document.get("model"), dict):
        raise ModelFormatError("tokenizer.json holds no tokenizer")
    model = dict(document["model"])
    vocabulary = model.pop("vocab", None)
    model.pop("merges", None)
    if isinstance(vocabulary, dict):
        if not all(type(id_) is int for id_ in vocabulary.values()):
            raise ModelFormatError("tokenizer.json: an id of the vocabulary is no integer")
        highest = max(vocabulary.values(), default=-1)
    elif isinstance(vocabulary, list):
        highest = len(vocabulary) - 1
        model.setdefault("type", "Unigram")
    else:
        raise ModelFormatError("tokenizer.json has no vocabulary")
    return {**document, "model": model}, highest


# -------------------------------------------------------------------- fields


class _Object:
    """A JSON object whose fields are read with their types."""

    def __init__(self, what: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise ModelFormatError(f"tokenizer.json: {what} is no object")
        self.what = what
        self.value: dict[str, Any] = value

    def _get(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.value.get(name)
        if value is None:
            value = default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ModelFormatError(f"tokenizer.json: {name} of {self.what} is {shown(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value: str = self._get(name, str, default)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value: bool = self._get(name, bool, default)
        return value

    def integer(self, name: str, low: int, high: int) -> int:
        value: int = self._get(name, int, None)
        if not low <= value <= high:
            raise ModelFormatError(f"tokenizer.json: {name} of {self.what} is {shown(value)}, not in [{low}, {high}]")
        return value

    def items(self, name: str, most: int) -> list[Any]:
        value: list[Any] = self._get(name, list, None)
        if len(value) > most:
            raise ModelFormatError(f"tokenizer.json: {self.what} has {len(value)} {name}, at most {most}")
        return value

    def character(self, name: str) -> None:
        if len(self.text(name)) != 1:
            raise ModelFormatError(f"tokenizer.json: {name} of {self.what} must be one character")


def _added_tokens(value: Any, vocab_size: int | None) -> list[_Object]:
    if not isinstance(value or [], list) or len(value or []) > MAX_ADDED_TOKENS:
        raise ModelFormatError(f"tokenizer.json: added_tokens is no list of at most {MAX_ADDED_TOKENS}")
    tokens = [_Object("an added token", token) for token in value or []]
    for token in tokens:
        if not 1 <= len(token.text("content")) <= MAX_TOKEN:
            raise ModelFormatError(f"tokenizer.json: an added token is empty or longer than {MAX_TOKEN} characters")
        token.integer("id", 0, (vocab_size or 1 << 32) - 1)
    return tokens


# -------------------------------------------------------------------- components


class _Effect:
    """What a chain of components makes of a text."""

    def __init__(self) -> None:
        self.components = 0
        self.expansion = 1.0  # characters that may become of one
        self.shrinks_to = 1.0  # bytes of text that may become one
        self.is_quadratic = False
        self.once: set[str] = set()

    def grow(self, factor: float) -> None:
        self.expansion *= max(1.0, factor)

    def shrink(self, factor: float) -> None:
        self.shrinks_to *= max(1.0, factor)

    def only_once(self, kind: str) -> None:
        """Components that lengthen the text whenever they run."""
        if kind in self.once:
            raise UnsupportedModelError(f"tokenizer.json: more than one {kind}")
        self.once.add(kind)


_Check = Callable[[_Object, _Effect], None]


def _walk(what: str, value: Any, children: str, known: Mapping[str, _Check], effect: _Effect, depth: int = 0) -> None:
    if value is None:
        return
    component = _Object(f"the {what}", value)
    kind = component.text("type", "")
    effect.components += 1
    if effect.components > MAX_COMPONENTS or depth > 8:
        raise UnsupportedModelError(f"tokenizer.json: more than {MAX_COMPONENTS} components")
    if kind == "Sequence":
        for child in component.items(children, MAX_COMPONENTS):
            _walk(what, child, children, known, effect, depth + 1)
    elif kind in known:
        known[kind](component, effect)
    else:
        raise UnsupportedModelError(f"tokenizer {what} {shown(kind)} is not supported")


def _unicode_form(_: _Object, effect: _Effect) -> None:
    """NFC, NFD, NFKC, NFKD: at most 18 characters become of one (U+FDFA); twelve bytes may be joined to one. Their repetition
    changes nothing."""
    if "Unicode form" not in effect.once:
        effect.once.add("Unicode form")
        effect.grow(18)
        effect.shrink(12)


def _lowercase(_: _Object, effect: _Effect) -> None:
    if "Lowercase" not in effect.once:
        effect.once.add("Lowercase")
        effect.grow(2)
        effect.shrink(3)


def _removes(_: _Object, effect: _Effect) -> None:
    effect.shrink(float("inf"))


def _prepend(component: _Object, effect: _Effect) -> None:
    effect.only_once("Prepend")
    if len(component.text("prepend")) > MAX_LITERAL:
        raise UnsupportedModelError(f"tokenizer.json: a normalizer prepends more than {MAX_LITERAL} characters")


def _replace(component: _Object, effect: _Effect) -> None:
    content = component.text("content")
    literal, pattern = _pattern(component, effect)
    least = len(literal) if literal is not None else check_pattern(pattern)
    if least == 0:
        raise UnsupportedModelError("tokenizer.json: a normalizer replaces nothing by something")
    effect.grow(len(content) / least)
    if literal is None or not content:
        effect.shrink(float("inf"))
    else:
        effect.shrink(len(literal.encode("utf-8", "replace")) / len(content.encode("utf-8", "replace")))


def _pattern(component: _Object, effect: _Effect) -> tuple[str | None, str]:
    """(literal, "") or (None, pattern)."""
    pattern = component.value.get("pattern")
    if isinstance(pattern, dict) and len(pattern) == 1:
        kind, text = next(iter(pattern.items()))
        if isinstance(text, str) and kind == "String":
            return text, ""
        if isinstance(text, str) and kind == "Regex":
            check_pattern(text)
            effect.is_quadratic |= text == QUADRATIC_PATTERN
            return None, text
    raise ModelFormatError(f"tokenizer.json: pattern of {component.what} is {shown(pattern)}")


def _precompiled(component: _Object, effect: _Effect) -> None:
    """SentencePiece's table: a size, a trie, and the texts that it leads to, each ended by a NUL."""
    import base64
    import binascii

    try:
        table = base64.b64decode(component.text("precompiled_charsmap"), validate=True)
    except (binascii.Error, ValueError):
        raise ModelFormatError("tokenizer.json: precompiled_charsmap is no base64") from None
    size = int.from_bytes(table[:4], "little")
    if len(table) < 4 or size % 4 or not 4 <= size <= len(table) - 4:
        raise ModelFormatError("tokenizer.json: precompiled_charsmap is damaged")
    effect.only_once("Precompiled")
    effect.grow(max(map(len, table[4 + size :].split(b"\0"))))
    effect.shrink(float("inf"))


_NORMALIZERS: dict[str, _Check] = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), _unicode_form),
    **dict.fromkeys(("Nmt", "Strip", "StripAccents"), _removes),
    "Lowercase": _lowercase,
    "Prepend": _prepend,
    "Replace": _replace,
    "Precompiled": _precompiled,
}


def _byte_level(_: _Object, effect: _Effect) -> None:
    effect.only_once("ByteLevel")  # a second one would spell the bytes of the first one's spelling, and so on
    effect.grow(4)


def _metaspace(component: _Object, effect: _Effect) -> None:
    effect.only_once("Metaspace")
    component.character("replacement")


def _split(component: _Object, effect: _Effect) -> None:
    _pattern(component, effect)
    _behavior(component, effect)


def _behavior(component: _Object, effect: _Effect) -> None:
    if component.text("behavior", "Isolated") == "Removed":
        _removes(component, effect)


def _delimiter(component: _Object, effect: _Effect) -> None:
    component.character("delimiter")
    _removes(component, effect)


def _nothing(_: _Object, __: _Effect) -> None:
    """It only cuts the text."""


_PRE_TOKENIZERS: dict[str, _Check] = {
    "ByteLevel": _byte_level,
    "Metaspace": _metaspace,
    "Split": _split,
    "Punctuation": _behavior,
    "CharDelimiterSplit": _delimiter,
    "Whitespace": _removes,
    "WhitespaceSplit": _removes,
    "Digits": _nothing,
    "UnicodeScripts": _nothing,
}


def _end_id(value: Any, at: int, depth: int = 0) -> int | None:
    """The id that a post-processor puts before a text (at 0), or behind it (at -1)."""
    if value is None:
        return None
    processor = _Object("the post_processor", value)
    kind = processor.text("type", "")
    if kind == "Sequence" and depth < 8:
        found = [_end_id(part, at, depth + 1) for part in processor.items("processors", MAX_COMPONENTS)]
        return next((id_ for id_ in reversed(found) if id_ is not None), None)
    if kind == "TemplateProcessing":
        return _template_end_id(processor, at)
    if kind in ("RobertaProcessing", "BertProcessing"):
        token = processor.items("cls" if at == 0 else "sep", 2)
        return token[1] if len(token) == 2 and type(token[1]) is int else None
    if kind != "ByteLevel":
        raise UnsupportedModelError(f"tokenizer post_processor {shown(kind)} is not supported")
    return None


def _template_end_id(processor: _Object, at: int) -> int | None:
    pieces: Sequence[Any] = processor.items("single", MAX_COMPONENTS)
    special = pieces[at].get("SpecialToken") if pieces and isinstance(pieces[at], dict) else None
    if not isinstance(special, dict):
        return None
    tokens = processor.value.get("special_tokens")
    token = tokens.get(special.get("id")) if isinstance(tokens, dict) and isinstance(special.get("id"), str) else None
    ids = token.get("ids") if isinstance(token, dict) else None
    return ids[at] if isinstance(ids, list) and ids and type(ids[at]) is int else None
