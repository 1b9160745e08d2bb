"""What a caller passes: sampling parameters, prompts, messages, options of the engine."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import closing
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutations
from fuzz.cases import Case
from fuzz.targets import seeds
from fuzz.targets.template import conversation

import pyengine
from pyengine.freeze import freeze
from pyengine.sampling import SamplingParams

# Without a caller's own functions: what those raise is theirs.
_PARAMETERS = [field.name for field in fields(SamplingParams) if field.name not in ("logits_processor", "stopping_criteria")]
_ALIASES = ["max_new_tokens", "repeat_penalty", "stop_strings", "temp", "no_such_parameter"]
# Values that cannot be written down are made by name, so that a case can be saved.
_OBJECTS: dict[str, Callable[[], Any]] = {
    "float32": lambda: np.float32(0.7),
    "int64": lambda: np.int64(5),
    "array": lambda: np.array([1, 2]),
    "floats": lambda: np.array([0.5]),
    "fraction": lambda: Fraction(1, 3),
    "complex": lambda: 1j,
    "object": object,
    "function": lambda: math.sqrt,
    "bytes": lambda: b"a",
    "set": lambda: {1},
    "tuple": lambda: (1, 2),
    "range": lambda: range(3),
    "iterator": lambda: iter([1, 2]),
    "nan": lambda: math.nan,
    "bias": lambda: {1: 2.0, 299: -math.inf},
    "wide bias": lambda: {300: 1.0, -1: 1.0},
    "empty text": lambda: [""],
}
_MOST = {"max_tokens": 8, "max_new_tokens": 8, "n": 8}


def _value(rng: random.Random) -> Any:
    kind = rng.randrange(5)
    if kind == 0:
        return {"made": rng.choice(list(_OBJECTS))}
    return (
        rng.choice([0, 1, 2, 7, 0.5, 0.9, 1.0, True, None, "a", ["a"], [1, 2]]) if kind < 3 else mutations.value(rng, 2)
    )


def _made(value: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"made"}:
        return _OBJECTS[value["made"]]()
    return value


def _bounded(name: str, value: Any) -> Any:
    """Wishes for very much are granted for a little: they are no faults, they only take long."""
    if name in _MOST and isinstance(value, (int, float)) and not isinstance(value, bool) and value > _MOST[name]:
        return _MOST[name]
    return value


class ParametersTarget:
    name = "parameters"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""
        self._path = freeze(
            seeds.write_files(scratch / "hf", seeds.hf_files()), scratch / "m.safetensors", overwrite=True
        )
        self._engine = pyengine.Engine(self._path, n_threads=1)

    def make(self, rng: random.Random) -> Case:
        kind = rng.choice(["generate", "generate", "stream", "prompt", "chat", "open", "score", "logits", "detokenize"])
        options = {
            rng.choice([*_PARAMETERS, *(_ALIASES if rng.random() < 0.1 else [])]): _value(rng)
            for _ in range(rng.randint(0, 4))
        }
        options.setdefault("max_tokens", 3)
        prompt: Any = rng.choice(
            [[1, 2, 3], "hello", ["a", "b"], [[1], [2, 3]], mutations.text(rng, ["<|end|>", "<|bos|>"])]
        )
        if kind != "generate" and rng.random() < 0.7:
            prompt = _value(rng)
        return Case(
            {},
            {
                "kind": kind,
                "options": options,
                "prompt": prompt,
                "messages": conversation(rng) if rng.random() < 0.5 else _value(rng),
            },
        )

    def run(self, case: Case) -> None:
        kind = self.stage = case.arguments["kind"]
        options = {name: _bounded(name, _made(value)) for name, value in case.arguments["options"].items()}
        prompt, engine = _made(case.arguments["prompt"]), self._engine
        if kind in ("generate", "prompt"):
            results = engine.generate(prompt, **options)
            for result in results if isinstance(results, list) else [results]:
                assert all(0 <= token < engine.vocab_size for token in result.tokens)
                assert not any(math.isnan(item.logprob) for item in result.logprobs or [])
        elif kind == "stream":
            with closing(engine.stream(prompt, **options)) as pieces:
                list(pieces)
        elif kind == "chat":
            engine.chat(_made(case.arguments["messages"]), **options)
        elif kind == "open":
            names = ["n_ctx", "n_threads", "kv_dtype", "seed", "tokenizer", "mmap", "max_sequences", "max_kv_bytes"]
            chosen = dict(zip(random.Random(str(options)).sample(names, len(names)), options.values(), strict=False))
            if type(chosen.get("n_threads")) is int and chosen["n_threads"] > 8:
                del chosen["n_threads"]
            with pyengine.Engine(self._path, **chosen):
                pass
        elif kind == "score":
            engine.score(prompt)
        elif kind == "logits":
            engine.logits(prompt)
        else:
            engine.detokenize(prompt)
