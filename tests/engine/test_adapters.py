"""Adapters beside a frozen model: against the specification bit for bit, against PEFT, against merged weights; the same bytes
alone, beside others, streamed and from the cache; what is refused, and that nothing of it stays."""

from __future__ import annotations

import asyncio
import json
import math
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.draft_heads import with_random_head
from engine.speculation_tools import always_guess
from engine.test_against_transformers import isa, open_model
from numpy.typing import NDArray
from reference import fixtures, frozen_reader
from reference.folds import folded_multipliers
from reference.oracle import kl_divergence
from reference.spec_f32 import Spec
from reference.spec_ops import LowRank

import pyengine
from pyengine import InvalidArgumentError, ModelFormatError, PyEngineError, UnsupportedModelError, _core
from pyengine.adapters import Adapters
from pyengine.cli import main
from pyengine.freeze import freeze

__all__ = ["isa"]  # the fixture
f32 = np.float32
Array = NDArray[Any]

MODULES = {
    "self_attn.q_proj": "wq", "self_attn.k_proj": "wk", "self_attn.v_proj": "wv", "self_attn.o_proj": "wo",
    "mlp.gate_proj": "w_gate", "mlp.up_proj": "w_up", "mlp.down_proj": "w_down",
    "self_attn.out_proj": "wo", "feed_forward.w1": "w_gate", "feed_forward.w3": "w_up", "feed_forward.w2": "w_down",
}  # fmt: skip
PARTS = {"wq": "q", "wo": "wo", "w_down": "down"}
R, ALPHA = 5, 6.0
CONFIG = {"peft_type": "LORA", "r": R, "lora_alpha": ALPHA, "target_modules": "all-linear"}


