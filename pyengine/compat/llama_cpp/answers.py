"""From pieces and results to the dictionaries that llama-cpp-python gives: OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pyengine.engine import Engine
from pyengine.results import Generation, Piece, TokenLogprob
from pyengine.serve.payload import chat_logprobs, finish_reason, text_logprobs
from pyengine.serve.tools import CallReader, whole_call

Answer = dict[str, Any]
Entry = tuple[int, float | None, Sequence[tuple[int, float]]]  # token, its log-probability, the most probable ones


class Head:
    """What an answer and each of its chunks begin with."""

    def __init__(self, prefix: str, model: str) -> None:
        self.id = f"{prefix}{uuid.uuid4()}"
        self.created = int(time.time())
        self.model = model

    def answer(self, kind: str, choice: Answer) -> Answer:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return {**head, "choices": [{"index": 0, **choice}]}


def usage(result: Generation) -> Answer:
    """Tokens of prompt and text; the token that ended the text is not counted, as llama-cpp-python has it."""
    completion = len(result.tokens) - (result.finish_reason == "stop" and not isinstance(result.stop_reason, str))
    prompt = result.timings.prompt_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def said(engine: Engine, result: Generation) -> list[TokenLogprob]:
    """Log-probabilities of the tokens that are part of the text."""
    entries = result.logprobs or []
    return entries[:-1] if entries and result.tokens[-1] in engine.eos_token_ids else entries


def completion_logprobs(engine: Engine, entries: Iterable[Entry], offset: int) -> Answer:
    """Parallel lists; each token is also among its own top_logprobs. offset: characters before the first."""
    out = text_logprobs(entries, engine.tokenizer, offset)
    for token, value, top in zip(out["tokens"], out["token_logprobs"], out["top_logprobs"], strict=True):
        if top is not None:
            top[token] = value
    return out


# -------------------------------------------------------------------- completions


def completion(head: Head, result: Generation, text: str, logprobs: Answer | None) -> Answer:
    choice = {"text": text, "logprobs": logprobs, "finish_reason": finish_reason(result)}
    return {**head.answer("text_completion", choice), "usage": usage(result)}


def completion_chunks(head: Head, pieces: Iterator[Piece], engine: Engine, offset: int | None) -> Iterator[Answer]:
    """A chunk a piece, and one at the end with the reason. offset: characters of the prompt, None without logprobs."""
    for piece in pieces:
        entry = piece.logprob
        ended = piece.result is not None and piece.token in engine.eos_token_ids
        logprobs = None
        if offset is not None and entry is not None and not ended:
            logprobs = completion_logprobs(engine, [entry], offset)
            offset += len(piece.text)
        if piece.text or logprobs is not None:
            yield head.answer("text_completion", {"text": piece.text, "logprobs": logprobs, "finish_reason": None})
        if piece.result is not None:
            end = {"text": "", "logprobs": None, "finish_reason": finish_reason(piece.result)}
            yield head.answer("text_completion", end)


# -------------------------------------------------------------------- chats


def is_whole_call(result: Generation) -> bool:
    """Whether a forced call came to its own end."""
    return result.finish_reason == "stop" and result.stop_reason is None


def chat(head: Head, result: Generation, engine: Engine, *, is_call: bool) -> Answer:
    message: Answer = {"role": "assistant", "content": result.text}
    reason = finish_reason(result)
    if is_call:
        calls = whole_call(result.text, is_complete=is_whole_call(result))
        message |= {"content": None, "tool_calls": calls}
        if calls:
            message["function_call"] = calls[0]["function"]
        reason = "tool_calls" if is_whole_call(result) else reason
    logprobs = None if result.logprobs is None else chat_logprobs(said(engine, result), engine.tokenizer)
    choice = {"message": message, "logprobs": logprobs, "finish_reason": reason}
    return {**head.answer("chat.completion", choice), "usage": usage(result)}


def chat_chunks(head: Head, pieces: Iterator[Piece], engine: Engine, *, is_call: bool) -> Iterator[Answer]:
    """First the role, then what is said, at the end the reason."""

    def chunk(delta: Answer, logprobs: Answer | None = None, reason: str | None = None) -> Answer:
        choice = {"delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head.answer("chat.completion.chunk", choice)

    yield chunk({"role": "assistant"})
    reader = CallReader()
    for piece in pieces:
        result = piece.result
        if is_call:
            is_complete = result is not None and is_whole_call(result)
            calls = reader.push(piece.text, is_last=result is not None, is_complete=is_complete)
            delta: Answer = {"tool_calls": calls} if calls else {}
        else:
            delta = {"content": piece.text} if piece.text else {}
        ended = result is not None and piece.token in engine.eos_token_ids
        entry = None if ended else piece.logprob
        logprobs = None if entry is None else chat_logprobs([entry], engine.tokenizer)
        if delta or logprobs is not None:
            yield chunk(delta, logprobs)
        if result is not None:
            reason = "tool_calls" if is_call and is_whole_call(result) else finish_reason(result)
            yield chunk({}, reason=reason)
