"""Make data/beam/transformers.npz: what transformers' beam search finds where log-probabilities come from a table.

    pip install '.[oracle]' && python tests/reference/make_beam_fixtures.py

The fixture holds
    logits   (vocab_size, vocab_size, vocab_size) float32: those after the last two tokens
    cases    JSON: a list of {"prompt": two tokens, "end_ids", "width", "max_tokens", "length_penalty", "early_stopping",
             "outputs": [[tokens, score], ...], the best first, as many as the search is wide}

Tokens that end a text are made so probable that outputs end early and late, and searches by each of their rules. Logits lie on a
grid so coarse that many candidates tie in nothing but their sums; no two of them are equal.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

VOCAB_SIZE = 11
PAD = VOCAB_SIZE  # no token


class TableConfig(PretrainedConfig):
    model_type = "table"
    vocab_size = VOCAB_SIZE


class Table(PreTrainedModel, GenerationMixin):
    """A model whose logits are looked up."""

    config_class = TableConfig

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__(TableConfig())
        self.table = torch.nn.Parameter(logits, requires_grad=False)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **_: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}

    def forward(self, input_ids: torch.Tensor, **_: Any) -> CausalLMOutput:
        before, last = input_ids[:, -2], input_ids[:, -1]
        return CausalLMOutput(logits=self.table[before, last][:, None])


def search(model: Table, case: dict[str, Any]) -> list[tuple[list[int], float]]:
    width, prompt = case["width"], case["prompt"]
    out = model.generate(
        torch.tensor([prompt]),
        num_beams=width,
        num_return_sequences=width,
        max_new_tokens=case["max_tokens"],
        length_penalty=case["length_penalty"],
        early_stopping=case["early_stopping"],
        eos_token_id=case["end_ids"] or None,
        pad_token_id=PAD,
        do_sample=False,
        use_cache=False,
        output_scores=True,
        return_dict_in_generate=True,
    )
    tokens = [[int(token) for token in row[len(prompt) :] if token != PAD] for row in out.sequences]
    return list(zip(tokens, map(float, out.sequences_scores), strict=True))


def main() -> None:
    generator = np.random.default_rng(20)
    logits = np.round(generator.normal(0, 1.5, (VOCAB_SIZE,) * 3) * 64).astype(np.float32) / 64
    logits[..., :2] += 0.75  # the tokens that end a text
    model = Table(torch.from_numpy(logits)).eval()
    cases = []
    for number, (width, end_ids, penalty, early) in enumerate(
        product((2, 3, 4, 7), ([0], [0, 1], []), (-0.5, 0.0, 1.0, 2.0), (False, True, "never"))
    ):
        case = {
            "prompt": [2 + number % 9, 2 + number // 9 % 9],
            "end_ids": end_ids,
            "width": width,
            "max_tokens": (1, 2, 5, 12)[number % 4] if number % 3 else 12,
            "length_penalty": penalty,
            "early_stopping": early,
        }
        cases.append({**case, "outputs": search(model, case)})
    path = Path(__file__).parent / "data" / "beam" / "transformers.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, logits=logits, cases=json.dumps(cases))
    print(f"{path}: {len(cases)} cases, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
