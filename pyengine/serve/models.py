"""The models of a server, each a route by its name, and each of its adapters a route by its own."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyengine.async_engine import AsyncEngine
from pyengine.engine import Engine
from pyengine.errors import InvalidArgumentError, TemplateError
from pyengine.serve.calls import Syntax, syntax_of
from pyengine.serve.errors import HTTPError
from pyengine.text.chat import ChatTemplate

# For a model that has no template, and was not trained to talk: it goes on with what the conversation says.
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
)


class ServedModel:
    """An engine under a name.

    adapter       the adapter that changes it, which is its name; None for the model itself
    base          the model's own name
    has_template  whether chats go by a template of the model's own, or plainly continue
    shows_tools   whether the template tells the model of tools
    call_syntax   how the model writes calls, by its template; None if it does not, or in a format that is not read here
    fills_in      whether the model fills in the middle, by its tokenizer
    """

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = self.base = name
        self.adapter: str | None = None
        self.engine = engine
        self.asynchronous = AsyncEngine(engine)
        file = os.stat(engine.path)  # once: the file may go while its pages stay
        self.created, self.n_bytes = int(file.st_mtime), file.st_size
        self.has_template = True
        try:
            self.template = engine.chat_template
        except TemplateError:
            self.has_template = False
            bos = engine.tokenizer.bos_id
            token = engine.tokenizer.token_text(bos) if bos is not None and engine.tokenizer.adds_bos else None
            self.template = ChatTemplate(PLAIN_TEMPLATE, bos_token=token)
        self.shows_tools = _shows_tools(self.template)
        self.call_syntax = syntax_of(self.template.source) if self.shows_tools else None
        self.fills_in = _fills_in(engine)

    def adapted(self, adapter: str) -> ServedModel:
        """The same engine with an adapter, under the adapter's name."""
        other = copy.copy(self)
        other.name = other.adapter = adapter
        return other

    def call_tokens(self, syntax: Syntax) -> frozenset[int]:
        """Special tokens that stand around calls."""
        marks = syntax.special()
        return frozenset(id_ for text, id_ in self.engine.tokenizer.special_tokens.items() if text in marks)

    def chat_ids(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        ending: Mapping[str, bool] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; `ending` as messages.ending_of gives it. Raises TemplateError, InvalidArgumentError."""
        ids = self.template.encode(
            self.engine.tokenizer,
            messages,
            n_ctx=self.engine.n_ctx,  # what cannot fit is not tokenized
            tools=tools,
            **(ending or {}),
            **(variables or {}),
        )
        return self.engine.prompt_ids(ids)

    def card(self) -> dict[str, Any]:
        """As /v1/models lists it; `parent` and `root` are vLLM's for an adapter."""
        origin = {} if self.adapter is None else {"parent": self.base, "root": self.adapter}
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "pyengine",
            "max_model_len": self.engine.n_ctx,
            **origin,
        }


def _fills_in(engine: Engine) -> bool:
    try:
        _ = engine.infill_format
    except InvalidArgumentError:
        return False
    return True


def _shows_tools(template: ChatTemplate) -> bool:
    """Whether a tool appears in a conversation as the template renders it."""
    if "tools" not in template.source:
        return False
    parameters = {"type": "object", "properties": {}, "required": []}
    name = "probe_of_tools"
    probe = {"name": name, "description": "", "parameters": parameters}
    try:
        text = template.render([{"role": "user", "content": "Hi"}], tools=[{"type": "function", "function": probe}])
    except TemplateError:
        return False
    return name in text


class Models:
    """By name, with the adapters that their engines have; the first is the default for requests that name none. Raises
    InvalidArgumentError for an adapter with the name of a model."""

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._models = list(models)
        self._by_name = {model.name: model for model in self._models}
        for model in self._models:
            for adapter in model.engine.adapters():
                if adapter.name in self._by_name:
                    raise InvalidArgumentError(f"there is a model called {adapter.name!r}: name the adapter with --lora NAME=DIR")
                self._by_name[adapter.name] = model.adapted(adapter.name)

    def __iter__(self) -> Iterator[ServedModel]:
        """The models themselves, without adapters."""
        return iter(self._models)

    def names(self) -> list[str]:
        """Every route."""
        return list(self._by_name)

    def cards(self) -> list[dict[str, Any]]:
        return [model.card() for model in self._by_name.values()]

    def get(self, name: str | None) -> ServedModel:
        """Raises HTTPError 404 with the names that there are."""
        if name is None:
            return self._models[0]
        model = self._by_name.get(name)
        if model is None:
            known = ", ".join(self._by_name)
            shown = name if len(name) <= 100 else name[:100] + "…"
            raise HTTPError(
                404, f"there is no model {shown!r}; there is: {known}", param="model", code="model_not_found"
            )
        return model

    def close(self) -> None:
        for model in self._models:
            model.engine.close()


def model_name(path: str, metadata: Mapping[str, str]) -> str:
    """The name of a frozen file: what its metadata says, else the file's own."""
    name = metadata.get("name") or metadata.get("general.name") or ""
    return name or os.path.splitext(os.path.basename(path))[0]
