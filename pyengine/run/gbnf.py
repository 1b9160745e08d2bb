"""Grammars in llama.cpp's notation (GBNF), for llguidance, which reads Lark's and converts nearly all of the former itself.

Its converter makes a terminal of every rule that is made of characters alone. In Lark's notation a terminal is as long as it
can be: after `word ::= [a-z]+` no letter could follow, and `word "end"` would never end. Here all rules are of the grammar, whose
terminals are single characters, so a text is what llama.cpp takes it for.
"""

from __future__ import annotations

import re

from pyengine import fork
from pyengine.errors import InvalidArgumentError

MAX_RULES = 2000  # to convert them takes a time that grows with the square

_RULE = re.compile(r"^[ \t]*[A-Za-z0-9_-]+[ \t]*::=", re.MULTILINE)
_WORD = re.compile(
    r"""(?P<comment>\#[^\r\n]*)|(?P<chars>"(?:\\.|[^"\\])*"?|\[(?:\\.|[^\]\\])*\]?)|(?P<name>[A-Za-z0-9_-]+)|(?P<any>\.)""",
    re.DOTALL,
)
# Of Lark's: strings, regular expressions, and what is outside of them.
_LARK_WORD = re.compile(r'"(?:\\.|[^"\\])*"?|/(?:\\.|[^/\\])*/?|(?P<name>[A-Za-z0-9_]+)')
_LARK_RULE = re.compile(r"^([a-z0-9_]+):", re.MULTILINE)
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)", re.DOTALL)


def is_gbnf(grammar: str) -> bool:
    """Whether it is GBNF and not Lark's notation, by its first rule: `name ::= ...` begins no line there."""
    return _RULE.search(grammar) is not None


def to_lark(grammar: str) -> str:
    """A grammar in GBNF, with a rule `root`, in Lark's notation. Raises InvalidArgumentError for what is none."""
    try:
        with fork.importing:
            from llguidance.gbnf_to_lark import gbnf_to_lark
    except ImportError:
        raise InvalidArgumentError("grammars need llguidance: pip install 'pyengine-lm[guide]'") from None
    if len(_RULE.findall(grammar)) > MAX_RULES:
        raise InvalidArgumentError(f"a GBNF grammar of more than {MAX_RULES} rules")
    try:
        lark: str = gbnf_to_lark(_as_converted(grammar))
    except RecursionError:
        raise InvalidArgumentError("this is no GBNF grammar that can be read: it is nested too deeply") from None
    except Exception as error:  # it raises plain ones, too, for a rule that is missing
        raise InvalidArgumentError(f"this is no GBNF grammar: {error}") from None
    lark = _LARK_WORD.sub(lambda match: match[0].lower() if match["name"] else match[0], lark)
    rules = _LARK_RULE.findall(lark)
    if len(set(rules)) < len(rules):
        raise InvalidArgumentError("this GBNF grammar has rules whose names differ in nothing but case, - and _")
    return lark


def _as_converted(grammar: str) -> str:
    """The same grammar without what the converter takes for something else: an escape \\u0041 (its zeros are lost), a dot (any
    character in GBNF, all but a newline in Lark), a rule `start` (Lark's root)."""
    start, names = "start", {match["name"] for match in _WORD.finditer(grammar)}
    while start in names:
        start += "-x"

    def word(match: re.Match[str]) -> str:
        text = match[0]
        if match["comment"]:
            return ""
        if match["chars"]:
            return _ESCAPE.sub(_escape, text)
        if match["any"]:
            return r'("\n" | .)'
        return start if match["name"] == "start" else text

    return _WORD.sub(word, grammar)


def _escape(match: re.Match[str]) -> str:
    digits = match[1] or match[2]
    if digits is None:
        return match[0]
    code = int(digits, 16)
    return f"\\x{code:02x}" if code < 0x80 else chr(code)
