"""What the trainer simulates is what ``pyengine freeze`` writes and what the engine computes.

The frozen codes and scales equal the trainer's byte for byte, and so do the values that they stand for. Losses of whole models
agree statistically only: one flipped code moves everything after it, so the engine's and the trainer's losses are compared over
many tokens.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba", reason="training needs numba: extra [train]")
pytest.importorskip("pyengine.freeze", reason="needs the engine's freeze package")

from pyengine_training import checkpoint as checkpoints
from pyengine_training.arena import Arena, initialize, parameter_shapes
from pyengine_training.config import ModelConfig, TrainConfig
from pyengine_training.data import BatchSource, Corpus, Phase, prepare_corpus
from pyengine_training.device import make_trainer
from pyengine_training.model import Worker, fake_quantize_parameters
from pyengine_training.ops import cpu as ops
from pyengine_training.ops.cpu.fake_quant import weight_codes
from pyengine_training.text import (
    is_validation,
    load_tokenizer,
    read_documents,
    train_tokenizer,
)

from pyengine.format.inventory import inventory
from pyengine.format.quantize import QuantizedMatrix, dequantize, to_panels
from pyengine.freeze import open_source

VOCAB, SEQ = 320, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 32,
    "hidden_dim": 192,
    "max_seq_len": SEQ,
}


def save(folder: Path, model: ModelConfig, params: Arena, tokenizer: Any) -> Path:
    folder.mkdir()
    checkpoints.write_hf_folder(folder, params, model, tokenizer=tokenizer, bos=0, eos=0)
    return folder


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return train_tokenizer((t for t in read_documents(stories) if not is_validation(t)), VOCAB)


@pytest.fixture(scope="module", params=[False, True], ids=["llama", "qwen3"])
def trained(
    stories: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[Path, ModelConfig, Arena]:
    """A model with learnt weights, so that activations are not merely random; without QK-norm and with it."""
    folder = tmp_path_factory.mktemp("trained")
    prepare_corpus(stories, folder / "data", tokenizer)
    split = Corpus(folder / "data").train
    config = TrainConfig(seq_len=SEQ, batch_size=8, shards=2, steps=60, eval_every=0, muon_lr=0.02)
    source = BatchSource([split], [Phase(0, (1.0,))], batch_size=8, seq_len=SEQ, seed=1)
    trainer = make_trainer(ModelConfig(**SIZES, qk_norm=request.param), config)
    trainer.initialize()
    for step in range(60):
        trainer.step(*source.batch(step))
    trainer.close()
    return save(folder / "hf", trainer.model, trainer.params, tokenizer), trainer.model, trainer.params


def frozen_panels(folder: Path) -> dict[str, tuple[Any, Any]]:
    """Codes and scales of every matrix as freeze makes them."""
    source = open_source(folder)
    try:
        result = {}
        for name, rows in source.matrices.items():
            matrix = QuantizedMatrix(rows)
            codes = np.concatenate(list(matrix))
            result[name] = (codes, matrix.scales)
        return result
    finally:
        source.close()


def our_panels(params: Arena, name: str, model: ModelConfig) -> tuple[Any, Any]:
    """The trainer's codes and scales of one matrix, laid out in panels."""
    codes, scales = weight_codes(params[name])
    rows, columns = codes.shape
    codes = np.pad(codes, ((0, 0), (0, -columns % 64))).reshape(rows, -1, 64)
    if not name.endswith("w_gate_up"):
        return to_panels(codes, scales)
    hidden = model.hidden_dim  # gate and up alternate by panel
    gate = to_panels(codes[:hidden], scales[:hidden])
    up = to_panels(codes[hidden:], scales[hidden:])
    both = [np.stack([g, u], 1).reshape(-1, *g.shape[1:]) for g, u in zip(gate, up, strict=True)]
    return both[0], both[1]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tie_embeddings": False, "qk_norm": True},
        {"dim": 96, "hidden_dim": 200, "head_dim": 24, "n_heads": 2, "n_kv_heads": 1},
    ],
)
def test_frozen_codes_and_scales_are_the_trainers(tmp_path: Path, tokenizer: Any, change: dict[str, Any]) -> None:
    model = ModelConfig(**{**SIZES, **change})
    params = Arena(parameter_shapes(model))
    initialize(params, model, seed=3)
    params["tok_embeddings"][5] = 1e-9  # scale 0
    panels = frozen_panels(save(tmp_path / "hf", model, params, tokenizer))
    wanted = [name for name in params.shapes if params[name].ndim == 2]
    assert sorted(panels) == sorted(wanted)
    for name in wanted:
        codes, scales = our_panels(params, name, model)
        assert panels[name][0].tobytes() == codes.tobytes(), name
        assert panels[name][1].tobytes() == scales.tobytes(), name
        if not name.endswith("w_gate_up"):
            values = np.empty_like(params[name])
            ops.fake_quant_weights(values, params[name])
            np.testing.assert_array_equal(values, dequantize(*panels[name], *values.shape), name)


