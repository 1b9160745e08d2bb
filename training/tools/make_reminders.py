"""A small set of instructions for a first fine-tuning: a sentence that asks for a reminder, answered by a JSON object.

    python training/tools/make_reminders.py FOLDER --train 480 --test 200

FOLDER gets train.jsonl and test.jsonl, conversations of a user and an assistant; no sentence of the test is in train.jsonl.
The answer has what is to be done in the user's words, the day (null where none is said) and the time on a clock of 24 hours, so
that there is a format, a rule and a default to be learnt, and every answer is either right or wrong. The same numbers give the
same files.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

VERBS = ("call", "email", "visit", "thank", "pay", "meet", "write to", "pick up")
WHOM = (
    *("the dentist", "my mother", "the plumber", "Dr. Adams", "our landlord", "the school", "Maria", "the bank"),
    *("my brother", "the library", "uncle Theo", "the garage", "Mrs. Lee", "the neighbours", "the tax office"),
    *("Jonas", "the bakery", "my boss"),
)
CHORES = (
    *("water the plants", "take out the trash", "feed the cat", "book a table", "renew my passport", "buy stamps"),
    *("back up my photos", "walk the dog", "change the filter", "charge the camera", "cancel the gym"),
    *("return the books", "clean the oven", "order coffee", "pack my bag", "check the tires", "fix the shelf"),
    *("sharpen the knives", "measure the window", "wash the car", "print the tickets"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MINUTES = (0, 0, 0, 15, 30, 45)
WITH_DAY = (
    "Remind me to {what} on {day} at {time}.",
    "Please remind me on {day} at {time} to {what}.",
    "On {day} at {time} I have to {what}.",
    "I need to {what} on {day}, at {time}.",
    "Can you remind me to {what}? {day}, {time}.",
    "Don't let me forget to {what} on {day} at {time}!",
)
WITHOUT_DAY = (
    "Remind me to {what} at {time}.",
    "At {time} I must {what}.",
    "Could you tell me at {time} to {what}?",
)


def clock(hour: int, minute: int) -> str:
    """As people say it: 3 pm, 11:15 am."""
    return f"{(hour - 1) % 12 + 1}{f':{minute:02}' if minute else ''} {'am' if hour < 12 else 'pm'}"


def conversations(seed: int) -> Iterator[tuple[str, str]]:
    """(sentence, answer) without an end."""
    draw = random.Random(seed)
    while True:
        what = draw.choice(CHORES) if draw.random() < 0.5 else f"{draw.choice(VERBS)} {draw.choice(WHOM)}"
        hour, minute, day = (
            draw.randrange(24),
            draw.choice(MINUTES),
            None if draw.random() < 0.25 else draw.choice(DAYS),
        )
        sentence = draw.choice(WITHOUT_DAY if day is None else WITH_DAY)
        answer = {"what": what, "day": day, "time": f"{hour:02}:{minute:02}"}
        yield sentence.format(what=what, day=day, time=clock(hour, minute)), json.dumps(answer)


def write(folder: Path, n_train: int, n_test: int, seed: int) -> None:
    """Both files, all sentences different."""
    folder.mkdir(parents=True, exist_ok=True)
    source, seen = conversations(seed), set[str]()
    for name, count in (("train", n_train), ("test", n_test)):
        lines = []
        while len(lines) < count:
            sentence, answer = next(source)
            if sentence not in seen:
                seen.add(sentence)
                messages = [{"role": "user", "content": sentence}, {"role": "assistant", "content": answer}]
                lines.append(json.dumps({"messages": messages}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=480, metavar="N")
    parser.add_argument("--test", type=int, default=200, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    args = parser.parse_args()
    write(args.folder, args.train, args.test, args.seed)


if __name__ == "__main__":
    main()
