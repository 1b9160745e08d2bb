"""One exception class per pe_status, one pe_status per class, and messages that say something."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyengine import _core, errors
from pyengine.format.config import LayerSpec

HEADER = Path(__file__).parents[2] / "csrc" / "pyengine.h"


def header_codes() -> dict[str, int]:
    """enum pe_status as written in pyengine.h, without the sentinel."""
    text = re.search(r"typedef enum pe_status \{(.*?)\} pe_status;", HEADER.read_text(), re.S)
    assert text is not None
    return {name: int(value) for name, value in re.findall(r"(PE_\w+) = (\d+)", text[1])}


def test_codes_are_contiguous_up_to_the_sentinel() -> None:
    codes = header_codes()
    assert sorted(codes.values()) == list(range(_core.status_count()))
    assert codes["PE_OK"] == 0


def test_every_code_has_exactly_one_class() -> None:
    codes = set(header_codes().values()) - {0}
    assert set(errors.STATUS_ERRORS) == codes
    assert len(set(errors.STATUS_ERRORS.values())) == len(codes)


@pytest.mark.parametrize("name, code", [(n, c) for n, c in header_codes().items() if c != 0])
def test_class_is_an_engine_error_and_a_builtin_where_one_fits(name: str, code: int) -> None:
    builtin: dict[str, type[Exception]] = {
        "PE_ERR_INVALID_ARGUMENT": ValueError,
        "PE_ERR_OUT_OF_MEMORY": MemoryError,
        "PE_ERR_FORMAT": ValueError,
        "PE_ERR_CONTEXT_FULL": ValueError,
        "PE_ERR_NOT_FINITE": ArithmeticError,
        "PE_ERR_SYSTEM": OSError,
        "PE_ERR_UNSUPPORTED_ISA": ValueError,
    }
    cls = errors.STATUS_ERRORS[code]
    assert issubclass(cls, errors.PyEngineError)
    assert issubclass(cls, builtin.get(name, errors.PyEngineError))
    assert cls.__doc__


def test_an_error_of_the_core_arrives_as_its_class_with_its_sentence() -> None:
    with pytest.raises(errors.UnsupportedISAError, match=r"'sse9' is unknown.*scalar"):
        _core.select_isa("sse9")
    names = ("dim", "hidden_dim", "n_heads", "n_kv_heads", "head_dim", "vocab_size", "max_seq_len")
    config = SimpleNamespace(**dict.fromkeys(names, 2), norm_eps=0.0, tie_embeddings=True, layers=[LayerSpec()] * 2)
    config.qkv_bias = config.o_bias = config.qk_norm = config.key_bias = config.qk_norm_all_heads = False
    config.attention_softcap = config.logits_softcap = 0.0
    config.n_experts = config.n_experts_used = config.experts_normalized = config.shared_hidden_dim = 0
    config.attention_sinks = config.router_bias = config.qk_norm_after_rope = False
    config.shared_gated = config.gate_up_bias = config.down_bias = config.output_bias = False
    with pytest.raises(errors.ModelFormatError, match=r"tok_embeddings\.codes is missing"):
        _core.Model(config, bytes(64), {})
    config.head_dim = 3
    with pytest.raises(errors.ModelFormatError, match="head_dim 3 is odd"):
        _core.Model(config, bytes(64), {})
    config.layers, config.head_dim = [LayerSpec(), LayerSpec(norm="layernorm")], 2
    with pytest.raises(errors.ModelFormatError, match="layer 1 has the norm layernorm"):
        _core.Model(config, bytes(64), {})
