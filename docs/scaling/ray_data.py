"""Ray Data: a completion for each row of a data set.

    pip install pyengine-lm 'ray[data]' pandas
    python docs/scaling/ray_data.py model.safetensors prompts.jsonl answers

prompts.jsonl has a "prompt" on each line; the directory `answers` gets files with the same rows and their "text". An answer is
that of its prompt alone, whatever stands in its batch and however many engines there are.
"""

from __future__ import annotations

import argparse
from typing import Any

import ray
import ray.data

from pyengine import Engine


class Complete:
    """An engine in a process of its own; the model's file is mapped, so engines of a machine share its memory."""

    def __init__(self, model: str, threads: int, max_tokens: int) -> None:
        self.engine = Engine(model, n_threads=threads)
        self.max_tokens = max_tokens

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        results = self.engine.generate([str(prompt) for prompt in batch["prompt"]], max_tokens=self.max_tokens)
        return {**batch, "text": [result.text for result in results]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts")
    parser.add_argument("answers")
    parser.add_argument("--engines", type=int, default=2, help="at most, as CPUs allow")
    parser.add_argument("--threads", type=int, default=1, help="of each engine")
    parser.add_argument("--batch", type=int, default=32, help="prompts that an engine computes as one batch")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    rows = ray.data.read_json(args.prompts, lines=True)
    rows.map_batches(
        Complete,
        fn_constructor_args=(args.model, args.threads, args.max_tokens),
        batch_size=args.batch,
        concurrency=(1, args.engines),  # reading and writing need a CPU, too: engines that took all would wait for ever
        num_cpus=args.threads,
    ).write_json(args.answers)


if __name__ == "__main__":
    main()
