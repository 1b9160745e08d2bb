"""`pyengine doctor`: what this machine offers, what pyengine makes of it and why."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from typing import Any

from pyengine.cli import options
from pyengine.cli.terminal import say, warn

EPILOG = """\
examples:
  pyengine doctor
  PYENGINE_ISA=scalar pyengine doctor
  pyengine doctor --json > machine.json
"""

# What the extras serve, guide, hub and train bring.
EXTRAS = ("uvicorn", "llguidance", "huggingface_hub", "numba")
# Kernel tables by the CPU features that they need.
_FEATURES_OF = {
    "amx": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "amx_tile", "amx_int8"),
    "avxvnni": ("avx2", "fma", "f16c", "avxvnni"),
    "avx512vnni": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"),
    "avx2": ("avx2", "fma", "f16c"),
}


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("doctor", EPILOG)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def instruction_sets(warnings: list[str]) -> dict[str, Any]:
    """CPU features, tables that can run, the chosen one and why."""
    from pyengine import _core
    from pyengine.errors import PyEngineError

    features, available = _core.cpu_features(), _core.available_isas()
    name = os.environ.get("PYENGINE_ISA")
    reason = f"PYENGINE_ISA={name}" if name else "the best that this CPU runs"
    facts: dict[str, Any] = {"cpu_features": features, "available": available, "chosen": None, "reason": reason}
    try:
        facts["chosen"] = _core.active_isa()
    except PyEngineError as error:
        warnings.append(str(error))
    if facts["chosen"] is not None and facts["chosen"] != available[0]:
        warnings.append(f"{available[0]} would be faster than {facts['chosen']}, which {facts['reason']} asks for")
    if available[0] == "scalar" and platform.machine() in ("x86_64", "AMD64"):
        missing = [f for f in _FEATURES_OF["avx2"] if f not in features]
        warnings.append(f"without {', '.join(missing)} only the scalar kernels run, which are many times slower")
    warnings += withheld(features, available)
    return facts


def withheld(features: list[str], available: list[str]) -> list[str]:
    """A warning for each table that the CPU could run and that is not available all the same."""
    reasons = "the compiler of this build did not know it"
    return [
        f"this CPU could run {name}, but {reasons}" + (", or the kernel refuses the tile registers" if name == "amx" else "")
        for name, needed in _FEATURES_OF.items()
        if name not in available and set(needed) <= set(features)
    ]


def threads(warnings: list[str]) -> dict[str, Any]:
    """How many threads an engine uses by default, what decided it, and whether the quota is enough."""
    from pyengine import _core, cpu_watch
    from pyengine.errors import InvalidArgumentError
    from pyengine.opening import threads_from_environment

    info = _core.thread_info()
    facts: dict[str, Any] = {"cpus": os.cpu_count(), **info, "chosen": info["n_default"]}
    quota = info["cpu_quota"]
    limited = quota > 0 and info["n_default"] < info["n_affinity"]
    facts["reason"] = (
        f"the cgroup's quota of {cpu_watch.n_cpus(quota)}"
        if limited
        else f"the affinity mask has {info['n_affinity']} CPUs"
    )
    try:
        if chosen := threads_from_environment():
            facts |= {"chosen": chosen, "reason": f"PYENGINE_NUM_THREADS={chosen}"}
            if chosen > info["n_default"]:
                warnings.append(
                    f"PYENGINE_NUM_THREADS={chosen} is more than the {info['n_default']} that can run: slow"
                )
    except InvalidArgumentError as error:
        warnings.append(str(error))
    if 0 < quota < 1:
        warnings.append(f"the cgroup grants {quota:g} of a CPU: tokens come in bursts")
    facts["throttling"] = counters = _core.throttling()
    if cpu_watch.is_throttled(counters):
        stops, periods = counters["n_throttled"], counters["n_periods"]
        warnings.append(
            f"the cgroup's quota was used up in {stops} of {periods} periods so far, by whatever runs in it"
        )
    return facts


def versions() -> dict[str, str | None]:
    """Of what matters here; None = not installed."""
    from importlib.metadata import PackageNotFoundError, version

    from pyengine import __version__

    found: dict[str, str | None] = {"pyengine": __version__, "python": platform.python_version()}
    for package in ("tokenizers", "numpy", "jinja2", "gguf", *EXTRAS):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def cache(warnings: list[str]) -> dict[str, Any]:
    """Where checkpoints are kept frozen, how many there are, and their bytes."""
    from pyengine.errors import PyEngineError
    from pyengine.freeze.cache import cache_directory

    try:
        directory = cache_directory()
    except PyEngineError as error:
        warnings.append(str(error))
        return {"path": None, "models": 0, "bytes": 0}
    files = [path.stat().st_size for path in directory.glob("*.safetensors")] if directory.is_dir() else []
    return {"path": str(directory), "models": len(files), "bytes": sum(files)}


def model(warnings: list[str]) -> dict[str, Any]:
    """The model that a command without -m would use."""
    from pyengine.opening import DEFAULT_MODEL

    name = os.environ.get("PYENGINE_MODEL")
    if name and not name.startswith("hf:") and not os.path.exists(name):
        warnings.append(f"PYENGINE_MODEL={name}: there is no such file")
    path = name or (DEFAULT_MODEL if os.path.exists(DEFAULT_MODEL) else None)
    reason = "shipped with the package" if path else "this build ships none"
    return {"default": path, "reason": "PYENGINE_MODEL" if name else reason}


def speculation() -> dict[str, Any]:
    """What guesses tokens ahead by default, and what that costs a step of one text on this machine, in microseconds: to read the
    token that came, and to look for what comes next."""
    from pyengine import _draft

    stats = _draft.DraftStats()
    drafter = _draft.Drafter(stats, (), _draft.Ngrams(1 << 15), n_tokens=1 << 15)
    outputs: list[int] = []
    reads, looks = [], []
    for n in range(16):  # nothing repeats itself: every table grows, and every look is in vain
        outputs += range(n << 8, (n + 1) << 8)
        began = time.perf_counter()
        drafter.read(outputs)
        read = time.perf_counter()
        for _ in range(256):
            _draft.plan(stats, [drafter], [_draft.MAX_DRAFT], 1, [()])
        reads.append((read - began) / 256)
        looks.append((time.perf_counter() - read) / 256)
    return {
        "default": "auto",
        "guessed_by": ["n-grams", "grammars", "the model's draft head if it has one"],
        "max_draft": _draft.MAX_DRAFT,
        "read_us": round(1e6 * min(reads), 2),
        "look_us": round(1e6 * min(looks), 2),
    }


def diagnose() -> dict[str, Any]:
    """Everything, as plain values."""
    warnings: list[str] = []
    return {
        "versions": versions(),
        "machine": {"system": platform.system(), "release": platform.release(), "architecture": platform.machine()},
        "isa": instruction_sets(warnings),
        "threads": threads(warnings),
        "speculation": speculation(),
        "cache": cache(warnings),
        "model": model(warnings),
        "warnings": warnings,
    }


def text_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of the human form."""
    isa, t, c, m, s = (facts[name] for name in ("isa", "threads", "cache", "model", "speculation"))
    quota = f"{t['cpu_quota']:g}" if t["cpu_quota"] else "none"
    stops = "{n_throttled} of {n_periods} periods".format(**t["throttling"]) if t["cpu_quota"] else "no quota"
    return [
        ("versions", ", ".join(f"{name} {version or 'not installed'}" for name, version in facts["versions"].items())),
        ("machine", " ".join(facts["machine"].values())),
        ("CPU features", ", ".join(isa["cpu_features"]) or "none that matter here"),
        ("kernels", f"{', '.join(isa['available'])}; chosen: {isa['chosen'] or 'none'} ({isa['reason']})"),
        ("threads", f"{t['chosen']} ({t['reason']}; CPUs {t['cpus']}, affinity {t['n_affinity']}, quota {quota})"),
        ("throttled", stops),
        (
            "speculation",
            f"{s['default']}: up to {s['max_draft']} tokens a step by {', '.join(s['guessed_by'])}; of its time n-grams take "
            f"{s['read_us']:g} us to read a token and {s['look_us']:g} us to look for the next",
        ),
        ("cache", f"{c['path'] or 'none'} ({c['models']} models, {c['bytes'] / 2**20:.1f} MiB)"),
        ("default model", f"{m['default'] or 'none'} ({m['reason']})"),
    ]


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    facts = diagnose()
    if args.json:
        print(json.dumps(facts))
        return 0
    for label, value in text_lines(facts):
        say(f"{label + ':':15} {value}")
    for warning in facts["warnings"]:
        warn(f"pyengine: warning: {warning}")
    return 0
