"""Make data/rerank.json: what transformers makes of the model of rerankers.py, by the steps of the model cards.

    pip install '.[oracle]' && python tests/reference/make_rerank_fixtures.py

    scores       [[number of tokens, CRC-32 of their ids as int32, probability of "yes" against "no"], ...] of QUERY and each of
                 DOCUMENTS
    classifier   the probabilities of write_classifier's model
    embeddings   {"query", "document": the last token's state behind the last norm, of length 1}, of QUERY and DOCUMENTS[0]
                 behind their prompt, <|im_end|> behind all
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import rerankers


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        directory = rerankers.write_model(Path(temporary) / "model")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
        model = AutoModelForCausalLM.from_pretrained(directory, torch_dtype=torch.float32).eval()
        directory = rerankers.write_classifier(Path(temporary) / "classifier")
        classifier = AutoModelForSequenceClassification.from_pretrained(directory, torch_dtype=torch.float32).eval()
    no, yes = (tokenizer.convert_tokens_to_ids(word) for word in ("no", "yes"))
    before, behind = (tokenizer.encode(text, add_special_tokens=False) for text in (rerankers.PREFIX, rerankers.SUFFIX))
    scores, classified = [], []
    for document in rerankers.DOCUMENTS:
        body = tokenizer.encode(rerankers.pair(rerankers.QUERY, document), add_special_tokens=False)
        ids = before + body + behind
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        score = torch.nn.functional.log_softmax(torch.stack([logits[no], logits[yes]]), dim=0)[1].exp().item()
        scores.append([len(ids), zlib.crc32(np.array(ids, np.int32).tobytes()), score])
        with torch.no_grad():
            classified.append(classifier(torch.tensor([ids])).logits[0, 0].sigmoid().item())
    vectors = {}
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name, text in (("query", rerankers.QUERY), ("document", rerankers.DOCUMENTS[0])):
        ids = [*tokenizer.encode(rerankers.PROMPTS[name] + text, add_special_tokens=False), end]
        with torch.no_grad():
            state = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        vectors[name] = torch.nn.functional.normalize(state, dim=0).tolist()
    rerankers.DATA.write_text(json.dumps({"scores": scores, "classifier": classified, "embeddings": vectors}) + "\n")
    print(scores, classified)


if __name__ == "__main__":
    main()
