"""What several endpoints read of a request: its prompts, and who asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyengine.serve.errors import bad_request
from pyengine.serve.tokens import token_ids

if TYPE_CHECKING:
    from pyengine.engine import Prompt
    from pyengine.serve.exchange import Exchange
    from pyengine.serve.fields import Fields
    from pyengine.serve.models import ServedModel


def prompts_of(fields: Fields, name: str, model: ServedModel) -> list[Prompt]:
    """A field that is a text, a list of token ids, or a list of these. Raises HTTPError."""
    value, path, vocab_size = fields.take(name), fields.path(name), model.engine.vocab_size
    if value is None:
        fields.missing(name)
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise bad_request(f"{path} must be a string, a list of token ids, or a list of these that is not empty", path)
    if isinstance(value[0], int):
        return [token_ids(value, path, vocab_size)]
    prompts: list[Prompt] = []
    for i, item in enumerate(value):
        if isinstance(item, list):
            prompts.append(token_ids(item, f"{path}[{i}]", vocab_size))
        elif isinstance(item, str):
            prompts.append(item)
        else:
            raise bad_request(f"{path}[{i}] must be a string or a list of token ids", f"{path}[{i}]")
    return prompts


def note_user(exchange: Exchange, fields: Fields) -> None:
    """Names that callers give their own users: for the log."""
    for name in ("user", "safety_identifier"):
        value = fields.string(name)
        if value is not None:
            exchange.notes["user"] = value[:64]
