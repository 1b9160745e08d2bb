"""What an engine is opened with: its options, the file that a name stands for, threads, pages."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pyengine import fork
from pyengine.arguments import INT32_MAX, boolean, integer, shown
from pyengine.errors import InvalidArgumentError, MissingFileError
from pyengine.files import is_safetensors, path_of
from pyengine.format.kv import KvLayout
from pyengine.run.pages import max_pages
from pyengine.run.scheduler import BUDGET

if TYPE_CHECKING:
    from pyengine import _core
    from pyengine.freeze import Progress

DEFAULT_MODEL = os.path.join(os.path.dirname(__file__), "models", "default.safetensors")
MAX_THREADS = 256  # PE_MAX_THREADS of csrc/threadpool.h


@dataclass
class Options:
    """Options of an `Engine`, whose docstring says what they mean, checked: those that it has in another process, too.

    Raises InvalidArgumentError.
    """

    n_ctx: int
    n_threads: int | None
    kv_dtype: Literal["int8", "f32"]
    seed: int | None
    max_sequences: int
    max_kv_bytes: int | None
    speculative: Any  # a Drafting when it is checked
    mmap: bool

    def __post_init__(self) -> None:
        with fork.importing:
            from pyengine.sampling import check_seed, check_speculative

        self.n_threads = checked_threads(self.n_threads) or None
        self.n_ctx = integer("n_ctx", self.n_ctx, 0, INT32_MAX)
        self.max_sequences = integer("max_sequences", self.max_sequences, 1, INT32_MAX)
        if self.max_kv_bytes is not None:
            self.max_kv_bytes = integer("max_kv_bytes", self.max_kv_bytes, 1, 2**63 - 1)
        if self.seed is not None:
            self.seed = check_seed(self.seed)
        if not isinstance(self.kv_dtype, str) or self.kv_dtype not in ("int8", "f32"):
            raise InvalidArgumentError(f"kv_dtype is 'int8' or 'f32', not {shown(self.kv_dtype)}")
        self.mmap = boolean("mmap", self.mmap)
        self.speculative = check_speculative(self.speculative)


def resolve_model(
    model: str | os.PathLike[str] | None,
    progress: Progress | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
) -> str:
    """The frozen file that `model` names: itself, whatever its name, or a Hugging Face directory, a GGUF, a model of the hub
    (hf:org/name[@revision][:file]) or (with the path of its `tokenizer`) a llama2.c checkpoint, all frozen once into the cache
    directory. None = the model that ships with the package. Raises MissingFileError, InvalidArgumentError for a tokenizer that
    nothing would read, HubError, and what `freeze` raises."""
    label = None
    if model is None:
        if not os.path.exists(DEFAULT_MODEL):
            raise MissingFileError("this build ships no default model; name one: Engine('model.safetensors')")
        model = os.fspath(DEFAULT_MODEL)
    if isinstance(model, str) and model.startswith("hf:"):
        with fork.importing:
            from pyengine import hub

        place = hub.parse(model)
        model = hub.fetch(place)
        label = place.label if os.path.isdir(model) else None  # a directory of the library's is named by its commit
    path = path_of(model)
    if not os.path.exists(path):
        raise MissingFileError(no_model_at(path))
    if not os.path.isdir(path) and (path.endswith(".safetensors") or is_safetensors(path)):
        if tokenizer is not None:
            raise InvalidArgumentError(f"{path} has a tokenizer of its own; only llama2.c checkpoints are given one")
        return path
    with fork.importing:
        from pyengine.freeze import freeze_cached

    return os.fspath(freeze_cached(path, progress=progress, tokenizer=tokenizer, name=label))


def no_model_at(path: str) -> str:
    """The sentence that says so, and to whom wrote a name of the hub how it is written here."""
    organization, _, name = path.partition("/")
    is_file = name.endswith((".safetensors", ".gguf", ".bin"))
    is_name = organization not in ("", ".", "..", "~") and name and "/" not in name and not is_file
    return f"there is no model at {path}" + (f"; one of the hub is named hf:{path}" if is_name else "")


def threads_from_environment() -> int:
    """PYENGINE_NUM_THREADS, 0 if it is not set. Raises InvalidArgumentError if it is not a positive number."""
    text = os.environ.get("PYENGINE_NUM_THREADS", "")
    if not text:
        return 0
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) == 0:
        raise InvalidArgumentError(f"PYENGINE_NUM_THREADS is {text!r}, expected a number of threads from 1")
    return int(text)


def checked_threads(n_threads: int | None) -> int:
    """Threads that an engine is given, 0 = as many as the container allows. Raises InvalidArgumentError."""
    if n_threads is None:
        return threads_from_environment()
    return integer("n_threads", n_threads, 1, MAX_THREADS)


def pages_of(context: _core.Context, n_ctx: int, options: Options) -> int:
    """Pages whose memory a context of n_ctx positions may have."""
    layout = KvLayout.of_stats(context.cache_stats())
    return max_pages(options.max_kv_bytes, layout=layout, n_ctx=n_ctx, n_step=BUDGET, max_sequences=options.max_sequences)
