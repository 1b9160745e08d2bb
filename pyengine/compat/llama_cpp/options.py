"""Which of llama-cpp-python's arguments mean something here, which change nothing, and which are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, NoReturn

from pyengine.arguments import shown
from pyengine.errors import InvalidArgumentError, UnknownParameterError

DEFAULT_SEED = 0xFFFFFFFF  # llama.cpp's name for "a new one each time"

# How a machine is to do it: no result depends on these.
HINTS = frozenset({
    "n_gpu_layers", "split_mode", "main_gpu", "tensor_split", "use_mlock", "n_batch", "n_ubatch", "n_threads_batch",
    "offload_kqv", "flash_attn", "op_offload", "swa_full", "no_perf", "numa", "logits_all", "f16_kv", "mul_mat_q", "low_vram",
    "embedding",  # an engine that embeds generates as well
})  # fmt: skip


class Refused(NamedTuple):
    """An argument that is not supported, unless its value asks for nothing."""

    neutral: tuple[Any, ...]
    why: str


_ROPE = "a frozen model has its own RoPE table"
MODEL_REFUSED = {
    "vocab_only": Refused((False,), "a model is opened whole"),
    "kv_overrides": Refused((None, {}), "a frozen model is what its file says"),
    "rope_scaling_type": Refused((None, -1), _ROPE),
    "rope_freq_base": Refused((0.0,), _ROPE),
    "rope_freq_scale": Refused((0.0, 1.0), _ROPE),
    "yarn_ext_factor": Refused((-1.0,), _ROPE),
    "yarn_attn_factor": Refused((1.0,), _ROPE),
    "yarn_beta_fast": Refused((32.0,), _ROPE),
    "yarn_beta_slow": Refused((1.0,), _ROPE),
    "yarn_orig_ctx": Refused((0,), _ROPE),
    "attention_type": Refused((-1,), "attention is causal"),
    "last_n_tokens_size": Refused((64, -1), "penalties look at the whole text"),
    "lora_base": Refused((None,), "adapters are directories of PEFT: Engine.load_adapter loads one"),
    "lora_scale": Refused((1.0,), "adapters are directories of PEFT: Engine.load_adapter loads one"),
    "lora_path": Refused((None,), "adapters are directories of PEFT: Engine.load_adapter loads one"),
    "chat_handler": Refused((None,), "models read text only; chat_format names a template"),
    "tokenizer": Refused((None,), "a frozen model has its own tokenizer"),
    "spm_infill": Refused((False,), "a model's own order is used"),
}
CALL_REFUSED = {
    "tfs_z": Refused((1.0,), "tail-free sampling is not supported"),
    "mirostat_mode": Refused((0,), "mirostat is not supported"),
    "functions": Refused((None, []), "use tools"),
    "function_call": Refused((None, "none", "auto"), "use tool_choice"),
}
POOLING_UNSPECIFIED = -1
_POOLINGS: dict[int, Literal["mean", "last"] | None] = {
    POOLING_UNSPECIFIED: None,
    1: "mean",
    3: "last",
}  # llama.cpp's numbers
_KV_DTYPES = {(None, None): "int8", (8, 8): "int8", (0, 0): "f32"}  # ggml's numbers: 0 F32, 8 Q8_0


def check_refused(given: Mapping[str, Any], table: Mapping[str, Refused]) -> None:
    """Raises InvalidArgumentError naming the first argument that asks for something that there is not."""
    for name, value in given.items():
        if name in table and not any(value is item or value == item for item in table[name].neutral):
            refuse(f"{name}={shown(value)}", table[name].why)


def check_model_arguments(given: Mapping[str, Any]) -> None:
    """Arguments of the constructor that it does not use itself. Raises InvalidArgumentError, UnknownParameterError."""
    for name in given:
        if name not in HINTS and name not in MODEL_REFUSED:
            raise UnknownParameterError(f"Llama takes no argument {shown(name)}")
    check_refused(given, MODEL_REFUSED)


def refuse(what: str, why: str) -> NoReturn:
    raise InvalidArgumentError(f"{what} is not supported: {why}")


def kv_dtype(type_k: int | None, type_v: int | None) -> Any:
    """ "int8" or "f32". Raises InvalidArgumentError for what the cache cannot be."""
    if (type_k, type_v) not in _KV_DTYPES:
        refuse(
            f"type_k={shown(type_k)}, type_v={shown(type_v)}", "keys and values are both int8 (8) or both float32 (0)"
        )
    return _KV_DTYPES[type_k, type_v]


def pooling(number: int) -> Literal["mean", "last"] | None:
    """What Engine.embed calls it. Raises InvalidArgumentError."""
    if number not in _POOLINGS:
        refuse(f"pooling_type={shown(number)}", "a text has one vector, the mean (1) or that of the last token (3)")
    return _POOLINGS[number]
