"""`pyengine info`: what is in a model file. Reads its header and attachments only."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pyengine.cli import options
from pyengine.cli.terminal import say

if TYPE_CHECKING:
    from pyengine.format.reader import FrozenFile

EPILOG = f"""\
examples:
  pyengine info -m model.safetensors
  pyengine info model.gguf --tensors | less
  pyengine info -m model.safetensors --json | python -m json.tool

{options.ENVIRONMENT}"""

MIB = 1 << 20


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("info", EPILOG)
    options.add_model_argument(parser)
    options.add_model_option(parser)
    parser.add_argument("--tensors", action="store_true", help="list the tensors")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def tokenizer_facts(
    document: dict[str, Any], config: dict[str, Any], bos: int | None, eos: tuple[int, ...]
) -> dict[str, Any]:
    """Kind, size and special tokens, from tokenizer.json itself: the tokenizer is not built, and what in the file is not of its
    kind, which opening the model would refuse, is passed over."""
    listed = document.get("added_tokens")
    tokens = [token for token in listed if isinstance(token, dict)] if isinstance(listed, list) else []
    added = {token["id"]: token.get("content") for token in tokens if type(token.get("id")) is int}
    model = document.get("model")
    model = model if isinstance(model, dict) else {}
    vocabulary = model.get("vocab")
    spelled = {}
    if isinstance(vocabulary, dict):
        spelled = {id_: text for text, id_ in vocabulary.items() if type(id_) is int}
    n_listed = len(vocabulary) if isinstance(vocabulary, list) else 0

    def token(id_: int) -> dict[str, Any]:
        return {"id": id_, "text": added.get(id_, spelled.get(id_))}

    return {
        "kind": model.get("type"),
        "vocab_size": n_listed or len({*spelled, *added}),
        "bos": None if bos is None else token(bos),
        "eos": [token(id_) for id_ in eos],
        "adds_bos": config.get("add_bos_token"),
        "n_special_tokens": sum(token.get("special") is True for token in tokens),
    }


def describe(frozen: FrozenFile, with_tensors: bool) -> dict[str, Any]:
    """Everything that is printed, as plain values; sizes in bytes."""
    from pyengine.format.inventory import MATRIX_KINDS, count_parameters, inventory
    from pyengine.format.kv import PAGE_POSITIONS, kv_bytes_per_position, kv_layout
    from pyengine.format.strict_json import parse_json_object

    def attachment(name: str) -> dict[str, Any]:
        content = frozen.attachment(name)
        return {} if content is None else parse_json_object(content, name)

    c = frozen.config
    file_bytes = len(frozen.buffer)
    weights = sum(size for _, size, _ in frozen.weights.values())
    layout = kv_layout(c)
    kv_full = layout.n_bytes(c.max_seq_len)
    kinds = dict.fromkeys(weight.kind for weight in inventory(c) if weight.is_matrix)
    facts: dict[str, Any] = {
        "path": str(frozen.path),
        **{key: frozen.metadata.get(key) for key in ("name", "source", "generator", "format_version")},
        "file_bytes": file_bytes,
        "weight_bytes": weights,
        "draft_bytes": frozen.draft_bytes,
        "parameters": count_parameters(c),
        "quantization": "; ".join(MATRIX_KINDS[kind].description for kind in kinds),
        "config": c.to_document(),
        "tokenizer": tokenizer_facts(
            attachment("tokenizer.json"), attachment("tokenizer_config.json"), c.bos_token_id, c.eos_token_ids
        ),
        "chat_template": frozen.attachment("chat_template.jinja") is not None,
        "generation_config": attachment("generation_config.json"),
        "kv_bytes_per_position": kv_bytes_per_position(c),
        "kv_window_bytes_per_position": layout.window_bytes // PAGE_POSITIONS,
        "kv_bytes_full_context": kv_full,
        "memory_bytes_full_context": weights + kv_full,
    }
    if with_tensors:
        facts["tensors"] = [
            {"name": name, "offset": offset, "bytes": size} for name, (offset, size) in frozen.tensors.items()
        ]
    return facts


def _spelled(token: dict[str, Any]) -> str:
    return f"{token['text']} ({token['id']})"


def _layer_lines(layers: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What of LayerSpec is worth a line: windows, convolutions, and RoPE tables where layers differ."""

    def spread(values: Any, spelled: Callable[[Any], str]) -> str:
        if not isinstance(values, list):
            return spelled(values)
        return ", ".join(f"{spelled(value)} in {n} layers" for value, n in Counter(values).items())

    if layers["window"]:
        yield "window", spread(layers["window"], lambda n: f"the last {n} positions" if n else "all positions")
    if "mixer" in layers:
        yield "mixer", spread(layers["mixer"], str)
    if layers["rope"]:
        yield "RoPE", spread(layers["rope"], lambda table: f"table {table}")


