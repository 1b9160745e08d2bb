"""Models by name from a hub: a server on the loopback that speaks its protocol, the real huggingface_hub in between."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")

import huggingface_hub
import huggingface_hub.constants
from engine.cli_tools import write_talker
from engine.hub_server import Hub, serving

from pyengine import Engine, HubError, InvalidArgumentError, PyEngineError, UnsupportedModelError, hub
from pyengine.cli import main
from pyengine.compat.llama_cpp import Llama
from pyengine.freeze import freeze
from pyengine.opening import DEFAULT_MODEL

REPO = "tiny/talker"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a model as a repository has them, with some that nobody needs."""
    directory = write_talker(tmp_path_factory.mktemp("talker") / "hf", 64)
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    return {**files, "README.md": b"# A model", "pytorch_model.bin": b"\x80\x04.", "onnx/model.safetensors": b"no"}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub, and a cache of its own for each test."""
    with serving(Hub()) as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        if not huggingface_hub.hf_hub_url("a/b", "c").startswith(hub.url):
            pytest.skip("this huggingface_hub takes its address from elsewhere, and tests use no network")
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("PYENGINE_CACHE", str(tmp_path / "frozen"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub


@contextmanager
def offline(monkeypatch: pytest.MonkeyPatch, how: str) -> Iterator[None]:
    """By the library's own switch, or at an address that is taken and where nobody listens."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        if how == "switch":
            monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        else:
            address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
            monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
        yield


# ------------------------------------------------------------------ names


def test_names() -> None:
    assert hub.parse("hf:org/name") == hub.HubModel("org/name")
    assert hub.parse("hf:org/name@refs/pr/1:q4/model.gguf") == hub.HubModel("org/name", "refs/pr/1", "q4/model.gguf")
    for text in ("hf:org/name", "hf:org/name@v1", "hf:org/name:a.gguf", "hf:org/name@v1:a.gguf"):
        assert str(hub.parse(text)) == text
    assert hub.parse("hf:org/name:").label == "name"


@pytest.mark.parametrize("text", ["hf:", "hf:a/b/c", "hf:../x", "hf:a b", "hf:a/b@", "hf:a/b@../../x", "hf:a/b:../x.gguf",
                                  "hf:a/b:/etc/x.gguf", "hf:a/b:README.md"])  # fmt: skip
