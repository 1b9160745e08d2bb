"""Engine: a model, its tokenizer and a context behind one thread-safe object."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal, overload

from pyengine.arguments import boolean, shown
from pyengine.beam import BeamSearching
from pyengine.errors import InvalidArgumentError
from pyengine.opening import Options, resolve_model
from pyengine.prefixes import Prefixes
from pyengine.reranking import Reranking
from pyengine.results import Generation
from pyengine.run.request import Caller
from pyengine.run.scheduler import MAX_SEQUENCES
from pyengine.run.stream import Stream, run_all
from pyengine.text.prompts import Prompt as Prompt  # ours, for callers
from pyengine.text.prompts import is_batch

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Unpack  # typing's own from Python 3.11 on

    from pyengine.adapters import LoadedAdapter
    from pyengine.freeze import Progress
    from pyengine.sampling import SamplingParams
    from pyengine.sampling_options import SamplingOptions

Message = Mapping[str, Any]


class Engine(Reranking, BeamSearching, Prefixes):
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
        options = Options(
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
        path = resolve_model(model, progress, tokenizer)
        draft_path = None if draft_model is None else resolve_model(draft_model, progress)
        super().__init__(path, options, draft_path=draft_path, preload_tokenizer=preload_tokenizer)

    @classmethod
    def from_pretrained(cls, repo: str, *, revision: str | None = None, file: str | None = None, **options: Any) -> Engine:
        """A model of the Hugging Face Hub, "org/name", fetched once (extra `hub`) and frozen once.

        revision  a branch, tag or commit; None = the main branch
        file      a GGUF file of the repository; None = its safetensors, or its only GGUF file
        options   as for Engine
        Raises HubError for what the hub refuses or does not have, and what Engine raises."""
        from pyengine import hub

        return cls(str(hub.checked(repo, revision, file)), **options)

    # ------------------------------------------------------------ generation

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

    def infill_params(self, params: SamplingParams) -> SamplingParams:
        """`params`, with the tokens that end a filling among the stop tokens, unless ignore_eos. Raises InvalidArgumentError."""
        ends = self.infill_format.end_ids
        return params if params.ignore_eos else replace(params, stop_token_ids=(*(params.stop_token_ids or ()), *ends))

    @overload  # the first that fits: a str is a sequence of str, too
    def infill(  # type: ignore[overload-overlap]
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        stream: Literal[False] = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation: ...
    @overload
    def infill(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        stream: Literal[True],
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Stream: ...
    @overload
    def infill(
        self,
        prefix: Sequence[str],
        suffix: Sequence[str],
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        stream: Literal[False] = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> list[Generation]: ...
    def infill(
        self,
        prefix: str | Sequence[str],
        suffix: str | Sequence[str],
        params: SamplingParams | None = None,
        *,
        files: Sequence[tuple[str, str]] = (),
        filename: str = "",
        repository: str = "",
        stream: bool = False,
        adapter: str | None = None,
        cache_salt: str | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation | list[Generation] | Stream:
        """What belongs between a text and another one, by a code model that was trained to fill in the middle; of many holes
        together: lists of equal length.

        files       (name, text) of other files that may help, the most helpful one last
        filename    of the file with the hole, repository: its name; the model is told of both where it has tokens for them
        All else is as in generate, or with stream=True as in stream. The texts are laid out as the model's authors say, with the
        tokens of its tokenizer; special tokens that they spell are plain text. Any of these tokens ends the filling, as the end
        of text does. Calls that begin alike share what is computed: the same files, then the same prefix (of models that read the
        suffix first, the same suffix).

        Raises InvalidArgumentError if the model does not fill in the middle, with what is missing, and what generate raises."""
        chosen = self.infill_params(sampling_params(params, options))
        context: Any = {"files": files, "filename": filename, "repository": repository}
        if not stream:
            ids = [self.infill_ids(*hole, **context) for hole in holes_of(prefix, suffix)]
            prompt: Any = ids[0] if isinstance(prefix, str) else ids
            filled: Generation | list[Generation] = self.generate(prompt, chosen, adapter=adapter, cache_salt=cache_salt)
            return filled
        if not isinstance(prefix, str) or not isinstance(suffix, str):
            raise InvalidArgumentError("a stream has one hole: prefix and suffix are text; use stream=False for many")
        return self.stream(self.infill_ids(prefix, suffix, **context), chosen, adapter=adapter, cache_salt=cache_salt)

    # ------------------------------------------------------------ adapters

    def load_adapter(
        self, path: str | os.PathLike[str], *, name: str | None = None, scale: float | None = None
    ) -> LoadedAdapter:
        """Load a low-rank adapter (LoRA) beside the model: a directory in PEFT's layout. Calls choose it by adapter=name; they
        share every step with calls that chose another or none, and neither changes a bit of the other.

        name   what calls name it by; None = the directory's name
        scale  multiplies what it adds, beside its own alpha / r; None = 1
        Raises InvalidArgumentError for a name that is taken or a directory without an adapter, ModelFormatError for one of
        another model or a damaged one, UnsupportedModelError for what it asks for beyond low-rank products of the
        projections of attention and of a dense MLP. Then nothing is loaded."""
        self._check_open()
        return self._adapters.load(path, name, scale)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter: no later call finds it. Requests that run keep it to their end, and its memory goes with the
        last of them. Raises InvalidArgumentError if there is none of that name."""
        self._check_open()
        self._adapters.unload(name)

    def adapters(self) -> list[LoadedAdapter]:
        """Those that are loaded, in the order in which they were."""
        self._check_open()
        return list(self._adapters)

    # ------------------------------------------------------------ life

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
        if not self._is_open:
            return "Engine(closed)"
        return f"Engine({str(self.path)!r}, isa={self.isa!r}, n_threads={self.n_threads}, n_ctx={self.n_ctx})"


def _reopen(path: str, options: dict[str, Any], adapters: Sequence[tuple[Path, str, float]]) -> Engine:
    engine = Engine(path, **options)
    for directory, name, scale in adapters:
        engine.load_adapter(directory, name=name, scale=scale)
    return engine


def holes_of(prefix: str | Sequence[str], suffix: str | Sequence[str]) -> list[tuple[str, str]]:
    """(prefix, suffix) of each hole, of two texts or of two lists of them. Raises InvalidArgumentError."""
    if isinstance(prefix, str) and isinstance(suffix, str):
        return [(prefix, suffix)]
    are_lists = all(isinstance(one, Sequence) and not isinstance(one, (str, bytes)) for one in (prefix, suffix))
    if not are_lists or len(prefix) != len(suffix) or not prefix:
        raise InvalidArgumentError("prefix and suffix are two texts, or two lists of texts of one length that is not 0")
    return list(zip(prefix, suffix, strict=True))


def sampling_params(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    """One of the two forms in which callers give parameters. Raises InvalidArgumentError, UnknownParameterError."""
    from pyengine.sampling import SamplingParams  # which every engine has imported

    if params is not None and not isinstance(params, SamplingParams):
        raise InvalidArgumentError(f"params is a SamplingParams, not {shown(params)}; options have names: max_tokens=64")
    if params is not None and options:
        raise InvalidArgumentError(f"give params or keyword options, not both ({', '.join(options)})")
    return SamplingParams.from_kwargs(**options) if params is None else params
