"""Chat templates: messages to token ids, by the jinja2 template that the model ships (jinja2 is imported on first use).

**A template is hostile until shown otherwise.** A plain one, as nearly all are, is evaluated step by step in this process
(plain_template.py); any other one is rendered by jinja2's sandbox in a process of its own, which can be killed
(template_process.py). What a caller gives it is data of JSON's types (messages.py).

**Special tokens come only from the template.** If no string of the messages holds (or ends with the beginning of) the spelling of
a special token, the rendered text is tokenized as it is. Otherwise a private-use character, unused anywhere else, is put into
each such spelling before rendering. Whatever the template does to the content, the spelling is broken; afterwards
`Tokenizer.encode_marked` parses the unbroken ones, takes the marks out and tokenizes the rest as text. (A template that measures
a string, or compares it with a special token, then sees the mark: only content that spells special tokens can notice.)

**A last message that goes on** (continue_final_message) has such a character behind its content, and what is rendered ends before
it: whatever the template writes after a message, and whether it trims what is in one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pyengine import fork
from pyengine.arguments import shown
from pyengine.errors import InvalidArgumentError, TemplateError
from pyengine.text.messages import plain_data, plain_messages
from pyengine.text.prompts import check_length
from pyengine.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pyengine.text.template_process import TemplateProcess

MAX_TEMPLATE = 1 << 18  # characters of a template; the longest in use have about 20,000
MAX_OUTPUT = 1 << 23  # characters of a rendered conversation
TIME_LIMIT = 1.0  # seconds of CPU time, for templates that are not plain

_MARKS = range(0xE000, 0xF900)  # the private use area of the basic plane


class ChatTemplate:
    """A chat template. Rendering may run in any thread.

    source        the jinja2 template, as text or UTF-8
    bos_token, eos_token   their spelling, which templates refer to
    Raises TemplateError if the source is too long or no template.
    """

    def __init__(self, source: str | bytes, *, bos_token: str | None = None, eos_token: str | None = None) -> None:
        if isinstance(source, bytes):
            try:
                source = source.decode("utf-8")
            except UnicodeDecodeError as error:
                raise TemplateError(
                    f"the chat template is no UTF-8 text: {error.reason} at byte {error.start}"
                ) from None
        if not isinstance(source, str):
            raise TemplateError(f"a chat template must be a string, not {shown(source)}")
        if len(source) > MAX_TEMPLATE:
            raise TemplateError(f"the chat template has {len(source)} characters, at most {MAX_TEMPLATE}")
        with fork.importing:
            from pyengine.text import plain_template
            from pyengine.text.plain_values import NotPlain

        self.source = source
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}
        self._not_plain = NotPlain
        self._plain = plain_template.parse(source)
        self._process: TemplateProcess | None = None
        if self._plain is None:
            self._in_process().start()  # now, since whether it is a template is seen there

    @property
    def is_plain(self) -> bool:
        """Whether it is rendered in this process."""
        return self._plain is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        time_limit: float = TIME_LIMIT,
        **variables: Any,
    ) -> str:
        """The conversation as text, as transformers' `apply_chat_template(tokenize=False)` gives it.

        add_generation_prompt   end with the beginning of an answer; None = unless the last message goes on
        continue_final_message  end inside the last message, the assistant's, right behind its content
        variables               further names for the template
        TemplateError if it raises, exceeds a limit, or changes the end of a message that goes on; InvalidArgumentError for
        messages, tools and variables that are no data."""
        said = plain_messages(messages)
        options = plain_data({**variables, "add_generation_prompt": add_generation_prompt}, "variables")
        end = self._end(said, options, continue_final_message)
        return self._until(end, self._render(said, plain_data(tools, "tools"), options, time_limit))

    def _end(self, said: list[dict[str, Any]], options: dict[str, Any], goes_on: bool) -> str | None:
        """Settle in `options` how the conversation ends. If its last message goes on, that gets a mark, which is returned."""
        if options["add_generation_prompt"] is None:
            options["add_generation_prompt"] = not goes_on
        if not goes_on:
            return None
        last = said[-1]
        if options["add_generation_prompt"]:
            raise InvalidArgumentError("add_generation_prompt and continue_final_message contradict each other")
        if last["role"] != "assistant" or not isinstance(last.get("content"), str) or last.get("tool_calls"):
            raise InvalidArgumentError("continue_final_message needs a last message of the assistant, of text alone")
        mark = _unused_mark([self.source, *_strings([said, options])])
        last["content"] += mark
        return mark

    @staticmethod
    def _until(end: str | None, text: str) -> str:
        if end is None:
            return text
        if end not in text:
            raise TemplateError("the chat template does not show the last message as it is, so it cannot be gone on with")
        return text[: text.rindex(end)]

    def _render(self, messages: Any, tools: Any, options: Mapping[str, Any], time_limit: float = TIME_LIMIT) -> str:
        context = {**self._tokens, **options, "messages": messages, "tools": tools}
        if self._plain is not None:
            try:
                return self._plain.render(context, MAX_OUTPUT)
            except self._not_plain:
                pass
        return self._in_process().render(context, MAX_OUTPUT, time_limit)

    def _in_process(self) -> TemplateProcess:
        if self._process is None:
            with fork.importing:
                from pyengine.text.template_process import TemplateProcess

            self._process = TemplateProcess(self.source, TIME_LIMIT)
        return self._process

    def close(self) -> None:
        """End the process that renders it, if there is one."""
        if self._process is not None:
            self._process.close()

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        n_ctx: int | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> list[int]:
        """The conversation as token ids. BOS is there if the template writes it, as in transformers. Raises what `render` raises,
        and ContextFullError for a text that cannot fit `n_ctx` positions."""
        said, tools = plain_messages(messages), plain_data(tools, "tools")
        options = plain_data({**variables, "add_generation_prompt": add_generation_prompt}, "variables")
        end = self._end(said, options, continue_final_message)
        strings = list(_strings([said, tools, options]))
        mark = None
        if any(_threatens(tokenizer, string) for string in strings):
            mark = _unused_mark([self.source, *strings, *tokenizer.special_tokens])
            broken = {string: _mark(tokenizer, string, mark) for string in strings}
            said, tools, options = (_map_strings(data, broken.__getitem__) for data in (said, tools, options))
        text = self._until(end, self._render(said, tools, options))
        if n_ctx is not None:
            check_length(tokenizer, text, n_ctx)
        if mark is not None:
            return tokenizer.encode_marked(text, mark)
        return tokenizer.encode(text, add_bos=False, parse_special=True)


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
    used: set[str] = set()
    for text in texts:
        used.update(text)
    for code in _MARKS:
        if chr(code) not in used:
            return chr(code)
    raise InvalidArgumentError("the messages use every private-use character, and one is needed to mark something in them")
