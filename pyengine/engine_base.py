"""EngineBase: an open model file and what computes with it. All parts of an `Engine` stand on this."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pyengine import cpu_watch, fork
from pyengine._sampler import Sequences
from pyengine.adapters import Adapters
from pyengine.attachments import Attachments
from pyengine.background import Background
from pyengine.errors import InvalidArgumentError, PyEngineError
from pyengine.format.reader import FrozenFile
from pyengine.opening import Options, pages_of
from pyengine.run.request import Caller, GenerationRequest
from pyengine.run.scheduler import Scheduler
from pyengine.text.healing import Cut, Healing
from pyengine.text.prompts import Prompt, prompt_ids, token_ids
from pyengine.text.stops import StopStrings

if TYPE_CHECKING:
    from pathlib import Path  # 3 ms of the start, for names that the system calls take as they are

    from pyengine import _core
    from pyengine.draft_file import DraftFile
    from pyengine.format.config import DraftHeadSpec
    from pyengine.run.guide import Guide
    from pyengine.sampling import ResolvedParams, SamplingParams, StructuredOutputs
    from pyengine.text.chat import ChatTemplate
    from pyengine.text.infill import Infill
    from pyengine.text.rerank import Reranker
    from pyengine.text.tokenizer import Tokenizer

T = TypeVar("T")


class EngineBase:
    """What every part of an `Engine` may use: its model, its scheduler, and the way from a prompt to requests.

    n_ctx          positions of the context
    n_threads      threads that compute, at most
    vocab_size     token ids are below it
    eos_token_ids  tokens that end a text
    seed           of calls that give none; None = a fresh one for each
    """

    def __init__(self, path: str, options: Options, *, draft_path: str | None, preload_tokenizer: bool) -> None:
        """path, draft_path: frozen files, of the model and of one that guesses ahead. preload_tokenizer: see Engine."""
        self._lock = threading.RLock()
        fork.register(self._lock, fork.ENGINE)
        self._closed = True  # until all is there
        self._options = options
        self.seed = options.seed
        self._file = FrozenFile.open(path, use_mmap=options.mmap)
        self._attachments = Attachments(self._file, self._lock)
        self._open_model(preload_tokenizer)
        self._draft: DraftFile | None = None
        if draft_path is not None:
            self._open_draft_model(draft_path)
        elif (head := self._file.config.draft_head) is not None:
            self._open_draft_head(head)
        fork.register(self._scheduler.step_lock, fork.STEP)  # no step may be half done in a child
        self._closed = False
        cpu_watch.check_threads(options.n_threads or 0)

    def _open_model(self, preload_tokenizer: bool) -> None:
        """The model of the file, and what computes with it."""
        with fork.importing:
            from pyengine import _core

        options, config = self._options, self._file.config
        if options.n_ctx > config.max_seq_len:
            raise InvalidArgumentError(f"n_ctx is {options.n_ctx}, the model's context holds {config.max_seq_len}")
        self.n_ctx = options.n_ctx or config.max_seq_len
        self.vocab_size = config.vocab_size
        self.eos_token_ids: tuple[int, ...] = config.eos_token_ids
        n_threads = options.n_threads or 0
        config = replace(config, max_seq_len=self.n_ctx)
        opening = partial(_core.Model, config, self._file.buffer, self._file.weights, n_threads)
        self._model = self._beside_tokenizer(opening) if preload_tokenizer else opening()
        self._adapters = Adapters(self._file.config, self._model)
        context = _core.Context(self._model, kv_dtype=options.kv_dtype, n_threads=n_threads)
        self.n_threads: int = context.n_threads
        max_pages = pages_of(context, self.n_ctx, options)
        self._scheduler = Scheduler(context, max_sequences=options.max_sequences, max_pages=max_pages)

    def _open_draft_model(self, path: str) -> None:
        """A model of the same vocabulary that guesses ahead, with keys and values of its own."""
        with fork.importing:
            from pyengine.draft_file import DraftFile

        options = self._options
        self._draft = draft = DraftFile(path, self._file, self.n_ctx, use_mmap=options.mmap)
        context = draft.context(options.kv_dtype, options.n_threads or 0)
        context.set_max_pages(pages_of(context, draft.n_ctx, options))
        self._scheduler.speculation.add_model(context, draft.n_ctx)

    def _open_draft_head(self, spec: DraftHeadSpec) -> None:
        """The network in the file that guesses ahead."""
        from pyengine import _core

        head = _core.DraftHead(self._model, spec, self._file.draft_weights, self.n_threads)
        self._scheduler.speculation.add_head(head)

    def _beside_tokenizer(self, opening: Callable[[], T]) -> T:
        """Do `opening`, most of which is C without the interpreter's lock, while the tokenizer loads here: its parser holds the
        lock from end to end."""
        background = Background(opening)
        try:
            background.start()
            _ = self._attachments.tokenizer
        finally:
            background.wait()
        return background.result()

    # ------------------------------------------------------------ parts

    @property
    def path(self) -> Path:
        """The frozen file."""
        from pathlib import Path

        return Path(self._file.path)

    @property
    def config(self) -> dict[str, Any]:
        """config.json of the frozen file, as plain values."""
        return self._file.config.to_document()

    @property
    def metadata(self) -> dict[str, str]:
        """Name, source and generator, from the file's header."""
        return dict(self._file.metadata)

    def generation_defaults(self) -> dict[str, Any]:
        """generation_config.json of the frozen file, as plain values. Raises PyEngineError on a closed engine."""
        self._check_open()
        return dict(self._attachments.generation_config)

    @property
    def isa(self) -> str:
        """The instruction set whose kernels run."""
        return self.context.isa

    @property
    def context(self) -> _core.Context:
        """The core's context, for `exclusively`."""
        self._check_open()
        try:
            return self._scheduler.context
        except AttributeError:  # closed meanwhile
            raise PyEngineError("this engine is closed") from None

    @property
    def scheduler(self) -> Scheduler:
        """What computes, for callers of a kind of their own (run/jobs.py)."""
        self._check_open()
        return self._scheduler

    @property
    def max_sequences(self) -> int:
        """How many outputs are computed together."""
        return self._options.max_sequences

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded when it is first needed."""
        self._check_open()
        return self._attachments.tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """The model's chat template. Raises TemplateError if it has none."""
        self._check_open()
        return self._attachments.chat_template

    @property
    def infill_format(self) -> Infill:
        """How the model is asked to fill in the middle. Raises InvalidArgumentError, with what is missing, if its tokenizer
        has no tokens for it."""
        self._check_open()
        return self._attachments.infill

    @property
    def reranker(self) -> Reranker:
        """How the model is asked to rank. Raises InvalidArgumentError, with what is missing, if it cannot be."""
        self._check_open()
        return self._attachments.reranker

    # ------------------------------------------------------------ text

    def tokenize(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of `text`, behind BOS if the model wants it and add_bos. Special tokens written in the text are plain text
        unless parse_special. Raises InvalidArgumentError for what is no string."""
        return self.tokenizer.encode(text, add_bos=add_bos, parse_special=parse_special)

    def detokenize(self, tokens: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Raises InvalidArgumentError for ids out of range."""
        return self.tokenizer.decode(token_ids(tokens, self.vocab_size), skip_special_tokens=skip_special_tokens)

    def prompt_ids(self, prompt: Prompt, *, parse_special: bool = False) -> list[int]:
        """Token ids of a prompt, text or ids, checked. Raises InvalidArgumentError, ContextFullError."""
        self._check_open()
        return prompt_ids(
            lambda: self.tokenizer, prompt, vocab_size=self.vocab_size, n_ctx=self.n_ctx, parse_special=parse_special
        )

    def infill_ids(
        self,
        prefix: str,
        suffix: str,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
    ) -> list[int]:
        """Token ids of the prompt that asks the model for what belongs between two texts; see `Engine.infill`. Raises
        InvalidArgumentError, ContextFullError."""
        infill = self.infill_format
        with fork.importing:
            from pyengine.text.infill import Hole

        return infill.ids(Hole(prefix, suffix, files, filename, repository), self.n_ctx)

    def guide(self, wanted: StructuredOutputs) -> Guide:
        """For one output. Raises InvalidArgumentError for what is no schema or grammar, is not understood or too costly."""
        return self._attachments.guide(wanted)

    def resolve(self, params: SamplingParams) -> ResolvedParams:
        """`params` with the model's and this engine's defaults. Raises InvalidArgumentError."""
        return params.resolve(
            self._attachments.generation_config, seed=self.seed, speculative=self._options.speculative
        )

    def requests(
        self,
        caller: Caller,
        prompts: Sequence[list[int]],
        params: ResolvedParams,
        *,
        adapter: str | None = None,
        cache_salt: str | None = None,
        interactive: bool = False,
        shown_special: frozenset[int] = frozenset(),
    ) -> list[GenerationRequest]:
        """What the scheduler is to compute for prompts: params.n requests each. shown_special: special tokens that the text
        shows whatever skip_special_tokens says. Raises InvalidArgumentError."""
        healer = self._attachments.healer if params.token_healing else None
        cuts = [Cut(ids) if healer is None else healer.cut(ids) for ids in prompts]
        core_adapter, salt = self._adapters.of_request(adapter, cache_salt)
        request = partial(
            GenerationRequest,
            caller,
            params=params,
            stops=StopStrings(params.stop),
            tokenizer=self.tokenizer,
            vocab_size=self.vocab_size,
            n_ctx=self.n_ctx,
            end_ids=self.eos_token_ids,
            adapter=core_adapter,
            salt=salt,
            interactive=interactive,
            shown_special=shown_special,
            bad_sequences=Sequences(self._bad_sequences(params.bad_words)),
            breakers=Sequences(self._attachments.breakers(params.dry_sequence_breakers) if params.dry_multiplier else ()),
        )
        wanted = params.structured_outputs
        guide = None if wanted is None else self.guide(wanted)  # which costs up to seconds, and its twins next to nothing
        return [
            request(
                cut.ids,
                index=index,
                guide=None if guide is None else guide.fork(),
                healing=None if healer is None else Healing(healer, cut),
            )
            for cut in cuts
            for index in range(params.n)
        ]

    def _bad_sequences(self, words: tuple[str, ...]) -> Sequence[tuple[int, ...]]:
        if not words:
            return ()
        with fork.importing:
            from pyengine.text.sequences import bad_sequences

        return bad_sequences(self.tokenizer, words)

    @property
    def _is_open(self) -> bool:
        return not (self._closed or self._scheduler.closed)  # the latter from the beginning of `close` on

    def _check_open(self) -> None:
        if not self._is_open:
            raise PyEngineError("this engine is closed")

    def exclusively(self, function: Callable[[_core.Context], T]) -> T:
        """function(context) while nobody else computes: for programs that drive the core themselves (benchmarks, tests).
        Sequences that it makes must not outlive it. Raises PyEngineError on a closed engine."""
        self._check_open()
        out: list[T] = []
        self._scheduler.exclusively(lambda: out.append(function(self.context)))
        return out[0]

    def memory(self) -> dict[str, int]:
        """Bytes: "weights" (mapped), "kv" (pages of the cache), "scratch", "draft" (all of the draft model's, or head's), and
        "adapters"."""
        draft = self._file.draft_bytes if self._draft is None else self._draft.weights_bytes
        speculation = self._scheduler.speculation
        return self.exclusively(
            lambda context: {
                "weights": self._file.weights_bytes,
                **context.memory(),
                "draft": draft + speculation.memory(),
                "adapters": sum(one.n_bytes for one in self._adapters),
            }
        )

    def cache_stats(self) -> dict[str, int]:
        """Counts of the cache of keys and values. In bytes: n_bytes (allocated), of these n_held_bytes (of sequences at work);
        page_bytes (256 positions of all layers), window_bytes (the share of layers with a window, which keep no more of a
        sequence than that: `window` positions and a few). In pages: n_pages (allocated), of these n_cached (kept for later
        prompts) and n_free; max_pages, the memory of how many is allowed; n_evicted so far. And n_sequences at work."""
        return self.exclusively(lambda context: context.cache_stats())

    def clear_cache(self) -> None:
        """Forget what is kept for later prompts."""
        self.exclusively(lambda context: context.drop_cached())

    def check_integrity(self) -> dict[str, int]:
        """Check that sequences belong to requests, tokens to pages, and that references add up. Returns cache_stats();
        raises PyEngineError if anything is lost or shared unseen. For tests, and for the doubtful."""
        return self.exclusively(lambda _: self._scheduler.check_integrity())

    def close(self) -> None:
        """Wait for the step that is running, then free everything. Streams that go on raise PyEngineError. Idempotent: one that
        an exception has ended, too."""
        if self._closed:
            return
        self._scheduler.exclusively(self._scheduler.close)  # without our lock, which comes after that of the steps
        with self._lock:
            self._attachments.close()
            self._adapters.close()
            vars(self).pop("_model", None)
            self._file.close()
            if self._draft is not None:
                self._draft.close()
            self._closed = True

