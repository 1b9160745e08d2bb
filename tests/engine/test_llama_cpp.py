"""llama-cpp-python's interface: its README's examples run but for the import, its answers are Engine's, and nothing that is
not supported passes unnamed."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pyengine import Engine, InvalidArgumentError, PyEngineError
from pyengine.compat.llama_cpp import Llama, LlamaGrammar, LogitsProcessorList, StoppingCriteriaList
from pyengine.compat.llama_cpp.formats import FORMATS
from pyengine.compat.llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from pyengine.opening import DEFAULT_MODEL
from pyengine.text.chat import ChatTemplate

PLANETS = "Q: Name the planets in the solar system? A: "
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
JASON = [{"role": "user", "content": "Extract Jason is 25 years old"}]
USER_DETAIL = {
    "type": "function",
    "function": {
        "name": "UserDetail",
        "parameters": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 3},
                "age": {"type": "integer", "minimum": 7, "maximum": 7},
            },
            "required": ["name", "age"],
            "additionalProperties": False,
        },
    },
}
needs_guide = pytest.mark.skipif(find_spec("llguidance") is None, reason="the extra guide is not installed")


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    model = Llama(model_path=DEFAULT_MODEL, n_gpu_layers=-1, n_batch=512, verbose=False)
    yield model
    model.close()


# ------------------------------------------------------------------ the README's examples


def test_completion(llm: Llama) -> None:
    output = llm(PLANETS, max_tokens=32, stop=["Q:", "\n"], echo=True)
    (choice,) = output["choices"]
    assert choice["text"].startswith(PLANETS) and choice["index"] == 0 and choice["logprobs"] is None
    assert choice["finish_reason"] in ("stop", "length")
    assert (output["object"], output["model"]) == ("text_completion", DEFAULT_MODEL)
    usage = output["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["prompt_tokens"] == len(llm.tokenize(PLANETS.encode()))


def test_chat_falls_back_to_llama_2(llm: Llama) -> None:
    assert llm.chat_format == "llama-2"  # the model has no template
    messages = [{"role": "system", "content": "You are an assistant."}, {"role": "user", "content": "Hello."}]
    answer = llm.create_chat_completion(messages=messages, max_tokens=8)
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")


@needs_guide
def test_json_mode_and_schema_mode() -> None:
    import json

    llm = Llama(model_path=DEFAULT_MODEL, chat_format="chatml")
    messages = [{"role": "user", "content": "Who won the world series in 2020"}]
    schema = {
        "type": "object",
        "properties": {"team_name": {"type": "string", "maxLength": 5}},
        "required": ["team_name"],
        "additionalProperties": False,
    }
    answer = llm.create_chat_completion(
        messages, response_format={"type": "json_object", "schema": schema}, temperature=0.7
    )
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"team_name"}
    text = llm.create_chat_completion(messages, response_format={"type": "json_object"}, max_tokens=8)
    assert text["choices"][0]["message"]["content"].startswith("{")


@needs_guide
def test_function_calling_whole_and_streamed() -> None:
    import json

    llm = Llama(model_path=DEFAULT_MODEL, chat_format="chatml-function-calling")
    call: dict[str, Any] = {"messages": JASON, "tools": [USER_DETAIL], "seed": 3}
    call["tool_choice"] = {"type": "function", "function": {"name": "UserDetail"}}
    (choice,) = llm.create_chat_completion(**call)["choices"]
    (made,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert made["function"]["name"] == "UserDetail" and json.loads(made["function"]["arguments"])["age"] == 7
    deltas = [chunk["choices"][0] for chunk in llm.create_chat_completion(**call, stream=True)]
    parts = [part["function"]["arguments"] for delta in deltas for part in delta["delta"].get("tool_calls", [])]
    assert "".join(parts) == made["function"]["arguments"] and deltas[-1]["finish_reason"] == "tool_calls"
    call["tool_choice"] = "auto"  # the model may say what it likes
    assert isinstance(llm.create_chat_completion(**call, max_tokens=4)["choices"][0]["message"]["content"], str)


def test_speculative_decoding_changes_nothing() -> None:
    llama = Llama(model_path=DEFAULT_MODEL, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=10))
    plain = Llama(model_path=DEFAULT_MODEL, draft_model=LlamaPromptLookupDecoding(num_pred_tokens=0))
    text = "One day a cat and a dog met. " * 3
    assert llama(text, **GREEDY)["choices"] == plain(text, **GREEDY)["choices"]


def test_embeddings() -> None:
    llm = Llama(model_path=DEFAULT_MODEL, embedding=True, pooling_type=1)
    texts = ["Hello, world!", "Goodbye, world!"]
    answer = llm.create_embedding(texts)
    expected = [vector.tolist() for vector in llm.engine.embed(texts, pooling="mean", normalize=False)]
    assert [item["embedding"] for item in answer["data"]] == expected == llm.embed(texts)
    assert llm.create_embedding(texts[0])["data"] == answer["data"][:1] and llm.embed(texts[0]) == expected[0]
    n_tokens = sum(len(llm.tokenize(text.encode())) for text in texts)
    assert answer["usage"] == {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    assert llm.embed(texts, normalize=True, return_count=True)[1] == n_tokens and llm.embed([]) == []
    long = "word " * 2000
    assert len(llm.embed(long)) == llm.n_embd()
    with pytest.raises(ValueError, match="holds 512"):
        llm.embed(long, truncate=False)


# ------------------------------------------------------------------ what it says is what Engine says


def test_text_is_the_engines(llm: Llama) -> None:
    options = {"temperature": 0.8, "top_p": 0.95, "min_p": 0.05, "top_k": 40, "seed": 5}
    expected = llm.engine.generate("Once upon a time", max_tokens=16, **options)
    assert llm("Once upon a time", seed=5)["choices"][0]["text"] == expected.text  # llama-cpp-python's defaults
    assert llm(llm.tokenize(b"Once upon a time"), seed=5)["choices"][0]["text"] == expected.text
    ids = llm.engine.generate("Once upon a time", max_tokens=9, temperature=0, ignore_eos=True).tokens
    tokens = llm.generate(llm.tokenize(b"Once upon a time"), temp=0.0)
    assert [next(tokens) for _ in range(9)] == ids


@pytest.mark.parametrize("logprobs", [None, 2])
def test_chunks_join_to_the_completion(llm: Llama, logprobs: int | None) -> None:
    options: dict[str, Any] = {"max_tokens": 24, "seed": 8, "stop": ["\n\n"], "logprobs": logprobs}
    whole = llm("Once upon a time", **options)["choices"][0]
    *chunks, last = (chunk["choices"][0] for chunk in llm("Once upon a time", stream=True, **options))
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"] and last["text"] == ""
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * len(chunks)
    assert last["finish_reason"] == whole["finish_reason"]
    if logprobs is not None:
        values = [value for chunk in chunks for value in chunk["logprobs"]["token_logprobs"]]
        assert values == whole["logprobs"]["token_logprobs"] and len(values) == 24


def test_chat_chunks_join_to_the_answer(llm: Llama) -> None:
    options: dict[str, Any] = {"messages": JASON, "max_tokens": 12, "seed": 1, "logprobs": True, "top_logprobs": 2}
    whole = llm.create_chat_completion(**options)["choices"][0]
    first, *chunks = (chunk["choices"][0] for chunk in llm.create_chat_completion(stream=True, **options))
    assert first["delta"] == {"role": "assistant"}
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks) == whole["message"]["content"]
    entries = [entry for chunk in chunks for entry in (chunk["logprobs"] or {"content": []})["content"]]
    assert entries == whole["logprobs"]["content"]
    assert chunks[-1]["finish_reason"] == whole["finish_reason"]


def test_log_probabilities_of_an_echoed_prompt_are_scores(llm: Llama) -> None:
    text = "Once upon a time there was a cat."
    told = llm(text, max_tokens=1, echo=True, logprobs=1, **GREEDY)["choices"][0]["logprobs"]
    score = llm.engine.score(text, parse_special=True)
    n_bos = llm.engine.tokenizer.adds_bos
    assert told["token_logprobs"][: len(score.tokens) - n_bos] == score.logprobs[n_bos:]
    assert all(token in top for token, top in zip(told["tokens"], told["top_logprobs"], strict=True) if top is not None)


def test_processors_and_criteria(llm: Llama) -> None:
    """In llama-cpp-python's lists, and plain ones; of every call that has them."""
    (like,) = llm.tokenize(b"x", add_bos=False)[-1:]
    n = len(llm.tokenize(b"Once"))

    def prefer(input_ids: Any, scores: Any) -> Any:
        scores = scores.copy()
        scores[like] += 1000.0
        return scores

    def at_three(input_ids: Any, logits: Any) -> bool:
        return len(input_ids) == n + 3

    text = llm.detokenize([like]).decode()
    for processors, criteria in (([prefer], [at_three]), (LogitsProcessorList([prefer]), StoppingCriteriaList([at_three]))):
        (choice,) = llm("Once", max_tokens=9, logits_processor=processors, stopping_criteria=criteria)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (3 * text, "stop")
        tokens = llm.generate(llm.tokenize(b"Once"), logits_processor=processors, stopping_criteria=criteria)
        assert list(tokens) == [like] * 3
        (answer,) = llm.create_chat_completion(JASON, max_tokens=2, logits_processor=processors)["choices"]
        assert answer["message"]["content"] == 2 * text


