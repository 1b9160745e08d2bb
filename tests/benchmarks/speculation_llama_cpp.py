"""llama.cpp with n-gram drafting (llama-cpp-python's prompt lookup) in a process of its own, driven by speculation.py.

    python speculation_llama_cpp.py MODEL.gguf n_threads

It says {"version": ...}, then answers each line {"ids": [...], "n": 96, "drafts": true, "temperature": 0} on stdin with
{"tokens": how many came, "seconds": ...} on stdout, after the prompt was computed. With drafts, guesses are those of
LlamaPromptLookupDecoding as its documentation gives it for CPUs: num_pred_tokens=2; without them it decodes token by token.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def answer(model: Any, guesser: Any, ids: list[int], n: int, drafts: bool, temperature: float) -> dict[str, Any]:
    """n tokens after ids at most. The first one ends the prompt's time and is not counted."""
    model.draft_model = guesser if drafts else None
    model.reset()
    model.set_seed(1)
    ends = {model.token_eos(), model.token_eot() if hasattr(model, "token_eot") else -1}
    n_tokens, began = -1, 0.0
    for token in model.generate(ids, temp=temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0, reset=True):
        n_tokens += 1
        if n_tokens == 0:
            began = time.perf_counter()
        if n_tokens == n - 1 or token in ends:
            break
    return {"tokens": n_tokens, "seconds": time.perf_counter() - began}


def main() -> None:
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    path, n_threads = sys.argv[1], int(sys.argv[2])
    guesser = LlamaPromptLookupDecoding(num_pred_tokens=2)
    # Rows of all guessed tokens must have logits; without logits_all there is room for those of one batch of a prompt only.
    model = llama_cpp.Llama(
        path,
        n_ctx=4096,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        draft_model=guesser,
        logits_all=True,
        verbose=False,
    )
    print(json.dumps({"version": llama_cpp.__version__}), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(model, guesser, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
