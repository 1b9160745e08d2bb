"""Structured output: what comes is what was asked for, and the same whatever runs beside it."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from engine.draft_heads import with_random_head
from engine.scripted_drafts import drafts_of, script
from engine.speculation_tools import always_guess

import pyengine
from pyengine import Engine, SamplingParams
from pyengine.run import in_time
from pyengine.run.guide import Guide
from pyengine.run.request import Caller
from pyengine.sampling import StructuredOutputs

pytest.importorskip("llguidance", reason="the extra guide is not installed")

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "max_tokens": 200}


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[Engine]:
    with Engine(tiny_model) as engine:
        yield engine
        assert engine.check_integrity()["n_sequences"] == 0


@pytest.mark.parametrize("seed", range(5))
def test_an_output_is_what_was_asked_for(engine: Engine, seed: int) -> None:
    def text(**wanted: Any) -> str:
        result = engine.generate("Once", structured_outputs=wanted, seed=seed, **SAMPLED)
        assert result.finish_reason == "stop", result
        return result.text

    person = json.loads(text(json=PERSON))
    assert set(person) == {"name", "age"} and len(person["name"]) <= 8 and 0 <= person["age"] <= 150
    assert text(json=json.dumps({"enum": [1, "two", None]})) in ("1", '"two"', "null")
    assert text(choice=["yes", "no", 'a "quoted" \\ word']) in ("yes", "no", 'a "quoted" \\ word')
    assert re.fullmatch(r"[a-c]{2,5}-\d+x", text(regex=r"[a-c]{2,5}-[0-9]{1,4}x"))
    assert re.fullmatch(r"\(*a\)*", text(grammar='start: "a" | "(" start ")"'))


def test_any_object_begins_as_one(engine: Engine) -> None:
    result = engine.generate("Once", structured_outputs={"json_object": True}, seed=1, **SAMPLED)
    if result.finish_reason == "stop":
        assert isinstance(json.loads(result.text), dict)
    assert result.text.startswith("{")


def test_guided_outputs_are_the_same_in_a_batch_streamed_and_beside_others(engine: Engine) -> None:
    options: dict[str, Any] = {"structured_outputs": {"json": PERSON}, "seed": 4, **SAMPLED}
    alone = [engine.generate(prompt, **options).tokens for prompt in ("a", "bb", "ccc")]
    free = engine.stream("dddd", temperature=1, seed=1)
    next(free)
    assert [result.tokens for result in engine.generate(["a", "bb", "ccc"], **options)] == alone
    assert [piece.token for piece in engine.stream("bb", **options)] == alone[1]
    free.close()


WANTED: dict[str, dict[str, Any]] = {
    "schema": {"json": PERSON},
    "object": {"json_object": True},
    "choice": {"choice": ["a long beginning and one end", "a long beginning and another end"]},
    "regex": {"regex": r"[a-c]{2,5}-[0-9]{1,4}x"},
    "grammar": {"grammar": 'start: "a" | "(" start ")"'},
}


@pytest.mark.parametrize("kind", ["own", "right", "wrong", "random", "mixed"])
@pytest.mark.parametrize("wanted", WANTED)
def test_guesses_change_nothing_of_a_guided_output(tiny_model: Path, wanted: str, kind: str) -> None:
    options: dict[str, Any] = {"structured_outputs": WANTED[wanted], "temperature": 1.0, "max_tokens": 60}
    prompts = ["a", "bb", "Once"]
    with Engine(tiny_model) as engine:
        ids = [engine.tokenize(prompt) for prompt in prompts]
        plain = [engine.generate(one, speculative="off", seed=7, **options).tokens for one in ids]
        if kind != "own":
            truths = {(tuple(one), 0): tokens for one, tokens in zip(ids, plain, strict=True)}
            script(engine, truths, drafts_of(kind, seed=3, vocab_size=engine.vocab_size))
        together = engine.generate(ids, speculative={"max_draft": 24}, seed=7, **options)
        assert [one.tokens for one in together] == plain
        assert [engine.generate(one, speculative="auto", seed=7, **options).tokens for one in ids] == plain
        if kind == "right":
            assert all(one.timings.accepted_tokens > 0 for one in together if len(one.tokens) > 3)


@pytest.mark.parametrize("way", ["drafted", "by a draft head"])
def test_a_guess_that_the_grammar_cannot_follow_costs_no_answer(
    tiny_model: Path, headed_model: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some d more, and the parser has more items than it may have, for ever. But the text says b, then d, and no a."""
    monkeypatch.setattr("pyengine.run.speculation.MAX_SKIP", 0)  # no step goes by without a look for guesses
    rules = " | ".join(f'"d"{{{i}}}' for i in range(2, 303))
    grammar = f'start: ("b" | "c") ("a" x | "d"*)\nx: y* "z"\ny: "d" | y y | {rules}\n'
    options: dict[str, Any] = {"structured_outputs": {"grammar": grammar}, "max_tokens": 12, "temperature": 0}
    with Engine(tiny_model if way == "drafted" else headed_model) as engine:
        a, b, d = (engine.tokenize(one, add_bos=False)[-1] for one in "abd")
        options["logit_bias"] = {b: 60.0, d: 30.0}
        plain = engine.generate([5], speculative="off", **options)
        assert plain.tokens[0] == b and plain.tokens[1:4] == [d] * 3
        guesses = [a, *[d] * 9]
        if way == "drafted":
            script(engine, {}, lambda truth, most: guesses)
        else:
            head = always_guess(engine.scheduler.speculation, 10)
            choose = head._choose

            def choose_worst(request: Any, draft: list[int], *rest: Any, **more: Any) -> tuple[int, float]:
                choose(request, draft, *rest, **more)
                return guesses[len(draft)], 1.0

            head._choose = choose_worst  # type: ignore[method-assign]
        assert engine.generate([5], **options).tokens == plain.tokens
        assert engine.check_integrity()["n_sequences"] == 0


