"""Make data/resolved_configs.json: what transformers makes of special tokens and RoPE settings that are said in several places.

pip install 'transformers==5.24.*' && python tests/reference/make_resolved_configs.py

tokens   [{"tokenizer_config", "special_tokens_map" (either may be null), "bos", "eos": ids, null = none}, ...]
         for a tokenizer of 300 tokens, <|bos|> 256, <|end|> 257, "ab" 258, and ids in config.json that say otherwise
rope     [{"config": keys of config.json, "resolved": the rope_parameters that they come to}, ...]
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig

sys.path.insert(0, str(Path(__file__).parents[1]))
from engine.freeze_models import LLAMA, tokenizer_json

BOTH = {"bos_token": "<|bos|>", "eos_token": "<|end|>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
ADDED = {"__type": "AddedToken", "content": "<|bos|>", "lstrip": False, "rstrip": False, "single_word": False}
LISTED = {"added_tokens_decoder": {"256": {"content": "<|bos|>", "special": True}}}

TOKENS: list[tuple[dict[str, Any] | None, dict[str, Any] | None]] = [
    (BOTH, None),
    (FAST | BOTH, None),
    ({"tokenizer_class": "LlamaTokenizerFast"} | BOTH, None),
    ({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None, "eos_token": "<|end|>"}, None),
    ({"tokenizer_class": "Qwen2TokenizerFast"} | BOTH, None),
    ({"tokenizer_class": "GPT2Tokenizer", "bos_token": None, "eos_token": None}, None),
    (FAST | {"bos_token": None, "eos_token": "<|bos|>"}, None),
    (FAST | {"bos_token": ADDED, "eos_token": "<|end|>"}, None),
    (FAST | {"bos_token": "ab", "eos_token": "ab"}, None),
    (FAST, BOTH),
    (None, BOTH),
    (FAST | {"bos_token": "ab", "eos_token": "ab"}, BOTH),
    (FAST | {"bos_token": "ab", "eos_token": "ab"} | LISTED, BOTH),
    (FAST | BOTH, {"bos_token": {"content": "ab", "lstrip": False, "rstrip": False, "normalized": False}}),
]

DEFAULT = {"rope_type": "default", "rope_theta": 500000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE: list[dict[str, Any]] = [
    {},
    {"rope_theta": 5000.0},
    {"rope_parameters": DEFAULT},
    {"rope_parameters": DEFAULT, "rope_theta": 7.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0},
    {"rope_parameters": {}, "rope_theta": 9.0},
    {"rope_parameters": DEFAULT, "rope_scaling": None},
    {"rope_parameters": DEFAULT, "rope_scaling": {}},
    {"rope_parameters": DEFAULT, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_parameters": DEFAULT, "rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 77.0},
    {"rope_parameters": DEFAULT, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 8.0}},
    {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
    {"rope_scaling": {"factor": 2.0}},
    {"rope_scaling": {"rope_type": "llama3", "original_max_position_embeddings": 64, **LLAMA3}},
    {"rope_parameters": {"rope_type": "llama3", **LLAMA3}},
]


def resolved_tokens(settings: dict[str, Any] | None, tokens_map: dict[str, Any] | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "tokenizer.json").write_text(tokenizer_json())
        (directory / "config.json").write_text(json.dumps(LLAMA | {"bos_token_id": 5, "eos_token_id": 6}))
        for file, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", tokens_map)):
            if content is not None:
                (directory / file).write_text(json.dumps(content))
        tokenizer = AutoTokenizer.from_pretrained(directory)
    return {
        "tokenizer_config": settings,
        "special_tokens_map": tokens_map,
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }


def resolved_rope(config: dict[str, Any]) -> dict[str, Any]:
    before = json.loads(json.dumps(config))  # transformers writes into what it is given
    sizes = {"max_position_embeddings": LLAMA["max_position_embeddings"]}
    return {"config": before, "resolved": dict(LlamaConfig.from_dict(config | sizes).rope_parameters)}


def main() -> None:
    document = {
        "tokens": [resolved_tokens(*case) for case in TOKENS],
        "rope": [resolved_rope(case) for case in json.loads(json.dumps(ROPE))],
    }
    path = Path(__file__).parent / "data" / "resolved_configs.json"
    lines = [f'"{key}": [\n' + ",\n".join(map(json.dumps, cases)) + "\n]" for key, cases in document.items()]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
