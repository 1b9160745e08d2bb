"""Engine: a model, its tokenizer and a context behind one thread-safe object."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from pyengine import cpu_watch, fork
from pyengine.adapters import Adaptable, Adapters
from pyengine.arguments import boolean, shown
from pyengine.attachments import Attachments
from pyengine.background import Background
from pyengine.beam import BeamSearching
from pyengine.errors import InvalidArgumentError, PyEngineError
from pyengine.format.reader import FrozenFile
from pyengine.opening import Options, pages_of, resolve_model
from pyengine.prefixes import Prefixes
from pyengine.results import Generation
from pyengine.run.request import Caller, GenerationRequest
from pyengine.run.scheduler import MAX_SEQUENCES, Scheduler
from pyengine.run.stream import Stream, run_all
from pyengine.scoring import Prompt as Prompt  # ours, for callers
from pyengine.scoring import Scoring
from pyengine.text.prompts import is_batch, prompt_ids, token_ids
from pyengine.text.stops import StopStrings

if TYPE_CHECKING:
    from pathlib import Path  # 3 ms of the start, for names that the system calls take as they are

    from typing_extensions import Unpack  # typing's own from Python 3.11 on

    from pyengine import _core
    from pyengine.draft_file import DraftFile
    from pyengine.format.config import DraftHeadSpec
    from pyengine.freeze import Progress
    from pyengine.run.guide import Guide
    from pyengine.sampling import ResolvedParams, SamplingParams, StructuredOutputs
    from pyengine.sampling_options import SamplingOptions
    from pyengine.text.chat import ChatTemplate
    from pyengine.text.tokenizer import Tokenizer

Message = Mapping[str, Any]
T = TypeVar("T")


class Engine(Adaptable, Scoring, BeamSearching, Prefixes):
    """A frozen model, ready to generate.

    model      a frozen file, a Hugging Face directory, a GGUF or llama2.c checkpoint, a model of the hub as
               "hf:org/name[@revision][:file]" (all these frozen once into a cache), or None for the small model that ships with
               the package
    n_ctx      positions of the context; 0 = the model's
    n_threads  None = PYENGINE_NUM_THREADS, else what the affinity mask and the cgroup's quota allow
    kv_dtype   "int8", or "f32": a reference to compare with, slower and four times as large
    seed       seed of every call that gives none; None = a fresh one for each call, reported in its result
    max_sequences  outputs that are computed together; further ones wait
    max_kv_bytes   memory for keys and values, those kept for later prompts included; outputs that do not fit wait. At
                   least what one full context takes. None = room for a few contexts, at most half of the memory
    speculative    guesses ahead, which change no byte of any output: "auto", "off" or options; see SamplingParams and
                   docs/speculation.md
    draft_model  a smaller model with the same vocabulary, named like `model`, that guesses too: worth it beside a model several
                   times its size. None = the draft head in the model's file, if it has one
    mmap       False reads the file into memory, for files that others may truncate (a map would then kill the process)
    preload_tokenizer  True loads the tokenizer now, while a thread checks the weights: for programs that begin with text at once.
               Otherwise it is loaded when it is first needed
    progress   called as progress(done_bytes, total_bytes, tensor_name) while a model is frozen into the cache
    tokenizer  the path of a llama2.c checkpoint's tokenizer.bin; every other model has its own

    Methods may be called from any thread: what they compute shares every step, so eight callers get the speed of a batch
    of eight. Use it as a context manager, or `close` it. It pickles as its path, options and adapters, and opens the files again.
    Raises FileNotFoundError, ModelFormatError, UnsupportedModelError, UnsupportedISAError, InvalidArgumentError.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        n_ctx: int = 0,
        n_threads: int | None = None,
        kv_dtype: Literal["int8", "f32"] = "int8",
        seed: int | None = None,
        max_sequences: int = MAX_SEQUENCES,
        max_kv_bytes: int | None = None,
        speculative: str | Mapping[str, Any] = "auto",
        draft_model: str | os.PathLike[str] | None = None,
        mmap: bool = True,
        preload_tokenizer: bool = False,
        progress: Progress | None = None,
        tokenizer: str | os.PathLike[str] | None = None,
    ) -> None:
        self._lock = threading.RLock()
        fork.register(self._lock, fork.ENGINE)
        self._closed = True
        self._options = options = Options(
            n_ctx=n_ctx,
            n_threads=n_threads,
            kv_dtype=kv_dtype,
            seed=seed,
            max_sequences=max_sequences,
            max_kv_bytes=max_kv_bytes,
            speculative=speculative,
            mmap=mmap,
        )
        preload_tokenizer = boolean("preload_tokenizer", preload_tokenizer)
        self.seed = options.seed
        self._file = FrozenFile.open(resolve_model(model, progress, tokenizer), use_mmap=mmap)
        self._attachments = Attachments(self._file, self._lock)
        self._open_model(preload_tokenizer)
        self._draft: DraftFile | None = None
        if draft_model is not None:
            self._open_draft_model(resolve_model(draft_model, progress))
        elif (head := self._file.config.draft_head) is not None:
            self._open_draft_head(head)
        fork.register(self._scheduler.step_lock, fork.ENGINE)  # no step may be half done in a child
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

    @classmethod
    def from_pretrained(cls, repo: str, *, revision: str | None = None, file: str | None = None, **options: Any) -> Engine:
        """A model of the Hugging Face Hub, "org/name", fetched once (extra `hub`) and frozen once.

        revision  a branch, tag or commit; None = the main branch
        file      a GGUF file of the repository; None = its safetensors, or its only GGUF file
        options   as for Engine
        Raises HubError for what the hub refuses or does not have, and what Engine raises."""
        from pyengine import hub

        return cls(str(hub.checked(repo, revision, file)), **options)

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
        return self._scheduler.context

    @property
    def scheduler(self) -> Scheduler:
        """What computes, for callers of a kind of their own (async_engine.py)."""
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

    # ------------------------------------------------------------ generation

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
        core_adapter, salt = self._adapted(adapter, cache_salt)
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
        )
        wanted = params.structured_outputs
        return [
            request(ids, index=index, guide=None if wanted is None else self.guide(wanted))
            for ids in prompts
            for index in range(params.n)
        ]

    @overload  # the first that fits: a str is a sequence of str, too
    def generate(  # type: ignore[overload-overlap]
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    def generate(
        self,
        prompt: Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    def generate(
        self,
        prompt: Prompt | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation]:
        """Continue one prompt (text or token ids), or many together.

        params or keyword options: see SamplingParams. One prompt with n = 1 gives a Generation; several prompts, or n > 1, give
        a list, prompt by prompt. A prompt's output does not depend on what runs beside it.
        adapter: the name of one that `load_adapter` loaded.
        cache_salt: computed beginnings of prompts are shared between calls with the same salt only, for callers who must
        not learn from a time what others asked.
        Raises InvalidArgumentError, ContextFullError (a prompt that does not fit), NotFiniteError.
        """
        chosen = sampling_params(params, options)
        many = is_batch(prompt)
        prompts: Any = prompt if many else [prompt]
        ids = [self.prompt_ids(item, parse_special=parse_special) for item in prompts]
        caller = Caller()
        requests = self.requests(caller, ids, self.resolve(chosen), adapter=adapter, cache_salt=cache_salt)
        run_all(self._scheduler, requests)
        results = [request.result for request in requests]
        return results if many or len(results) > 1 else results[0]

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        parse_special: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream:
        """Like generate for one prompt, a Piece a token; the last piece carries the result. What generate refuses is
        refused by this call, not by the first piece. Closing the iterator (also by `with`), or letting go of it, ends it."""
        chosen = sampling_params(params, options)
        if chosen.n not in (None, 1):
            raise InvalidArgumentError(f"a stream has one sample, n is {chosen.n}; use generate")
        ids = self.prompt_ids(prompt, parse_special=parse_special)
        stream = Stream(self._scheduler)
        (stream.request,) = self.requests(
            stream, [ids], self.resolve(chosen), adapter=adapter, cache_salt=cache_salt, interactive=True
        )
        return stream

    def chat_ids(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a conversation under the model's template. Special tokens come from it, never from content. It ends with
        the beginning of an answer, or with continue_final_message inside the assistant's last message. Raises TemplateError,
        InvalidArgumentError, ContextFullError."""
        return self.chat_template.encode(
            self.tokenizer,
            messages,
            n_ctx=self.n_ctx,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **variables,
        )

    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        stream: Literal[False] = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        stream: Literal[True],
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream: ...
    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        continue_final_message: bool = False,
        stream: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation] | Stream:
        """The assistant's answer to messages ({"role", "content"}, …), or, with continue_final_message, how the last one goes on,
        which is the assistant's. All else is as in generate, or with stream=True as in stream.

        Raises TemplateError if the model has no usable template, and what generate raises."""
        chosen = sampling_params(params, options)
        ids = self.chat_ids(messages, continue_final_message=continue_final_message)
        if stream:
            return self.stream(ids, chosen, adapter=adapter, cache_salt=cache_salt)
        return self.generate(ids, chosen, adapter=adapter, cache_salt=cache_salt)

    # ------------------------------------------------------------ life

    def _check_open(self) -> None:
        if self._closed:
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
        """Wait for the step that is running, then free everything. Streams that go on raise PyEngineError. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._scheduler.exclusively(self._scheduler.close)
            self._closed = True
            self._attachments.close()
            self._adapters.close()
            del self._model
            self._file.close()
            if self._draft is not None:
                self._draft.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Callable[..., Engine], tuple[Any, ...]]:
        self._check_open()
        options = asdict(self._options)
        if self._draft is not None:
            options["draft_model"] = self._draft.path
        return _reopen, (str(self.path), options, [(one.path, one.name, one.scale) for one in self._adapters])

    def __repr__(self) -> str:
        if self._closed:
            return "Engine(closed)"
        return f"Engine({str(self.path)!r}, isa={self.isa!r}, n_threads={self.n_threads}, n_ctx={self.n_ctx})"


def _reopen(path: str, options: dict[str, Any], adapters: Sequence[tuple[Path, str, float]]) -> Engine:
    engine = Engine(path, **options)
    for directory, name, scale in adapters:
        engine.load_adapter(directory, name=name, scale=scale)
    return engine


def sampling_params(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """One of the two forms in which callers give parameters. Raises InvalidArgumentError, UnknownParameterError."""
    from pyengine.sampling import SamplingParams  # which every engine has imported

    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidArgumentError(f"params is a SamplingParams, not {shown(params)}; options have names: max_tokens=64")
    if params is not None and options:
        raise InvalidArgumentError(f"give params or keyword options, not both ({', '.join(options)})")
    return SamplingParams.from_kwargs(**options) if params is None else params
