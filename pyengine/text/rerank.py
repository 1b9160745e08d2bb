"""Ranking: a query and a document -> token ids of a prompt behind which one token says whether the document answers the query.

A language model that ranks is asked a question, and how likely it is to say one token rather than another is the answer. Its
prompt is laid out in one of two ways:

- by a chat template that knows the roles "query" and "document" (sentence-transformers' form; "system" is the instruction),
- by any other chat template as a conversation with the words that Qwen3-Reranker's authors publish (`JUDGE`, `PAIR`), without
  thinking. That is their prompt to the token, and a question that every chat model understands.

Which tokens count the model's file says (`SAID`), else they are "yes" and "no". Like `text/infill.py`, this says how to ask, not
whether the model was trained to answer.

The texts are text: special tokens that they spell stay plain, as in a chat.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyengine.arguments import shown
from pyengine.errors import ContextFullError, InvalidArgumentError, ModelFormatError, TemplateError

if TYPE_CHECKING:
    from pyengine.text.chat import ChatTemplate
    from pyengine.text.tokenizer import Tokenizer

# In a file's `extra`: {"true_token_id": id, "false_token_id": id or null}
SAID = "rerank"
JUDGE = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".'
)
PAIR = "<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
_ROLES = [re.compile(rf"role\b[^\n]{{0,40}}?['\"]{role}['\"]") for role in ("query", "document")]


class Reranker:
    """How one model is asked. Any thread may use it.

    tokenizer, template   the model's
    extra                 of its file's config.json
    model_name            what an error calls the model

    Attributes: `true_id`, `false_id` (None: what `true_id` is compared with is a logit of 0).
    Raises InvalidArgumentError, with what is missing, for a model that cannot be asked, ModelFormatError for a file that names
    tokens it has not.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, extra: Mapping[str, Any], model_name: str) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._has_roles = all(role.search(template.source) for role in _ROLES)
        self._instruction = _default_prompt(extra) if self._has_roles else INSTRUCTION
        self.true_id, self.false_id = _said(extra, tokenizer) or (
            _token_of(tokenizer, "yes", model_name),
            _token_of(tokenizer, "no", model_name),
        )

    def ids(
        self,
        query: str,
        document: str,
        instruction: str | None,
        *,
        n_ctx: int,
        max_tokens: int | None = None,
        truncate: bool = False,
    ) -> list[int]:
        """Token ids of the prompt.

        instruction  what the query is for; None = the default prompt of the model's file, that of the template, or INSTRUCTION
        max_tokens   so many of the document are read; None = all
        truncate     and no more than fit the context
        Raises ContextFullError for what does not fit n_ctx, TemplateError."""
        if truncate:
            max_tokens = n_ctx if max_tokens is None else min(max_tokens, n_ctx)
        if max_tokens is not None:
            document = self._beginning(document, max_tokens)
        if not truncate:
            return self._fitting(self._encode(query, document, instruction, n_ctx), n_ctx)
        spared = 0
        while (excess := len(ids := self._encode(query, document, instruction, None)) - n_ctx) > 0 and document:
            # Cut anew, and further each time, for a text may have more tokens than those it was decoded from.
            n_left = len(self._tokenizer.encode_inside(document)) - excess - spared
            document = self._beginning(document, n_left) if n_left > 0 else ""
            spared = 2 * spared + 1
        return self._fitting(ids, n_ctx)

    def _encode(self, query: str, document: str, instruction: str | None, n_ctx: int | None) -> list[int]:
        instruction = self._instruction if instruction is None else instruction
        if self._has_roles:
            system = [] if instruction is None else [{"role": "system", "content": instruction}]
            messages = [*system, {"role": "query", "content": query}, {"role": "document", "content": document}]
        else:
            pair = PAIR.format(instruction=instruction, query=query, document=document)
            messages = [{"role": "system", "content": JUDGE}, {"role": "user", "content": pair}]
        return self._template.encode(self._tokenizer, messages, n_ctx=n_ctx, enable_thinking=False)

    def _beginning(self, text: str, n_tokens: int) -> str:
        """The first tokens of a text, whole characters only."""
        text = self._tokenizer.beginning_beyond(text, n_tokens)  # what is behind it would only take time
        ids = self._tokenizer.encode_inside(text)
        if len(ids) <= n_tokens:
            return text
        return self._tokenizer.decode(ids[:n_tokens], skip_special_tokens=False).rstrip("\ufffd")

    @staticmethod
    def _fitting(ids: list[int], n_ctx: int) -> list[int]:
        if not ids:
            raise TemplateError("the chat template makes an empty prompt of a query and a document")
        if len(ids) > n_ctx:
            raise ContextFullError(
                f"the prompt of the query and a document has {len(ids)} tokens, the context holds {n_ctx}; "
                "shorten them, or read less of each document with max_tokens_per_doc or truncate"
            )
        return ids


def unasked(error: TemplateError | None, model_name: str) -> InvalidArgumentError:
    """Of a model whose template cannot be had, by this error, or None: it has none."""
    reason = error or "it has none; use a model that was trained for it"
    return InvalidArgumentError(f"{model_name} does not rank: its prompt would be laid out by a chat template, and {reason}")


def _said(extra: Mapping[str, Any], tokenizer: Tokenizer) -> tuple[int, int | None] | None:
    """The tokens that the model's file names, None if it names none."""
    if SAID not in extra:
        return None
    said = extra[SAID]
    ids = [said.get(name) for name in ("true_token_id", "false_token_id")] if isinstance(said, Mapping) else [None]
    if any(type(id_) is not int or not 0 <= id_ < tokenizer.vocab_size for id_ in ids if id_ is not None) or ids[0] is None:
        raise ModelFormatError(f"config: extra.{SAID} names no tokens of {tokenizer.vocab_size}: {shown(said)}")
    return ids[0], ids[1]


def _default_prompt(extra: Mapping[str, Any]) -> str | None:
    """What sentence-transformers would give a template of such roles as the system's message; None = nothing."""
    prompts, name = extra.get("prompts"), extra.get("default_prompt")
    prompt = prompts.get(name) if isinstance(prompts, Mapping) and isinstance(name, str) else None
    return prompt if isinstance(prompt, str) else None


def _token_of(tokenizer: Tokenizer, word: str, model_name: str) -> int:
    ids = tokenizer.encode_inside(word, goes_on=True)
    if len(ids) != 1 or ids[0] != tokenizer.token_id(word):  # it may be one for all that is unknown
        raise InvalidArgumentError(
            f"{model_name} does not rank: its tokenizer has no single token for {word!r}, and its file names no other one; "
            "use a model that was trained for it"
        )
    return ids[0]