def random_tensors(fixture: fixtures.Fixture, seed: int, size: float = 0.3) -> dict[str, Array]:
    """An adapter of every matrix that one may change, under PEFT's names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, w in fixture.hf_weights.items():
        if w.ndim == 2 and ".".join(name.split(".")[-3:-1]) in MODULES:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = (rng.standard_normal((R, w.shape[1])) / math.sqrt(w.shape[1])).astype(f32)
            tensors[f"{module}.lora_B.weight"] = (rng.standard_normal((w.shape[0], R)) * size / math.sqrt(R)).astype(f32)
    return tensors


def low_rank(fixture: fixtures.Fixture, tensors: dict[str, Array], scale: float) -> dict[str, LowRank]:
    """The same for Spec, with the multipliers that the freezer folds."""
    folded, out = folded_multipliers(fixture.hf_config), {}
    for name, a in tensors.items():
        if ".lora_A." not in name:
            continue
        _, _, _, _, layer, half, module, _, _ = name.split(".")
        ours = MODULES[f"{half}.{module}"]
        b = tensors[name.replace(".lora_A.", ".lora_B.")]
        out[f"layers.{layer}.{ours}"] = LowRank(a, b, scale * folded.get(PARTS.get(ours, ""), 1.0))
    return out


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


def frozen(root: Path, name: str) -> Path:
    path = root / f"{name}.safetensors"
    if not path.exists():
        fixture = fixtures.load(name)
        freeze(fixtures.write_hf_dir(fixture, root / name), path, n_ctx=fixtures.n_ctx(fixture))
    return path


def directory(root: Path, name: str, seed: int) -> Path:
    path = root / f"{name}-{seed}"
    if not path.exists():
        fixtures.write_lora_dir(path, json.dumps(CONFIG), random_tensors(fixtures.load(name), seed))
    return path


@pytest.fixture
def engine(root: Path) -> Iterator[pyengine.Engine]:
    """A model with two adapters, "one" and "two"."""
    with pyengine.Engine(frozen(root, "llama_untied"), n_threads=2) as engine:
        for seed, name in enumerate(("one", "two")):
            engine.load_adapter(directory(root, "llama_untied", seed), name=name)
        yield engine


# ------------------------------------------------------------------ what it computes


def test_beams_are_of_their_adapter(engine: pyengine.Engine) -> None:
    prompt = list(range(3, 43))
    found = {name: engine.beam_search(prompt, max_tokens=6, adapter=name)[0] for name in ("one", "two", None)}
    for name, beam in found.items():
        total = 0.0
        for value in engine.score(prompt + beam.tokens, start=40, adapter=name).logprobs[40:]:
            assert value is not None
            total += value
        assert beam.cumulative_logprob == total
    assert len({beam.cumulative_logprob for beam in found.values()}) == 3


@pytest.mark.parametrize("name", ["llama_untied", "qwen2_key_bias", "gemma2", "olmo2", "granite", "granite_moe", "lfm2"])
def test_engine_equals_the_specification_bit_for_bit(name: str, isa: str, root: Path) -> None:
    """One prefill with half of the rows of another sequence without an adapter."""
    fixture = fixtures.load(name)
    file, model = open_model(frozen(root, name))
    loaded = Adapters(file.config, model).load(directory(root, name, 0), None, 0.75)
    tokens = [int(t) for t in fixture.token_ids[:60]]
    adapter = low_rank(fixture, random_tensors(fixture, 0), 0.75 * ALPHA / R)
    wanted = spec_logits(root, name, json.dumps(tokens), adapter)
    context = _core.Context(model)
    one, other = context.sequence_new(), context.sequence_new()
    order = [one, other] * len(tokens)
    context.forward(
        [t for t in tokens for _ in range(2)], order, bytes([1]) * len(order), adapters=[loaded.core, None] * len(tokens)
    )
    got = np.stack([np.array(context.logits(row), f32) for row in range(2 * len(tokens))])
    for rows, expected in ((got[::2], wanted), (got[1::2], spec_logits(root, name, json.dumps(tokens), None))):
        differing = np.flatnonzero((rows.view(np.uint32) != expected.view(np.uint32)).any(axis=1))
        assert differing.size == 0, f"{isa}: rows {differing[:5]} differ"


_specs: dict[tuple[str, bool], Array] = {}


def spec_logits(root: Path, name: str, tokens: str, adapter: dict[str, LowRank] | None) -> Array:
    key = name, adapter is None
    if key not in _specs:
        _specs[key] = Spec(*frozen_reader.read(frozen(root, name)), adapter=adapter).logits(json.loads(tokens))
    return _specs[key]


@pytest.mark.parametrize("name", fixtures.lora_names())
def test_logits_stay_near_peft(name: str, root: Path, tmp_path: Path) -> None:
    """KL(transformers with PEFT, float32 || engine), within what test_against_transformers allows to the model alone; without the
    adapter it is tens of times that. The same adapter merged while freezing is as near."""
    fixture, lora = fixtures.load(name), fixtures.load_lora(name)
    path = fixtures.write_lora_dir(tmp_path / "adapter", lora.config, lora.tensors)
    tokens, rows = [int(t) for t in fixture.token_ids], [int(row) for row in fixture.rows]
    merged = freeze(root / name if frozen(root, name) else name, tmp_path / "merged.safetensors", lora=[path])
    with pyengine.Engine(frozen(root, name)) as engine, pyengine.Engine(merged) as other:
        assert engine.load_adapter(path).name == "adapter"
        beside, plain = engine.logits(tokens, rows, adapter="adapter"), engine.logits(tokens, rows)
        inside = other.logits(tokens, rows)
    for got in (beside, inside):
        kl = kl_divergence(lora.logits, got)
        assert kl.max() < 0.06 and kl.mean() < 0.01
    assert kl_divergence(inside, beside).max() < 2 * 0.06
    assert kl_divergence(lora.logits, plain).mean() > 0.2


def test_a_scale(root: Path, engine: pyengine.Engine) -> None:
    """It multiplies what is added: 0 adds nothing, and halves are doubled by 2."""
    path, tokens = directory(root, "llama_untied", 0), list(range(3, 40))
    halved = {key: w / 2 if ".lora_B." in key else w for key, w in random_tensors(fixtures.load("llama_untied"), 0).items()}
    half = fixtures.write_lora_dir(root / "half", json.dumps(CONFIG), halved)
    engine.load_adapter(path, name="none", scale=0)
    engine.load_adapter(half, name="half", scale=2)
    assert np.array_equal(engine.logits(tokens, adapter="none"), engine.logits(tokens))
    assert np.array_equal(engine.logits(tokens, adapter="half"), engine.logits(tokens, adapter="one"))
    assert not np.array_equal(engine.logits(tokens, adapter="two"), engine.logits(tokens, adapter="one"))


# ------------------------------------------------------------------ alone, beside others, from the cache


TEXTS = [list(range(3, 3 + n)) for n in (30, 9, 41, 17, 23, 5)]
CHOICES = [None, "one", "two", "one", None, "two"]
PARAMS: dict[str, Any] = {"max_tokens": 12, "temperature": 0.8, "seed": 5}


def test_mixed_batches_give_the_same_bytes(root: Path, engine: pyengine.Engine) -> None:
    alone = [engine.generate(text, adapter=chosen, **PARAMS).tokens for text, chosen in zip(TEXTS, CHOICES, strict=True)]
    with pyengine.Engine(engine.path, n_threads=1) as plain:
        for text, chosen, tokens in zip(TEXTS, CHOICES, alone, strict=True):
            assert (plain.generate(text, **PARAMS).tokens == tokens) == (chosen is None)

    async def together() -> list[Any]:
        asynchronous = pyengine.AsyncEngine(engine)
        calls = [asynchronous.generate(t, adapter=chosen, **PARAMS) for t, chosen in zip(TEXTS, CHOICES, strict=True)]
        return [result.tokens for result in await asyncio.gather(*calls)]  # type: ignore[union-attr]

    for _ in range(2):
        engine.clear_cache()
        assert asyncio.run(together()) == alone
    engine.check_integrity()


def test_every_call_takes_one(engine: pyengine.Engine) -> None:
    tokens = TEXTS[0]
    logits = engine.logits(tokens, adapter="one").astype(np.float64)
    wanted = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
    score = engine.score(tokens, adapter="one")
    assert np.allclose([x for x in score.logprobs if x is not None], [wanted[i, t] for i, t in enumerate(tokens[1:])], atol=1e-5)
    greedy = engine.generate(tokens, adapter="one", max_tokens=8, temperature=0)
    assert greedy.tokens[0] == logits[-1].argmax()
    assert [piece.token for piece in engine.stream(tokens, adapter="one", max_tokens=8, temperature=0)][:8] == greedy.tokens
    assert not np.array_equal(engine.embed(tokens, adapter="one"), engine.embed(tokens))

    async def asynchronous() -> None:
        other = pyengine.AsyncEngine(engine)
        assert (await other.score(tokens, adapter="one")).logprobs == score.logprobs
        assert np.array_equal(await other.embed(tokens, adapter="one"), engine.embed(tokens, adapter="one"))
        pieces = [piece.token async for piece in other.stream(tokens, adapter="one", max_tokens=8, temperature=0)]
        assert pieces[:8] == greedy.tokens

    asyncio.run(asynchronous())
    for call in (engine.generate, engine.stream, engine.score, engine.logits, engine.embed):
        with pytest.raises(InvalidArgumentError, match="no adapter 'three'; loaded: one, two"):
            call(tokens, adapter="three")  # type: ignore[operator]


def test_caches_are_apart(root: Path, engine: pyengine.Engine) -> None:
    """A page is of one model, one adapter and one salt. Equal adapters are one, whatever they are called."""
    prompt, options = list(range(3, 250)) + list(range(3, 100)), {"max_tokens": 2, "temperature": 0}

    def cached(**more: Any) -> int:
        return engine.generate(prompt, **options, **more).timings.cached_tokens

    assert cached() == 0 and cached() > 256
    assert cached(adapter="one") == 0 and cached(adapter="one") > 256
    assert cached(adapter="two") == 0 and cached() > 256
    assert cached(adapter="one", cache_salt="x") == 0 and cached(cache_salt="x") == 0
    engine.load_adapter(directory(root, "llama_untied", 0), name="again")
    assert cached(adapter="again") > 256
    engine.load_adapter(directory(root, "llama_untied", 0), name="louder", scale=1.5)
    assert cached(adapter="louder") == 0


def test_speculation_changes_nothing(engine: pyengine.Engine) -> None:
    text = [5, 6, 7, 8] * 12
    for adapter in (None, "one"):
        plain = engine.generate(text, adapter=adapter, max_tokens=40, temperature=0, speculative="off")
        assert engine.generate(text, adapter=adapter, max_tokens=40, temperature=0).tokens == plain.tokens


@pytest.mark.parametrize("by", ["head", "model"])
@pytest.mark.parametrize("name", ["llama_untied", "qwen2_key_bias", "gemma2", "granite"])
def test_what_guesses_with_a_network_changes_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, by: str
) -> None:
    """A draft head goes on from the changed model's hidden states, a draft model reads the text without the adapter: both guess
    wrong more often, and that is all. Attaching a head keeps what the file says of folded multipliers."""
    monkeypatch.setattr("pyengine.run.speculation.MAX_SKIP", 0)  # no step goes by without a look for guesses
    model, path = frozen(root, name), directory(root, name, 0)
    drafted = with_random_head(model, tmp_path / "headed.safetensors") if by == "head" else model
    texts, chosen = [list(range(3, 3 + n)) for n in (30, 9, 30)], ["a", None, "a"]
    with pyengine.Engine(model, n_threads=1, speculative="off") as plain:
        plain.load_adapter(path, name="a")
        expected = [plain.generate(text, adapter=one, **PARAMS).tokens for text, one in zip(texts, chosen, strict=True)]
        samples = [result.tokens for result in plain.generate(texts[0], adapter="a", n=3, **PARAMS)]
    with pyengine.Engine(drafted, draft_model=None if by == "head" else model) as engine:
        loaded = engine.load_adapter(path, name="a")
        always_guess(engine.scheduler.speculation, 3)

        async def together() -> list[Any]:
            asynchronous = pyengine.AsyncEngine(engine)
            calls = [asynchronous.generate(t, adapter=one, **PARAMS) for t, one in zip(texts, chosen, strict=True)]
            return await asyncio.gather(*calls)

        results = asyncio.run(together())
        assert [result.tokens for result in results] == expected
        assert [result.tokens for result in engine.generate(texts[0], adapter="a", n=3, **PARAMS)] == samples
        stream = engine.stream(texts[0], adapter="a", **PARAMS)
        assert next(stream).token == expected[0][0]
        engine.unload_adapter("a")
        assert [piece.token for piece in stream][: len(expected[0]) - 1] == expected[0][1:]
        assert sum(result.timings.drafted_tokens for result in results) > 0 < loaded.n_bytes
        assert engine.check_integrity()["n_sequences"] == 0 == engine.memory()["adapters"]


# ------------------------------------------------------------------ coming and going


def test_unloading(engine: pyengine.Engine) -> None:
    """Who runs keeps it to the end; nobody new finds it."""
    whole = engine.generate(TEXTS[0], adapter="one", **PARAMS).tokens
    stream = engine.stream(TEXTS[0], adapter="one", **PARAMS)
    first = next(stream)
    held = engine.memory()["adapters"]
    engine.unload_adapter("one")
    assert [one.name for one in engine.adapters()] == ["two"] and 0 < engine.memory()["adapters"] < held
    assert [first.token, *(piece.token for piece in stream)][: len(whole)] == whole
    for refused in (lambda: engine.generate(TEXTS[0], adapter="one"), lambda: engine.unload_adapter("one")):
        with pytest.raises(InvalidArgumentError, match="no adapter 'one'"):
            refused()


def test_an_engine_pickles_with_its_adapters(engine: pyengine.Engine) -> None:
    with pickle.loads(pickle.dumps(engine)) as other:
        assert [(one.name, one.digest) for one in other.adapters()] == [(one.name, one.digest) for one in engine.adapters()]


def test_a_closed_engine_has_none(root: Path) -> None:
    engine = pyengine.Engine(frozen(root, "llama_untied"))
    engine.close()
    for call in (engine.adapters, lambda: engine.unload_adapter("x"), lambda: engine.load_adapter(root)):
        with pytest.raises(PyEngineError, match="closed"):
            call()


# ------------------------------------------------------------------ what is refused


def refused(engine: pyengine.Engine, error: type[PyEngineError], message: str, path: Path, **options: Any) -> None:
    before = engine.adapters()
    with pytest.raises(error, match=message):
        engine.load_adapter(path, **options)
    assert engine.adapters() == before


def test_names_and_scales(root: Path, engine: pyengine.Engine, tmp_path: Path) -> None:
    path = directory(root, "llama_untied", 0)
    for name in ("", "x" * 257, "a\nb", 3):
        refused(engine, InvalidArgumentError, "name is 1 to 256", path, name=name)
    refused(engine, InvalidArgumentError, "called 'one' already", path, name="one")
    for scale in (math.nan, math.inf, "2", True, 10**400):
        refused(engine, InvalidArgumentError, "scale", path, scale=scale)
    refused(engine, ModelFormatError, "too large for float32", path, scale=1e300)
    refused(engine, InvalidArgumentError, "is no adapter", tmp_path)
    refused(engine, InvalidArgumentError, "is no adapter: there is no such directory", tmp_path / "nowhere")
    for run in (tmp_path, tmp_path / "final"):  # of a training run, which has it in a folder of its own
        run.mkdir(exist_ok=True)
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        refused(engine, InvalidArgumentError, "no adapter_config.json; .*adapter is one", run)


def test_two_threads_load_under_one_name(root: Path, engine: pyengine.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second is refused, even if the first has been unloaded by then."""
    path, adapters = directory(root, "llama_untied", 0), engine._adapters

    class Late(dict[str, Any]):
        """The other thread: it comes before `setdefault`, and has gone after it."""

        def setdefault(self, name: str, _: Any = None) -> Any:
            return self["one"]

    monkeypatch.setattr(adapters, "_by_name", Late(adapters._by_name))
    with pytest.raises(InvalidArgumentError, match="called 'late' already"):
        engine.load_adapter(path, name="late")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"use_dora": True}, UnsupportedModelError, "use_dora"),
        ({"bias": "all"}, UnsupportedModelError, "bias"),
        ({"modules_to_save": ["lm_head"]}, UnsupportedModelError, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, UnsupportedModelError, "rank_pattern"),
        ({"r": 0}, ModelFormatError, "r is 0"),
        ({"r": 1 << 40}, ModelFormatError, "r is "),
        ({"r": 8}, ModelFormatError, "r 8; the adapter's matrices are"),
        ({"lora_alpha": 1e400}, ModelFormatError, "Infinity"),
    ],
)
def test_configurations(root: Path, engine: pyengine.Engine, tmp_path: Path, changes: Any, error: Any, message: str) -> None:
    tensors = random_tensors(fixtures.load("llama_untied"), 0)
    refused(engine, error, message, fixtures.write_lora_dir(tmp_path / "x", json.dumps(CONFIG | changes), tensors))


