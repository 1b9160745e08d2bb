"""From pieces and results to the dictionaries that llama-cpp-python gives: OpenAI's shapes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pyengine.engine import Engine
from pyengine.results import Generation, Piece, TokenLogprob
from pyengine.serve.calls import message_of
from pyengine.serve.payload import chat_logprobs, finish_reason, text_logprobs
from pyengine.serve.tools import Tools, reader_of

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


def chat(head: Head, result: Generation, engine: Engine, tools: Tools | None) -> Answer:
    """tools: of which the answer is forced to call one, None if it is not."""
    message: Answer = {"role": "assistant", "content": result.text}
    reason = finish_reason(result)
    if tools is not None:
        reader = reader_of(tools)
        content, calls = message_of([*reader.push(result.text), *reader.finish()])
        message |= {"content": content or None, "tool_calls": calls}
        if calls:
            message["function_call"] = calls[0]["function"]
        reason = "tool_calls" if is_whole_call(result) else reason
    logprobs = None if result.logprobs is None else chat_logprobs(said(engine, result), engine.tokenizer)
    choice = {"message": message, "logprobs": logprobs, "finish_reason": reason}
    return {**head.answer("chat.completion", choice), "usage": usage(result)}


def chat_chunks(head: Head, pieces: Iterator[Piece], engine: Engine, tools: Tools | None) -> Iterator[Answer]:
    """First the role, then what is said, at the end the reason."""

    def chunk(delta: Answer, logprobs: Answer | None = None, reason: str | None = None) -> Answer:
        choice = {"delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return head.answer("chat.completion.chunk", choice)

    yield chunk({"role": "assistant"})
    reader = None if tools is None else reader_of(tools)
    for piece in pieces:
        result = piece.result
        if reader is not None:
            for delta in [*reader.push(piece.text), *(reader.finish() if result is not None else ())]:
                yield chunk(delta)
        else:
            ended = result is not None and piece.token in engine.eos_token_ids
            entry = None if ended else piece.logprob
            logprobs = None if entry is None else chat_logprobs([entry], engine.tokenizer)
            if piece.text or logprobs is not None:
                yield chunk({"content": piece.text} if piece.text else {}, logprobs)
        if result is not None:
            yield chunk(
                {}, reason="tool_calls" if reader is not None and is_whole_call(result) else finish_reason(result)
            )


# -------------------------------------------------------------------- embeddings


def embeddings(model: str, vectors: Sequence[Sequence[float]], n_tokens: int) -> Answer:
    data = [{"object": "embedding", "embedding": vector, "index": index} for index, vector in enumerate(vectors)]
    counts = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": model, "usage": counts}
