"""`pyengine models`: what the caches hold of models, frozen here and fetched from the hub."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli import UsageError, options
from pyengine.cli.terminal import say
from pyengine.errors import HubError, InvalidArgumentError, MissingFileError, PyEngineError

if TYPE_CHECKING:
    from pyengine.freeze.cache import Entry

EPILOG = """\
examples:
  pyengine models
  pyengine models rm hf:HuggingFaceTB/SmolLM2-135M-Instruct
  pyengine models rm SmolLM2-135M --dry-run
  pyengine models prune

rm hf:org/name removes what was fetched of it, every revision or the one that @revision names (a branch, a tag, or 7 characters
or more of a commit), and what was frozen from that; any other name is the beginning of a frozen model's. A frozen model is made
again from its source when it is needed; a model of the hub is fetched again. prune removes frozen models whose source has changed
or is gone, or that another version made; what a killed process left behind; and, of the hub's cache, revisions that no branch or
tag names, also those that were fetched by their commit, here or by another program.

environment:
  PYENGINE_CACHE        where frozen models are kept; else pyengine/ in the user's cache directory
  HF_HOME, HF_HUB_CACHE where huggingface_hub keeps what it fetches
"""


LEAST_COMMIT = 7  # characters by which a commit is named; what is shorter may be a branch that is not here


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("models", EPILOG)
    actions = ("list", "rm", "prune")
    parser.add_argument("action", nargs="?", choices=actions, default="list", help="list (default), rm or prune")
    parser.add_argument("names", nargs="*", metavar="NAME", help="for rm: frozen models and hf:org/name")
    parser.add_argument("--dry-run", action="store_true", help="say what rm or prune would remove")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


@dataclass
class Item:
    """Something that can be removed. origin: the path that it was frozen from, or the hub's branches and tags that name it."""

    kind: str
    name: str
    size: int
    origin: str
    is_stale: bool
    remove: Callable[[], None]
    repo: str | None = None
    commit: str = ""

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "bytes": self.size, "from": self.origin, "stale": self.is_stale}


def frozen_items() -> list[Item]:
    from pyengine.freeze import cache

    def item(kind: str, path: Path, size: int, origin: str, is_stale: bool) -> Item:
        return Item(kind, path.name, size, origin, is_stale, partial(cache.remove, path))

    items = [
        item("frozen", entry.path, entry.size, entry.origin.source if entry.origin else "", is_stale(entry))
        for entry in cache.entries()
    ]
    return items + [item("left behind", path, path.stat().st_size, "", True) for path in cache.leftovers()]


def is_stale(entry: Entry) -> bool:
    """Whether no run will open it again: it is not where its source as it is now would be frozen to."""
    from pyengine.format.reader import FrozenFile
    from pyengine.freeze import frozen_cache_path

    try:
        with FrozenFile.open(entry.path):
            pass
        origin = entry.origin
        return origin is not None and frozen_cache_path(origin.source, origin.tokenizer, name=origin.name) != entry.path
    except PyEngineError:  # of another format, or its source is gone
        return True


def hub_items() -> list[Item]:
    """Of the hub's cache, a revision each; nothing without huggingface_hub."""
    from pyengine import hub

    try:
        return [
            Item(
                "hub",
                f"hf:{one.repo}@{one.commit[:12]}",
                one.size,
                ", ".join(one.refs),
                not one.refs,
                one.remove,
                one.repo,
                one.commit,
            )
            for one in hub.cached_revisions()
        ]
    except HubError:
        return []


def chosen(items: list[Item], names: list[str]) -> list[Item]:
    """Items by name. Raises MissingFileError, InvalidArgumentError, UsageError."""
    found: list[Item] = []
    for name in names:
        matches = _of_hub(items, name) if name.startswith("hf:") else _by_beginning(items, name)
        if not matches:
            raise MissingFileError(f"the caches hold nothing that is called {name!r:.80}; 'pyengine models' lists it all")
        found += [item for item in matches if item not in found]
    return found


def _of_hub(items: list[Item], name: str) -> list[Item]:
    """A repository's revisions, or the one that is named, with what was frozen from them."""
    from pyengine import hub

    place = hub.parse(name)
    if place.file is not None:
        raise UsageError(f"{name}: a revision is removed as a whole; leave out :{place.file}")
    matches = [item for item in items if item.repo == place.repo and _is_revision(item, place.revision)]
    folder = f"/models--{place.repo.replace('/', '--')}/snapshots/"
    return matches + [item for item in items if any(folder + match.commit in item.origin for match in matches)]


def _is_revision(item: Item, revision: str | None) -> bool:
    """By a branch, a tag or (the beginning of) a commit; None = any."""
    if revision is None or revision in item.origin.split(", "):
        return True
    return len(revision) >= LEAST_COMMIT and item.commit.startswith(revision)


def _by_beginning(items: list[Item], name: str) -> list[Item]:
    """The frozen model of that name, or the only one that begins so. Raises InvalidArgumentError if several do."""
    own = [item for item in items if item.kind != "hub" and item.name.startswith(name)]
    exact = [item for item in own if item.name == name]
    if len(own) > 1 and not exact:
        raise InvalidArgumentError(f"{name} begins {len(own)} names: {', '.join(item.name for item in own)}")
    return exact or own


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if (args.action == "rm") != bool(args.names):
        raise UsageError("rm takes names" if args.action == "rm" else f"{args.action} takes no names")
    items = [*frozen_items(), *hub_items()]
    if args.action == "rm":
        items = chosen(items, args.names)
    elif args.action == "prune":
        items = [item for item in items if item.is_stale]
    if args.action != "list" and not args.dry_run:
        for item in items:
            item.remove()
    options.tolerant_stdout()
    total = sum(item.size for item in items)
    if args.json:
        print(json.dumps({"action": args.action, "models": [item.facts() for item in items], "bytes": total}))
        return 0
    if args.action == "list" and not items:
        from pyengine.freeze import cache

        say(f"nothing is kept, neither in {cache.cache_directory()} nor of the hub")
        return 0
    for item in items:
        stale = "  (stale)" if item.is_stale and args.action == "list" else ""
        say(f"{size_text(item.size):>10}  {item.kind:11}  {item.name}  {item.origin}{stale}".rstrip())
    done = {"list": "in all", "rm": "removed", "prune": "removed"}[args.action]
    say(f"{size_text(total):>10}  {done if not args.dry_run or args.action == 'list' else 'would be removed'}")
    return 0


def size_text(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size < 2**30 else f"{size / 2**30:.2f} GiB"
