"""`pyengine verify`: is the file what was frozen, and does this machine compute with it what it must?"""

from __future__ import annotations

import argparse
from pathlib import Path

from pyengine.cli import EXIT_ERROR, options
from pyengine.cli.progress import ProgressLine
from pyengine.cli.terminal import say, warn

EPILOG = f"""\
examples:
  pyengine verify model.safetensors
  pyengine verify -m model.safetensors --all-isas && echo "this machine computes it bit for bit"

Every tensor's SHA-256 is compared with the one on file, then the golden outputs are computed again and compared to the bit.
Exit code 1 if anything differs.

{options.ENVIRONMENT}"""


def parser() -> argparse.ArgumentParser:
    parser = options.Parser("verify", EPILOG)
    options.add_model_argument(parser)
    options.add_model_options(parser)
    parser.add_argument(
        "--all-isas", action="store_true", help="golden outputs on every instruction set that this CPU has"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    return parser


def differing_tensors(path: Path) -> tuple[int, list[str]]:
    """Number of tensors checked, and the names of those whose checksum is wrong."""
    from pyengine.format.reader import FrozenFile, verify_checksums

    wrong, done = [], 0
    with FrozenFile.open(path) as frozen, ProgressLine("checksums") as line:
        total = sum(size for _, size in frozen.tensors.values())
        n_checked = 0
        for name, is_right in verify_checksums(frozen):
            n_checked += 1
            done += frozen.tensors[name][1]
            line.update(done, total, name)
            if not is_right:
                wrong.append(name)
    return n_checked, wrong


def golden_outputs(path: Path) -> dict[str, object]:
    """What the file says it must compute. Raises ModelFormatError if it says nothing."""
    from pyengine.errors import ModelFormatError
    from pyengine.format.reader import FrozenFile
    from pyengine.format.strict_json import parse_json_object

    with FrozenFile.open(path) as frozen:
        golden = parse_json_object(frozen.attachment("golden.json") or b"", "golden.json")
    if not golden:
        raise ModelFormatError(f"{path}: the file has no golden outputs to compare with")
    return golden


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    options.take_model_argument(args)
    from pyengine import _core, golden
    from pyengine.opening import threads_from_environment

    options.select_isa(args.isa)
    path = Path(options.frozen_path(args))
    n_tensors, wrong = differing_tensors(path)
    differences = [f"tensor {name}: its SHA-256 is not the one on file" for name in wrong]
    active, n_threads = _core.active_isa(), args.threads or threads_from_environment()
    isas = _core.available_isas() if args.all_isas else [active]
    if not wrong:  # damaged weights compute something else anyway
        expected = golden_outputs(path)
        with ProgressLine("golden outputs") as line:
            for isa in isas:
                line.show(f"golden outputs on {isa}", force=True)
                _core.select_isa(isa)
                computed = golden.compute(path, n_threads)
                _core.select_isa(active)
                differences += [
                    f"golden.json: {key} differs on {isa}" for key in computed if computed[key] != expected.get(key)
                ]
    options.tolerant_stdout()
    if args.json:
        import json

        facts = {"path": str(path), "ok": not differences, "tensors": n_tensors, "isas": [] if wrong else isas}
        print(json.dumps({**facts, "differences": differences}))
    elif not differences:
        say(f"{path}: {n_tensors} checksums and the golden outputs on {', '.join(isas)} are right")
    for difference in differences:
        warn(f"pyengine: error: {path}: {difference}")
    return EXIT_ERROR if differences else 0