def test_a_processor_of_a_list_may_return_nothing() -> None:
    def add(_: Any, scores: Any) -> None:
        scores.append(1)

    assert LogitsProcessorList([add, lambda _, scores: [*scores, 2], add])([], [0]) == [0, 1, 2, 1]


def test_calls_without_a_seed_follow_the_models() -> None:
    def series() -> list[str]:
        llm = Llama(model_path=DEFAULT_MODEL, seed=1337)
        return [llm("The", max_tokens=24, temperature=1.5)["choices"][0]["text"] for _ in range(3)]

    first = series()
    assert first == series() and len(set(first)) == 3


def test_tokens(llm: Llama) -> None:
    text = "Once upon a time, a café.\n".encode()
    ids = llm.tokenize(text)
    assert ids == llm.engine.tokenize(text.decode()) and llm.detokenize(ids) == text
    assert llm.detokenize(llm.tokenize(text, add_bos=False)) == text
    pieces = [llm.detokenize([token]) for token in llm.tokenize("é".encode(), add_bos=False)]
    assert b"".join(pieces) == "é".encode()  # bytes, be they whole characters or not
    end = llm.detokenize([llm.token_eos()], special=True)
    assert llm.tokenize(end, add_bos=False, special=True) == [llm.token_eos()]
    assert llm.tokenize(end, add_bos=False) != [llm.token_eos()] and llm.detokenize([llm.token_eos()]) == b""
    assert (llm.n_ctx(), llm.n_vocab(), llm.token_bos()) == (512, 4096, llm.engine.tokenizer.bos_id)
    assert llm.n_embd() == llm.engine.embed("a").shape[1] and llm.detokenize([llm.token_nl()]) == b"\n"


