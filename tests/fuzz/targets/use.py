"""Everything that one can do with a model file."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from pathlib import Path

from fuzz.cases import Target
from fuzz.targets.seeds import MESSAGES, PROMPTS

import pyengine
from pyengine import golden
from pyengine.cli.info import describe, text_lines
from pyengine.cli.verify import golden_outputs
from pyengine.errors import PyEngineError
from pyengine.format.reader import FrozenFile, verify_checksums


def use(target: Target, path: Path, rng: random.Random) -> None:
    """Open a frozen file and do everything with it. What is refused on the way does not end it."""
    for stage, action in (("info", info), ("verify", verify)):
        target.stage = stage
        with suppress(PyEngineError):
            action(path)
    target.stage = "open"
    with pyengine.Engine(path, n_threads=1, mmap=rng.random() < 0.9) as engine:
        ids = [rng.randrange(engine.vocab_size) for _ in range(rng.randint(1, 5))]
        for stage, action in (
            ("generate", lambda: engine.generate(ids, max_tokens=4, ignore_eos=True, seed=1)),
            ("defaults", lambda: engine.generate(ids, max_tokens=2)),
            ("text", lambda: engine.generate(rng.choice(PROMPTS), max_tokens=3).text),
            ("special", lambda: engine.tokenize(rng.choice(PROMPTS), parse_special=True)),
            ("detokenize", lambda: engine.detokenize(ids, skip_special_tokens=False)),
            ("chat", lambda: engine.chat(MESSAGES, max_tokens=2)),
            ("score", lambda: engine.score(ids).perplexity),
            ("embed", lambda: engine.embed(rng.choice(PROMPTS), prompt_name=rng.choice([None, "query"]))),
            ("rerank", lambda: engine.rerank(rng.choice(PROMPTS), PROMPTS[:2], truncate=True)),
            ("logits", lambda: engine.logits(ids[:2])),
        ):
            target.stage = stage
            with suppress(PyEngineError):
                action()
        target.stage = "used"
        repr(engine)
        engine.memory()


def info(path: Path) -> None:
    with FrozenFile.open(path) as frozen:
        text_lines(describe(frozen, True))


def verify(path: Path) -> None:
    with FrozenFile.open(path) as frozen:
        all(is_right for _, is_right in verify_checksums(frozen))
    expected = golden_outputs(path)
    computed = golden.compute(path, 1)
    [computed[key] != expected.get(key) for key in computed]


def remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)
