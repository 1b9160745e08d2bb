"""Shared by the tests of the trainer: finding it in a bare checkout, and tiny models and texts."""

from __future__ import annotations

import importlib.util
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from training.command import TINY, train

ROOT = Path(__file__).resolve().parents[2]
if importlib.util.find_spec("pyengine_training") is None:  # not installed: the bare checkout
    sys.path.insert(0, str(ROOT / "training"))


@pytest.fixture
def tiny_sizes() -> dict[str, Any]:
    """A model with several query heads to a key, two layers, and no dimension that is a quantization group."""
    return {
        "vocab_size": 48,
        "dim": 40,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 10,
        "hidden_dim": 72,
        "max_seq_len": 24,
    }


def make_story(generator: random.Random) -> str:
    """A few sentences with enough regularity to be learnt."""
    names = ["Tom", "Mia", "Ben", "Lily", "Sam", "Zoë"]
    things = ["ball", "cake", "boat", "kite", "stone", "little dog"]
    verbs = ["found", "lost", "saw", "made", "wanted", "threw"]
    lines = []
    for _ in range(generator.randint(2, 9)):
        name, verb, thing = (generator.choice(x) for x in (names, verbs, things))
        lines.append(f"{name} {verb} a {thing}. {name} was happy with the {thing}.")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def stories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 600 short documents with separator lines."""
    generator = random.Random(3)
    path = tmp_path_factory.mktemp("text") / "stories.txt"
    text = "\n<|endoftext|>\n".join(make_story(generator) for _ in range(600))
    path.write_text(text + "\n<|endoftext|>\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def finished(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps whose trunk ends after 4. Whoever changes it takes a copy."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train(run, "--data", stories, TINY, "--steps 6 --decay-fraction 0.3") == 0
    return run


@pytest.fixture(scope="session")
def prepared(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text, prepared, with a vocabulary of 300."""
    from pyengine_training.__main__ import main

    folder = tmp_path_factory.mktemp("prepared") / "folder"
    assert main(["prepare", str(stories), str(folder), "--vocab-size", "300"]) == 0
    return folder


SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


@pytest.fixture(scope="session")
def chat_template() -> str:
    """Of the models with :func:`chat_tokenizer`."""
    return (
        "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


@pytest.fixture(scope="session")
def chat_tokenizer(stories: Path) -> Callable[[bool], Any]:
    """Makes one of 320 tokens, byte-level, with BOS (1) and EOS (2) that are not the same; adds BOS or does not."""

    def make(adds_bos: bool) -> Any:
        from pyengine_training.text import read_documents
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(read_documents(stories), trainer)
        if adds_bos:
            tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        return tokenizer

    return make


@pytest.fixture(scope="session")
def write_chat_model(chat_tokenizer: Callable[[bool], Any], chat_template: str) -> Callable[[Path, Any], Path]:
    """Writes a random model (a ModelConfig) with that tokenizer and template into a new Hugging Face directory."""

    def write(folder: Path, model: Any) -> Path:
        from pyengine_training import checkpoint as checkpoints
        from pyengine_training.arena import Arena, initialize, parameter_shapes
        from pyengine_training.files import write_json

        folder.mkdir()
        params = Arena(parameter_shapes(model))
        initialize(params, model, 3)
        checkpoints.write_hf_folder(folder, params, model, tokenizer=chat_tokenizer(True), bos=1, eos=2)
        names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": chat_template}
        write_json(folder / "tokenizer_config.json", names)
        return folder

    return write
