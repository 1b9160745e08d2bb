"""Models by name from the Hugging Face Hub: hf:org/name[@revision][:file].

Fetching, resuming, checking and keeping files is huggingface_hub's work (extra pyengine-lm[hub], imported when it is needed),
with its settings: HF_TOKEN, HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE. What is fetched is decided here: the documents of a model, its
safetensors, or one GGUF file; a pickle never is. All files are of one commit, whatever happens to the branch meanwhile. Without
a network, or where the hub does not answer, what was fetched before is used.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pyengine.arguments import shown
from pyengine.errors import HubError, InvalidArgumentError, PyEngineError, UnsupportedModelError

PREFIX = "hf:"
CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_KINDS = (".gguf", ".safetensors")
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
_REVISION = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
_HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


class HubModel(NamedTuple):
    """A model's place: its repository, a branch, tag or commit (None = the main branch), one file of it (None = by itself)."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{PREFIX}{self.repo}{revision}" + ("" if self.file is None else f":{self.file}")

    @property
    def label(self) -> str:
        """A name for the model."""
        return self.repo.rpartition("/")[2]


class _Repository(Protocol):
    """names: its files, with / between folders."""

    names: list[str]

    def get(self, name: str) -> Path:
        """The local path of one of them. Raises HubError."""


def is_hub_name(model: object) -> bool:
    return isinstance(model, str) and model.startswith(PREFIX)


def parse(text: str) -> HubModel:
    """hf:org/name[@revision][:file]. Raises InvalidArgumentError."""
    place, _, file = text.removeprefix(PREFIX).partition(":")
    repo, at, revision = place.partition("@")
    return checked(repo, revision if at else None, file or None)


def checked(repo: str, revision: str | None = None, file: str | None = None) -> HubModel:
    """Raises InvalidArgumentError for what is no name, and UnsupportedModelError for a file that is never read."""
    if not isinstance(repo, str) or not _NAME.fullmatch(repo) or ".." in repo:
        raise InvalidArgumentError(f"a model of the hub is named org/name, not {shown(repo)}")
    if revision is not None and (
        not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision
    ):
        raise InvalidArgumentError(f"a revision is a branch, a tag or a commit, not {shown(revision)}")
    if file is not None:
        if not isinstance(file, str) or file.startswith("/") or ".." in file.split("/"):
            raise InvalidArgumentError(f"a file of a repository is named by its path in it, not {shown(file)}")
        if file.endswith(PICKLES):
            raise UnsupportedModelError(f"{file}: pickled weights (.bin, .pt) can run code and are never read")
        if not file.endswith(_KINDS):
            raise InvalidArgumentError(f"{file}: give a .gguf file, or no file for a repository of safetensors")
    return HubModel(repo, revision, file)


def fetch(model: HubModel) -> Path:
    """The model on this machine: a GGUF file, a frozen file or a directory as Hugging Face has it. Raises HubError for what the
    hub refuses or does not have, UnsupportedModelError for a repository without weights that are read."""
    return _choose(_open(model), model)


def list_files(repo: str, revision: str | None = None) -> list[str]:
    """The files of a repository. Raises HubError."""
    return _open(checked(repo, revision)).names


def _open(model: HubModel) -> _Repository:
    _library()
    try:
        return _Online(model)
    except PyEngineError:
        raise
    except Exception as error:
        if not _is_unreachable(error):
            raise _explained(error, model) from error
        return _Cached(model, error)


# -------------------------------------------------------------------- which files


