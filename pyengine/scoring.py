"""What an engine computes of texts that are there already: logits, log-probabilities and embeddings of given positions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pyengine import fork
from pyengine._sampler import logprobs
from pyengine.arguments import INT32_MAX, integer, shown
from pyengine.engine_base import EngineBase
from pyengine.errors import ContextFullError, InvalidArgumentError
from pyengine.results import Score
from pyengine.run.request import HIDDEN, LOGITS, Caller, RowsRequest
from pyengine.run.stream import run_all
from pyengine.text.prompts import Prompt, is_batch, prompt_ids

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pyengine.embeddings import Pooled

# score, logits and embed may ask for a row of every position; this bounds the buffer (rows x vocab_size or dim x 4 bytes).
ROWS_BYTES = 32 << 20


class Scoring(EngineBase):
    """The part of an `Engine` that reads texts and generates none."""

    def check_fits(self, ids: Sequence[int]) -> None:
        """Raises ContextFullError with both numbers if there are more tokens than the context holds."""
        if len(ids) > self.n_ctx:
            raise ContextFullError(f"the text has {len(ids)} tokens, the context holds {self.n_ctx}")

    # ------------------------------------------------------------ logits and log-probabilities

    def rows_requests(
        self,
        caller: Caller,
        ids: list[int],
        positions: list[int],
        take: Callable[[int, memoryview], None],
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
        row_kind: int = LOGITS,
        keep: bool = False,
    ) -> list[RowsRequest]:
        """What the scheduler is to compute for take(position, row) at each of the positions, ascending: logits (vocab_size), or
        with row_kind HIDDEN final hidden states (dim). The view is valid during the call. Nothing for no positions. keep: its
        keys and values stay cached, and texts that begin like it wait for them."""
        self.check_fits(ids)
        if not positions:
            return []
        width = self.vocab_size if row_kind == LOGITS else self._file.config.dim
        most = max(16, ROWS_BYTES // (4 * width))
        core_adapter, salt = self._adapters.of_request(adapter, cache_salt)
        return [
            RowsRequest(
                caller, ids, positions, take, max_rows=most, row_kind=row_kind, adapter=core_adapter, salt=salt, keep=keep
            )
        ]

    def score_requests(
        self, caller: Caller, text: Prompt, *, parse_special: bool, start: int, adapter: str | None, cache_salt: str | None
    ) -> tuple[Score, list[RowsRequest]]:
        """A Score, and what fills it in when it is computed."""

        ids = self.prompt_ids(text, parse_special=parse_special)
        start = integer("start", start, -INT32_MAX, INT32_MAX)
        values: list[float | None] = [None] * len(ids)

        def take(position: int, logits: memoryview) -> None:
            values[position + 1] = logprobs(logits, ids[position + 1])[0]

        positions = [i - 1 for i in range(max(start, 1), len(ids))]
        requests = self.rows_requests(caller, ids, positions, take, adapter=adapter, cache_salt=cache_salt)
        return Score(ids, values), requests

    def score(
        self,
        text: Prompt,
        *,
        parse_special: bool = False,
        start: int = 0,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> Score:
        """Log-probability (natural logarithm) of each token of `text`, from the `start`-th on, after those before it. Memory does
        not grow with the text's logits, and tokens before `start` are context only: they take the time of a prompt. Raises
        ContextFullError if the text does not fit the context."""
        caller = Caller()
        score, requests = self.score_requests(
            caller, text, parse_special=parse_special, start=start, adapter=adapter, cache_salt=cache_salt
        )
        run_all(self._scheduler, requests)
        return score

    def logits(
        self, tokens: Sequence[int], positions: Sequence[int] | None = None, *, adapter: str | None = None
    ) -> npt.NDArray[np.float32]:
        """Logits after each token: float32 (n_tokens, vocab_size), or (len(positions), vocab_size) in the order of
        `positions`. Raises InvalidArgumentError, ContextFullError."""
        import numpy as np

        ids = prompt_ids(None, tokens, vocab_size=self.vocab_size, n_ctx=self.n_ctx)
        most = len(ids) - 1
        if positions is None:
            positions = range(len(ids))
        elif not isinstance(positions, Iterable):
            raise InvalidArgumentError(f"positions is a list of integers, not {shown(positions)}")
        chosen = [integer("a position", position, 0, most) for position in positions]
        out = np.empty((len(chosen), self.vocab_size), np.float32)
        rows: dict[int, list[int]] = {}
        for row, position in enumerate(chosen):
            rows.setdefault(position, []).append(row)

        def take(position: int, logits: memoryview) -> None:
            out[rows[position]] = np.asarray(logits)

        caller = Caller()
        run_all(self._scheduler, self.rows_requests(caller, ids, sorted(rows), take, adapter=adapter))
        return out

    # ------------------------------------------------------------ embeddings

    def embed_requests(
        self,
        caller: Caller,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: str | None,
        prompt_name: str | None = None,
        parse_special: bool,
        adapter: str | None = None,
        cache_salt: str | None,
    ) -> tuple[list[Pooled], list[RowsRequest]]:
        """Each text's vector in the making, and what completes it when it is computed."""
        with fork.importing:
            from pyengine.embeddings import Pooled, chosen_pooling, chosen_prompt

        prompts: Any = texts if is_batch(texts) else [texts]
        config = self._file.config
        pooling = chosen_pooling(pooling, config.extra)
        prompt = chosen_prompt(prompt_name, config.extra)
        if prompt_name and not all(isinstance(item, str) for item in prompts):
            raise InvalidArgumentError(f"prompt_name is {shown(prompt_name)}, and token ids get no prompt")
        texts = [prompt + item if isinstance(item, str) else item for item in prompts]
        ids = [self._ended(item, self.prompt_ids(item, parse_special=parse_special)) for item in texts]
        n_unread = 0
        if prompt and config.extra.get("include_prompt") is False:
            n_unread = len(self.tokenizer.encode(prompt, parse_special=parse_special))
        pooled = [
            Pooled(tokens, pooling, config.dim, n_unread if isinstance(item, str) else 0)
            for item, tokens in zip(texts, ids, strict=True)
        ]
        requests = [
            request
            for one in pooled
            for request in self.rows_requests(
                caller, one.tokens, one.positions, one.take, adapter=adapter, cache_salt=cache_salt, row_kind=HIDDEN
            )
        ]
        return pooled, requests

    def _ended(self, text: Prompt, ids: list[int]) -> list[int]:
        """A text's tokens, with the one behind it where the model's tokenizer puts one: the last token is pooled."""
        if isinstance(text, str) and self.tokenizer.end_id is not None:
            ids.append(self.tokenizer.end_id)
        return ids

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        pooling: Literal["mean", "last"] | None = None,
        prompt_name: str | None = None,
        normalize: bool = True,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
    ) -> npt.NDArray[np.float32]:
        """A vector for each text (or token ids; one alone counts as a list of one): float32 (n, dim), a row's length 1 if
        `normalize`.

        pooling: "mean" of the final hidden states (after the last norm) of its tokens, or that of the "last" token; None = what
        the model's files say, else "last". prompt_name: which of the prompts in the model's file is put before each text, mostly
        "query" or "document"; None = its default one, if it has one, "" = none. A text's tokens are those of a prompt, and the
        one behind it that the model's tokenizer puts there (<|endoftext|> of Qwen3-Embedding). A vector does not depend on what
        is computed beside it. Raises InvalidArgumentError, ContextFullError, NotFiniteError."""
        from pyengine.embeddings import vectors

        caller = Caller()
        pooled, requests = self.embed_requests(
            caller,
            texts,
            pooling=pooling,
            prompt_name=prompt_name,
            parse_special=parse_special,
            adapter=adapter,
            cache_salt=cache_salt,
        )
        run_all(self._scheduler, requests)
        return vectors(pooled, normalize=normalize)
