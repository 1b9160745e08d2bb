"""Low-rank adapters (LoRA): a model's matrices stay, and what is learnt is a product of two thin ones beside each.

forward   W  = W0 + s B A                    s = alpha / r;  W0, W (out, in), A (r, in), B (out, r)
backward  dA = s (dy B)^T x = s B^T dW       x (N, in), dy (N, out): of the product y = x W^T
          dB = s dy^T (x A^T) = s dW A^T

W is what every product reads, so the forward of the whole model, with the engine's int8 simulated or not, is the same as without
adapters. dW (out, in) is never made: products with r columns take its place, and a step computes two thirds of a whole one.
A begins random and B at zero, so W begins as W0. AdamW, without decay. What is written for others is PEFT's layout.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .arena import Arena, Shapes, block_matrices, parameter_shapes
from .checkpoint import hf_tensors
from .config import ModelConfig, TrainConfig
from .errors import CheckpointError, ConfigError
from .files import load_safetensors, save_safetensors, write_json
from .ops import cpu as ops
from .ops.cpu.grad_norm import BLOCK

Array = NDArray[Any]
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODULES = {
    "wqkv": TARGETS[:3],
    "wo": TARGETS[3:4],
    "w_gate_up": TARGETS[4:6],
    "w_down": TARGETS[6:],
}  # of fused matrices
STATE = "lora.safetensors"  # in a checkpoint


@dataclass(frozen=True)
class LoraConfig:
    """Rank, scale and matrices of adapters on the model in folder ``base``."""

    r: int
    alpha: float
    targets: tuple[str, ...]
    base: str

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 < self.alpha < math.inf:
            raise ConfigError(f"--lora: r is {self.r}, alpha {self.alpha}; both must be positive")
        unknown = [name for name in self.targets if name not in TARGETS]
        if unknown or not self.targets:
            raise ConfigError(f"--lora: no matrix {', '.join(unknown) or 'is named'}; choose from {', '.join(TARGETS)}")

    def parts(self, model: ModelConfig, name: str) -> list[tuple[str, slice]]:
        """Targets that lie in a parameter of the model's arena: (Hugging Face module, its rows)."""
        head, _, last = name.rpartition(".")
        parts = zip(MODULES.get(last, ()), block_matrices(name, model), strict=True)
        within = "mlp" if last in ("w_gate_up", "w_down") else "self_attn"
        return [(f"model.{head}.{within}.{m}", slice(*rows)) for m, rows in parts if m in self.targets]

    def n_params(self, model: ModelConfig) -> int:
        """Of A and B of every target."""
        found = ((shape, self.parts(model, name)) for name, shape in parameter_shapes(model).items())
        return sum(self.r * (rows.stop - rows.start + shape[1]) for shape, parts in found for _, rows in parts)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> LoraConfig:
        return LoraConfig(int(values["r"]), float(values["alpha"]), tuple(values["targets"]), str(values["base"]))


def parse(text: str, base: Path) -> LoraConfig:
    """``r,alpha,target,…`` or ``r,alpha`` (every matrix)."""
    r, _, rest = text.partition(",")
    alpha, _, names = rest.partition(",")
    try:
        numbers = int(r), float(alpha)
    except ValueError as error:
        raise ConfigError(f"--lora {text}: expected r,alpha or r,alpha,target,…, as in 8,16,q_proj,v_proj") from error
    return LoraConfig(*numbers, tuple(names.split(",")) if names else TARGETS, str(base.resolve()))


