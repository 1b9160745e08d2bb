"""How a chat model answers: which of its answers end by themselves, and which are the ones that were wanted.

    python training/tools/answers.py MODEL conversations.jsonl

MODEL is anything that the engine opens. Each line of the file is {"messages": […]}, whose last message is the wanted answer; the
model is given those before it, decodes greedily, and its answer is compared letter for letter. Prints one JSON object, and with
--show N the first N answers.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pyengine


def read(path: Path) -> list[tuple[list[dict[str, str]], str]]:
    """(messages before the answer, the wanted answer) of each line. ValueError names a line that has no such thing."""
    asked = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        messages = json.loads(line).get("messages") if line.startswith("{") else None
        if not messages or len(messages) < 2 or messages[-1].get("role") != "assistant":
            raise ValueError(f"{path}: line {number} does not end with what the assistant should say")
        asked.append((messages[:-1], messages[-1]["content"]))
    return asked


def judge(engine: pyengine.Engine, asked: list[tuple[list[dict[str, str]], str]], max_tokens: int) -> dict[str, Any]:
    """Counts over all questions, and the answers."""
    answers = [engine.chat(messages, temperature=0, max_tokens=max_tokens) for messages, _ in asked]
    texts = [answer.text for answer in answers]
    wanted = [text for _, text in asked]
    return {
        "questions": len(asked),
        "ended": sum(answer.finish_reason == "stop" for answer in answers),
        "as_wanted": sum(text == want for text, want in zip(texts, wanted, strict=True)),
        "answers": texts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("conversations", type=Path)
    parser.add_argument("--first", type=int, metavar="N", help="only so many of them")
    parser.add_argument(
        "--max-tokens", type=int, default=128, metavar="N", help="an answer that has not ended then (default 128)"
    )
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N questions and answers")
    args = parser.parse_args()
    try:
        asked = read(args.conversations)[: args.first]
        with pyengine.Engine(args.model) as engine:
            found = judge(engine, asked, args.max_tokens)
    except (ValueError, OSError, pyengine.PyEngineError) as error:
        raise SystemExit(f"error: {error}") from error
    for (messages, want), answer in list(zip(asked, found.pop("answers"), strict=True))[: args.show]:
        print(json.dumps({"asked": messages[-1]["content"], "answered": answer, "wanted": want}, ensure_ascii=False))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
