"""token_healing of an engine: a broken word goes on, the text is whole, and the bytes are those of the same tokens asked for by
hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.scripted_drafts import drafts_of, script
from engine.test_infill import MARKS, freeze_coder, laid_out

from pyengine import Engine, InvalidArgumentError, SamplingParams
from pyengine.run.request import Caller

BROKEN = "Once upon a ti"
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 11, "max_tokens": 12, "ignore_eos": True, "logprobs": 1}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The small model of the package, which knows words."""
    with Engine(n_threads=2) as engine:
        yield engine
        assert engine.check_integrity()["n_sequences"] == 0


def test_a_broken_word_goes_on(engine: Engine) -> None:
    healed = engine.generate(BROKEN, temperature=0, max_tokens=6, token_healing=True)
    assert healed.text.startswith("me, there was")
    assert engine.generate(BROKEN, temperature=0, max_tokens=6).text[:2] != "me"
    kept = engine.prompt_ids("Once upon a")
    assert healed.timings.prompt_tokens == len(kept)  # " ti" was taken, two tokens
    whole = engine.tokenizer.decode([*kept, *healed.tokens])
    assert whole == BROKEN + healed.text


@pytest.mark.parametrize("prompt", [BROKEN, "a 😀", "He sai"])
def test_it_is_the_shorter_prompt_with_its_first_tokens_held_to_the_rest(engine: Engine, prompt: str) -> None:
    """By the same random numbers, and by the same keys and values, whatever is cached and however it is computed."""
    healed = engine.generate(prompt, token_healing=True, **SAMPLED)
    params = engine.resolve(SamplingParams(token_healing=True, **SAMPLED))
    (request,) = engine.requests(Caller(), [engine.prompt_ids(prompt)], params)
    assert request.healing is not None
    n_first = next(n for n in range(13) if request.healing.is_over(healed.tokens[:n]))

    def hold(tokens: Any, logits: Any) -> None:
        mask = request_healing.mask(tokens[len(request.prompt) :].tolist())
        if mask is not None:
            bits = np.unpackbits(np.array(mask, dtype="<u4").view(np.uint8), bitorder="little")[: len(logits)]
            logits[bits == 0] = -np.inf

    (again,) = engine.requests(Caller(), [engine.prompt_ids(prompt)], params)
    assert again.healing is not None
    request_healing = again.healing
    by_hand = engine.generate(list(request.prompt), logits_processor=hold, **SAMPLED)
    assert (by_hand.tokens, by_hand.logprobs) == (healed.tokens, healed.logprobs)
    rest = engine.generate(
        [*request.prompt, *healed.tokens[:n_first]], **{**SAMPLED, "max_tokens": 12 - n_first}
    )
    assert rest.tokens == healed.tokens[n_first:]

    pieces = list(engine.stream(prompt, token_healing=True, **SAMPLED))
    assert [piece.token for piece in pieces] == healed.tokens
    assert "".join(piece.text for piece in pieces) == healed.text
    batch = engine.generate([prompt, "x", BROKEN], n=2, token_healing=True, **SAMPLED)
    assert batch[0].tokens == healed.tokens and batch[1].tokens != healed.tokens


def test_guesses_change_nothing(engine: Engine) -> None:
    options = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "token_healing": True}
    expected = engine.generate(BROKEN, speculative="off", **options).tokens
    with Engine(n_threads=1) as guessing:
        script(guessing, {(tuple(engine.prompt_ids("Once upon a")), 0): expected}, drafts_of("right", seed=1, vocab_size=50))
        result = guessing.generate(BROKEN, **options)
    assert result.tokens == expected and result.timings.accepted_tokens > 10


def test_no_step_waits_for_an_import() -> None:
    code = """
import sys
from pyengine import Engine, SamplingParams
from pyengine.run.request import Caller
with Engine(n_threads=1) as engine:
    assert "numpy" not in sys.modules
    engine.requests(Caller(), [engine.prompt_ids("Once upon a ti")], engine.resolve(SamplingParams(token_healing=True)))
    assert "numpy" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parent)


def test_stop_strings_are_looked_for_behind_what_was_taken(engine: Engine) -> None:
    options = {"temperature": 0, "max_tokens": 9, "token_healing": True}
    text = engine.generate(BROKEN, **options).text
    assert text.startswith("me, there")
    assert engine.generate(BROKEN, stop=["ti", " time", "was"], **options).text == text[: text.index("was")]
    (a_piece,) = (one for one in engine.tokenize(" t", add_bos=False))
    short = engine.generate(BROKEN, **{**options, "max_tokens": 1, "logit_bias": {a_piece: 1000.0}})  # not all is said again
    assert (short.text, short.tokens, short.finish_reason) == ("", [a_piece], "length")


def test_what_does_not_go_together_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidArgumentError, match="token_healing and structured_outputs"):
        engine.generate(BROKEN, token_healing=True, structured_outputs={"regex": "a"})
    with pytest.raises(InvalidArgumentError, match="token_healing must be True or False"):
        engine.generate(BROKEN, token_healing=1)  # type: ignore[call-overload]
    with pytest.raises(InvalidArgumentError, match="every token is banned"):
        engine.generate(BROKEN, token_healing=True, allowed_token_ids=engine.tokenize("x", add_bos=False))


def test_in_front_of_a_hole(tmp_path: Path) -> None:
    """The end of the prefix is taken, not that of the prompt, which is the format's last token."""
    with Engine(freeze_coder(tmp_path, MARKS[:3]), n_threads=1) as coder:  # its only long token is "he"
        params = coder.resolve(SamplingParams(token_healing=True, **SAMPLED))
        prefix, suffix = "def catch", "\n\nprint(oh"
        (request,) = coder.requests(Caller(), [coder.infill_ids(prefix, suffix)], params)
        assert request.prompt == laid_out(coder, "def catc", suffix)
        he, h = (coder.tokenize(text, add_bos=False)[0] for text in ("he", "h"))
        for token, text in ((he, "e"), (h, "")):
            filled = coder.infill(prefix, suffix, token_healing=True, logit_bias={token: 1000.0}, max_tokens=1)
            assert (filled.tokens, filled.text) == ([token], text)
        assert coder.infill("", suffix, token_healing=True, **SAMPLED).tokens == coder.infill("", suffix, **SAMPLED).tokens