class Adapters:
    """A and B of every target, their moments, and the effective weights in a model's arena.

    parts: fused matrix of the model's arena -> (Hugging Face module, its rows), targets alone.
    """

    def __init__(self, config: LoraConfig, model: ModelConfig, params: Arena) -> None:
        self.config, self.model, self.params = config, model, params
        self.scale = np.float32(config.alpha / config.r)
        self._weights = self._targets(params)
        shapes: Shapes = {}
        for name, weight in self._weights.items():
            shapes[f"{name}.lora_A.weight"] = (config.r, weight.shape[1])
            shapes[f"{name}.lora_B.weight"] = (weight.shape[0], config.r)
        self.values = Arena(shapes)
        self.m, self.v = self.values.like(), self.values.like()
        self._base: dict[str, Array] = {}
        self.parts = {name: config.parts(model, name) for name in params.shapes}

    def _targets(self, arena: Arena) -> dict[str, Array]:
        """Hugging Face module name -> its matrix in an arena, (out, in)."""
        return {
            name.removesuffix(".weight"): view
            for name, view in hf_tensors(arena, self.model).items()
            if name.split(".")[-2] in self.config.targets
        }

    def pair(self, arena: Arena, name: str) -> tuple[Array, Array]:
        """A (r, in) and B (out, r) of a module, in an arena with the layout of ``values``."""
        return arena[f"{name}.lora_A.weight"], arena[f"{name}.lora_B.weight"]

    def begin(self, seed: int) -> None:
        """Fresh adapters on what the arena holds, which is the base from now on."""
        self._base = {name: weight.copy() for name, weight in self._weights.items()}
        for index, name in enumerate(self._weights):
            a, b = self.pair(self.values, name)
            generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 3, index]))
            a[...] = generator.standard_normal(a.shape, dtype=np.float32) / np.float32(math.sqrt(a.shape[1]))
            b.fill(0)

    def merge(self) -> None:
        """The effective weights into the model's arena."""
        for name, weight in self._weights.items():
            a, b = self.pair(self.values, name)
            np.matmul(b, a, out=weight)
            weight *= self.scale
            weight += self._base[name]

    def norm(self, grads: Arena) -> float:
        """Of a gradient of A and B."""
        partial = np.empty(-(-grads.flat.size // BLOCK))
        ops.sum_of_squares(partial, grads.flat, BLOCK)
        return float(np.sqrt(partial.sum()))

    def step(self, config: TrainConfig, grads: Arena, step: int, factor: float, norm: float) -> None:
        """One update of A and B, and the weights that follow from it."""
        options = {"beta1": config.beta1, "beta2": config.beta2, "eps": config.eps, "weight_decay": 0.0}
        options["grad_scale"] = ops.clip_coefficient(norm, config.clip)
        flat = (arena.flat for arena in (self.values, grads, self.m, self.v))
        ops.adamw_update(*flat, step=step + 1, lr=config.lr * factor, **options)
        self.merge()

    # ---- files -------------------------------------------------------------------------------------------------------

    def _tensors(self, arena: Arena) -> dict[str, Array]:
        """PEFT's names."""
        return {f"base_model.model.{name}": arena[name] for name in arena.shapes}

    def save_state(self, folder: Path, values: Arena) -> None:
        """What resuming needs beside the moments: A and B, or a copy of them."""
        save_safetensors(folder / STATE, self._tensors(values))

    def load_state(self, folder: Path) -> None:
        """A and B of a checkpoint, on the base that the arena holds; raises CheckpointError if that has changed."""
        found = load_safetensors(folder / STATE)
        for name, view in self._tensors(self.values).items():
            if name not in found or found[name].shape != view.shape:
                raise CheckpointError(f"{folder / STATE}: {name} is missing or has another shape")
            view[...] = found[name]
        self.merge()
        saved = load_safetensors(folder / "model.safetensors")
        for name, weight in self._weights.items():
            if not np.array_equal(saved[f"{name}.weight"], weight):
                raise CheckpointError(f"{folder}: the adapters do not belong to {self.config.base}: has it changed?")

    def export(self, folder: Path) -> None:
        """adapter_config.json and adapter_model.safetensors into an existing folder, as PEFT and its readers expect."""
        c = self.config
        write_json(
            folder / "adapter_config.json",
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": c.base,
                "r": c.r,
                "lora_alpha": c.alpha,
                "target_modules": list(c.targets),
                "lora_dropout": 0.0,
                "bias": "none",
                "fan_in_fan_out": False,
                "use_rslora": False,
                "modules_to_save": None,
                "inference_mode": True,
            },
        )
        save_safetensors(folder / "adapter_model.safetensors", self._tensors(self.values), {"format": "pt"})
