"""What int8 costs on a real model: the engine against transformers in float32, teacher-forced.

    pip install '.[oracle]' accelerate
    python tests/benchmarks/quality.py --model SmolLM2-135M-Instruct.Q4_1.gguf

Both sides score the same windows of one English text. The last line of stdout is one JSON document;
the exit status is 1 when a target is missed. For each of n_windows * window_length positions:

    kl      KL(float32 || engine) of the next-token distributions, in nats
    nll     negative log-likelihood of the token that really follows; the difference
            engine - float32 is paired position by position, and so is its standard error
    argmax  whether both have the same winner, over positions where float32's top two logits
            are more than 0.5 apart

And what each side says next after PROMPT, which every language model that works knows.

transformers reads the weights of a GGUF file rightly but not always its tokenizer, so token ids
come from the engine. --simulate puts the float64 oracle of csrc/FORMAT.md in the engine's place:
what a change of the specification would cost.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from reference import fixtures  # noqa: E402
from reference.oracle import Oracle, kl_divergence, log_softmax  # noqa: E402

Logits = Callable[[NDArray[Any]], NDArray[Any]]  # (n_tokens) ids -> (n_tokens, vocab_size)

MAX_KL = 0.0055  # SmolLM2's on the texts of docs/performance.md is 0.0027 to 0.0051
MAX_NLL_SHARE = 0.005  # of float32's, plus two standard errors
MIN_ARGMAX = 0.998
CLEAR_MARGIN = 0.5
PROMPT = "The capital of France is"


def default_text() -> Path:
    """A long English text: the GPL where the system keeps it, else our own license."""
    gpl = Path("/usr/share/common-licenses/GPL-3")
    return gpl if gpl.is_file() else ROOT / "LICENSE"


def load_float32(model: Path) -> Any:
    """The checkpoint (GGUF file or Hugging Face directory) in transformers, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    if model.is_dir():
        directory, options = model, {}
    else:
        directory, options = model.parent, {"gguf_file": model.name}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    return loaded.eval()


def float32_logits(model: Any) -> Logits:
    import torch

    def logits(token_ids: NDArray[Any]) -> NDArray[Any]:
        with torch.no_grad():
            result: NDArray[Any] = model(torch.tensor(token_ids)[None]).logits[0].numpy()
        return result

    return logits


def engine_logits(engine: Any) -> Logits:
    return lambda token_ids: np.asarray(engine.logits([int(t) for t in token_ids]))


def simulated_logits(model: Any) -> Logits:
    """The specification in float64 (reference/oracle.py) over the weights of a transformers model."""
    hf_config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    config = fixtures.config_from_hf(hf_config, (name for name, _ in model.named_parameters()))
    weights = {
        fixtures.canonical_name(name): parameter.detach().numpy() for name, parameter in model.named_parameters()
    }
    weights["rope.0.inv_freq"] = model.model.rotary_emb.inv_freq.numpy()
    return Oracle(config, fixtures.split_key_biases(config, weights), quantized=True).logits


def compare(reference: NDArray[Any], other: NDArray[Any], token_ids: NDArray[Any]) -> dict[str, Any]:
    """Arrays over the positions of one window: kl (n), nll and nll_difference (n - 1), agrees
    (as many as have a clear winner)."""
    here, following = np.arange(len(token_ids) - 1), token_ids[1:]
    nll, other_nll = (-log_softmax(side)[here, following] for side in (reference, other))
    top_two = np.partition(reference, -2, axis=1)[:, -2:]
    clear = top_two[:, 1] - top_two[:, 0] > CLEAR_MARGIN
    return {
        "kl": kl_divergence(reference, other),
        "nll": nll,
        "nll_difference": other_nll - nll,
        "agrees": (reference.argmax(axis=1) == other.argmax(axis=1))[clear],
    }


def standard_error(x: NDArray[Any]) -> float:
    return float(x.std(ddof=1) / np.sqrt(len(x)))


def summarize(windows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over all positions, with the targets and whether each is met."""
    kl, nll, difference, agrees = (
        np.concatenate([w[key] for w in windows]) for key in ("kl", "nll", "nll_difference", "agrees")
    )
    nll_bound = MAX_NLL_SHARE * nll.mean() + 2 * standard_error(difference)
    return {
        "n_windows": len(windows),
        "n_positions": len(kl),
        "kl_mean": float(kl.mean()),
        "kl_se": standard_error(kl),
        "kl_max": float(kl.max()),
        "kl_mean_per_window": [float(w["kl"].mean()) for w in windows],
        "nll_float32": float(nll.mean()),
        "nll_difference": float(difference.mean()),
        "nll_difference_se": standard_error(difference),
        "argmax_agreement": float(agrees.mean()),
        "argmax_positions": len(agrees),
        "targets": {"kl_mean": MAX_KL, "nll_difference": float(nll_bound), "argmax": MIN_ARGMAX},
        "passed": {
            "kl_mean": bool(kl.mean() <= MAX_KL),
            "nll_difference": bool(abs(difference.mean()) <= nll_bound),
            "argmax": bool(agrees.mean() >= MIN_ARGMAX),
        },
    }


def next_tokens(engine: Any, sides: dict[str, Logits]) -> dict[str, Any]:
    """The most probable token after PROMPT by each side, and whether they agree."""
    token_ids = np.array(engine.tokenize(PROMPT))
    tokens = {name: engine.detokenize([int(logits(token_ids)[-1].argmax())]) for name, logits in sides.items()}
    return {"prompt": PROMPT, **tokens, "passed": len(set(tokens.values())) == 1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What int8 costs on a real model, as JSON.")
    add = parser.add_argument
    add("--model", type=Path, required=True, help="GGUF file or Hugging Face directory")
    add("--frozen", type=Path, help="its frozen file (default: frozen into the cache)")
    add("--text", type=Path, default=default_text())
    add("--n-windows", type=int, default=4)
    add("--window-length", type=int, default=512)
    add("--kv-dtype", choices=["int8", "f32"], default="int8")
    add("--simulate", action="store_true", help="the oracle in the engine's place")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    import pyengine

    engine = pyengine.Engine(args.frozen or args.model, kv_dtype=args.kv_dtype)
    text = args.text.read_text(encoding="utf-8")
    n_tokens = args.n_windows * args.window_length
    token_ids = np.array(engine.tokenize(text, add_bos=False)[:n_tokens])
    if len(token_ids) < n_tokens:
        print(f"{args.text} has {len(token_ids)} tokens, {n_tokens} are needed", file=sys.stderr)
        return 2
    model = load_float32(args.model)
    reference = float32_logits(model)
    other = simulated_logits(model) if args.simulate else engine_logits(engine)

    windows = []
    for window in token_ids.reshape(args.n_windows, args.window_length):
        windows.append(compare(reference(window), other(window), window))
        print(f"window {len(windows)}: KL {windows[-1]['kl'].mean():.5f}", file=sys.stderr)
    summary = summarize(windows)
    what = {"model": args.model.name, "text": args.text.name, "kv_dtype": args.kv_dtype}
    side = "simulated" if args.simulate else "engine"
    said = next_tokens(engine, {"float32": reference, side: other})
    print(json.dumps({**what, "side": side, **summary, "next_token": said}))
    return 0 if all(summary["passed"].values()) and said["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