def test_outputs_of_one_request_share_the_work_of_its_grammar(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"structured_outputs": StructuredOutputs(regex="[a-m]{3,9}"), "temperature": 1.0, "max_tokens": 5}
    alone = [engine.generate(text, seed=1, **options).tokens for text in ("Once", "Two")]
    made, check = [], Guide.check

    def noted(guide: Guide) -> None:
        made.append(guide)
        check(guide)

    monkeypatch.setattr(Guide, "check", noted)
    together = engine.generate(["Once", "Two"], seed=1, **options)
    assert [one.tokens for one in together] == alone and len(made) == 1
    samples = engine.generate("Once", seed=1, n=3, **options)
    assert samples[0].tokens == alone[0] and len(made) == 2


def test_a_grammar_that_takes_too_long_is_refused_and_so_are_others_while_two_are_at_work(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llguidance cannot be interrupted: what nobody waits for goes on in its thread."""
    go_on, wanted = threading.Event(), StructuredOutputs(regex="a+")
    check = Guide.check

    def check_slowly(guide: Guide) -> None:
        go_on.wait()
        check(guide)

    with monkeypatch.context() as patched:
        patched.setattr(Guide, "check", check_slowly)
        patched.setattr("pyengine.run.guide.COMPILE_SECONDS", 0.001)
        for _ in range(in_time.MOST_AT_ONCE):
            with pytest.raises(pyengine.InvalidArgumentError, match="structured_outputs: too costly: it takes longer"):
                engine.guide(wanted)
        with pytest.raises(pyengine.BusyError, match="structured_outputs: other grammars are at work: 2 that took longer"):
            engine.guide(wanted)
        left = list(in_time._left)
        go_on.set()
        for one in left:
            one.wait()
    assert engine.generate("Once", structured_outputs=wanted, max_tokens=3, seed=1).text.strip("a") == ""


def test_no_more_than_two_are_at_work_however_many_come_at_once() -> None:
    """The limit is of those that have begun: a third that comes before the others have taken too long waits in turn."""
    go_on, lock, begun = threading.Event(), threading.Lock(), []

    def slowly() -> None:
        with lock:
            begun.append(1)
        go_on.wait()

    def caller(errors: list[type]) -> None:
        try:
            in_time.in_time(slowly, 0.05)
        except Exception as error:
            errors.append(type(error))

    errors: list[type] = []
    callers = [threading.Thread(target=caller, args=(errors,)) for _ in range(6)]
    for one in callers:
        one.start()
    for one in callers:
        one.join()
    left = list(in_time._left)
    go_on.set()
    for one in left:
        one.wait()
    assert len(begun) == len(left) == errors.count(TimeoutError) == in_time.MOST_AT_ONCE
    assert errors.count(pyengine.BusyError) == 6 - in_time.MOST_AT_ONCE


@pytest.fixture(scope="module")
def headed_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with a draft head that guesses anything."""
    return with_random_head(tiny_model, tmp_path_factory.mktemp("headed") / "headed.safetensors")


@pytest.mark.parametrize("by", ["draft model", "draft head"])
@pytest.mark.parametrize("wanted", WANTED)
def test_a_draft_model_or_head_changes_nothing_of_a_guided_output(
    tiny_model: Path, headed_model: Path, wanted: str, by: str
) -> None:
    """It guesses on behind the end of a text, which a grammar's state cannot be rolled back over."""
    options: dict[str, Any] = {"structured_outputs": WANTED[wanted], "temperature": 1.0, "max_tokens": 60}
    with Engine(tiny_model, draft_model=tiny_model) if by == "draft model" else Engine(headed_model) as engine:
        always_guess(engine.scheduler.speculation, 8)
        for seed in range(6):
            plain = engine.generate("Once", speculative="off", seed=seed, **options)
            guessed = engine.generate("Once", speculative={"store": False}, seed=seed, **options)
            assert (guessed.tokens, guessed.finish_reason) == (plain.tokens, plain.finish_reason)


@pytest.mark.parametrize("more", [[], [5], [0, 1]])
def test_a_guide_is_as_it_was_after_a_draft_that_ends_the_text(engine: Engine, more: list[int]) -> None:
    def guide() -> Guide:
        params = engine.resolve(SamplingParams(structured_outputs={"regex": "[0-9]{3}x"}))
        (request,) = engine.requests(caller, [[5]], params)
        assert request.guide is not None
        return request.guide

    caller = Caller()
    tokens = engine.tokenize("123x", add_bos=False)
    for n in range(len(tokens) + 1):
        one, outputs, draft = guide(), tokens[:n], [*tokens[n:], engine.eos_token_ids[0], *more]
        assert one.allowed(outputs, draft) == tuple(tokens[n:])
        masks = [bytes(mask) for mask in one.masks(outputs, draft)]
        assert masks[: len(tokens) - n + 1] == [bytes(guide().masks(tokens[:i])[0]) for i in range(n, len(tokens) + 1)]
        assert len(masks) == 1 + len(draft) and bytes(one.masks(outputs)[0]) == masks[0]


def test_what_a_grammar_forces_is_guessed_and_comes_true(tiny_model: Path) -> None:
    with Engine(
        tiny_model
    ) as engine:  # a new one, which has measured nothing yet: what it guesses first is always the same
        result = engine.generate("Once", structured_outputs={"choice": ["x" * 40]}, temperature=1.0, seed=1)
    assert result.text == "x" * 40
    assert result.timings.accepted_tokens > 0


def test_a_torn_guide_begins_anew(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"structured_outputs": {"json": PERSON}, "seed": 4, **SAMPLED}
    whole = engine.generate("a", **options)
    stream = engine.stream("a", **options)
    tokens = [next(stream).token for _ in range(3)]
    assert stream.request.guide is not None
    stream.request.guide._is_torn = True
    assert tokens + [piece.token for piece in stream] == whole.tokens


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"json": {"type": "no such type"}}, "type"),
        ({"json": "{"}, "structured_outputs"),
        ({"json": {"$ref": "#/nowhere"}}, "structured_outputs"),
        ({"regex": "("}, "unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"json": {"type": "string", "pattern": "["}}, "unclosed character class"),
        ({"grammar": "start: a\na: a"}, "structured_outputs cannot be followed: there is no text that it allows"),
        ({"regex": "(a{1,1000}){1,1000}" * 50}, "structured_outputs"),
        ({"grammar": "nonsense"}, "structured_outputs"),
        ({"json": PERSON, "regex": "a"}, "exactly one"),
        ({}, "exactly one"),
        ({"jsn": PERSON}, "no field 'jsn'"),
        ({"choice": []}, "not empty"),
        ({"choice": ["a", 5]}, "strings"),
        ({"regex": 5}, "not of its kind"),
        ({"regex": "a" * 300_000}, "at most"),
        (5, "must be a StructuredOutputs"),
    ],
)
def test_what_cannot_be_is_refused(engine: Engine, wanted: Any, words: str) -> None:
    with pytest.raises(pyengine.InvalidArgumentError, match=re.escape(words)):
        engine.generate("Once", structured_outputs=wanted, **SAMPLED)


