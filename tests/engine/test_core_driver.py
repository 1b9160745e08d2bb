"""The C driver (tests/csrc): every kernel table equals the scalar one and the forward pass gives
one answer, also under AddressSanitizer and UndefinedBehaviorSanitizer. Compiled here without CMake
or Python headers, so that it shows what the sources alone need."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("csrc/*.c"), *ROOT.glob("tests/csrc/*.c")])
KERNELS = ROOT / "csrc" / "kernels"
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", f"-I{ROOT / 'csrc'}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))]
SIMDE = ROOT / "tests" / "csrc" / "simde" / "kernels_simde.c"


def compilers() -> list[str]:
    return [name for name in ("gcc", "clang") if shutil.which(name)]


def compile_driver(compiler: str, directory: Path, flags: list[str], *, simde: bool) -> Path:
    """cc every source with the flags of its own instruction set, and link."""
    x86 = platform.machine() == "x86_64"
    per_file: dict[str, list[str]] = {"kernels_avx2.c": AVX2, "kernels_avx512vnni.c": AVX512}
    sources = [*SOURCES, *(KERNELS / n for n in ("dispatch.c", "cpu_features.c"))]
    sources += [KERNELS / "kernels_scalar.c"]
    if x86:
        sources += [KERNELS / name for name in per_file]
    if simde:
        sources.append(SIMDE)
        flags = [*flags, "-DPE_TEST_SIMDE", "-Wno-psabi"]
        per_file[SIMDE.name] = AVX2
    objects, running = [], []
    for source in sources:
        out = directory / f"{source.stem}.o"
        objects.append(str(out))
        command = [compiler, *FLAGS, *flags, *per_file.get(source.name, []), "-c", str(source)]
        running.append(subprocess.Popen([*command, "-o", str(out)]))
        if len(running) == 2:
            assert running.pop(0).wait() == 0, command
    assert all(process.wait() == 0 for process in running)
    driver = directory / "test_core"
    subprocess.run([compiler, *flags, *objects, "-pthread", "-lm", "-o", str(driver)], check=True)
    return driver


def run_driver(driver: Path, *args: str) -> str:
    result = subprocess.run([str(driver), *args], capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert result.stdout.rstrip().endswith(" passed, 0 failed")
    print(result.stdout)
    return result.stdout


def have_simde() -> bool:
    include = ["/usr/include", "/usr/local/include"]
    return platform.machine() == "x86_64" and any((Path(i) / "simde" / "x86" / "avx512.h").is_file() for i in include)


@pytest.mark.timeout(900)
def test_driver_under_sanitizers(tmp_path: Path) -> None:
    """No read or write outside a contract, no undefined step, and all checks pass."""
    if not compilers():
        pytest.skip("neither gcc nor clang is installed")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    probe = tmp_path / "probe.c"
    probe.write_text("int main(void) { return 0; }\n")
    command = [compilers()[0], *flags, str(probe), "-o", str(tmp_path / "probe")]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("the compiler has no sanitizer runtime")
    output = run_driver(compile_driver(compilers()[0], tmp_path, flags, simde=False), "--quick")
    assert "scalar" in output.splitlines()[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("level", ["-O1", "-O3"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_driver_gives_the_same_hashes_from_every_compiler(compiler: str, level: str, tmp_path: Path) -> None:
    """The golden hashes inside the driver are the same for all of them."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    run_driver(compile_driver(compiler, tmp_path, [level], simde=False))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_avx512_table_equals_scalar_over_emulated_intrinsics(tmp_path: Path) -> None:
    if not have_simde():
        pytest.skip("no x86-64, or no SIMDe headers (Debian: libsimde-dev)")
    if not compilers():
        pytest.skip("neither gcc nor clang is installed")
    output = run_driver(compile_driver(compilers()[0], tmp_path, ["-O2"], simde=True), "--quick")
    assert "avx512vnni (over SIMDe)" in output.splitlines()[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_driver_under_qemu_aarch64(tmp_path: Path) -> None:
    """Cross-compiled: the scalar table on another architecture gives the same hashes."""
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-gcc or no qemu-aarch64")
    objects = [*SOURCES, KERNELS / "dispatch.c", KERNELS / "cpu_features.c"]
    objects += [*sorted(KERNELS.glob("kernels_neon*.c")), KERNELS / "kernels_scalar.c"]
    driver = tmp_path / "test_core"
    command = [compiler, *FLAGS, "-O2", "-static", "-march=armv8.2-a+dotprod"]
    command += [*map(str, objects), "-pthread", "-lm", "-o", str(driver)]
    subprocess.run(command, check=True)
    environment = {**os.environ, "QEMU_CPU": "max"}
    result = subprocess.run([emulator, str(driver), "--quick"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout[-4000:]
