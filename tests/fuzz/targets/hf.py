"""Hugging Face directories: every document changed, weights too, files missing or more than expected."""

from __future__ import annotations

import json
import random
import struct
from pathlib import Path
from typing import Any

from fuzz import mutations
from fuzz.cases import Case
from fuzz.mutations import words
from fuzz.targets import seeds
from fuzz.targets.template import template_source
from fuzz.targets.tokenizer import changed_tokenizer
from fuzz.targets.use import use

from pyengine.freeze import freeze, open_source
from pyengine.freeze.arch import ARCHITECTURES

_DOCUMENTS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
)
# sentence-transformers'
_SENTENCE = {
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode": "lasttoken", "include_prompt": False},
    "1_LogitScore/config.json": {"true_token_id": 70, "false_token_id": 71},
    "config_sentence_transformers.json": {"prompts": {"query": "q: ", "document": ""}, "default_prompt_name": "query"},
}
_CONFIG_KEYS = words("""
architectures attention_bias bos_token_id eos_token_id head_dim hidden_act layer_types max_window_layers mlp_bias model_type
num_key_value_heads original_max_position_embeddings partial_rotary_factor quantization_config rms_norm_eps rope_parameters
rope_scaling rope_theta sliding_window tie_word_embeddings use_sliding_window attention_multiplier attn_logit_softcapping
embedding_multiplier final_logit_softcapping hidden_activation logits_scaling no_rope_layer_interval no_rope_layers
query_pre_attn_scalar residual_multiplier rope_local_base_freq sliding_window_pattern activation_function clip_qkv
intermediate_size layer_norm_eps layer_rope_theta mlp_layer_types moe_intermediate_size moe_topk norm_eps norm_topk_prob
num_experts num_experts_per_tok num_local_experts rotary_emb_base rotary_pct shared_intermediate_size text_config
transformers_version use_parallel_residual use_post_norm
""")
_ROPE = [
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"type": "linear", "factor": 2.0},
    {"rope_type": "default", "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 2.0},
    {"full_attention": {"rope_type": "default"}},
]
_KINDS = [(one.hf, one.model_type) for one in ARCHITECTURES]
_AROUND = ["LlavaForConditionalGeneration", "InternVLForConditionalGeneration", "Exaone4_5_ForConditionalGeneration"]
_NAMES = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b.safetensors",
    "../x.safetensors",
    "\0.safetensors",
    ".safetensors",
]
_NAMES += ["\ud800.safetensors", "x" * 400 + ".safetensors", "/dev/zero.safetensors", "model.safetensors"]


class HFTarget:
    name = "hf"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""
        self._source, self._output = scratch / "hf", scratch / "m.safetensors"
        self._files = {dtype: seeds.hf_files(dtype) for dtype in ("F32", "F16", "BF16")}

    def make(self, rng: random.Random) -> Case:
        files = dict(self._files[rng.choice(list(self._files))])
        for _ in range(rng.choice([1, 1, 2])):
            kind = rng.randrange(14)
            if kind < 4:
                files["config.json"] = json.dumps(self._config(rng)).encode()
            elif kind < 8:
                name = rng.choice(_DOCUMENTS[1:])
                document = json.loads(self._files["F32"][name])
                changed = (
                    changed_tokenizer(rng, document) if name == "tokenizer.json" else self._settings(rng, document)
                )
                files[name] = json.dumps(changed).encode()
            elif kind == 8:
                files["chat_template.jinja"] = template_source(rng).encode("utf-8", "surrogatepass")
            elif kind == 9:
                files["model.safetensors.index.json"] = json.dumps(self._index(rng)).encode()
                files.pop("model.safetensors", None)
            elif kind == 10 and "model.safetensors" in files:
                files["model.safetensors"] = self._weights(rng)
            elif kind == 11 and files:
                files.pop(rng.choice(list(files)))
            elif kind == 12:
                name = rng.choice(list(_SENTENCE))
                files[name] = json.dumps(mutations.mutated(rng, _SENTENCE[name], rng.randrange(3))).encode()
            elif files:
                name = rng.choice(list(files))
                files[name] = mutations.mutated_bytes(rng, files[name], 3000)
        return Case(files, rng.random())

    def _config(self, rng: random.Random) -> Any:
        config = dict(seeds.CONFIG)
        if rng.random() < 0.3:
            config["architectures"], config["model_type"] = [(kind := rng.choice(_KINDS))[0]], kind[1]
        for _ in range(rng.randrange(3)):
            key = rng.choice(_CONFIG_KEYS)
            config[key] = (
                mutations.mutated(rng, rng.choice(_ROPE), rng.randrange(2))
                if "rope_" in key and rng.random() < 0.6
                else mutations.value(rng)
            )
        if rng.random() < 0.1:  # a text model as a part
            inside = config | {"model_type": rng.choice(["llama", "mistral", "qwen2", "qwen3", rng.choice(_KINDS)[1]])}
            kept = {key: value for key, value in config.items() if rng.random() < 0.3}
            config = kept | {"architectures": [rng.choice([*_AROUND, rng.choice(_KINDS)[0]])], "text_config": inside}
        return mutations.mutated(rng, config, rng.randrange(3))

    def _settings(self, rng: random.Random, document: dict[str, Any]) -> Any:
        if rng.random() < 0.3:
            named = [
                {"name": mutations.value(rng, 3), "template": mutations.value(rng, 3)},
                {"name": "default", "template": "x"},
            ]
            document["chat_template"] = rng.choice([named, template_source(rng), mutations.value(rng)])
        return mutations.mutated(rng, document)

    def _index(self, rng: random.Random) -> Any:
        names = [rng.choice([rng.choice(_NAMES), mutations.value(rng)]) for _ in range(rng.randrange(4))]
        return rng.choice(
            [
                {"weight_map": dict(enumerate(names))},
                {"weight_map": names},
                {"weight_map": mutations.value(rng)},
                mutations.value(rng),
            ]
        )

    def _weights(self, rng: random.Random) -> bytes:
        data = self._files["F16"]["model.safetensors"]
        length = int.from_bytes(data[:8], "little")
        header = mutations.mutated(rng, json.loads(data[8 : 8 + length]))
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    def run(self, case: Case) -> None:
        rng = random.Random(case.arguments)
        seeds.write_files(self._source, case.files)
        self.stage = "source"
        open_source(self._source).close()
        if rng.random() < 0.5:
            self.stage = "freeze"
            freeze(self._source, self._output, overwrite=True)
            use(self, self._output, rng)