def text_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of the human form."""
    c, t = facts["config"], facts["tokenizer"]
    weights, kv, total = (
        facts[key] / MIB for key in ("weight_bytes", "kv_bytes_full_context", "memory_bytes_full_context")
    )
    biases = "qkv_bias", "o_bias", "gate_up_bias", "down_bias", "output_bias"
    attention = "attention_sinks", "qk_norm", "qk_norm_all_heads", "qk_norm_after_rope"
    flags = [name for name in ("tie_embeddings", *biases, "router_bias", *attention) if c.get(name)]
    if c.get("n_experts"):
        shared = " and a shared one" if c.get("shared_hidden_dim") else ""
        flags.append(f"{c['n_experts_used']} of {c['n_experts']} experts{shared}")
    in_window = facts["kv_window_bytes_per_position"]
    window = f" ({in_window:,} of them kept for a window only)" if in_window else ""
    flags += [f"{name} {c[name]:g}" for name in ("attention_softcap", "logits_softcap") if name in c]
    lines = [
        ("file", f"{facts['path']} ({facts['file_bytes'] / MIB:.1f} MiB)"),
        ("name", f"{facts['name']} (from {facts['source']}, by {facts['generator']})"),
        ("architecture", f"{c['architecture']}{', ' if flags else ''}{', '.join(flags)}"),
        ("parameters", f"{facts['parameters']:,} ({facts['quantization']})"),
        ("layers", f"{c['n_layers']} of dim {c['dim']}, hidden dim {c['hidden_dim']}"),
        ("heads", f"{c['n_heads']} of {c['head_dim']}, {c['n_kv_heads']} for keys and values"),
        ("context", f"{c['max_seq_len']} positions"),
        *_layer_lines(c["layers"]),
        (
            "tokenizer",
            f"{t['kind']}, {t['vocab_size']} tokens, {t['n_special_tokens']} special (the model has {c['vocab_size']})",
        ),
        ("begin of text", _spelled(t["bos"]) if t["bos"] else "none"),
        ("end of text", ", ".join(map(_spelled, t["eos"])) or "none"),
        ("chat template", "yes" if facts["chat_template"] else "no"),
        ("generation", ", ".join(f"{k} {v}" for k, v in facts["generation_config"].items()) or "greedy"),
        ("KV cache", f"{facts['kv_bytes_per_position']:,} bytes a position{window}, {kv:.1f} MiB in full"),
        ("memory", f"{total:.1f} MiB with a full context, {weights:.1f} of them weights that processes share"),
    ]
    extra = dict(c.get("extra", {}))
    if head := extra.pop("draft", None):
        size = facts["draft_bytes"] / MIB
        lines.append(("draft head", f"hidden dim {head['hidden_dim']}, {head['vocab_size']} tokens, {size:.1f} MiB"))
    return [*lines, ("extra", json.dumps(extra))] if extra else lines


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    from pyengine.format.reader import FrozenFile

    options.take_model_argument(args)
    with FrozenFile.open(options.frozen_path(args)) as frozen:
        facts = describe(frozen, args.tensors)
    options.tolerant_stdout()
    if args.json:
        print(json.dumps(facts))
        return 0
    for label, value in text_lines(facts):
        say(f"{label + ':':15} {value}")
    if args.tensors:
        print(f"\n{'offset':>14} {'bytes':>14}  tensor")
        for tensor in facts["tensors"]:
            print(f"{tensor['offset']:14} {tensor['bytes']:14}  {tensor['name']}")
    return 0