def test_tensors(engine: pyengine.Engine, tmp_path: Path) -> None:
    good = random_tensors(fixtures.load("llama_untied"), 0)
    prefix = "base_model.model.model.layers.1.self_attn.q_proj"
    a, b = good[f"{prefix}.lora_A.weight"], good[f"{prefix}.lora_B.weight"]

    def moved(module: str) -> dict[str, Array]:
        return {f"base_model.model.{module}.lora_{side}.weight": w for side, w in (("A", a), ("B", b))}

    w1 = {key.replace("mlp.gate_proj", "feed_forward.w1"): w for key, w in good.items() if "layers.1.mlp.gate_proj" in key}
    assert len(w1) == 2
    bad = a.copy()
    bad[1, 2] = np.nan
    cases: list[tuple[dict[str, Array], type[PyEngineError], str]] = [
        ({**good, f"{prefix}.lora_A.weight": bad}, ModelFormatError, "not finite"),
        ({**good, f"{prefix}.lora_A.weight": a[:, :-1]}, ModelFormatError, "q_proj.weight' is"),
        ({**good, f"{prefix}.lora_B.weight": b[:-1]}, ModelFormatError, "q_proj.weight' is"),
        ({**good, **moved("lm_head")}, UnsupportedModelError, "cannot change what is no projection"),
        ({**good, **moved("model.layers.1.input_layernorm")}, UnsupportedModelError, "input_layernorm"),
        ({**good, **moved("model.layers.0.mlp.experts.0.up_proj")}, UnsupportedModelError, "experts.0.up_proj"),
        ({**good, **moved("model.layers.01.self_attn.q_proj")}, UnsupportedModelError, "layers.01"),
        ({**good, **moved("model.layers.9.self_attn.q_proj")}, ModelFormatError, "layers.9.*does not have"),
        ({**good, **moved("model.language_model.layers.1.self_attn.q_proj")}, ModelFormatError, "of layer 1 twice"),
        ({**good, **w1}, ModelFormatError, "feed_forward.w1 of layer 1 twice"),
        ({**good, f"{prefix}.lora_magnitude_vector": b[:, 0]}, UnsupportedModelError, "magnitude"),
        ({}, ModelFormatError, "is empty"),
    ]
    for i, (tensors, error, message) in enumerate(cases):
        refused(engine, error, message, fixtures.write_lora_dir(tmp_path / str(i), json.dumps(CONFIG), tensors))
    cut = fixtures.write_lora_dir(tmp_path / "cut", json.dumps(CONFIG), good)
    data = (cut / "adapter_model.safetensors").read_bytes()
    for n in (0, 7, 100, len(data) - 1):
        (cut / "adapter_model.safetensors").write_bytes(data[:n])
        refused(engine, PyEngineError, "adapter_model", cut)
    (cut / "adapter_model.safetensors").unlink()
    refused(engine, UnsupportedModelError, "no adapter_model.safetensors", cut)


