"""LlamaGrammar: GBNF, as llama.cpp has it, or a JSON schema. Both need the extra pyengine-lm[guide]."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from pyengine.errors import InvalidArgumentError, system_errors
from pyengine.run.gbnf import to_lark
from pyengine.sampling import StructuredOutputs


class LlamaGrammar:
    """What a text must be; made by one of the class methods. Whether a schema is understood shows when it is used."""

    def __init__(self, wanted: StructuredOutputs) -> None:
        self.wanted = wanted

    @classmethod
    def from_string(cls, grammar: str, verbose: bool = True) -> LlamaGrammar:
        """A grammar in llama.cpp's GBNF, with a rule `root`. Raises InvalidArgumentError for what is none."""
        if not isinstance(grammar, str):
            raise InvalidArgumentError(f"a grammar must be a string, not {type(grammar).__name__}")
        return cls(StructuredOutputs(grammar=to_lark(grammar)))

    @classmethod
    def from_file(cls, file: str | os.PathLike[str], verbose: bool = True) -> LlamaGrammar:
        """`from_string` of a UTF-8 file. Raises MissingFileError or its like."""
        with system_errors(), open(file, "rb") as opened:
            data = opened.read()
        try:
            return cls.from_string(data.decode("utf-8"), verbose)
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"{os.fspath(file)} is no UTF-8 text: {error.reason}") from None

    @classmethod
    def from_json_schema(cls, json_schema: str | Mapping[str, Any], verbose: bool = True) -> LlamaGrammar:
        """Text is JSON of this schema, which is given as text."""
        return cls(StructuredOutputs(json=json_schema if isinstance(json_schema, str) else json.dumps(json_schema)))


def wanted_output(grammar: LlamaGrammar | None, response_format: Any) -> StructuredOutputs | None:
    """What a call asks of its text, None for nothing. Raises InvalidArgumentError."""
    if grammar is not None and not isinstance(grammar, LlamaGrammar):
        raise InvalidArgumentError(f"grammar must be a LlamaGrammar, not {type(grammar).__name__}")
    if response_format is None:
        return None if grammar is None else grammar.wanted
    if grammar is not None:
        raise InvalidArgumentError("grammar and response_format contradict each other: give one of them")
    if not isinstance(response_format, Mapping) or response_format.get("type") not in ("text", "json_object"):
        raise InvalidArgumentError("response_format must be a mapping whose 'type' is 'text' or 'json_object'")
    if response_format["type"] == "text":
        return None
    schema = response_format.get("schema")
    return StructuredOutputs(json_object=True) if schema is None else StructuredOutputs(json=schema)
