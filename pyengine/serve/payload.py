"""Parts of answers that several endpoints share: usage, timings, log-probabilities."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from pyengine import __version__
from pyengine.results import BeamHypothesis, Generation, Piece, Timings, TokenLogprob
from pyengine.run.request import GenerationRequest
from pyengine.text.tokenizer import Tokenizer

FINGERPRINT = f"pyengine-{__version__}"
LEAST_LOGPROB = -9999.0  # JSON has no infinity


def new_id(prefix: str) -> str:
    return f"{prefix}{uuid.uuid4().hex}"


def usage(requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """Of outputs that are complete; the samples of one prompt count it once, as OpenAI does."""
    results = [request.result for request in requests]
    prompts = {id(request.prompt): result for request, result in reversed(list(zip(requests, results, strict=True)))}
    prompt = sum(result.timings.prompt_tokens for result in prompts.values())
    cached = sum(result.timings.cached_tokens for result in prompts.values())
    return usage_of(prompt, cached, sum(result.timings.generated_tokens for result in results))


def usage_of(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """Of so many tokens: of prompts, of these cached, and of outputs."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def begun_usage(requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """Of outputs before their first token."""
    prompt = sum(len(tokens) for tokens in {id(request.prompt): request.prompt for request in requests}.values())
    return {"prompt_tokens": prompt, "completion_tokens": 0, "total_tokens": prompt}


def prompt_timings(cached: int, computed: int, seconds: float) -> dict[str, Any]:
    """Of tokens that were read, as llama.cpp's server gives them."""
    return {
        "cache_n": cached,
        "prompt_n": computed,
        "prompt_ms": round(seconds * 1e3, 3),
        "prompt_per_token_ms": round(seconds * 1e3 / max(computed, 1), 3),
        "prompt_per_second": round(computed / max(seconds, 1e-9), 3),
    }


def timings(t: Timings) -> dict[str, Any]:
    """As llama.cpp's server gives them."""
    rest = t.total - t.time_to_first_token
    guesses = {"draft_n": t.drafted_tokens, "draft_n_accepted": t.accepted_tokens} if t.drafted_tokens else {}
    return {
        **prompt_timings(t.cached_tokens, t.prompt_tokens - t.cached_tokens, t.time_to_first_token),
        "predicted_n": t.generated_tokens,
        "predicted_ms": round(rest * 1e3, 3),
        "predicted_per_token_ms": round(rest * 1e3 / max(t.generated_tokens - 1, 1), 3),
        "predicted_per_second": round(t.tokens_per_second, 3),
        **guesses,
    }


def finish_reason(result: Generation | BeamHypothesis) -> str:
    """In OpenAI's words: a request that ran out of time was cut, as one that ran out of tokens. stop_reason tells more."""
    return "stop" if result.finish_reason == "stop" else "length"


def stop_reason(result: Generation | BeamHypothesis) -> str | int | None:
    return "timeout" if result.finish_reason == "timeout" else result.stop_reason


# -------------------------------------------------------------------- log-probabilities


def said(pieces: Iterable[Piece], end_ids: Iterable[int]) -> list[TokenLogprob]:
    """Log-probabilities of the tokens that are part of the text: not of the one that ended it."""
    ends = set(end_ids)
    return [
        piece.logprob
        for piece in pieces
        if piece.logprob is not None and not (piece.result is not None and piece.token in ends)
    ]


def _number(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)


def chat_logprobs(entries: Iterable[TokenLogprob], tokenizer: Tokenizer) -> dict[str, Any]:
    """Chat completions' form."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": _number(logprob), "bytes": list(data)}

    return {
        "content": [
            {**one(entry.token, entry.logprob), "top_logprobs": [one(token, logprob) for token, logprob in entry.top]}
            for entry in entries
        ],
        "refusal": None,
    }


def token_string(tokenizer: Tokenizer, token: int) -> str:
    r"""A token as a key: its text, or "bytes:\xe2\x80" if it is no whole text."""
    data = tokenizer.token_bytes(token)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def text_logprobs(
    entries: Iterable[tuple[int, float | None, Sequence[tuple[int, float]]]], tokenizer: Tokenizer, offset: int
) -> dict[str, Any]:
    """Completions' form: parallel lists of (token, its log-probability, the most probable ones). `offset`: characters
    before the first, negative for the length of a beginning that is not part of the text."""
    out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, logprob, top in entries:
        out["tokens"].append(token_string(tokenizer, token))
        out["token_logprobs"].append(None if logprob is None else _number(logprob))
        out["top_logprobs"].append(
            None if logprob is None else {token_string(tokenizer, id_): _number(value) for id_, value in top}
        )
        out["text_offset"].append(max(offset, 0))
        offset += len(tokenizer.token_bytes(token).decode("utf-8", "ignore"))
    return out