def test_experts_and_fused_matrices(root: Path, tmp_path: Path) -> None:
    """Named: experts of a mixture, a convolution, Phi's fused matrices, and a file that does not say what was folded into it."""
    tensors = random_tensors(fixtures.load("mixtral"), 0)
    a = next(w for key, w in tensors.items() if "q_proj.lora_A" in key)
    with pyengine.Engine(frozen(root, "mixtral")) as engine:
        engine.load_adapter(fixtures.write_lora_dir(tmp_path / "attention", json.dumps(CONFIG), tensors))
        for module in ("block_sparse_moe.experts.0.w1", "mlp.gate_proj", "feed_forward.w1"):
            name = f"base_model.model.model.layers.0.{module}"
            mixed = tensors | {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": a[:1].T @ a[:1, :R]}
            path = fixtures.write_lora_dir(tmp_path / module, json.dumps(CONFIG), mixed)
            refused(engine, UnsupportedModelError, f"{module}.*cannot change experts", path)
    with pyengine.Engine(frozen(root, "lfm2")) as engine:  # layer 0 is a convolution
        for module, error in (("conv.in_proj", UnsupportedModelError), ("self_attn.q_proj", ModelFormatError)):
            name = f"base_model.model.model.layers.0.{module}"
            pair = {f"{name}.lora_A.weight": a[:, :40], f"{name}.lora_B.weight": a[:1].T @ a[:1, :R]}
            path = fixtures.write_lora_dir(tmp_path / module, json.dumps(CONFIG), pair)
            refused(engine, error, f"layers.0.{module}", path)
    file, model = open_model(frozen(root, "lfm2"))
    with pytest.raises(InvalidArgumentError, match="layer 0 is a convolution"):  # nor by the core, were it asked
        _core.Adapter(model).set(0, "o", np.ones((2, file.config.q_dim), f32), np.ones((file.config.dim, 2), f32), 1.0)
    with pyengine.Engine(frozen(root, "phi3_window")) as engine:
        refused(engine, UnsupportedModelError, "Phi3ForCausalLM, whose matrices are fused", directory(root, "llama_untied", 0))
    with pyengine.Engine(frozen(root, "starcoder2")) as engine:
        refused(engine, UnsupportedModelError, "Starcoder2ForCausalLM, whose .* changed", directory(root, "llama_untied", 0))
    file, model = open_model(frozen(root, "granite"))
    with pytest.raises(UnsupportedModelError, match="freeze the model again"):
        Adapters(replace(file.config, extra={}), model).load(directory(root, "granite", 0), None, None)


# ------------------------------------------------------------------ the command line


def test_generate(root: Path, engine: pyengine.Engine, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = str(engine.path), directory(root, "llama_untied", 0)
    engine.load_adapter(path, name="half", scale=0.5)
    words = ["generate", "-m", model, "abc", "-n", "6", "--temp", "0", "--json", "--lora"]
    for given, name in ((str(path), "one"), (f"x={path}:0.5", "half")):
        assert main([*words, given]) == 0
        expected = engine.generate("abc", adapter=name, max_tokens=6, temperature=0)
        assert json.loads(capsys.readouterr().out)["tokens"] == expected.tokens
    assert main([*words, str(root / "nowhere")]) != 0
    assert "is no adapter" in capsys.readouterr().err
    assert main([*words, f"{path}:nan"]) == 2
    assert "finite" in capsys.readouterr().err
    assert main([*words, str(path), "--lora", str(path)]) == 2 and "given twice" in capsys.readouterr().err


def test_serve_wants_one_model(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = frozen(root, "llama_untied")
    assert main(["serve", "-m", f"a={model}", "-m", f"b={model}", "--lora", str(directory(root, "llama_untied", 0))]) == 2
    assert "adapters are for one model" in capsys.readouterr().err