def test_an_output_without_end_contradicts_itself() -> None:
    with pytest.raises(pyengine.InvalidArgumentError, match="ignore_eos"):
        SamplingParams(structured_outputs={"regex": "a"}, ignore_eos=True)


# -------------------------------------------------------------------- llama.cpp's notation

# a grammar, texts of it, texts that are not; as llama.cpp takes them
GBNF: list[tuple[str, list[str], list[str]]] = [
    ('root ::= "yes" | "no"', ["yes", "no"], ["", "yesno", "maybe"]),
    ('root ::= word "end"\nword ::= [a-z]+', ["friend", "aend", "endend"], ["end", "friends"]),  # no longest word
    ('root ::= num "." num\nnum ::= [0-9.]+', ["1.2.3", "..."], ["1", ".1"]),
    ('root ::= line+\nline ::= "- " [^\\r\\n]+ "\\n"  # an item', ["- a\n- b # c\n"], ["- a", "-a\n"]),
    ("root ::= .{2}", ["ab", "a\n", "é\u2028"], ["a", "abc"]),
    ("root ::= [\\u0041-\\x43\\u00e9\\U0001F600]+", ["ABC", "é😀"], ["D", "u0041"]),
    ('root ::= "\\\\u0041" [\\]"/]', ["\\u0041]", '\\u0041"', "\\u0041/"], ["A]", "\\u0041\\"]),
    ('start ::= "a"\nstart-x ::= "b" | "start"\nroot ::= start start-x', ["ab", "astart"], ["a", "ba"]),
    (
        'root ::= (\n  "a" |  # one\n  camelCase-rule\n)*\ncamelCase-rule ::= "b"{2,3}',
        ["", "abba", "bbb"],
        ["b", "abb b"],
    ),
    ('root ::= expr\nexpr ::= expr "+" [0-9]{1,2} | [0-9]', ["1+23", "1+2+3"], ["1+", "12"]),
    ('root ::= "start: x" "\\t" "%llguidance"', ["start: x\t%llguidance"], ["start: x%llguidance"]),
]


