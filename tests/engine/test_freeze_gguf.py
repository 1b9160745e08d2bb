"""GGUF models of strangers: metadata of wrong types and sizes, models in parts, pointers instead of files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engine.freeze_models import weight_bytes
from engine.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    N_TOKENS,
    STRING,
    U8,
    U16,
    U32,
    U64,
    Value,
    bpe_keys,
    model_bytes,
    model_keys,
    spm_keys,
    write_split,
)

from pyengine.errors import ModelFormatError, PyEngineError, UnsupportedModelError
from pyengine.format.reader import FrozenFile
from pyengine.freeze import freeze, frozen_cache_path, open_source


def frozen(tmp_path: Path, changes: dict[str, Value | None], **options: Any) -> FrozenFile:
    path = tmp_path / "small.gguf"
    path.write_bytes(model_bytes(changes, **options))
    return FrozenFile.open(freeze(path, tmp_path / "m", overwrite=True))


# ---------------------------------------------------------------------------- metadata of any type

VALUES: list[Value] = [
    (U8, 0), (U32, 0), (U32, 1), (U32, 300), (U32, 2**32 - 1), (U64, 2**64 - 1), (I32, -1), (F32, 0.0), (F32, float("inf")),
    (F32, float("nan")), (F32, -1.0), (F64, 1e300), (BOOL, True), (STRING, ""), (STRING, "llama"), (STRING, "x" * 1000),
    (ARRAY, (U32, [])), (ARRAY, (U32, [1, 2])), (ARRAY, (U32, [2, 2])), (ARRAY, (STRING, [])), (ARRAY, (STRING, ["a"])),
    (ARRAY, (STRING, ["a"] * N_TOKENS)), (ARRAY, (F32, [float("nan")] * N_TOKENS)), (ARRAY, (F32, [float("inf")] * N_TOKENS)),
    (ARRAY, (BOOL, [True] * N_TOKENS)), (ARRAY, (U64, [2**64 - 1] * N_TOKENS)), (ARRAY, (I32, [1] * N_TOKENS)),
]  # fmt: skip

KEYS = sorted(
    {*model_keys(), *model_keys(spm_keys()), "general.alignment", "split.no", "split.count", "split.tensors.count",
     *(f"llama.{key}" for key in (
         "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.causal",
         "attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
         "rope.scaling.factor", "rope.scaling.original_context_length", "vocab_size", "expert_count", "pooling_type")),
     *(f"tokenizer.ggml.{key}" for key in (
         "add_bos_token", "add_eos_token", "add_space_prefix", "unknown_token_id", "eot_token_id", "eom_token_id"))}
)  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
def test_any_value_of_any_key(tmp_path: Path, tokenizer: str, key: str) -> None:
    """Refused with one of our errors, or a file that opens."""
    path = tmp_path / "small.gguf"
    for value in [None, *VALUES]:
        path.write_bytes(model_bytes({key: value}, tokenizer=bpe_keys() if tokenizer == "bpe" else spm_keys()))
        try:
            open_source(path).close()
        except PyEngineError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokenizer.ggml.pre": (ARRAY, (U32, [1, 2]))}, r"tokenizer\.ggml\.pre must be a string"),
        ({"tokenizer.ggml.pre": (ARRAY, (STRING, ["a"]))}, r"tokenizer\.ggml\.pre must be a string"),
        ({"tokenizer.ggml.model": (ARRAY, (U32, [1, 2]))}, r"tokenizer\.ggml\.model must be a string"),
        ({"general.architecture": (ARRAY, (U32, [1, 2]))}, r"general\.architecture must be a string"),
        ({"llama.block_count": (STRING, "1")}, r"llama\.block_count must be an integer"),
        ({"llama.rope.freq_base": (F32, float("nan"))}, r"llama\.rope\.freq_base must be a finite number"),
        ({"llama.attention.layer_norm_rms_epsilon": (F64, 1e300)}, "norm_eps"),
        ({"split.count": (STRING, "3")}, r"split\.count must be an integer"),
    ],
)
def test_wrong_types_are_named(tmp_path: Path, changes: dict[str, Value | None], match: str) -> None:
    with pytest.raises(ModelFormatError, match=match):
        frozen(tmp_path, changes)


@pytest.mark.parametrize(
    "scores", [(STRING, ["x"] * N_TOKENS), (BOOL, [True] * N_TOKENS), (F32, [float("nan")] * N_TOKENS)]
)
def test_scores_must_be_numbers(tmp_path: Path, scores: tuple[int, list[Any]]) -> None:
    with pytest.raises(ModelFormatError, match=r"scores must be an array of numbers"):
        frozen(tmp_path, {"tokenizer.ggml.scores": (ARRAY, scores)}, tokenizer=spm_keys())


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.padding_token_id": (U32, N_TOKENS)},  # a fine-tune that added one without an embedding
        {"tokenizer.ggml.unknown_token_id": (U32, 2**32 - 1)},
        {"tokenizer.ggml.unknown_token_id": (I32, -1)},
        {"tokenizer.ggml.eot_token_id": (U32, 2**32 - 1)},
        {"tokenizer.ggml.eom_token_id": (U32, 100_000)},
        {"tokenizer.ggml.mask_token_id": (U32, 2**32 - 1)},
        {"general.name": (ARRAY, (U32, [1, 2]))},
        {"general.quantization_version": (F32, float("nan"))},
        {"llama.attention.sliding_window": (U32, 2**32 - 1)},
        {"llama.context_length": (U32, 2**31)},
        {"llama.rope.scaling.type": (STRING, "linear"), "llama.rope.scaling.factor": (F32, 0.0)},
        {"llama.rope.scale_linear": (F32, 0.0)},
        {"llama.vocab_size": (U32, 2**32 - 1)},
    ],
)
def test_harmless_metadata_out_of_range_is_ignored(tmp_path: Path, changes: dict[str, Value | None]) -> None:
    plain = weight_bytes(freeze(_written(tmp_path / "plain.gguf", {}), tmp_path / "plain"))
    with frozen(tmp_path, changes) as file:
        assert file.config.layers[0].window == 0 and file.config.eos_token_ids == (257,)
    assert weight_bytes(tmp_path / "m") == plain


def _written(path: Path, changes: dict[str, Value | None]) -> Path:
    path.write_bytes(model_bytes(changes))
    return path


@pytest.mark.parametrize(("kind", "pooling"), [(0, None), (1, "mean"), (2, None), (3, "last"), (99, None)])
def test_how_embeddings_are_pooled(tmp_path: Path, kind: int, pooling: str | None) -> None:
    with frozen(tmp_path, {"llama.pooling_type": (U32, kind)}) as file:
        assert file.config.extra.get("pooling") == pooling


def test_bos_minus_one_is_none(tmp_path: Path) -> None:
    with frozen(tmp_path, {"tokenizer.ggml.bos_token_id": (U32, 2**32 - 1)}) as file:
        assert file.config.bos_token_id is None
    for value in ((U32, N_TOKENS), (I32, -1), (STRING, "256")):
        with pytest.raises(ModelFormatError, match=r"bos_token_id .* is not a token of 300"):
            frozen(tmp_path, {"tokenizer.ggml.bos_token_id": value})


# ---------------------------------------------------------------------------- time and memory

BOUNDED = """
import resource, sys
from pyengine.errors import ModelFormatError
from pyengine.freeze import open_source
open_source  # imported; what follows is the file's own
resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
try:
    open_source(sys.argv[1]).close()
