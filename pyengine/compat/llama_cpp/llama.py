"""Llama: an Engine with llama-cpp-python's methods, arguments, defaults and answers.

Every argument is honoured, or changes no result (options.py), or is refused by name. Differences that remain are in
docs/migrating.md.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from pyengine import hub
from pyengine._sampler import logprobs as token_logprobs
from pyengine.arguments import INT32_MAX, integer, shown
from pyengine.compat.llama_cpp import answers, formats, options
from pyengine.compat.llama_cpp.answers import Answer
from pyengine.compat.llama_cpp.callables import Callables, LogitsProcessor, StoppingCriteria
from pyengine.compat.llama_cpp.grammar import LlamaGrammar, wanted_output
from pyengine.compat.llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from pyengine.compat.llama_cpp.options import refuse
from pyengine.compat.llama_cpp.tools import chosen_tools
from pyengine.engine import Engine
from pyengine.errors import InvalidArgumentError, TemplateError
from pyengine.format.reader import FrozenFile
from pyengine.freeze.gguf_split import part_paths
from pyengine.opening import resolve_model
from pyengine.run.request import Caller
from pyengine.run.stream import run_all
from pyengine.sampling import SamplingParams, check_seed
from pyengine.text.chat import ChatTemplate
from pyengine.text.prompts import token_ids

_DEFAULT_CTX = 512


class Llama:
    """A model. Raises what Engine raises, and InvalidArgumentError for arguments that ask for what there is not.

    model_path   a GGUF file, a Hugging Face directory (both frozen once into the cache) or a frozen file
    n_ctx        positions of the context; 0 = the model's; the default is 512, or the model's if that is less
    seed         of all calls that give none; 0xFFFFFFFF or -1 = a new one for each
    chat_format  a name of formats.FORMATS; None = the model's own template, "llama-2" if it has none
    draft_model  a LlamaPromptLookupDecoding; None = guess ahead where it pays, which changes no byte
    pooling_type llama.cpp's number: 1 = mean, 3 = last token, -1 = what the model's files say
    type_k, type_v   of keys and values, ggml's numbers: None or 8 = int8, 0 = float32
    """

    def __init__(
        self,
        model_path: str,
        *,
        n_ctx: int = _DEFAULT_CTX,
        n_threads: int | None = None,
        seed: int = options.DEFAULT_SEED,
        use_mmap: bool = True,
        chat_format: str | None = None,
        draft_model: LlamaPromptLookupDecoding | None = None,
        type_k: int | None = None,
        type_v: int | None = None,
        pooling_type: int = options.POOLING_UNSPECIFIED,
        verbose: bool = True,
        **others: Any,
    ) -> None:
        options.check_model_arguments(others)
        self._reopen = partial(
            type(self), model_path, n_ctx=n_ctx, n_threads=n_threads, seed=seed, use_mmap=use_mmap, chat_format=chat_format,
            draft_model=draft_model, type_k=type_k, type_v=type_v, pooling_type=pooling_type, verbose=verbose, **others,
        )  # fmt: skip
        if draft_model is not None and not isinstance(draft_model, LlamaPromptLookupDecoding):
            refuse(f"draft_model={shown(draft_model)}", "give a LlamaPromptLookupDecoding")
        if chat_format is not None and chat_format != formats.OWN:
            formats.chat_format(chat_format)
        self._pooling = options.pooling(pooling_type)
        self.model_path = model_path
        self.verbose = verbose
        self._seed: int | None
        self.set_seed(seed)
        path = resolve_model(model_path)
        if n_ctx == _DEFAULT_CTX:
            with FrozenFile.open(path) as frozen:
                n_ctx = min(n_ctx, frozen.config.max_seq_len)
        self.engine = Engine(
            path,
            n_ctx=n_ctx,
            n_threads=n_threads or None,
            kv_dtype=options.kv_dtype(type_k, type_v),
            mmap=use_mmap,
            speculative="auto" if draft_model is None else {"max_draft": draft_model.num_pred_tokens},
        )
        self.chat_format, self._format = self._chat_format(chat_format)
        self._template: ChatTemplate | None = None

    @classmethod
    def from_pretrained(cls, repo_id: str, filename: str | None, revision: str | None = None, **kwargs: Any) -> Llama:
        """A file of a repository of the hub (extra `hub`), by its name or a pattern that matches one; of a split model any part
        stands for all. kwargs: as for Llama. Raises HubError, and InvalidArgumentError unless a pattern matches one."""
        for name in ("additional_files", "local_dir", "cache_dir", "local_dir_use_symlinks"):
            if kwargs.pop(name, None) not in (None, "auto", []):
                refuse(name, "huggingface_hub keeps what it fetches; HF_HOME says where")
        if filename is None:
            return cls(str(hub.checked(repo_id, revision)), **kwargs)
        names = hub.list_files(repo_id, revision)
        found = [
            name for name in names if fnmatchcase(name, filename) or fnmatchcase(name.rpartition("/")[2], filename)
        ]
        if len(found) != 1 and not (found and len(part_paths(found[0])) == len(found)):
            raise InvalidArgumentError(
                f"{filename!r} matches {len(found)} files of {repo_id}: {', '.join(found or names)[:500]}"
            )
        return cls(str(hub.checked(repo_id, revision, found[0])), **kwargs)

    def _chat_format(self, name: str | None) -> tuple[str, formats.ChatFormat | None]:
        """(name, format); None for the model's own template."""
        if name in (None, formats.OWN):
            try:
                _ = self.engine.chat_template
                return formats.OWN, None
            except TemplateError:
                if name is not None:
                    raise
        name = name or "llama-2"
        return name, formats.chat_format(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._reopen, ()

    # ------------------------------------------------------------ tokens

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of UTF-8 text. Special tokens written in it are plain text unless `special`."""
        if not isinstance(text, (bytes, bytearray)):
            raise InvalidArgumentError(f"tokenize takes bytes, not {type(text).__name__}: text.encode('utf-8')")
        return self.engine.tokenize(text.decode("utf-8", "replace"), add_bos=add_bos, parse_special=special)

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes:
        """The bytes of token ids, special tokens left out unless `special`. Where a vocabulary spells a text's first word with a
        space, it is dropped after BOS only, as llama.cpp does: ids alone do not say whether they begin a text."""
        tokenizer = self.engine.tokenizer
        ids = token_ids(tokens, self.engine.vocab_size)
        is_first = ids[:1] == [tokenizer.bos_id] and not prev_tokens
        out = b""
        for token in ids:
            if token in tokenizer.special_ids:
                out += (tokenizer.token_text(token) or "").encode("utf-8") if special else b""
            else:
                out += tokenizer.token_bytes_first(token) if is_first else tokenizer.token_bytes(token)
                is_first = False
        return out

    def n_ctx(self) -> int:
        """Positions of the context."""
        return self.engine.n_ctx

    def n_vocab(self) -> int:
        return self.engine.vocab_size

    def n_embd(self) -> int:
        """Length of a token's vector inside the model."""
        size: int = self.engine.config["dim"]
        return size

    def token_bos(self) -> int:
        """-1 if the model has none, as llama.cpp says it."""
        bos = self.engine.tokenizer.bos_id
        return -1 if bos is None else bos

    def token_eos(self) -> int:
        """-1 if the model has none."""
        ends = self.engine.eos_token_ids
        return ends[0] if ends else -1

    def token_nl(self) -> int:
        """The token of a newline, -1 if no single one is."""
        ids = self.engine.tokenize("\n", add_bos=False)
        return ids[-1] if self.detokenize(ids[-1:]) == b"\n" else -1

    @property
    def metadata(self) -> dict[str, str]:
        """Of the frozen file's header."""
        return self.engine.metadata

    # ------------------------------------------------------------ completions

    def create_completion(
        self,
        prompt: str | Sequence[int],
        suffix: str | None = None,
        max_tokens: int | None = 16,
        temperature: float = 0.8,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        logprobs: int | None = None,
        echo: bool = False,
        stop: str | Sequence[str] | None = (),
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        top_k: int = 40,
        stream: bool = False,
        seed: int | None = None,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        stopping_criteria: Callables[StoppingCriteria] = None,
        logits_processor: Callables[LogitsProcessor] = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[int, float] | None = None,
    ) -> Any:
        """Continue a prompt, or with a suffix fill what lies between the two: a completion, or with `stream` an iterator of its
        chunks, without `echo`. Special tokens written in the prompt are special tokens, but not around a hole. max_tokens None or
        below 1: to the end of text or of the context."""
        options.check_refused(locals(), options.CALL_REFUSED)
        ids = self._completion_ids(prompt, suffix, echo and logprobs is not None)
        params = self._params(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, min_p=min_p, typical_p=typical_p, stop=stop,
            frequency_penalty=frequency_penalty, presence_penalty=presence_penalty, repetition_penalty=repeat_penalty,
            top_k=top_k, seed=seed, logit_bias=logit_bias, logprobs=logprobs,
            structured_outputs=wanted_output(grammar, None),
            logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        )  # fmt: skip
        if suffix is not None:
            params = self.engine.infill_params(params)
        head = answers.Head("cmpl-", model or str(self.model_path))
        said = prompt if isinstance(prompt, str) else self.detokenize(prompt).decode("utf-8", "replace")
        if stream:
            pieces = self.engine.stream(ids, params)
            return answers.completion_chunks(head, pieces, self.engine, None if logprobs is None else len(said))
        result = self.engine.generate(ids, params)
        entries: list[answers.Entry] = list(answers.said(self.engine, result))
        if echo and logprobs is not None:
            entries = [*self._prompt_logprobs(ids, logprobs), *entries]
        offset = 0 if echo else len(said)
        told = None if logprobs is None else answers.completion_logprobs(self.engine, entries, offset)
        return answers.completion(head, result, said + result.text if echo else result.text, told)

    def __call__(self, prompt: str | Sequence[int], *args: Any, **kwargs: Any) -> Any:
        """`create_completion`."""
        return self.create_completion(prompt, *args, **kwargs)

    def _completion_ids(self, prompt: str | Sequence[int], suffix: str | None, tells_prompt: bool) -> list[int]:
        if suffix is None:
            return self.engine.prompt_ids(prompt, parse_special=True)
        if not isinstance(prompt, str):
            options.refuse("suffix with token ids", "the text before a hole is text")
        if tells_prompt:
            options.refuse("suffix with echo and logprobs", "what the model reads is more than the prompt")
        return self.engine.infill_ids(prompt, suffix)

    def _params(self, **given: Any) -> SamplingParams:
        """Sampling parameters with llama-cpp-python's conventions for "none". Raises InvalidArgumentError."""
        limit = given["max_tokens"]
        if limit is not None and integer("max_tokens", limit, -INT32_MAX, INT32_MAX) <= 0:
            given["max_tokens"] = None
        if given["stop"] is None:
            given["stop"] = ()
        if given["top_k"] is not None and integer("top_k", given["top_k"], -INT32_MAX, INT32_MAX) <= 0:
            given["top_k"] = 0
        if given["seed"] is None:
            given["seed"] = self._next_seed()
        elif given["seed"] in (-1, options.DEFAULT_SEED):
            given["seed"] = None
        return SamplingParams(**given)

    def _next_seed(self) -> int | None:
        """A seed for a call that gives none: of a series that begins with the model's seed."""
        if self._seed is not None:
            self._seed = random.Random(self._seed).randrange(1 << 32)
        return self._seed

    def _prompt_logprobs(self, ids: list[int], n_top: int) -> list[answers.Entry]:
        """Of the prompt's tokens, BOS aside: the first has none."""
        entries: list[answers.Entry] = [(token, None, ()) for token in ids]

        def take(position: int, logits: memoryview) -> None:
            token = ids[position + 1]
            entries[position + 1] = (token, *token_logprobs(logits, token, n_top))

        caller = Caller()  # the scheduler knows it weakly
        run_all(self.engine.scheduler, self.engine.rows_requests(caller, ids, list(range(len(ids) - 1)), take))
        return entries[1:] if ids[0] == self.engine.tokenizer.bos_id else entries

    # ------------------------------------------------------------ chats

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        functions: Any = None,
        function_call: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: Any = None,
        temperature: float = 0.2,
        top_p: float = 0.95,
        top_k: int = 40,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        stream: bool = False,
        stop: str | Sequence[str] | None = (),
        seed: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        max_tokens: int | None = None,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        repeat_penalty: float = 1.0,
        tfs_z: float = 1.0,
        mirostat_mode: int = 0,
        mirostat_tau: float = 5.0,
        mirostat_eta: float = 0.1,
        model: str | None = None,
        logits_processor: Callables[LogitsProcessor] = None,
        grammar: LlamaGrammar | None = None,
        logit_bias: Mapping[int, float] | None = None,
        logprobs: bool | None = None,
        top_logprobs: int | None = None,
    ) -> Any:
        """The answer to messages, or with `stream` an iterator of its chunks. A tool_choice that names a tool holds the answer to
        one call of it; otherwise `tools` are told to the template and the answer is text."""
        options.check_refused(locals(), options.CALL_REFUSED)
        listed, forced = chosen_tools(tools, tool_choice)
        wanted = wanted_output(grammar, response_format)
        if forced is not None and wanted is not None:
            raise InvalidArgumentError("a forced tool call and a grammar or response_format contradict each other")
        ids = self._chat_ids(messages, listed)
        params = self._params(
            max_tokens=max_tokens, temperature=temperature, top_p=top_p, min_p=min_p, typical_p=typical_p,
            stop=self._stops(stop), frequency_penalty=frequency_penalty, presence_penalty=presence_penalty,
            repetition_penalty=repeat_penalty, top_k=top_k, seed=seed, logit_bias=logit_bias,
            logprobs=(top_logprobs or 0) if logprobs else None, logits_processor=logits_processor,
            structured_outputs=wanted if forced is None else forced.must_be,
        )  # fmt: skip
        head = answers.Head("chatcmpl-", model or str(self.model_path))
        if stream:
            return answers.chat_chunks(head, self.engine.stream(ids, params), self.engine, forced)
        return answers.chat(head, self.engine.generate(ids, params), self.engine, forced)

    def _stops(self, stop: Any) -> tuple[str, ...]:
        """A call's stop strings and the chat format's. Raises InvalidArgumentError."""
        own = () if self._format is None else self._format.stop
        given = SamplingParams(stop=() if stop is None else stop).stop or ()
        return (*given, *own)

    def _chat_ids(self, messages: Sequence[Mapping[str, Any]], tools: Any) -> list[int]:
        if self._format is None:
            return self.engine.chat_ids(messages, tools=tools)
        if self._template is None:
            text = self.engine.tokenizer.token_text
            bos, eos = text(self.token_bos()), text(self.token_eos())
            self._template = ChatTemplate(self._format.template, bos_token=bos, eos_token=eos)
        return self._template.encode(self.engine.tokenizer, messages, tools=tools, n_ctx=self.engine.n_ctx)

    # ------------------------------------------------------------ embeddings

    def embed(
        self, input: str | Sequence[str], normalize: bool = False, truncate: bool = True, return_count: bool = False
    ) -> Any:
        """A vector of floats for one text, a list of them for several; with `return_count` also how many tokens they have. Texts
        that do not fit are cut if `truncate`."""
        vectors, n_tokens = self._embed(input, normalize=normalize, truncate=truncate)
        out = vectors[0] if isinstance(input, str) else vectors
        return (out, n_tokens) if return_count else out

    def create_embedding(self, input: str | Sequence[str], model: str | None = None) -> Answer:
        """OpenAI's list of embeddings."""
        vectors, n_tokens = self._embed(input, normalize=False, truncate=True)
        return answers.embeddings(model or str(self.model_path), vectors, n_tokens)

    def _embed(self, texts: str | Sequence[str], *, normalize: bool, truncate: bool) -> tuple[list[list[float]], int]:
        given = [texts] if isinstance(texts, str) else list(texts)
        prompts = [self.engine.tokenize(text, parse_special=True) for text in given]
        ids = [prompt[: self.engine.n_ctx] for prompt in prompts] if truncate else prompts
        vectors: list[list[float]] = []
        if ids:
            vectors = self.engine.embed(ids, pooling=self._pooling, normalize=normalize).tolist()
        return vectors, sum(map(len, ids))

    # ------------------------------------------------------------ tokens, one by one

    def generate(
        self,
        tokens: Sequence[int],
        top_k: int = 40,
        top_p: float = 0.95,
        min_p: float = 0.05,
        typical_p: float = 1.0,
        temp: float = 0.8,
        repeat_penalty: float = 1.0,
        reset: bool = True,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        logits_processor: Callables[LogitsProcessor] = None,
        stopping_criteria: Callables[StoppingCriteria] = None,
        **others: Any,
    ) -> Iterator[int]:
        """Token ids that follow `tokens`, one after the other until the context is full; the model's end of text does not end
        them. What earlier calls computed of the tokens is found again, whatever `reset` says."""
        options.check_refused(others, options.CALL_REFUSED)
        params = self._params(
            max_tokens=None, temperature=temp, top_p=top_p, min_p=min_p, typical_p=typical_p, top_k=top_k, stop=None,
            frequency_penalty=frequency_penalty, presence_penalty=presence_penalty, repetition_penalty=repeat_penalty,
            seed=None, ignore_eos=True, structured_outputs=wanted_output(others.get("grammar"), None),
            logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        )  # fmt: skip
        pieces = self.engine.stream(list(tokens), params)
        return (piece.token for piece in pieces if piece.token is not None)

    # ------------------------------------------------------------ life

    def set_seed(self, seed: int) -> None:
        """Begin the series of seeds anew. Raises InvalidArgumentError."""
        number = check_seed(seed)
        self._seed = None if number == options.DEFAULT_SEED else number

    def set_cache(self, cache: Any) -> None:
        """Nothing to do: what was computed is kept as long as there is memory for it."""

    def reset(self) -> None:
        """Forget what is kept for later prompts. No output depends on it."""
        self.engine.clear_cache()

    def close(self) -> None:
        """Free everything. Idempotent."""
        if self._template is not None:
            self._template.close()
        self.engine.close()

    # ------------------------------------------------------------ refused

    def eval(self, *_: Any, **__: Any) -> Any:
        refuse("eval", "there is no state between calls; Engine.logits gives logits")

    def sample(self, *_: Any, **__: Any) -> Any:
        refuse("sample", "there is no state between calls; generate gives tokens one by one")

    def save_state(self) -> Any:
        refuse("save_state", "there is no state between calls")

    def load_state(self, *_: Any) -> Any:
        refuse("load_state", "there is no state between calls")

    def create_chat_completion_openai_v1(self, *_: Any, **__: Any) -> Answer:
        refuse("create_chat_completion_openai_v1", "use create_chat_completion, which has the same fields as a dict")