def is_text_of(engine: Engine, grammar: str, text: str) -> bool:
    """By the masks, a token at a time, as a model would write it."""
    guide = engine.guide(pyengine.StructuredOutputs(grammar=grammar))
    outputs: list[int] = []
    for token in [*engine.tokenize(text, add_bos=False), engine.eos_token_ids[0]]:
        (mask,) = guide.masks(outputs)
        if not mask[token // 32] >> token % 32 & 1:
            return False
        outputs.append(token)
    return True


@pytest.mark.parametrize(("grammar", "right", "wrong"), GBNF)
def test_a_grammar_of_llama_cpp_s(engine: Engine, grammar: str, right: list[str], wrong: list[str]) -> None:
    assert [text for text in right if not is_text_of(engine, grammar, text)] == []
    assert [text for text in wrong if is_text_of(engine, grammar, text)] == []


NO_GBNF = [
    ("root ::= (", "no GBNF grammar"),
    ("root ::= other", "'other' not found"),
    ("other ::= [a]", "No 'root'"),
    ("root ::= " + "(" * 50_000, "no GBNF grammar.* nested too deeply"),
    ('root ::= "' + '\\"' * 100_000, "no GBNF grammar"),
    ('root ::= "\\', "no GBNF grammar"),
    ("root ::= [\\uD800]", "surrogates not allowed"),
    ("root ::= [\\U00110000]", "no GBNF grammar"),
    ("root ::= [a]{" + "9" * 5000 + "}", "no GBNF grammar"),
    ('root ::= a-b A-b\na-b ::= "x"\nA-b ::= "y"', "already exists|in nothing but case"),
    ("root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(3000)) + 'r3000 ::= "a"', "more than 2000 rules"),
    ("root ::= [a]" + " " * (1 << 18), "characters, at most"),
]


@pytest.mark.parametrize(("grammar", "words"), NO_GBNF, ids=range(len(NO_GBNF)))
def test_what_is_no_grammar_of_llama_cpp_s_is_refused(engine: Engine, grammar: str, words: str) -> None:
    with pytest.raises(pyengine.InvalidArgumentError, match=words):
        engine.guide(pyengine.StructuredOutputs(grammar=grammar))


def test_a_grammar_in_lark_s_notation_may_speak_of_the_other(engine: Engine) -> None:
    assert is_text_of(engine, 'start: "a ::= b"  // root ::= "c"', "a ::= b")


# -------------------------------------------------------------------- beams


def test_every_beam_is_what_was_asked_for(engine: Engine) -> None:
    """And no two are the same; beside others as alone."""
    options: dict[str, Any] = {"beam_width": 6, "n": 6, "max_tokens": 200, "structured_outputs": {"json": PERSON}}
    beams = engine.beam_search("Once", **options)
    assert len({tuple(beam.tokens) for beam in beams}) == 6
    for beam in beams:
        assert beam.finish_reason == "stop"
        person = json.loads(beam.text)
        assert set(person) == {"name", "age"} and len(person["name"]) <= 8 and 0 <= person["age"] <= 150
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(engine.beam_search, "Once", **options) for _ in range(2)]
        sampled = pool.submit(engine.generate, "Once", structured_outputs={"json": PERSON}, seed=3, **SAMPLED)
        assert [call.result() for call in calls] == [beams] * 2
        assert sampled.result().finish_reason == "stop"
    cut = engine.beam_search("Once", **options | {"max_tokens": 2})
    assert {beam.finish_reason for beam in cut} == {"length"}


def spellings(engine: Engine, text: bytes) -> list[list[int]]:
    """Every way to write a text in tokens."""
    if not text:
        return [[]]
    tokens = [token for token in range(engine.vocab_size) if token not in engine.tokenizer.special_ids]
    parts = [(token, engine.tokenizer.token_bytes(token)) for token in tokens]
    return [
        [token, *rest]
        for token, part in parts
        if part and text.startswith(part)
        for rest in spellings(engine, text[len(part) :])
    ]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -1.0])
