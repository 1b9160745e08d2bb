"""Conversations to train on: rendered by the model's own template, with the assistant's words marked.

A line of a .jsonl file is ``{"messages": [{"role": …, "content": …}, …]}``. The text is what the model will see when it is
used, because the same template renders it; what the assistant says, with the tokens that end its turn, lies between the
rendering of what came before (with the prompt for an answer) and the rendering that includes it.

Rendering needs the package ``pyengine``, whose sandbox keeps hostile templates within limits; it is imported here only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DataError, MissingLibraryError
from .files import read_json
from .text import LONE_SURROGATE, read_json_lines

Array = NDArray[Any]
TRAIN_ON = ("assistant", "all")


@dataclass(frozen=True)
class Conversation:
    """Rendered text, and the (begin, end) of what the assistant says in it, in characters."""

    text: str
    spans: tuple[tuple[int, int], ...]


def is_chat(path: Path) -> bool:
    """Whether a .jsonl file's first object has "messages"."""
    if path.suffix != ".jsonl":
        return False
    for _, line in read_json_lines(path):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and "messages" in value
    return False


class ChatFormat:
    """A model folder's template and tokenizer. train_on: count the assistant's tokens, or all."""

    def __init__(self, folder: Path, tokenizer: Any, train_on: str = "assistant") -> None:
        try:
            from pyengine.text.chat import ChatTemplate
        except ImportError as error:
            raise MissingLibraryError(
                "conversations are rendered by the package pyengine, which is not installed: pip install pyengine-lm"
            ) from error
        from pyengine.errors import PyEngineError

        self._error: type[Exception] = PyEngineError
        self.tokenizer, self.train_on, self.folder = tokenizer, train_on, folder
        values = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
        tokens = {name: _spelling(values.get(name)) for name in ("bos_token", "eos_token")}
        try:
            self._template = ChatTemplate(_source(folder, values), **tokens)
        except PyEngineError as error:
            raise DataError(f"{folder}: its chat template cannot be used: {error}") from error
        added = tokenizer.get_added_tokens_decoder().values() if hasattr(tokenizer, "get_added_tokens_decoder") else ()
        self._special = [str(token.content) for token in added if token.special]

    def conversations(self, path: Path) -> Iterator[Conversation]:
        """Those of a file. Raises DataError with the line that cannot be used."""
        for number, line in read_json_lines(path):
            where = f"{path}: line {number}"
            try:
                messages = json.loads(line)["messages"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f'{where} is no object with "messages"') from error
            yield self.render(self.checked(messages, where), where)

    def checked(self, messages: Any, where: str) -> list[dict[str, str]]:
        """Messages with a role and a text that spells no special token; a lone surrogate becomes U+FFFD, as in other texts."""
        if not isinstance(messages, list) or not messages:
            raise DataError(f'{where}: "messages" is not a list with something in it')
        for message in messages:
            texts = [message.get(name) for name in ("role", "content")] if isinstance(message, dict) else [None]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(f'{where}: a message needs "role" and "content", both strings')
            spelled = next((token for token in self._special if token in message["content"]), None)
            if spelled is not None:
                raise DataError(f"{where}: a message spells the special token {spelled}")
        plain = [{name: LONE_SURROGATE.sub("\ufffd", m[name]) for name in ("role", "content")} for m in messages]
        return [message | texts for message, texts in zip(messages, plain, strict=True)]

    def render(self, messages: list[dict[str, str]], where: str) -> Conversation:
        """The text and the assistant's spans."""
        text = self._render(messages, False, where)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or self.train_on == "all":
                continue
            span = self._span(text, messages[: index + 1], where)
            if span is None:
                raise DataError(
                    f"{where}: the chat template of {self.folder} renders the beginning of a conversation in another way "
                    "than the whole, so the assistant's words cannot be told: --train-on all"
                )
            spans.append(span)
        return Conversation(text, tuple(spans))

    def render_answer(self, messages: list[dict[str, str]], where: str) -> Conversation:
        """The text, and the span of the last message alone, an answer of the assistant's."""
        text = self._render(messages, False, where)
        span = self._span(text, messages, where)
        if span is None:
            raise DataError(
                f"{where}: the chat template of {self.folder} renders the prompt of an answer in another way alone"
            )
        return Conversation(text, (span,))

    def _span(self, text: str, messages: list[dict[str, str]], where: str) -> tuple[int, int] | None:
        """Where the last message lies in a rendered conversation that begins with these; None where that cannot be told."""
        before = self._render(messages[:-1], True, where) if len(messages) > 1 else ""
        until = self._render(messages, False, where)
        found = text.startswith(before) and text.startswith(until) and len(before) < len(until)
        return (len(before), len(until)) if found else None

    def _render(self, messages: list[dict[str, str]], prompt: bool, where: str) -> str:
        try:
            return str(self._template.render(messages, add_generation_prompt=prompt))
        except self._error as error:
            raise DataError(f"{where}: {error}") from error

    def encode(self, conversation: Conversation) -> tuple[list[int], Array]:
        """Token ids, and for each whether it is to be learnt."""
        encoding = self.tokenizer.encode(conversation.text, add_special_tokens=False)
        if self.train_on == "all":
            return encoding.ids, np.ones(len(encoding.ids), bool)
        begins = np.array([begin for begin, _ in encoding.offsets], np.int64)
        counted = np.zeros(len(begins), bool)
        for begin, end in conversation.spans:
            counted |= (begins >= begin) & (begins < end)
        return encoding.ids, counted


def _spelling(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _source(folder: Path, values: dict[str, Any]) -> str:
    """The template, from its own file or tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    found = values.get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise DataError(f"{folder}: no chat template, which conversations need (chat_template.jinja)")
    return found