@pytest.mark.parametrize(("tied", "qk_norm"), [(True, False), (False, False), (True, True)])
def test_parameters_are_the_inventorys(tmp_path: Path, tokenizer: Any, tied: bool, qk_norm: bool) -> None:
    """Same names and shapes in the same order: the trainer's list cannot drift from the file's."""
    model = ModelConfig(**{**SIZES, "tie_embeddings": tied, "qk_norm": qk_norm})
    shapes = parameter_shapes(model)
    source = open_source(save(tmp_path / "hf", model, Arena(shapes), tokenizer))
    source.close()
    weights = {weight.name: weight.shape for weight in inventory(source.config) if weight.is_parameter}
    assert list(weights.items()) == list(shapes.items())


def test_trained_weights_and_their_snapped_copy_freeze_alike(
    trained: tuple[Path, ModelConfig, Arena], tokenizer: Any, tmp_path: Path
) -> None:
    folder, model, params = trained
    snapped = params.like()
    fake_quantize_parameters(snapped, params)
    first = frozen_panels(folder)
    second = frozen_panels(save(tmp_path / "snapped", model, snapped, tokenizer))
    for name, (codes, scales) in first.items():
        assert codes.tobytes() == second[name][0].tobytes(), name
        assert scales.tobytes() == second[name][1].tobytes(), name


def test_rope_frequencies_are_the_frozen_ones(trained: tuple[Path, ModelConfig, Arena]) -> None:
    folder, model, _ = trained
    source = open_source(folder)
    inv_freq = np.asarray(source.vectors["rope.0.inv_freq"]())
    source.close()
    cos, sin = ops.rope_tables(SEQ, model.head_dim, model.rope_theta)
    angle = (np.arange(SEQ, dtype=np.float32)[:, None] * inv_freq[None]).astype(np.float64)
    np.testing.assert_array_equal(cos, np.cos(angle).astype(np.float32))
    np.testing.assert_array_equal(sin, np.sin(angle).astype(np.float32))