def _choose(repository: _Repository, model: HubModel) -> Path:
    names = repository.names
    if model.file is not None:
        return _get_file(repository, model, model.file)
    if CONFIG in names and any(name.endswith(".safetensors") and "/" not in name for name in names):
        return _get_directory(repository)
    files = [name for name in names if name.endswith(".gguf")]
    firsts = [name for name in files if _parts(name)[0] == name]
    if len(firsts) == 1:
        return _get_file(repository, model, firsts[0])
    if firsts:
        example = f"{model}:{firsts[0]}"
        raise InvalidArgumentError(
            f"{model} has {len(firsts)} GGUF files; name one, as in {example}: {_listed(firsts)}"
        )
    if any(name.endswith(PICKLES) for name in names):
        raise UnsupportedModelError(
            f"{model} has pickled weights (.bin, .pt) only: they can run code and are never read"
        )
    raise UnsupportedModelError(f"{model} has neither {CONFIG} with safetensors nor a GGUF file: {_listed(names)}")


def _get_file(repository: _Repository, model: HubModel, name: str) -> Path:
    """A file, with all other parts of one that is split."""
    parts = _parts(name)
    for part in parts:
        if part not in repository.names:
            others = [other for other in repository.names if other.endswith(_KINDS)]
            raise HubError(f"{model} has no file {part}; it has: {_listed(others)}")
    return [repository.get(part) for part in parts][parts.index(name)]


def _parts(name: str) -> list[str]:
    from pyengine.freeze.gguf_split import part_paths

    return [path.as_posix() for path in part_paths(name)]


def _get_directory(repository: _Repository) -> Path:
    """The documents first: they say whether the weights are worth fetching, and which files they are."""
    from pyengine.freeze.hf import DOCUMENTS, missing_weights, refuse_unknown_architecture

    directory = repository.get(CONFIG).parent
    refuse_unknown_architecture(directory)
    for name in DOCUMENTS:
        if name in repository.names:
            repository.get(name)
    whole = "model.safetensors"
    for name in [whole] if whole in repository.names else missing_weights(directory):
        repository.get(name)
    return directory


def _listed(names: list[str]) -> str:
    shown_names = names[:40]
    return ", ".join(shown_names) + (
        f" and {len(names) - len(shown_names)} more" if len(names) > len(shown_names) else ""
    )


# -------------------------------------------------------------------- where they come from


class _Online:
    """A repository as the hub has it now. Raises what huggingface_hub raises when it is made."""

    def __init__(self, model: HubModel) -> None:
        library = _library()
        info = library.HfApi().model_info(model.repo, revision=model.revision)
        self.names: list[str] = sorted(file.rfilename for file in info.siblings or [])
        self._model, self._library, self._commit = model, library, info.sha
        self._is_named = False

    def get(self, name: str) -> Path:
        """The first one is asked for by the revision's name, which the library then remembers, the others by its commit."""
        revision = self._commit if self._is_named else self._model.revision
        try:
            path = Path(self._download(name, revision))
            commit = path.parents[name.count("/")].name
            if commit != self._commit:
                raise HubError(f"{self._model} moved to commit {commit[:12]} meanwhile: run it again")
        except PyEngineError:
            raise
        except Exception as error:
            raise _explained(error, self._model, name) from error
        self._is_named = True
        return path

    def _download(self, name: str, revision: str | None) -> str:
        path: str = self._library.hf_hub_download(self._model.repo, name, revision=revision, tqdm_class=_progress_bar())
        return path


class _Cached:
    """A repository as far as it was fetched before. Raises HubError if nothing was."""

    def __init__(self, model: HubModel, why: BaseException) -> None:
        folder = cache_directory() / f"models--{model.repo.replace('/', '--')}"
        revision = model.revision or "main"
        reference = folder / "refs" / revision
        commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
        self._snapshot = folder / "snapshots" / commit
        self._what = f"{model} is not on this machine ({cache_directory()})"
        self._reason = f"and the hub cannot be asked: {_first_line(why)}"
        if not re.fullmatch(r"[0-9a-f]{40}", commit) or not self._snapshot.is_dir():
            raise HubError(f"{self._what}, {self._reason}")
        files = (path for path in self._snapshot.rglob("*") if path.is_file())
        self.names = sorted(path.relative_to(self._snapshot).as_posix() for path in files)
        self._check_whole()

    def _check_whole(self) -> None:
        """A directory whose weights were not all fetched is not whole; freezing would only say that it has no such file."""
        from pyengine.freeze.hf import missing_weights

        if CONFIG in self.names and (missing := missing_weights(self._snapshot)):
            raise HubError(f"{self._what} as a whole, {self._reason}; missing: {_listed(missing)}")

    def get(self, name: str) -> Path:
        return self._snapshot / name


