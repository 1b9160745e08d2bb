"""The attachments of a frozen file as objects, made when first needed: tokenizer, chat template, infill and
ranking formats, guides, token healing, where strings break passages, generation defaults."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

from pyengine import fork
from pyengine.errors import InvalidArgumentError, TemplateError
from pyengine.format.reader import FrozenFile
from pyengine.format.strict_json import parse_json_object

if TYPE_CHECKING:
    from pyengine.run.guide import Guide, Guides
    from pyengine.sampling import StructuredOutputs
    from pyengine.text.chat import ChatTemplate
    from pyengine.text.healing import Healer
    from pyengine.text.infill import Infill
    from pyengine.text.rerank import Reranker
    from pyengine.text.sequences import Breakers, Tokens
    from pyengine.text.tokenizer import Tokenizer


class Attachments:
    """Of one engine. lock: the engine's; it is held while one of them is made."""

    def __init__(self, file: FrozenFile, lock: threading.RLock) -> None:
        self._file = file
        self._lock = lock
        self.generation_config = self._json("generation_config.json")
        self._tokenizer: Tokenizer | None = None
        self._chat_template: ChatTemplate | None = None
        self._infill: Infill | None = None
        self._reranker: Reranker | None = None
        self._breakers: Breakers | None = None
        self._guides: Guides | None = None
        self._healer: Healer | None = None

    def _json(self, name: str) -> dict[str, Any]:
        text = self._file.attachment(name)
        return {} if text is None else parse_json_object(text, name)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ModelFormatError if what the file has is none."""
        with self._lock:
            if self._tokenizer is None:
                from pyengine.text.tokenizer import Tokenizer

                config = self._file.config
                self._tokenizer = Tokenizer(
                    self._file.attachment("tokenizer.json") or b"",
                    self._json("tokenizer_config.json"),
                    bos_token_id=config.bos_token_id,
                    eos_token_ids=config.eos_token_ids,
                    vocab_size=config.vocab_size,
                )
            return self._tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises TemplateError if the file has none."""
        with self._lock:
            if self._chat_template is None:
                from pyengine.text.chat import ChatTemplate

                source = self._file.attachment("chat_template.jinja")
                if source is None:
                    raise TemplateError(
                        "this model has no chat template; use generate, or render the conversation yourself"
                    )
                bos, eos = self._file.config.bos_token_id, self._file.config.eos_token_ids
                text = self.tokenizer.token_text
                self._chat_template = ChatTemplate(
                    source,
                    bos_token=None if bos is None else text(bos),
                    eos_token=text(eos[0]) if eos else None,
                )
            return self._chat_template

    @property
    def infill(self) -> Infill:
        """Raises InvalidArgumentError if the model does not fill in the middle."""
        with self._lock:
            if self._infill is None:
                from pyengine.text.infill import Infill

                self._infill = Infill(self.tokenizer, os.path.basename(self._file.path))
            return self._infill

    @property
    def healer(self) -> Healer:
        """What takes back the end of a prompt."""
        with self._lock:
            if self._healer is None:
                from pyengine.text.healing import Healer

                try:
                    infill = self.infill
                except InvalidArgumentError:  # the model does not fill in the middle
                    infill = None
                self._healer = Healer(self.tokenizer, self._file.config.vocab_size, infill)
            return self._healer

    @property
    def reranker(self) -> Reranker:
        """Raises InvalidArgumentError if the model cannot be asked to rank."""
        with self._lock:
            if self._reranker is None:
                from pyengine.text.rerank import Reranker, unasked

                name = os.path.basename(self._file.path)
                try:
                    template = self.chat_template
                except TemplateError as error:
                    has_none = self._file.attachment("chat_template.jinja") is None
                    raise unasked(None if has_none else error, name) from None
                self._reranker = Reranker(self.tokenizer, template, self._file.config.extra, name)
            return self._reranker

    def breakers(self, strings: tuple[str, ...]) -> list[Tokens]:
        """In which tokens these strings may come. Raises InvalidArgumentError if they are too many."""
        breakers = self._breakers
        if breakers is None:
            with fork.importing:
                from pyengine.text.sequences import Breakers

            # Not under the lock, which everybody needs: with a large vocabulary it takes a second, and two may do it.
            self._breakers = breakers = Breakers(self.tokenizer)
        return breakers.of(strings)

    def guide(self, wanted: StructuredOutputs) -> Guide:
        """A new guide, for one output. Raises InvalidArgumentError for a grammar that cannot be used."""
        with self._lock:
            if self._guides is None:
                from pyengine.run.guide import Guides

                config = self._file.config
                self._guides = Guides(self.tokenizer, config.vocab_size, config.eos_token_ids)
        return self._guides.new(wanted)

    def close(self) -> None:
        """End what has processes of its own."""
        if self._chat_template is not None:
            self._chat_template.close()
