"""Patterns of tokenizer.json: those of the common models pass, and none passes whose time is not linear in the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyengine.errors import UnsupportedModelError
from pyengine.freeze.tokenizer import PRE_TOKENIZERS
from pyengine.text.patterns import check_pattern

UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
HAN_UPPER, HAN_LOWER = (letters[:-1] + r"&&[^\p{Han}]]" for letters in (UPPER, LOWER))

KNOWN = {
    **{f"{name} {i}": text for name, pre in PRE_TOKENIZERS.items() for i, text in enumerate(pre.patterns)},
    "GPT-4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "GPT-4o": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{CONTRACTION}?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "Kimi": (
        rf"[\p{{Han}}]+|[^\r\n\p{{L}}\p{{N}}]?{HAN_UPPER}*{HAN_LOWER}+{CONTRACTION}?|"
        rf"[^\r\n\p{{L}}\p{{N}}]?{HAN_UPPER}+{HAN_LOWER}*{CONTRACTION}?|"
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "DeepSeek V3": (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "blanks": " {2,}",
    "line ends": r"(?:\r?\n|\r)",
    "digits": "[0-9][0-9][0-9]",
}


@pytest.mark.parametrize("name", KNOWN)
def test_patterns_of_common_models_pass(name):
    assert check_pattern(KNOWN[name]) >= 1


@pytest.mark.parametrize(
    "pattern, least", [("", 0), ("a?", 0), ("a|bc", 1), ("(?:ab){3}", 6), (r"\s+(?!\S)|\s+", 1), ("a{2,5}b", 3)]
)
def test_the_shortest_match(pattern, least):
    assert check_pattern(pattern) == least


SLOW = [
    "(a+)+b|(a|a)*c", "^(([a-z])+.)+[A-Z]([a-z])+$", "a*a*b", "a+b", "(a?){30}a{30}", "a?" * 30 + "a" * 30, ".*?x",
    "(?:a|b)*", "(?:a|a){1,64}c", "a{1,64}" * 8 + "b", r"(a)\1", "(?<=a)b", "(?<!a+)b", "(?x)a + b", "x(?i)a+b|a+", "(?=a+)a",
    r"a+(?!b)|a+?", "a+b|a+c", r"\g<0>", "(?<n>a)", "(?~a)", "[a", "(a", "a)", "[]", "*a", "a**", "a{2}{3}", "a{2,3}+", r"\R*",
    "((((((((((a))))))))))", "[[[[[[[[[[a]]]]]]]]]]", "x" * 10_000, "(?:){9}", r"\K",
]  # fmt: skip


@pytest.mark.parametrize("pattern", SLOW)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(UnsupportedModelError, match="pattern"):
        check_pattern(pattern)


@settings(max_examples=2000, deadline=None)
@given(st.text(alphabet=list(r"ab .*+?{}1,()[]|^$\psd:!=i&"), max_size=24))
def test_nothing_else_is_raised(pattern):
    """And whatever passes comes back: the library's limit of 10^7 steps a match, which is a panic, is not met."""
    from tokenizers import Regex, pre_tokenizers

    try:
        check_pattern(pattern)
    except UnsupportedModelError:
        return
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception:  # no pattern for the library, which says so at once
        return
    for text in ("a" * 100, "ab" * 50, " a" * 50, "sd1,:" * 20):
        assert "".join(piece for piece, _ in split.pre_tokenize_str(text)) == text