@needs_guide
def test_grammars(tmp_path: Path) -> None:
    llm = Llama(model_path=DEFAULT_MODEL)
    path = tmp_path / "answer.gbnf"
    path.write_text('root ::= " " ("yes" | "no") "."')
    for grammar in (LlamaGrammar.from_file(path), LlamaGrammar.from_string(path.read_text())):
        assert llm("Is it?", grammar=grammar)["choices"][0]["text"] in (" yes.", " no.")
    grammar = LlamaGrammar.from_json_schema('{"enum": [17]}')
    assert llm("It is", grammar=grammar)["choices"][0]["text"] == "17"
    for text in ("root ::= (", "root ::= other", "root ::= " + "(" * 50_000):
        with pytest.raises(InvalidArgumentError, match="no GBNF"):
            LlamaGrammar.from_string(text)


def test_pickle_opens_the_model_again(llm: Llama) -> None:
    again: Llama = pickle.loads(pickle.dumps(llm))
    assert again("Once", **GREEDY)["choices"] == llm("Once", **GREEDY)["choices"]
    again.close()
    again.close()
    with pytest.raises(PyEngineError, match="closed"):
        again("Once")


# ------------------------------------------------------------------ chat formats

TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
    "llama-2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A </s><s>[INST] V [/INST]",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "U<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
    "V<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral-instruct": "<s>[INST] U [/INST] A</s>[INST] V [/INST]",
    "gemma": "<s><start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nV<end_of_turn>\n"
    "<start_of_turn>model\n",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_chat_formats(name: str) -> None:
    template = ChatTemplate(FORMATS[name].template, bos_token="<s>", eos_token="</s>")
    knows_system = name not in ("gemma", "mistral-instruct")
    assert template.render(TALK if knows_system else TALK[1:]) == RENDERED[name]
    assert template.is_plain


