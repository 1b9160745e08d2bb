"""What several endpoints read of a request: its prompts, and who asks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pyengine.serve.errors import bad_request
from pyengine.serve.fields import STRING, Kind, Table, list_of
from pyengine.serve.tokens import TOKEN_IDS, check_token_ids

if TYPE_CHECKING:
    from pyengine.engine import Prompt
    from pyengine.serve.exchange import Exchange
    from pyengine.serve.fields import Fields
    from pyengine.serve.models import ServedModel


def _read_prompts(value: Any, path: str) -> list[tuple[str, Prompt]]:
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        return [(path, _read_prompt(value, path))]
    if not isinstance(value, list) or not value:
        raise bad_request(f"{path} must be a string, a list of token ids, or a list of these that is not empty", path)
    return [(f"{path}[{i}]", _read_prompt(item, f"{path}[{i}]")) for i, item in enumerate(value)]


def _read_prompt(value: Any, path: str) -> Prompt:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_request(f"{path} must be a string or a list of token ids", path)
    ids: list[int] = TOKEN_IDS.read(value, path)
    return ids


_TEXT_OR_IDS = [STRING.schema, TOKEN_IDS.schema]
# A text, a list of token ids, or a list of these; read as [(path, one of them)].
PROMPTS = Kind(
    {"anyOf": [*_TEXT_OR_IDS, {"type": "array", "items": {"anyOf": _TEXT_OR_IDS}, "minItems": 1}]}, _read_prompts
)


def _read_texts(value: Any, path: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    texts: list[str] = list_of(STRING, least=1).read(value, path)
    return texts


# A text, or a list of texts.
TEXTS = Kind({"anyOf": [STRING.schema, {"type": "array", "items": STRING.schema, "minItems": 1}]}, _read_texts)


def prompts_of(given: list[tuple[str, Prompt]], model: ServedModel) -> list[Prompt]:
    """A field of the kind PROMPTS, if its token ids are the model's. Raises HTTPError."""
    for path, prompt in given:
        if not isinstance(prompt, str):
            check_token_ids(prompt, path, model.engine.vocab_size)
    return [prompt for _, prompt in given]


def _read_salt(value: Any, path: str) -> Any:
    if value == "":
        raise bad_request(f"{path} must not be empty", path)
    return STRING.read(value, path)


SALT = Kind({"type": "string", "minLength": 1}, _read_salt)
# Fields of every endpoint that computes.
CALLER: Table = {
    "model": STRING,
    "cache_salt": SALT,
    "user": STRING,
    "safety_identifier": STRING,
}


def note_user(exchange: Exchange, fields: Fields) -> None:
    """Names that callers give their own users: for the log."""
    for name in ("user", "safety_identifier"):
        value = fields.take(name)
        if value is not None:
            exchange.notes["user"] = value[:64]
