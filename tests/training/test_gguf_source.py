"""A GGUF file as the model that a run begins from: the same weights, the same tokens, the same run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")
pytest.importorskip("pyengine.freeze", reason="a GGUF file is read by the engine's freeze package")

import gguf
from pyengine_training import checkpoint as checkpoints
from pyengine_training.__main__ import main
from pyengine_training.checkpoint import hf_tensors
from pyengine_training.config import ModelConfig
from pyengine_training.errors import CheckpointError
from pyengine_training.files import load_safetensors
from pyengine_training.gguf_source import model_config_of, model_folder

MODEL = ModelConfig(320, 32, 2, 2, 1, 16, 64, 64, norm_eps=1e-5, rope_theta=20000.0)
KNOBS = "--seq-len 64 --batch-size 4 --shards 2 --steps 3 --sample-every 0 --eval-documents 4"
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def folder(write_chat_model: Callable[[Path, ModelConfig], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as Hugging Face has it."""
    return write_chat_model(tmp_path_factory.mktemp("model") / "hf", MODEL)


def gguf_name(name: str) -> str:
    whole = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in whole:
        return f"{whole[stem]}.weight"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[rest]}.weight"


def write_gguf(path: Path, folder: Path, template: str, *, q8: bool = False, **keys: float) -> dict[str, Any]:
    """With the format's own writer, rows of q and k interleaved as its converter does; returns the values that the file holds."""
    c, writer = checkpoints.read_model_config(folder), gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_seq_len)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_head_count(c.n_heads)
    writer.add_head_count_kv(c.n_kv_heads)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    for key, value in keys.items():
        writer.add_float32(f"llama.{key}", value)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {token["id"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([3 if number in special else 1 for _, number in vocab])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_chat_template(template)
    held = {}
    for name, weight in load_safetensors(folder / "model.safetensors").items():
        if q8 and weight.ndim == 2:
            blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)
            weight = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
        held[name] = weight
        for part, heads in (("q_proj", c.n_heads), ("k_proj", c.n_kv_heads)):
            if part in name:
                halves = weight.reshape(heads, 2, c.head_dim // 2, c.dim)
                weight = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
        if q8 and weight.ndim == 2:
            blocks = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q8_0)  # of values that have codes: exact
            writer.add_tensor(gguf_name(name), blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(gguf_name(name), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


@pytest.mark.parametrize("q8", [False, True], ids=["F32", "Q8_0"])
def test_the_folder_holds_the_files_values(folder: Path, chat_template: str, tmp_path: Path, q8: bool) -> None:
    source, unpacked = tmp_path / "m.gguf", tmp_path / "unpacked"
    held = write_gguf(source, folder, chat_template, q8=q8)
    assert model_config_of(source) == model_config_of(folder) == MODEL
    assert model_folder(folder, unpacked) == folder and not unpacked.exists()
    assert model_folder(source, unpacked) == unpacked
    config, params = checkpoints.load_model(unpacked)
    assert config == MODEL
    for name, weight in hf_tensors(params, config).items():
        np.testing.assert_array_equal(weight, held[name], err_msg=name)
    assert checkpoints.special_ids(unpacked) == (1, 2)


def test_a_run_from_either_is_the_same(folder: Path, chat_template: str, tmp_path: Path) -> None:
    source, chats = tmp_path / "m.gguf", tmp_path / "chats.jsonl"
    write_gguf(source, folder, chat_template)
    said = [(f"Who is {i}?", f"Tom found {i} balls. Zoë, too!") for i in range(60)]
    talks = [[{"role": "user", "content": ask}, {"role": "assistant", "content": answer}] for ask, answer in said]
    chats.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    for name, model in (("gguf", source), ("hf", folder)):
        words = ["--init-from", str(model), "--data", str(chats), *KNOBS.split(), "--lora", "2,4"]
        assert main(["train", "--run-dir", str(tmp_path / name), *words]) == 0
    found = [tmp_path / name for name in ("gguf", "hf")]
    for file in ("final/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (found[0] / file).read_bytes() == (found[1] / file).read_bytes(), file
    assert (found[0] / "final" / "chat_template.jinja").read_text() == chat_template
    base = json.loads((found[0] / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == (found[0] / "base").resolve()
    source.unlink()  # the run needs it no more
    assert main(["train", "--run-dir", str(found[0]), "--resume"]) == 0


def test_a_plan_reads_the_header_alone(
    folder: Path, chat_template: str, stories: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "m.gguf", tmp_path / "run"
    write_gguf(source, folder, chat_template)
    words = ["--init-from", str(source), "--data", str(stories), *KNOBS.split(), "--dry-run"]
    assert main(["train", "--run-dir", str(run), *words]) == 0
    assert f"{MODEL.n_params():,}" in capsys.readouterr().out
    assert not run.exists()


def test_files_that_cannot_be_trained(folder: Path, chat_template: str, tmp_path: Path) -> None:
    source, text = tmp_path / "m.gguf", tmp_path / "text"
    write_gguf(source, folder, chat_template, **{"rope.scale_linear": 4.0})
    with pytest.raises(CheckpointError, match="RoPE is scaled"):
        model_folder(source, tmp_path / "out")
    text.write_text("no model")
    with pytest.raises(CheckpointError, match="neither a Hugging Face folder nor a GGUF file"):
        model_config_of(text)
    write_gguf(source, folder, chat_template)
    source.write_bytes(source.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        model_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_teacher_from_a_file(folder: Path, chat_template: str, stories: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    write_gguf(source, folder, chat_template)
    sizes = [
        "--dim",
        "32",
        "--n-layers",
        "1",
        "--n-heads",
        "2",
        "--n-kv-heads",
        "1",
        "--head-dim",
        "16",
        "--hidden-dim",
        "64",
    ]
    for name, teacher in (("gguf", source), ("hf", folder)):
        words = ["--teacher", str(teacher), "--data", str(stories), *sizes, *KNOBS.split()]
        assert main(["train", "--run-dir", str(tmp_path / name), *words]) == 0
    weights = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("gguf", "hf")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "gguf" / "run.json").read_text())["teacher"] == str(
        (tmp_path / "gguf" / "teacher").resolve()
    )
