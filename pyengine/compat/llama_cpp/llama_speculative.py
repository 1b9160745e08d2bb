"""Guesses ahead, as llama-cpp-python asks for them. This engine guesses by the text's n-grams by itself; it changes no byte."""

from __future__ import annotations

from pyengine.arguments import INT32_MAX, integer
from pyengine.sampling import MAX_DRAFT


class LlamaPromptLookupDecoding:
    """num_pred_tokens: guesses in a step at most (here never more than 24). max_ngram_size changes no output and is not used."""

    def __init__(self, max_ngram_size: int = 2, num_pred_tokens: int = 10) -> None:
        integer("max_ngram_size", max_ngram_size, 1, INT32_MAX)
        self.num_pred_tokens = min(integer("num_pred_tokens", num_pred_tokens, 0, INT32_MAX), MAX_DRAFT)