@pytest.fixture(scope="module")
def engine(trained: tuple[Path, ModelConfig, Arena], tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("pyengine._core", reason="the engine's extension is not built")
    import pyengine
    from pyengine.freeze import freeze

    path = tmp_path_factory.mktemp("frozen") / "model.safetensors"
    freeze(trained[0], path)
    with pyengine.Engine(path) as opened:
        yield opened


def losses(worker: Worker, params: Arena, documents: list[list[int]], quantize: bool) -> list[np.ndarray[Any, Any]]:
    """Per-token losses of each document by the trainer's forward (one-row worker)."""
    result = []
    for ids in documents:
        tokens = np.zeros((1, SEQ), np.int64)
        targets = np.full((1, SEQ), -1, np.int64)
        n = min(SEQ, len(ids) - 1)
        tokens[0, :n], targets[0, :n] = ids[:n], ids[1 : n + 1]
        result.append(worker.evaluate(params, tokens, targets, quantize)[0, :n].copy())
    return result


def test_engine_and_trainer_lose_alike(trained: tuple[Path, ModelConfig, Arena], engine: Any, stories: Path) -> None:
    """Mean difference within 3 standard errors of the paired differences, and far nearer to the engine than float32 is;
    most tokens agree to float precision, because no code flipped before them."""
    folder, model, params = trained
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    texts = list(read_documents(stories))[:150]
    documents = [tokenizer.encode(text).ids[: SEQ + 1] for text in texts]
    quantized = params.like()
    fake_quantize_parameters(quantized, params)
    worker = Worker(model, 1, SEQ, training=False)
    int8 = np.concatenate(losses(worker, quantized, documents, True)).astype(np.float64)
    plain = np.concatenate(losses(worker, params, documents, False)).astype(np.float64)
    scored = []
    for ids in documents:
        # n_ctx is SEQ: the last of SEQ + 1 tokens cannot be scored in one go
        scored += [-x for x in engine.score(ids[:SEQ]).logprobs[1:]]
        if len(ids) > SEQ:
            logits = engine.logits(ids[:SEQ], positions=[SEQ - 1])[0].astype(np.float64)
            scored.append(np.log(np.exp(logits - logits.max()).sum()) - (logits[ids[SEQ]] - logits.max()))
    theirs = np.asarray(scored)
    assert len(theirs) == len(int8) > 5000
    difference = theirs - int8
    standard_error = difference.std() / math.sqrt(len(difference))
    assert abs(difference.mean()) <= 5 * standard_error + 1e-7  # the trained model is another one on another CPU
    # every rounding point is simulated: the engine is several times nearer to the simulation than to float32
    rms = np.sqrt((difference**2).mean())
    assert rms < 0.5 * np.sqrt(((theirs - plain) ** 2).mean())
    exact = (np.abs(difference) < 1e-4).mean()
    assert exact > 0.5, f"only {exact:.0%} of the tokens agree to 1e-4"


@pytest.mark.parametrize("layer", [0, 1])
def test_each_block_agrees_with_the_engines(trained: tuple[Path, ModelConfig, Arena], engine: Any, layer: int) -> None:
    """Fed the same input, a block's output agrees to 1e-5 of its norm on most rows; on the others a code flipped, which
    moves a row (of a key or value: the rows after it, too) by a quantization step or so, 1/127 of its largest value."""
    _, model, params = trained
    quantized = params.like()
    fake_quantize_parameters(quantized, params)
    x = np.random.default_rng(layer).standard_normal((SEQ, model.dim)).astype(np.float32)
    worker = Worker(model, 1, SEQ, training=False)
    ours = np.empty_like(x)
    worker._block_forward(quantized, layer, x, ours, True)
    theirs = x.copy()
    engine.context.debug_block(layer, theirs)
    error = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    flipped = int((error > 1e-5).sum())
    assert flipped <= SEQ // 2, f"{flipped} of {SEQ} rows"
    assert error.max() < 2 / 127
    # without the simulation nothing agrees: the comparison can fail
    worker._block_forward(params, layer, x, ours, False)
    plain = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    assert (plain > 1e-4).all()


def test_engine_opens_with_the_checkpoints_own_settings(engine: Any) -> None:
    assert engine.eos_token_ids == (0,)
    ids = engine.tokenize("Tom found a ball.")
    assert ids[0] == 0 and ids.count(0) == 1
    result = engine.generate("Tom", max_tokens=5, seed=1)
    assert len(result.tokens) <= 5


def test_config_is_what_transformers_reads(trained: tuple[Path, ModelConfig, Arena]) -> None:
    values = json.loads((trained[0] / "config.json").read_text())
    architecture = "Qwen3ForCausalLM" if trained[1].qk_norm else "LlamaForCausalLM"
    assert values["architectures"] == [architecture]
    assert checkpoints.read_model_config(trained[0]) == trained[1]
    assert values["head_dim"] == 32 and values["tie_word_embeddings"] is True


def test_transformers_gives_the_same_logits(trained: tuple[Path, ModelConfig, Arena]) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [oracle]")
    torch = pytest.importorskip("torch", reason="needs the extra [oracle]")
    folder, model, params = trained
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, VOCAB, (1, SEQ))
    worker = Worker(model, 1, SEQ, training=False)
    worker.forward(params, tokens)
    ours = worker.xn_final @ worker.output_matrix(params).T
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits[0].numpy()
    np.testing.assert_allclose(ours, wanted, atol=2e-4)
