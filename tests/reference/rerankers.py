"""A tiny random Qwen3 with the tokens and the chat template of Qwen's rerankers and models for embeddings, and the prompts that
their model cards write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from . import fixtures

DATA = fixtures.DATA / "rerank.json"
TEMPLATE = Path(__file__).parents[1] / "text" / "templates" / "qwen3.jinja"
SPECIAL, ORDINARY = ("<|im_start|>", "<|im_end|>"), ("<think>", "</think>")
MERGES = (("y", "e"), ("ye", "s"), ("n", "o"))  # "yes" and "no" are one token each

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
TASK = "Given a web search query, retrieve relevant passages that answer the query"
QUERY = "What is the capital of China?"
DOCUMENTS = [
    "The capital of China is Beijing.",
    "Gravity is a force that attracts two bodies towards each other.",
    "no",
    "Beijing, the capital, yes.\n\nIt has 21 million inhabitants, and the query is answered.",
    "",
]
PROMPTS = {"query": "Instruct: Find what answers it\nQuery:", "document": ""}


def pair(query: str, document: str, instruction: str = TASK) -> str:
    return f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"


def write_classifier(directory: Path, head: str = "difference") -> Path:
    """The same with tied embeddings and a head in the place of the output matrix, as tools make it of a causal model: the
    "difference" of the embeddings of "yes" and "no", "both" of them, or "other" numbers."""
    hf = write_model(directory)
    path = hf / "config.json"
    config = json.loads(path.read_text()) | {"architectures": ["Qwen3ForSequenceClassification"], "pad_token_id": 2}
    config["id2label"] = {i: f"LABEL_{i}" for i in range(2 if head == "both" else 1)}
    path.write_text(json.dumps(config))
    weights = {name: w for name, w in fixtures.load("qwen3").hf_weights.items() if name != "lm_head.weight"}
    vocabulary = json.loads((hf / "tokenizer.json").read_text())["model"]["vocab"]
    yes, no = (weights["model.embed_tokens.weight"][vocabulary[word]] for word in ("yes", "no"))
    weights["score.weight"] = {"difference": (yes - no)[None], "both": np.stack([no, yes]), "other": (yes + no)[None]}[head]
    fixtures.write_safetensors(hf / "model.safetensors", weights)
    return hf


def write_model(directory: Path, template: str | None = None) -> Path:
    """A Hugging Face directory. template: another one than Qwen3's."""
    hf = fixtures.write_hf_dir(fixtures.load("qwen3"), directory)
    path = hf / "tokenizer.json"
    tokenizer: dict[str, Any] = json.loads(path.read_text())
    model = tokenizer["model"]
    ids = sorted(model["vocab"].values())
    for last in sorted(model["vocab"], key=model["vocab"].__getitem__)[-len(MERGES + SPECIAL + ORDINARY) :]:
        del model["vocab"][last]  # tokens of "hello", and bytes that no ASCII has
    model["merges"] = [list(pair) for pair in MERGES]
    free = iter(ids[len(model["vocab"]) :])
    for merge in MERGES:
        model["vocab"]["".join(merge)] = next(free)
    for content in SPECIAL + ORDINARY:
        added = {**tokenizer["added_tokens"][0], "id": next(free), "content": content, "special": content in SPECIAL}
        tokenizer["added_tokens"].append(added)
    path.write_text(json.dumps(tokenizer))
    (hf / "chat_template.jinja").write_text(TEMPLATE.read_text() if template is None else template)
    path = hf / "config.json"
    config = json.loads(path.read_text())
    theta = config.pop("rope_parameters")["rope_theta"]  # where transformers 4 looks for it, too
    path.write_text(json.dumps(config | {"max_position_embeddings": 1024, "rope_theta": theta}))
    return hf
