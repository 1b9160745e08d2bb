"""Make data/lora/*.npz: adapters for models of data/, as PEFT writes them, and what transformers with PEFT computes in float32.

    pip install '.[oracle]' && python tests/reference/make_lora_fixtures.py [NAME ...]

A fixture has the name of its model, and holds (keys of the .npz)
    config            adapter_config.json, the file's text
    tensors/<name>    the tensors of adapter_model.safetensors, float32
    logits            (n_rows, vocab_size) float32, at the model's own `rows`

What an adapter adds is about half as large as what its matrix gives: in a comparison of logits, a product that is missing,
shifted by a row or scaled twice is far outside of any tolerance.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import fixtures
from reference.fixture_models import LOUD_CHANNELS, LOUDNESS, MAGNITUDES

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "llama_untied": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "qwen2": {"r": 6, "lora_alpha": 5, "target_modules": ATTENTION, "use_rslora": True},
    "granite": {"r": 4, "lora_alpha": 8, "target_modules": ALL},
    "gemma2": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj", "up_proj"]},
}
GRID = 2.0**-10  # compresses


def randomize(name: str, weight: torch.nn.Parameter, is_a: bool, width: int, generator: torch.Generator) -> None:
    noise = torch.randn(weight.shape, generator=generator)
    value = noise / weight.shape[1] ** 0.5 if is_a else 0.3 / weight.shape[1] ** 0.5 * noise
    if is_a and name in MAGNITUDES and weight.shape[1] == width:
        value[:, list(LOUD_CHANNELS)] /= LOUDNESS  # who reads the stream is used to them
    weight.data.copy_((value / GRID).round() * GRID)


def make(name: str, options: dict[str, Any]) -> None:
    fixture = fixtures.load(name)
    config = AutoConfig.for_model(**json.loads(json.dumps(fixture.hf_config)))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    weights = {key: torch.from_numpy(w.astype(np.float32)) for key, w in fixture.hf_weights.items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and all(key == "lm_head.weight" for key in missing)
    tokens = torch.from_numpy(fixture.token_ids.astype(np.int64))[None]
    with torch.no_grad():
        assert np.allclose(model(tokens).logits[0].numpy()[fixture.rows], fixture.logits, atol=1e-4)
    tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    for key, parameter in tuned.named_parameters():
        if "lora_" in key:
            randomize(name, parameter, "lora_A" in key, config.hidden_size, generator)
    with torch.no_grad():
        logits = tuned.eval()(tokens).logits[0].numpy()[fixture.rows]
    with tempfile.TemporaryDirectory() as directory:
        tuned.save_pretrained(directory)
        text = (Path(directory) / "adapter_config.json").read_text()
        tensors = load_file(Path(directory) / "adapter_model.safetensors")
    path = fixtures.DATA / "lora" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(
        path, config=np.array(text), logits=logits, **{f"tensors/{key}": tensor for key, tensor in tensors.items()}
    )
    print(f"{name}: {path.stat().st_size} bytes, logits moved by {np.abs(logits - fixture.logits).mean():.2f}")


def main() -> None:
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ADAPTERS:
        make(name, ADAPTERS[name])


if __name__ == "__main__":
    main()
