"""A target with every kind of fault, to try the harness on."""

from __future__ import annotations

import os
import random
from pathlib import Path

from fuzz.cases import Case

from pyengine.errors import ModelFormatError

FAULTS = ["none", "refusal", "exception", "loop", "abort", "exit", "memory"]


class FaultyTarget:
    name = "fuzz.faulty_target:FaultyTarget"

    def __init__(self, scratch: Path) -> None:
        self.stage = ""

    def make(self, rng: random.Random) -> Case:
        return Case({"file": rng.randbytes(3)}, rng.choice(FAULTS))

    def run(self, case: Case) -> None:
        self.stage = case.arguments
        if case.arguments == "refusal":
            raise ModelFormatError("no")
        if case.arguments == "exception":
            raise KeyError("foreign")
        if case.arguments == "abort":
            os.abort()
        if case.arguments == "exit":
            os._exit(3)
        if case.arguments == "memory":
            bytearray(1 << 40)
        while case.arguments == "loop":
            pass