def test_names_that_are_none(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        hub.parse(text)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.pt", "a.pth", "x.pkl"])
def test_pickles_are_refused_by_name(file: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{file}: pickled"):
        Engine.from_pretrained("org/name", file=file)


# ------------------------------------------------------------------ what is fetched


def test_a_directory_is_fetched_once_without_pickles(server: Hub, talker: dict[str, bytes], tmp_path: Path) -> None:
    server.add(REPO, talker)
    with Engine(write_talker(tmp_path / "local", 64)) as local, Engine(f"hf:{REPO}") as engine:
        assert engine.generate("hello", max_tokens=8).tokens == local.generate("hello", max_tokens=8).tokens
        assert engine.metadata["name"] == "talker" and engine.path.name.startswith("talker-")
        again = Engine.from_pretrained(REPO, revision="main", n_ctx=32)
        assert again.path == engine.path and again.n_ctx == 32
    wanted = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}
    assert sorted(server.fetched()) == sorted(wanted)


def test_shards_are_those_that_the_index_names(server: Hub, talker: dict[str, bytes]) -> None:
    shards = {"model-00001-of-00001.safetensors": talker["model.safetensors"], "consolidated.safetensors": b"other"}
    index = {"weight_map": {"any": "model-00001-of-00001.safetensors"}}
    files = {name: data for name, data in talker.items() if name != "model.safetensors"}
    server.add(REPO, {**files, **shards, "model.safetensors.index.json": json.dumps(index).encode()})
    directory = hub.fetch(hub.HubModel(REPO))
    assert (directory / "model-00001-of-00001.safetensors").is_file()
    assert "consolidated.safetensors" not in server.fetched() and "pytorch_model.bin" not in server.fetched()


def test_an_architecture_that_is_not_known_costs_no_weights(server: Hub, talker: dict[str, bytes]) -> None:
    config = {**json.loads(talker["config.json"]), "architectures": ["MambaForCausalLM"]}
    server.add(REPO, {**talker, "config.json": json.dumps(config).encode()})
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM"):
        Engine(f"hf:{REPO}")
    assert server.fetched() == ["config.json"]


def test_the_one_gguf_file_or_the_one_that_is_named(server: Hub) -> None:
    server.add("tiny/one", {"a.gguf": b"GGUF1", "README.md": b""})
    assert hub.fetch(hub.HubModel("tiny/one")).read_bytes() == b"GGUF1"
    server.add("tiny/many", {"q4/a.gguf": b"GGUF4", "a-q8.gguf": b"GGUF8"})
    with pytest.raises(
        InvalidArgumentError, match=r"2 GGUF files; name one, as in hf:tiny/many:a-q8.gguf: a-q8.gguf, q4/a.gguf"
    ):
        hub.fetch(hub.HubModel("tiny/many"))
    assert hub.fetch(hub.parse("hf:tiny/many:q4/a.gguf")).read_bytes() == b"GGUF4"
    with pytest.raises(HubError, match=r"no file b.gguf; it has: a-q8.gguf, q4/a.gguf"):
        hub.fetch(hub.parse("hf:tiny/many:b.gguf"))
    parts = {f"m-0000{i}-of-00002.gguf": b"GGUF" + bytes([i]) for i in (1, 2)}
    server.add("tiny/split", parts)
    first = hub.fetch(hub.HubModel("tiny/split"))
    assert first.name == "m-00001-of-00002.gguf" and first.with_name("m-00002-of-00002.gguf").is_file()
    server.add("tiny/pickle", {"config.json": b"{}", "pytorch_model.bin": b""})
    with pytest.raises(UnsupportedModelError, match="pickled weights"):
        hub.fetch(hub.HubModel("tiny/pickle"))


def test_a_frozen_file_and_llama_cpps_patterns(server: Hub) -> None:
    frozen = Path(DEFAULT_MODEL).read_bytes()
    server.add("tiny/frozen", {"stories.safetensors": frozen, "notes.txt": b""})
    with Engine("hf:tiny/frozen:stories.safetensors") as engine, Engine() as own:
        assert engine.generate("A", max_tokens=4, seed=1).text == own.generate("A", max_tokens=4, seed=1).text
    assert Llama.from_pretrained(repo_id="tiny/frozen", filename="*.safetensors", verbose=False).n_vocab() == 4096
    with pytest.raises(InvalidArgumentError, match=r"'\*q8_0.gguf' matches 0 files of tiny/frozen"):
        Llama.from_pretrained(repo_id="tiny/frozen", filename="*q8_0.gguf")


def test_revisions(server: Hub, talker: dict[str, bytes]) -> None:
    old = server.add(REPO, {"a.gguf": b"GGUF-old"})
    server.add(REPO, {"a.gguf": b"GGUF-new"})
    assert hub.fetch(hub.HubModel(REPO)).read_bytes() == b"GGUF-new"
    assert hub.fetch(hub.HubModel(REPO, old)).read_bytes() == b"GGUF-old"
    with pytest.raises(HubError, match=f"{REPO} has no revision v9"):
        hub.fetch(hub.HubModel(REPO, "v9"))


# ------------------------------------------------------------------ offline


@pytest.mark.parametrize("how", ["switch", "nobody listens"])
def test_offline_what_was_fetched_before_is_used(server: Hub, talker: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
                                                 how: str) -> None:  # fmt: skip
    server.add(REPO, talker)
    first = hub.fetch(hub.HubModel(REPO))
    with offline(monkeypatch, how):
        assert hub.fetch(hub.HubModel(REPO)) == first
        with pytest.raises(HubError, match=r"hf:tiny/other is not on this machine .* and the hub cannot be asked"):
            Engine("hf:tiny/other")
        with pytest.raises(HubError, match="hf:tiny/talker@v2 is not on this machine"):
            Engine(f"hf:{REPO}@v2")
        (first / "model.safetensors").unlink()
        with pytest.raises(HubError, match=r"not on this machine .* as a whole, .*; missing: model.safetensors"):
            hub.fetch(hub.HubModel(REPO))


def test_a_hub_that_is_down_is_as_good_as_none(server: Hub, talker: dict[str, bytes]) -> None:
    server.add(REPO, talker)
    first = hub.fetch(hub.HubModel(REPO))
    server.answers["/api/models"] = (502, "")
    assert hub.fetch(hub.HubModel(REPO)) == first


# ------------------------------------------------------------------ what goes wrong, one line each


@pytest.mark.parametrize(
    ("where", "status", "code", "message"),
    [
        ("/api/models", 401, "", "hf:tiny/talker: there is no such model, or it is private: .*HF_TOKEN"),
        ("/api/models", 403, "GatedRepo", "access is not granted; accept its terms at .*/tiny/talker"),
        ("/api/models", 404, "RepoNotFound", "there is no such model"),
        ("/api/models", 429, "", "too many requests"),
        ("/api/models", 418, "", "hf:tiny/talker: .*418"),
        ("/resolve/", 403, "GatedRepo", "hf:tiny/talker, config.json: access is not granted"),
        ("/model.safetensors", 404, "EntryNotFound", "model.safetensors: the file is gone; .* run it again"),
    ],
)
def test_refusals(server: Hub, talker: dict[str, bytes], where: str, status: int, code: str, message: str) -> None:
    server.add(REPO, talker)
    server.answers[where] = (status, code)
    with pytest.raises(HubError, match=message) as caught:
        Engine(f"hf:{REPO}")
    assert "\n" not in str(caught.value)


def test_half_a_file_is_said_and_fetched_again(server: Hub, talker: dict[str, bytes]) -> None:
    server.add(REPO, talker)
    server.cut.add("model.safetensors")
    with pytest.raises(HubError, match=r"model.safetensors: the download is not whole .*; run it again"):
        Engine(f"hf:{REPO}")
    server.cut.clear()
    Engine(f"hf:{REPO}").close()


def test_a_revision_that_moves_in_the_middle(
    server: Hub, talker: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add(REPO, talker)
    listing = huggingface_hub.HfApi.model_info

    def moving(*args: object, **kwargs: object) -> object:
        info = listing(*args, **kwargs)
        server.add(REPO, {**talker, "README.md": b"changed"})
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", moving)
    with pytest.raises(HubError, match=r"moved to commit .* meanwhile: run it again"):
        hub.fetch(hub.HubModel(REPO))


def test_a_full_disk(server: Hub, talker: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    server.add(REPO, talker)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", full)
    with pytest.raises(HubError, match=r"no space left in .*; HF_HOME names another place"):
        Engine(f"hf:{REPO}")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(hub, "import_module", absent)
    with pytest.raises(HubError, match=r"pip install 'pyengine-lm\[hub\]'"):
        Engine("hf:tiny/talker")
    assert issubclass(HubError, PyEngineError) and issubclass(HubError, OSError)


# ------------------------------------------------------------------ pyengine models


def models(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[tuple[str, str]]:
    """(kind, name) of what the command says."""
    capsys.readouterr()
    assert main(["models", *arguments, "--json"]) == 0
    return [(item["kind"], item["name"]) for item in json.loads(capsys.readouterr().out)["models"]]


def test_models_are_listed_and_removed(server: Hub, talker: dict[str, bytes], capsys: pytest.CaptureFixture[str],
                                       tmp_path: Path) -> None:  # fmt: skip
    commit = server.add(REPO, talker)
    assert models(capsys) == []
    assert main(["models"]) == 0 and capsys.readouterr().out.startswith("nothing is kept, neither in ")
    with Engine(f"hf:{REPO}") as engine:
        frozen = engine.path.name
    local = write_talker(tmp_path / "local", 64)
    with Engine(local) as engine:
        other = engine.path.name
    fetched = ("hub", f"hf:{REPO}@{commit[:12]}")
    assert models(capsys) == [("frozen", other), ("frozen", frozen), fetched]
    assert models(capsys, "prune") == []
    assert main(["models"]) == 0
    listed = capsys.readouterr().out
    assert str(local) in listed and "in all" in listed
    assert models(capsys, "rm", f"hf:{REPO}", "--dry-run") == [fetched, ("frozen", frozen)]
    assert models(capsys, "rm", f"hf:{REPO}") == [fetched, ("frozen", frozen)]
    assert models(capsys) == [("frozen", other)]
    assert models(capsys, "rm", other[:7]) == [("frozen", other)]
    assert main(["models", "rm", "nothing"]) == 1 and "nothing that is called 'nothing'; " in capsys.readouterr().err
    assert main(["models", "rm"]) == 2 and main(["models", "list", "x"]) == 2


def test_revisions_are_removed_by_their_names(server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    commits = [server.add("tiny/gguf", {"a.gguf": b"GGUF" + bytes([i])}, branch) for i, branch in enumerate("xyz")]
    for branch in "xyz":
        hub.fetch(hub.HubModel("tiny/gguf", branch))
    shown = [("hub", f"hf:tiny/gguf@{commit[:12]}") for commit in commits]
    for name, gone in (("x", shown[0]), (commits[1], shown[1]), (commits[2][:12], shown[2])):
        assert models(capsys, "rm", f"hf:tiny/gguf@{name}", "--dry-run") == [gone]
    assert main(["models", "rm", f"hf:tiny/gguf@{commits[0][:1]}"]) == 1  # not every commit that begins so
    assert main(["models", "rm", "hf:tiny/gguf:a.gguf"]) == 2 and "leave out :a.gguf" in capsys.readouterr().err
    assert sorted(models(capsys)) == sorted(shown)


def test_prune_removes_what_no_run_will_use_again(server: Hub, talker: dict[str, bytes], capsys: pytest.CaptureFixture[str],
                                                  tmp_path: Path) -> None:  # fmt: skip
    local = write_talker(tmp_path / "local", 64)
    with Engine(local) as engine:
        old = engine.path
    write_talker(local, 32)  # the source changes
    with Engine(local) as engine:
        new = engine.path
    left = old.with_name(f".{old.name}.0123456789abcdef.partial")
    left.write_bytes(b"half")
    damaged = old.with_name("other-0123456789abcdef01234567.safetensors")
    freeze(local, damaged)
    damaged.write_bytes(damaged.read_bytes()[:100])
    server.add("tiny/gguf", {"a.gguf": b"GGUF-old"})
    hub.fetch(hub.HubModel("tiny/gguf"))
    server.add("tiny/gguf", {"a.gguf": b"GGUF-new"})
    hub.fetch(hub.HubModel("tiny/gguf"))
    stale = [name for _, name in models(capsys, "prune", "--dry-run")]
    assert stale[:3] == [old.name, damaged.name, left.name] and len(stale) == 4 and stale[3].startswith("hf:tiny/gguf@")
    assert [name for _, name in models(capsys, "prune")] == stale
    kept = [name for _, name in models(capsys)]
    assert kept[0] == new.name and len(kept) == 2 and not left.exists()
    assert hub.fetch(hub.HubModel("tiny/gguf")).read_bytes() == b"GGUF-new"
