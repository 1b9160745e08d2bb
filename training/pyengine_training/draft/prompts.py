"""What a draft head learns from begins with prompts: conversations, questions, or beginnings of texts.

.jsonl lines are {"messages": […]}, {"prompt": …} or {"text": …}; other files are texts, as for pretraining. Conversations
and prompts are rendered by the model's own template; a prompt for a model without one is plain text. Texts give beginnings of
MIN_BEGIN to MAX_BEGIN tokens to continue or, where they are taken as they are, themselves.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..text import LONE_SURROGATE, read_documents, read_json_lines
from .target import Target

MIN_BEGIN, MAX_BEGIN = 4, 64  # tokens of a beginning
LONGEST = 1024  # tokens of a text that is taken as it is: the engine's forward grows with the square of more


@dataclass
class Prompts:
    """ids: token ids each. skipped: prompts that leave no room for an output in the model's context."""

    ids: list[list[int]]
    skipped: int = 0


def read_prompts(files: list[Path], target: Target, *, max_tokens: int, given: bool, seed: int) -> Prompts:
    """Of all files, in a random order that depends on the seed alone. given: whole texts instead of what to continue.

    Raises DataError with the line that cannot be used, or if nothing is left.
    """
    found = Prompts([])
    room = target.context if given else target.context - max_tokens
    if room < 1:
        raise DataError(f"outputs of {max_tokens} tokens leave no room in the model's context of {target.context}")
    for path in files:
        for ids in _given(path, target) if given else _open(path, target, min(room, MAX_BEGIN), seed):
            if len(ids) > room:
                found.skipped += 1
            elif len(ids) >= (2 if given else 1):
                found.ids.append(ids)
    found.ids = [list(ids) for ids in dict.fromkeys(map(tuple, found.ids))]  # the same one twice would be on both sides
    if len(found.ids) < 2:
        names = ", ".join(map(str, files))
        raise DataError(
            f"{names}: {len(found.ids)} texts with tokens that fit the context of {target.context}; 2 different ones are "
            "needed, one to learn from and one held out"
        )
    order = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 5, 0])).permutation(len(found.ids))
    found.ids = [found.ids[i] for i in order]
    return found


def _open(path: Path, target: Target, longest: int, seed: int) -> Iterator[list[int]]:
    """What the model is to go on from; beginnings of texts have at most ``longest`` tokens."""
    if _kind(path) == "text":
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 6, 0]))
        for document in read_documents(path):
            ids = target.text_ids(document[: 16 * MAX_BEGIN])
            yield ids[: int(generator.integers(min(MIN_BEGIN, longest), longest + 1))]
        return
    for messages in _conversations(path):
        while messages and messages[-1]["role"] == "assistant":  # the model is to say it itself
            messages = messages[:-1]
        if messages:
            yield _prompt(messages, target)


def _given(path: Path, target: Target) -> Iterator[list[int]]:
    """Texts as they are; long ones in pieces."""
    if _kind(path) == "text":
        for document in read_documents(path):
            ids, size = target.text_ids(document), min(LONGEST, target.context)
            yield from (ids[at : at + size] for at in range(0, len(ids), size))
        return
    for messages in _conversations(path):
        yield target.chat_ids(messages, answer=False) if target.is_chat else target.text_ids(messages[-1]["content"])


def _prompt(messages: list[dict[str, str]], target: Target) -> list[int]:
    return target.chat_ids(messages, answer=True) if target.is_chat else target.text_ids(messages[-1]["content"])


def _kind(path: Path) -> str:
    """ "text", or "chat" for a .jsonl file of conversations or prompts."""
    if path.suffix != ".jsonl":
        return "text"
    for number, line in read_json_lines(path):
        value = _object(path, number, line)
        return "text" if "text" in value else "chat"
    raise DataError(f"{path}: no line with anything in it")


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: line {number} is no JSON") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: line {number} is no object")
    return value


def _conversations(path: Path) -> Iterator[list[dict[str, str]]]:
    """Messages of each line."""
    for number, line in read_json_lines(path):
        value = _object(path, number, line)
        messages = value.get("messages", [{"role": "user", "content": value.get("prompt")}])
        where = f"{path}: line {number}"
        if not isinstance(messages, list) or not messages:
            raise DataError(f'{where}: "messages" is not a list with something in it')
        for message in messages:
            texts = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(
                    f'{where} needs "prompt", a string, or "messages" with "role" and "content", both strings'
                )
        yield [{name: LONE_SURROGATE.sub("\ufffd", m[name]) for name in ("role", "content")} for m in messages]
