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
PROGRAMS = {"count_instructions.c"}  # have a main of their own
CORE = [*ROOT.glob("csrc/*.c"), *ROOT.glob("csrc/sampler/*.c")]
SOURCES = sorted([*CORE, ROOT / "tests/csrc/amx/trap.c", *(p for p in ROOT.glob("tests/csrc/*.c") if p.name not in PROGRAMS)])
KERNELS = ROOT / "csrc" / "kernels"
FLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-math-errno"]
FLAGS += ["-fno-trapping-math", f"-I{ROOT / 'csrc'}"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))]
AVXVNNI = [*AVX2, "-mavxvnni"]
AMX = [*AVX512, "-mamx-tile", "-mamx-int8"]
SIMDE = sorted((ROOT / "tests" / "csrc" / "simde").glob("*.c"))


def compilers() -> list[str]:
    return [name for name in ("gcc", "clang") if shutil.which(name)]


def knows(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler takes these flags."""
    command = [compiler, *flags, "-fsyntax-only", "-x", "c", os.devnull]
    return subprocess.run(command, capture_output=True).returncode == 0


def compile_driver(compiler: str, directory: Path, flags: list[str], *, simde: bool) -> Path:
    """cc every source with the flags of its own instruction set, and link."""
    x86 = platform.machine() == "x86_64"
    per_file: dict[str, list[str]] = {"kernels_avx2.c": AVX2, "kernels_avx512vnni.c": AVX512}
    sources = [*SOURCES, *(KERNELS / n for n in ("dispatch.c", "cpu_features.c"))]
    sources += [KERNELS / "kernels_scalar.c"]
    if x86 and knows(compiler, AVXVNNI):
        per_file["kernels_avxvnni.c"] = AVXVNNI
        flags = [*flags, "-DPE_HAVE_AVXVNNI"]
    if x86 and knows(compiler, AMX):
        per_file["kernels_amx.c"] = AMX
        flags = [*flags, "-DPE_HAVE_AMX"]
    if x86:
        sources += [KERNELS / name for name in per_file]
    if simde:
        sources += SIMDE
        flags = [*flags, "-DPE_TEST_SIMDE", "-Wno-psabi"]
        per_file |= {source.name: AVX2 for source in SIMDE}
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
    flags = ["-O1", "-g", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
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
def test_driver_on_condition_variables(tmp_path: Path) -> None:
    """The half of platform_posix.c that systems without futexes run."""
    if not compilers():
        pytest.skip("neither gcc nor clang is installed")
    run_driver(compile_driver(compilers()[0], tmp_path, ["-O2", "-DPE_PLATFORM_POSIX"], simde=False), "--quick")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_vnni_and_amx_tables_equal_scalar_over_emulated_intrinsics(tmp_path: Path) -> None:
    if not have_simde():
        pytest.skip("no x86-64, or no SIMDe headers (Debian: libsimde-dev)")
    if not compilers():
        pytest.skip("neither gcc nor clang is installed")
    output = run_driver(compile_driver(compilers()[0], tmp_path, ["-O1"], simde=True), "--quick")
    tables = output.splitlines()[0]  # what the CPU runs itself needs no emulation
    assert all(f" {name}" in tables for name in ("avx512vnni", "avxvnni", "amx"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_driver_under_qemu_aarch64(tmp_path: Path) -> None:
    """Cross-compiled: the NEON tables equal the scalar one on their own architecture, all give the hashes of x86-64,
    and a CPU runs those whose instructions it has."""
    compiler = shutil.which("aarch64-linux-gnu-gcc")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no aarch64-linux-gnu-gcc or no qemu-aarch64")
    objects = [*SOURCES, *(KERNELS / name for name in ("dispatch.c", "cpu_features.c", "kernels_scalar.c"))]
    for name, extensions in (("neon_dotprod", "+dotprod"), ("neon_i8mm", "+dotprod+i8mm")):
        objects.append(tmp_path / f"{name}.o")
        command = [compiler, *FLAGS, "-O3", f"-march=armv8.2-a{extensions}", "-c", str(KERNELS / f"kernels_{name}.c")]
        subprocess.run([*command, "-o", str(objects[-1])], check=True)
    driver = tmp_path / "test_core"
    command = [compiler, *FLAGS, "-O2", "-DPE_HAVE_NEON_I8MM", "-static", *map(str, objects), "-pthread", "-lm"]
    command += ["-o", str(driver)]
    subprocess.run(command, check=True)
    runs = [
        ("max", "--quick", "neon_i8mm neon_dotprod scalar"),
        ("neoverse-n1", "--kernels", "neon_dotprod scalar"),  # no matrix product
        ("cortex-a53", "--kernels", "scalar"),  # no dot product
    ]
    for cpu, argument, tables in runs:
        environment = {**os.environ, "QEMU_CPU": cpu}
        result = subprocess.run([emulator, str(driver), argument], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout[-4000:]
        assert result.stdout.splitlines()[0] == f"tables: {tables}"