def cache_directory() -> Path:
    """Where huggingface_hub keeps what it fetches: HF_HUB_CACHE, else HF_HOME/hub, else ~/.cache/huggingface/hub."""
    return Path(_library("constants").HF_HUB_CACHE)


class CachedRevision(NamedTuple):
    """What is kept of one commit. refs: the branches and tags that name it; size in bytes, of files that others share too."""

    repo: str
    commit: str
    refs: tuple[str, ...]
    size: int

    def remove(self) -> None:
        """Its snapshot, and the files that no other revision has."""
        _library().scan_cache_dir(cache_directory()).delete_revisions(self.commit).execute()


def cached_revisions() -> list[CachedRevision]:
    """Of every model in huggingface_hub's cache. Raises HubError without the library."""
    library = _library()
    try:
        repos = library.scan_cache_dir(cache_directory()).repos
    except _library("errors").CacheNotFound:
        return []
    found = [
        CachedRevision(repo.repo_id, one.commit_hash, tuple(sorted(one.refs)), one.size_on_disk)
        for repo in repos
        if repo.repo_type == "model"
        for one in repo.revisions
    ]
    return sorted(found)


def _library(module: str = "") -> Any:
    """huggingface_hub, or one of its modules. Raises HubError without it."""
    try:
        return import_module(f"huggingface_hub.{module}".rstrip("."))
    except ImportError:
        raise HubError("models of the hub need huggingface_hub: pip install 'pyengine-lm[hub]'") from None


def _progress_bar() -> Any:
    """The library's bar on a terminal, nothing anywhere else."""

    class Bar(_library("utils").tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": not sys.stderr.isatty()})

    return Bar


# -------------------------------------------------------------------- what went wrong


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_unreachable(error: BaseException) -> bool:
    """Whether the hub was not asked, or could not answer."""
    status = _status(error)
    if status is not None:
        return status >= 500
    return isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES


def _explained(error: Exception, model: HubModel, name: str | None = None) -> PyEngineError:
    """One line that names the thing and the way out."""
    errors, status = _library("errors"), _status(error)
    what = str(model) if name is None else f"{model}, {name}"
    page = f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{model.repo}"
    if isinstance(error, errors.GatedRepoError) or status == 403:
        return HubError(
            f"{what}: access is not granted; accept its terms at {page}, and set HF_TOKEN or run 'hf auth login'"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):  # the library's word for a file that it could not ask for
        why = _first_line(error.__cause__ or error)
        return HubError(f"{what}: the connection broke ({why}); run it again, it goes on where it stopped")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{model.repo} has no revision {model.revision or 'main'} (any more): {page} lists them")
    if isinstance(error, errors.EntryNotFoundError):
        return HubError(f"{what}: the file is gone; the revision may have moved meanwhile: run it again")
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return HubError(f"{what}: there is no such model, or it is private: then set HF_TOKEN or run 'hf auth login'")
    if status == 429:
        return HubError(f"{what}: the hub has had too many requests from here; wait a little, or set HF_TOKEN")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        room = "HF_HOME names another place, and 'pyengine models' lists what can be removed"
        return HubError(f"{what}: no space left in {cache_directory()}; {room}")
    if isinstance(error, OSError) and status is None and error.errno is None:  # the library's word for a wrong size
        return HubError(
            f"{what}: the download is not whole ({_first_line(error)}); run it again, it goes on where it stopped"
        )
    if _is_unreachable(error):
        return HubError(
            f"{what}: the connection broke ({_first_line(error)}); run it again, it goes on where it stopped"
        )
    return HubError(f"{what}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