def test_a_beam_as_wide_as_a_grammar_finds_the_best_of_it(engine: Engine, length_penalty: float) -> None:
    """Against all that it allows, spelled in tokens and scored one by one: probabilities are those among all tokens."""
    prompt = engine.tokenize("Once upon")
    every = {}
    texts = ["".join(one) for n in (1, 2, 3) for one in itertools.product("th", repeat=n)] + ["thee", "no"]
    for text in texts:
        for tokens in spellings(engine, text.encode()):
            for end in engine.eos_token_ids:
                output, total = (*tokens, end), 0.0
                for value in engine.score([*prompt, *output], start=len(prompt)).logprobs[len(prompt) :]:
                    assert value is not None
                    total += value
                every[output] = total / len(output) ** length_penalty
    assert len(texts) <= len(every) <= 32
    beams = engine.beam_search(
        prompt, beam_width=32, n=32, length_penalty=length_penalty, early_stopping="never",
        structured_outputs={"regex": "[th]{1,3}|thee|no"},
    )  # fmt: skip
    assert {tuple(beam.tokens): beam.score for beam in beams} == every
    assert [beam.score for beam in beams] == sorted(every.values(), reverse=True)


@pytest.mark.parametrize("wanted", WANTED)
def test_one_guided_beam_is_greedy(engine: Engine, wanted: str) -> None:
    for prompt in ("a", "bb", "Once"):
        options: dict[str, Any] = {"structured_outputs": WANTED[wanted], "max_tokens": 40}
        greedy = engine.generate(prompt, temperature=0, **options)
        (beam,) = engine.beam_search(prompt, beam_width=1, **options)
        assert (beam.text, beam.tokens, beam.finish_reason) == (greedy.text, greedy.tokens, greedy.finish_reason)


def test_forks_of_a_guide_go_their_own_ways(engine: Engine) -> None:
    wanted = StructuredOutputs(regex="ab+c|ac+d")

    def masks(guide: Guide, text: str) -> list[list[int]]:
        tokens = [id_ for one in text for id_ in engine.tokenize(one, add_bos=False)[-1:]]
        return [list(mask) for mask in guide.masks(tokens)]

    guide = engine.guide(wanted)
    first = masks(guide, "a")
    twin = guide.fork()
    for one, text in ((twin, "abb"), (guide, "acc"), (twin, "abbb"), (guide, "accd"), (twin.fork(), "abbbc")):
        assert masks(one, text) == masks(engine.guide(wanted), text)
    assert masks(engine.guide(wanted), "a") == first


def test_a_beam_whose_grammar_becomes_too_complex_ends_its_search_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Guide._compute_mask

    def fails(self: Guide, i: int) -> None:
        if self._n_read == 3:
            raise pyengine.InvalidArgumentError("structured_outputs cannot be followed: too complex")
        compute(self, i)

    monkeypatch.setattr(Guide, "_compute_mask", fails)
    with pytest.raises(pyengine.InvalidArgumentError, match="cannot be followed"):
        engine.beam_search("Once", max_tokens=20, structured_outputs={"json": PERSON})
    monkeypatch.undo()
    assert engine.beam_search("Once", max_tokens=200, structured_outputs={"json": PERSON})[0].finish_reason == "stop"