def test_every_format_is_known_and_a_models_own_comes_first(tmp_path: Path) -> None:
    from engine.cli_tools import write_talker

    assert FORMATS.keys() - {"chatml-function-calling"} == RENDERED.keys()
    with Engine(write_talker(tmp_path / "hf", 64)) as engine:
        own = Llama(model_path=str(engine.path))
        assert own.chat_format == "chat_template.default" and own.n_ctx() == 64
        expected = engine.chat(JASON, temperature=0, max_tokens=8).text
        assert own.create_chat_completion(JASON, max_tokens=8, **GREEDY)["choices"][0]["message"]["content"] == expected


# ------------------------------------------------------------------ refused by name


@pytest.mark.parametrize(
    "options",
    [
        {"vocab_only": True}, {"kv_overrides": {"a": 1}}, {"rope_freq_base": 1e6}, {"rope_freq_scale": 0.5},
        {"yarn_orig_ctx": 4096}, {"pooling_type": 0}, {"lora_path": "a.gguf"}, {"chat_handler": object()},
        {"last_n_tokens_size": 128}, {"draft_model": object()}, {"type_k": 1}, {"chat_format": "functionary-v2"}, {"n_ctx": 513},
        {"n_ctx": "many"}, {"tokenizer": object()}, {"seed": 2**64}, {"n_threads": -1}, {"context": 3},
    ],
    ids="-".join,
)  # fmt: skip
def test_model_arguments_are_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        Llama(model_path=DEFAULT_MODEL, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"tfs_z": 0.5}, {"mirostat_mode": 2}, {"stopping_criteria": "no"}, {"logits_processor": [1]},
        {"grammar": "root ::= x"}, {"temperature": -1.0}, {"logprobs": 65}, {"max_tokens": "all"}, {"stop": [""]},
    ],
    ids="-".join,
)  # fmt: skip
def test_call_arguments_are_refused_by_name(llm: Llama, options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        llm("Once", **options)
    with pytest.raises(InvalidArgumentError, match=next(iter(options))):
        llm("Once", stream=True, **options)  # now, and not with the first chunk


@pytest.mark.parametrize(
    "options",
    [
        {"functions": [{}]}, {"function_call": {"name": "f"}}, {"tools": [{}]}, {"tools": "all"}, {"tool_choice": "required"},
        {"response_format": {"type": "xml"}}, {"response_format": "json"}, {"messages": "hello"}, {"stop": 5},
        {"tools": [{"function": {"name": "f", "parameters": "x"}}], "tool_choice": "required"},
    ],
    ids="-".join,
)  # fmt: skip
def test_chat_arguments_are_refused_by_name(llm: Llama, options: dict[str, Any]) -> None:
    name = next(iter(options)).removesuffix("s")
    with pytest.raises(InvalidArgumentError, match=name):
        llm.create_chat_completion(**{"messages": JASON, **options})


@pytest.mark.parametrize("name", ["eval", "sample", "create_chat_completion_openai_v1"])
def test_methods_are_refused_by_name(llm: Llama, name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=name):
        getattr(llm, name)("text")


def test_hints_change_nothing(llm: Llama) -> None:
    hinted = Llama(
        DEFAULT_MODEL, n_threads=1, use_mmap=False, use_mlock=True, n_ubatch=8, flash_attn=True, offload_kqv=False, type_k=8,
        type_v=8, logits_all=True, numa=True, tensor_split=[1.0], n_gpu_layers=35,
    )  # fmt: skip
    assert hinted("Once upon a time", **GREEDY)["choices"] == llm("Once upon a time", **GREEDY)["choices"]
    with pytest.raises(FileNotFoundError):
        Llama("nowhere.gguf")
