"""Every target, by name. Each is made in a scratch directory of its own."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from fuzz.cases import Target
from fuzz.targets.frozen import FrozenFileTarget
from fuzz.targets.gguf import GGUFTarget
from fuzz.targets.hf import HFTarget
from fuzz.targets.llama2c import Llama2cTarget
from fuzz.targets.parameters import ParametersTarget
from fuzz.targets.template import TemplateTarget
from fuzz.targets.tokenizer import TokenizerTarget

TARGETS: dict[str, Callable[[Path], Target]] = {
    "frozen": FrozenFileTarget,
    "gguf": GGUFTarget,
    "hf": HFTarget,
    "llama2c": Llama2cTarget,
    "tokenizer": TokenizerTarget,
    "template": TemplateTarget,
    "parameters": ParametersTarget,
}

if find_spec("prometheus_client"):  # of the extra "serve"
    from fuzz.targets.serve import ServeTarget

    TARGETS["serve"] = ServeTarget
