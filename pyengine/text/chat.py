"""Chat templates: messages to token ids, by the jinja2 template that the model ships (jinja2 is imported on first use).

**A template is hostile until shown otherwise.** It runs in jinja2's ImmutableSandboxedEnvironment, further cut down in
sandbox.py so that it must come back: a thread cannot be killed from outside, so every turn of a loop, call and
filter looks at the clock, and between two looks only work of bounded size is possible. No signal, no second process and no
trace function is involved, so it works in any thread.

**Special tokens come only from the template.** If no string of the messages holds (or ends with the beginning of) the spelling of
a special token, the rendered text is tokenized as it is. Otherwise a private-use character, unused anywhere else, is put into
each such spelling before rendering. Whatever the template does to the content, the spelling is broken; afterwards
`Tokenizer.encode_marked` parses the unbroken ones, takes the marks out and tokenizes the rest as text. (A template that measures
a string, or compares it with a special token, then sees the mark: only content that spells special tokens can notice.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from pyengine.errors import InvalidArgumentError, TemplateError
from pyengine.text.tokenizer import Tokenizer

MAX_TEMPLATE = 1 << 18  # characters of a template; the longest in use have about 20,000
MAX_OUTPUT = 1 << 23  # characters of a rendered conversation
TIME_LIMIT = 2.0  # seconds

_MARKS = range(0xE000, 0xF900)  # the private use area of the basic plane


class ChatTemplate:
    """A compiled chat template. Rendering may run in any thread.

    source        the jinja2 template
    bos_token, eos_token   their spelling, which templates refer to
    Raises TemplateError if the source is too long or no template.
    """

    def __init__(self, source: str, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        if not isinstance(source, str):
            raise TemplateError(f"a chat template must be a string, not {type(source).__name__}")
        if len(source) > MAX_TEMPLATE:
            raise TemplateError(f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE}")
        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        from pyengine.text import sandbox

        self._sandbox = sandbox
        self._template = sandbox.compile_template(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        time_limit: float = TIME_LIMIT,
        **variables: Any,
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template(tokenize=False)` gives it.

        `variables` are further names for the template. TemplateError if it raises, or exceeds a limit."""
        context = {
            **self._tokens,
            **variables,
            "messages": _check_messages(messages),
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._sandbox.render(self._template, context, MAX_OUTPUT, time_limit)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The conversation as token ids. BOS is there if the template writes it, as in transformers."""
        options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, **variables}
        strings = list(_strings([_check_messages(messages), tools, variables]))
        if not any(_threatens(tokenizer, string) for string in strings):
            text = self.render(messages, tools=tools, **options)
            return tokenizer.encode(text, add_bos=False, parse_special=True)
        mark = _unused_mark([self.source, *strings, *tokenizer.special_tokens])
        marked = _map_strings(
            {"messages": list(messages), "tools": tools, "variables": variables},
            lambda string: _mark(tokenizer, string, mark),
        )
        options |= marked["variables"]
        text = self.render(marked["messages"], tools=marked["tools"], **options)
        return tokenizer.encode_marked(text, mark)


def _check_messages(messages: object) -> list[Mapping[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
        raise InvalidArgumentError("messages must be a list of {'role': ..., 'content': ...}")
    checked = list(messages)
    for message in checked:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidArgumentError(f"a message must be a mapping with a string 'role', not {message!r}")
    if not checked:
        raise InvalidArgumentError("messages is empty")
    return checked


# -------------------------------------------------------------------- marks


def _strings(value: object) -> Iterator[str]:
    """Every string inside nested lists and mappings, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A copy of nested lists and mappings with every string changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value


def _threatens(tokenizer: Tokenizer, string: str) -> bool:
    return tokenizer.special.occur_in(string) or bool(tokenizer.special.open_tails(string))


def _mark(tokenizer: Tokenizer, string: str, mark: str) -> str:
    """`string` with `mark` after the first character of each spelling of a special token, and of each that begins at its end."""
    for begin in reversed(tokenizer.special.open_tails(string)):
        string = string[: begin + 1] + mark + string[begin + 1 :]
    broken = tokenizer.special.break_up(string, mark)
    if tokenizer.special.occur_in(broken):
        raise InvalidArgumentError(
            "the messages hold a special token of one character, whose spelling cannot be broken"
        )
    return broken


def _unused_mark(texts: Iterable[str]) -> str:
    used = set().union(*map(set, texts))
    for code in _MARKS:
        if chr(code) not in used:
            return chr(code)
    raise InvalidArgumentError("the messages use every private-use character and spell special tokens")