except ModelFormatError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "pieces",
    [
        ["a" * (1 << 20)],  # the splits of one piece are as many as it has characters, and as long
        ["a" * 300_000],
        ["a" * i for i in range(1, N_TOKENS + 1)] + ["b" * 16_000],
    ],
    ids=["1MB", "300KB", "many"],
)
def test_long_pieces_are_refused_before_they_are_split(tmp_path: Path, pieces: list[str]) -> None:
    tokens = [*pieces, *(f"[{i}]" for i in range(N_TOKENS))][:N_TOKENS]
    tokenizer = spm_keys() | {"tokenizer.ggml.tokens": (ARRAY, (STRING, tokens))}
    tokenizer["tokenizer.ggml.token_type"] = (ARRAY, (I32, [1] * N_TOKENS))
    path = tmp_path / "m.gguf"
    path.write_bytes(model_bytes({"tokenizer.ggml.bos_token_id": None}, tokenizer=tokenizer))
    done = subprocess.run(
        [sys.executable, "-c", BOUNDED, str(path)], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert len(pieces) > 1 or "too long" in done.stdout


def test_every_substring_a_piece_stays_within_bounds() -> None:
    """n pieces "a", "aa", … have n^2 / 2 merges of n / 2 characters."""
    from pyengine.freeze.tokenizer import merges_from_scores

    pieces = ["a" * (i + 1) for i in range(300)]
    assert len(merges_from_scores(pieces, [0.0] * 300)) == 299 * 300 // 2
    pieces = ["a" * (i + 1) for i in range(900)]
    with pytest.raises(ModelFormatError, match=r"too many merges|too long"):
        merges_from_scores(pieces, [0.0] * 900)


# ---------------------------------------------------------------------------- models in parts


@pytest.mark.parametrize("n_parts", [2, 3, 11])
def test_a_split_model_is_read_whole_by_any_of_its_parts(tmp_path: Path, n_parts: int) -> None:
    whole = weight_bytes(freeze(_written(tmp_path / "whole.gguf", {}), tmp_path / "whole"))
    for part in write_split(tmp_path / "split", n_parts):
        assert weight_bytes(freeze(part, tmp_path / "m", overwrite=True)) == whole


def test_missing_parts_are_named(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "m", 3)
    before = frozen_cache_path(parts[0])
    parts[1].unlink()
    assert frozen_cache_path(parts[0]) != before
    for part in (parts[0], parts[2]):
        with pytest.raises(ModelFormatError, match=r"part 2 of 3 is missing: m-00002-of-00003\.gguf"):
            freeze(part, tmp_path / "out")
    for name in ("other.gguf", "m-00001-of-00002.gguf", "m-00003-of-00003.gguf"):
        path = tmp_path / name
        path.write_bytes(parts[0].read_bytes())
        with pytest.raises(ModelFormatError, match="part 1 of 3"):
            freeze(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({1: {"split.no": (U16, 2)}}, "not part 2 of 3"),
        ({1: {"split.count": (U16, 2)}}, "not part 2 of 3"),
        ({2: {"split.no": (U16, 7)}}, "part 8 of 3"),
        ({0: {"split.tensors.count": (I32, 5)}}, "11 tensors in all parts, it claims 5"),
        ({0: {"split.count": (U16, 0)}}, "missing"),  # then it says that it is whole
    ],
)
def test_parts_that_contradict_each_other(tmp_path: Path, changes: dict[int, dict[str, Value]], match: str) -> None:
    parts = write_split(tmp_path / "m", 3, changes)
    with pytest.raises(ModelFormatError, match=match):
        freeze(parts[0], tmp_path / "out")


def test_a_tensor_in_two_parts(tmp_path: Path) -> None:
    parts = write_split(tmp_path / "m", 2)
    split: dict[str, Value | None] = {"split.no": (U16, 1), "split.count": (U16, 2)}
    parts[1].write_bytes(model_bytes(dict.fromkeys(model_keys()) | split))
    with pytest.raises(ModelFormatError, match="is in another part too"):
        freeze(parts[0], tmp_path / "out")


def test_an_unknown_architecture_key_is_still_refused(tmp_path: Path) -> None:
    """Harmless is what no arithmetic depends on."""
    with pytest.raises(UnsupportedModelError, match=r"llama\.logit_scale"):
        frozen(tmp_path, {"llama.logit_scale": (F32, 2.0)})
