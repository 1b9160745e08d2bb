"""A reranker's head, looked up among the rows of the output matrix.

Tools make classifiers of rerankers that are causal models: the head is one row of the output matrix ("yes"), the difference of
two, or both of them, and the rest of the model is as it was, but for an output matrix of its own, which is left out. So where the
embeddings are the output matrix such a file is frozen as the causal model that it was made of, with the two tokens by their ids.
Any other head is refused: its numbers are nowhere else in the file, and the format has no place for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from ..errors import ModelFormatError, UnsupportedModelError
from ..format.quantize import Float32Array, RowSource

# Words for "it does" and "it does not", as rerankers were trained to say them.
_WORDS = (("yes", "no"), ("Yes", "No"), ("1", "0"), ("true", "false"), ("True", "False"))
EXACT = 0.02  # of a row's norm: what float16 and bfloat16 leave of a difference of two rows
QUANTIZED = 0.15  # and what a few bits leave of one


def tokens_of(
    head: RowSource, output: RowSource, ids: Mapping[str, int], *, tolerance: float, is_folded: bool
) -> dict[str, int | None]:
    """``true_token_id`` and ``false_token_id`` of a head (1 or 2 rows of ``output.columns``) that is made of ``output``.

    ids        the vocabulary
    tolerance  how far off the head may be, of its norm
    is_folded  logits are more than the product of the output matrix with what the head reads
    Raises ModelFormatError for a head of another width, UnsupportedModelError for one that is made of nothing."""
    if head.columns != output.columns:
        raise ModelFormatError(f"the head has rows of {head.columns} values, the output matrix of {output.columns}")
    if head.rows not in (1, 2) or is_folded:
        what = "of this architecture" if is_folded else f"of {head.rows} classes"
        raise UnsupportedModelError(f"a classifier {what} is not implemented, only rerankers of one or two classes")
    rows = head.read_rows(0, head.rows).astype(np.float64)
    for true_id, false_id, made in _makings(output, ids, head.rows):
        if np.linalg.norm(made - rows) <= tolerance * np.linalg.norm(rows):
            return {"true_token_id": true_id, "false_token_id": false_id}
    raise UnsupportedModelError(
        "the head of this classifier is not made of the embeddings of two answers, as that of a reranker with tied embeddings "
        "is: a head of its own is not implemented; freeze the causal model that it was made of"
    )


def _makings(output: RowSource, ids: Mapping[str, int], n_rows: int) -> Iterator[tuple[int, int | None, Float32Array]]:
    """Tokens, and a head (n_rows, columns) that would be made of them."""
    for words in _WORDS:
        if not all(word in ids and ids[word] < output.rows for word in words):
            continue
        true_id, false_id = (ids[word] for word in words)
        true, false = (output.read_rows(id_, id_ + 1) for id_ in (true_id, false_id))
        if n_rows == 2:
            yield true_id, false_id, np.concatenate([false, true])
            yield true_id, false_id, np.concatenate([true, false])
        else:
            yield true_id, false_id, true - false
            yield true_id, None, true
