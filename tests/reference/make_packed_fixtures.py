"""Make data/packed/layers.npz: a layer quantized and read back by the tools whose layouts pyengine/freeze/packed.py reads.

    pip install torch transformers compressed-tensors numpy && pip install --no-deps auto-gptq autoawq
    python tests/reference/make_packed_fixtures.py

Per case NAME: `NAME/settings` the quantization_config as JSON, `NAME/<part>` each stored tensor of the layer (its bytes
as uint8, with `NAME/<part>:shape` and `:dtype` in the words of safetensors), and `NAME/expected` (n, k) float32, what the
tool itself makes of them. Only the modules that do so are imported: the packages' own __init__ want graphics cards.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

N, K, GROUP = 32, 96, 32
DTYPES = {
    torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
out: dict[str, np.ndarray] = {}


def bare_package(name: str) -> None:
    """Its modules can be imported, its __init__ is not run."""
    spec = importlib.machinery.PathFinder.find_spec(name.rpartition(".")[2], _path_of(name))
    assert spec is not None and spec.submodule_search_locations is not None, f"{name} is not installed"
    module = types.ModuleType(name)
    module.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = module


def _path_of(name: str) -> list[str] | None:
    parent = name.rpartition(".")[0]
    return list(sys.modules[parent].__path__) if parent else None


def keep(name: str, settings: dict[str, Any], parts: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    out[f"{name}/settings"] = np.array(json.dumps(settings))
    for part, tensor in parts.items():
        tensor = tensor.detach().contiguous()
        out[f"{name}/{part}"] = tensor.reshape(-1).view(torch.uint8).numpy()
        out[f"{name}/{part}:shape"] = np.array(tensor.shape, np.int64)
        out[f"{name}/{part}:dtype"] = np.array(DTYPES[tensor.dtype])
    assert expected.shape == (N, K)
    out[f"{name}/expected"] = expected.detach().float().numpy()


def weight(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, K, generator=generator) * (1 + torch.arange(N)[:, None] / 8)


def asymmetric(groups: torch.Tensor, bits: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """scales, zeros (n, groups), and weights (n, k) that are codes: what packs them rounds nothing."""
    generator = torch.Generator().manual_seed(seed)
    n_groups, top = int(groups.max()) + 1, 2**bits
    scales = (torch.rand(N, n_groups, generator=generator) / top + 0.01).half().float()
    zeros = torch.randint(1, top, (N, n_groups), generator=generator).float()
    codes = torch.randint(0, top, (N, K), generator=generator).float()
    return scales, zeros, (codes - zeros[:, groups]) * scales[:, groups]


def gptq() -> None:
    for name in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        bare_package(name)
    from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

    for bits, act_order in ((4, False), (4, True), (8, False)):
        groups = torch.arange(K) // GROUP
        if act_order:
            groups = groups[torch.randperm(K, generator=torch.Generator().manual_seed(5))]
        scales, zeros, w = asymmetric(groups, bits, bits + act_order)
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = w
        layer = QuantLinear(bits, GROUP, K, N, bias=False)
        layer.pack(linear, scales.clone(), zeros.clone(), groups.to(torch.int32))
        layer.autogptq_cuda_available = False
        layer.scales = layer.scales.float()
        expected = layer(torch.eye(K)).T
        assert torch.allclose(expected, w, atol=1e-5)
        parts = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales", "g_idx")}
        parts["scales"] = parts["scales"].half()
        settings = {"quant_method": "gptq", "bits": bits, "group_size": GROUP, "desc_act": act_order, "sym": False}
        keep(f"gptq{bits}{'-act-order' if act_order else ''}", settings, parts, expected)


def awq() -> None:
    for name in ("awq", "awq.utils", "awq.modules", "awq.modules.linear"):
        bare_package(name)
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    scales, zeros, w = asymmetric(torch.arange(K) // GROUP, 4, 9)
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = w
    layer = WQLinear_GEMM.from_linear(linear, 4, GROUP, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    parts = {part: getattr(layer, part) for part in ("qweight", "qzeros", "scales")}
    expected = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP).T
    keep("awq", {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, parts, expected)


def compressed_tensors() -> None:
    from compressed_tensors.compressors.naive_quantized.base import NaiveQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    cases = {
        "packed4": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": True}),
        "packed4-zeros": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": GROUP, "symmetric": False}),
        "packed8": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        "int8": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": True}),
        "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}),
        "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}),
    }
    for number, (name, (kind, options)) in enumerate(cases.items()):
        args = QuantizationArgs(**options)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=kind)
        w, bits = weight(20 + number), options["num_bits"]
        n_groups = K // GROUP if options["strategy"] == "group" else 1
        state: dict[str, torch.Tensor] = {"weight": w}
        if options["symmetric"]:
            largest = w.reshape(N, n_groups, -1).abs().amax(2)
            largest = largest.max().reshape(1) if options["strategy"] == "tensor" else largest
            scale = largest / (448 if options.get("type") == "float" else 2 ** (bits - 1) - 1)
            state["weight_zero_point"] = torch.zeros(scale.shape, dtype=torch.int8)
        else:
            scale, zeros, w = asymmetric(torch.arange(K) // GROUP, bits, 30 + number)
            state["weight"] = w
            state["weight_zero_point"] = (zeros - 2 ** (bits - 1)).to(torch.int8)
        state["weight_scale"] = scale.bfloat16()
        if options.get("type") == "float":
            state["weight_zero_point"] = state["weight_zero_point"].to(torch.float8_e4m3fn)
        compressor = PackedQuantizationCompressor if kind == "pack-quantized" else NaiveQuantizationCompressor
        parts = dict(compressor.compress(dict(state), scheme))
        if options["symmetric"]:
            parts.pop("weight_zero_point", None)
        wide = {key: value.float() if key == "weight_scale" else value for key, value in parts.items()}
        expected = compressor.decompress(wide, scheme)["weight"]
        settings = {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": {"weights": options}}}
        keep(f"compressed-{name}", settings, parts, expected)


def fp8_blocks() -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    block, w = (24, 64), weight(40)
    heights = torch.arange(N) // block[0]
    widths = torch.arange(K) // block[1]
    largest = torch.zeros(int(heights.max()) + 1, int(widths.max()) + 1)
    for i in range(largest.shape[0]):
        for j in range(largest.shape[1]):
            largest[i, j] = w[heights == i][:, widths == j].abs().max()
    scale = largest / 448
    codes = (w / scale[heights][:, widths]).to(torch.float8_e4m3fn)
    expected = codes.float() * scale[heights][:, widths]
    # transformers takes whole blocks only: the part that consists of them
    tool = Fp8Dequantize(types.SimpleNamespace(quantization_config=types.SimpleNamespace(weight_block_size=list(block))))
    whole = {"weight$": [codes[:24, :64].contiguous()], "weight_scale_inv": [scale[:1, :1].contiguous()]}
    (seen,) = tool.convert(whole, full_layer_name="m.weight").values()
    assert torch.equal(torch.as_tensor(seen).float(), expected[:24, :64])
    parts = {"weight": codes, "weight_scale_inv": scale}
    keep("fp8-blocks", {"quant_method": "fp8", "weight_block_size": list(block)}, parts, expected)


if __name__ == "__main__":
    for make in (gptq, awq, compressed_tensors, fp8_blocks):
        make()
    np.savez_compressed(Path(__file__).parent / "data" / "packed" / "layers.npz", **out)
