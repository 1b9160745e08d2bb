"""Loss curves of a run made of several pieces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pyengine_training.__main__ import main
from pyengine_training.plot import POINTS, read_chain, thinned

pytest.importorskip("matplotlib", reason="drawing needs matplotlib: extra [train]")


def write_run(folder: Path, first: int, last: int, parent: Path | None = None, quantized_from: int = 1 << 30) -> Path:
    """A run folder with steps first..last, a validation every 10 of them."""
    (folder / "checkpoints").mkdir(parents=True)
    values = {"run_version": 1, **({"parent": str(parent)} if parent else {})}
    (folder / "run.json").write_text(json.dumps(values))
    lines: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        entry = {"step": step, "tokens": 1000 * step, "loss": 8 / step**0.1, "quantized": step >= quantized_from}
        lines.append(entry)
        if step % 10 == 0:
            check = {"val_loss": 8.1 / step**0.1, "val_bits_per_byte": 3 / step**0.1, "int8": False}
            lines.append({"step": step, "tokens": 1000 * step, **check})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Trunk (200 steps, then its own decay), continued from a checkpoint, decayed from another one."""
    trunk = write_run(tmp_path / "a", 1, 250, quantized_from=201)
    longer = write_run(tmp_path / "d", 201, 400, trunk / "trunk")
    return write_run(tmp_path / "e", 381, 500, longer / "checkpoints" / "step_00000380", quantized_from=400)


def test_each_step_comes_from_the_piece_that_led_on(chain: Path) -> None:
    pieces = read_chain(chain)
    steps = [[e["step"] for e in piece if "loss" in e] for piece in pieces]
    assert [(s[0], s[-1]) for s in steps] == [(1, 200), (201, 380), (381, 500)]
    assert [number for piece in steps for number in piece] == list(range(1, 501))
    assert not any(e.get("quantized") for e in pieces[0])  # the first piece's own decay led nowhere


def test_the_picture_is_small(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "card.png"
    assert main(["plot", str(chain), "-o", str(target)]) == 0
    assert capsys.readouterr().out.strip() == str(target)
    assert target.read_bytes()[:4] == b"\x89PNG" and target.stat().st_size < 60_000
    assert main(["plot", str(chain)]) == 0
    assert (chain / "loss.png").exists()


@pytest.mark.parametrize(("name", "begins"), [("a.svg", b"<?xml"), ("a.pdf", b"%PDF"), ("A.PNG", b"\x89PNG")])
def test_a_picture_is_what_its_name_says(chain: Path, tmp_path: Path, name: str, begins: bytes) -> None:
    assert main(["plot", str(chain), "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(begins)


@pytest.mark.parametrize("name", ["loss.jpeg", "loss", "loss.svg.old"])
def test_a_name_that_says_nothing_known_is_refused(
    chain: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plot", str(chain), "-o", str(tmp_path / name)]) == 1
    assert f"{tmp_path / name}: a picture's name ends in .png, .svg, .pdf" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_a_parent_that_is_gone_is_named(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d" / "run.json").unlink()
    assert main(["plot", str(chain)]) == 1
    assert "step_00000380" in capsys.readouterr().err
    assert main(["plot", str(chain), "--alone"]) == 0


def test_a_circle_of_parents_ends(chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"run_version": 1, "parent": str(chain / "trunk")}
    (tmp_path / "a" / "run.json").write_text(json.dumps(values))
    assert main(["plot", str(chain)]) == 1
    assert "--alone" in capsys.readouterr().err


def test_other_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", str(tmp_path)]) == 1
    assert "not a run folder" in capsys.readouterr().err
    assert main(["plot", str(write_run(tmp_path / "new", 1, 0))]) == 1
    assert "no step has been done" in capsys.readouterr().err


def test_a_line_cut_short_is_left_out(chain: Path) -> None:
    with open(chain / "metrics.jsonl", "a") as file:
        file.write('{"step": 501, "lo')
    assert read_chain(chain)[-1][-1]["step"] == 500


def test_long_curves_are_thinned_by_means() -> None:
    steps = [{"tokens": 1e6 * i, "loss": float(i % 2)} for i in range(1, 4 * POINTS + 1)]
    tokens, losses = thinned(steps)
    assert len(tokens) == POINTS and tokens[-1] == 4 * POINTS
    assert set(losses) == {0.5}
    assert thinned([]) == ([], [])


def test_drawing_needs_no_numba(chain: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['numba', 'llvmlite', 'pyengine']));"
        "from pyengine_training.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    home = Path(__file__).resolve().parents[2] / "training"
    command = [sys.executable, "-c", code, "plot", str(chain)]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
