"""What the compiler made of the loops that no instruction counter can run, and that wide instructions stay in their files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from engine.core_build import REPOSITORY, build, gcc_version, need

OBJECTS = "CMakeFiles/pyengine_core.dir/csrc"
STACK = r"-?(0x[0-9a-f]+)?\(%r[sb]p"


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


class Loop(NamedTuple):
    """From the target of a jump backwards to that jump."""

    function: str
    body: list[Instruction]

    def count(self, name: str) -> int:
        return sum(i.name == name for i in self.body)

    @property
    def integer_vector_spills(self) -> list[Instruction]:
        """Vector registers of integers that are stored on the stack or fetched from it; float sums use vmovaps and vmovups.
        A sum that is finished may wait there: its place is read by the conversion to float alone."""
        on_stack = [(i, place[0]) for i in self.body if (place := re.search(STACK, i.operands))]
        finished = {place for i, place in on_stack if i.name == "vcvtdq2ps"}
        moves = ((i, place) for i, place in on_stack if re.match(r"vmovdq[au](8|16|32|64)?$", i.name))
        return [i for i, place in moves if place not in finished or i.operands.startswith(place)]


def functions(listing: str) -> dict[str, list[Instruction]]:
    """Instructions of each function of an objdump listing without raw bytes."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in listing.splitlines():
        if match := re.match(r"^[0-9a-f]+ <(.+)>:$", line):
            current = found.setdefault(match[1], [])
        elif match := re.match(r"^\s*([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
            current.append(Instruction(int(match[1], 16), match[2], match[3].strip()))
    return found


def is_jump(name: str) -> bool:
    """Of x86-64 or AArch64, and no call."""
    return name == "b" or name.startswith(("j", "b.", "cb", "tb"))


def multiplying_loops(listing: str, step: str = "vpdpbusd") -> list[Loop]:
    """Loops with a dot step that hold no other such loop. (What they may hold is a loop that fetches memory ahead.)"""
    loops = []
    for function, instructions in functions(listing).items():
        spans = set()
        for i in instructions:
            target = re.search(r"(?:^|, )([0-9a-f]+) <", i.operands)
            if is_jump(i.name) and target and int(target[1], 16) <= i.address:
                spans.add((int(target[1], 16), i.address))
        bodies = {(b, e): [i for i in instructions if b <= i.address <= e] for b, e in spans}
        spans = {span for span, body in bodies.items() if any(i.name == step for i in body)}
        for begin, end in spans:
            if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans):
                loops.append(Loop(function, bodies[begin, end]))
    return loops


def disassemble(name: str) -> str:
    """Listing of one object file of the core, built with gcc as it is shipped."""
    need("objdump")
    path = build("pyengine_core") / OBJECTS / f"{name}.o"
    command = ["objdump", "-d", "--no-show-raw-insn", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def vnni_loops() -> list[Loop]:
    """Innermost of the loops of the AVX-512-VNNI table that multiply."""
    if int((version := gcc_version()).split(".")[0]) < 12:
        pytest.skip(f"the register blocks were chosen by reading what gcc 12 and later make of them, this is {version}")
    listing = disassemble("kernels/kernels_avx512vnni.c")
    if "file format elf64-x86-64" not in listing:
        pytest.skip("not an x86-64 machine")
    return multiplying_loops(listing)


def test_prefill_block_is_fully_unrolled(vnni_loops: list[Loop]) -> None:
    source = (REPOSITORY / "csrc/kernels/lanes16_avx512.h").read_text()
    sizes = re.search(r"TILE_PANELS = (\d+), TILE_TOKENS = (\d+)", source)
    assert sizes is not None
    largest = max((loop for loop in vnni_loops if loop.function == "matmul"), key=lambda loop: loop.count("vpdpbusd"))
    # one group of 64 inputs, four at a time, for every panel and token of the register block
    assert largest.count("vpdpbusd") == int(sizes[1]) * int(sizes[2]) * 16
    assert largest.count("vpdpbusd") >= 0.3 * len(largest.body), "too much beside the multiplications"


def test_integer_sums_stay_in_registers(vnni_loops: list[Loop]) -> None:
    assert {loop.function for loop in vnni_loops} >= {"matmul", "attention_scores"}
    for loop in vnni_loops:
        assert not loop.integer_vector_spills, (loop.function, loop.count("vpdpbusd"))


def test_values_are_loaded_once_for_the_rows_of_a_block(vnni_loops: list[Loop]) -> None:
    """No step has 64 bytes of V as an operand in memory, which each of three rows would load for itself."""
    blocks = [loop for loop in vnni_loops if loop.function == "multiply_values" and loop.count("vpdpbusd") == 3 * 4 * 8]
    assert blocks
    for loop in blocks:
        steps = [i.operands for i in loop.body if i.name == "vpdpbusd"]
        assert not [operands for operands in steps if "(" in operands and "{1to16}" not in operands]


@pytest.fixture(scope="module")
def amx_listing() -> str:
    gcc_version()
    if not (build("pyengine_core") / OBJECTS / "kernels/kernels_amx.c.o").exists():
        pytest.skip("not an x86-64 machine, or a compiler without AMX")
    return disassemble("kernels/kernels_amx.c")


def test_a_tile_of_sums_costs_what_the_format_asks(amx_listing: str) -> None:
    """Of 16 tokens and two groups: a conversion, a multiplication and an fma for each row of sums, nothing on the stack. Sums and
    the tokens' scales are operands in memory."""
    (convert,) = (body for name, body in functions(amx_listing).items() if name.startswith("convert_two"))
    names = [i.name for i in convert]
    assert [names.count(name) for name in ("vcvtdq2ps", "vmulps")] == [32, 32]
    assert sum(name.startswith("vfmadd") for name in names) == 32
    assert not [i for i in convert if re.search(STACK, i.operands) and "zmm" in i.operands]
    assert len(convert) <= 3 * 32 + 2 * 16 + 24  # the accumulators, and some addresses


def test_a_step_loads_inputs_once_for_two_panels(amx_listing: str) -> None:
    """From the first product of a step to its last: two tiles of inputs, four products, the weights where they were."""
    product = functions(amx_listing)["matmul_tiled"]
    at = [n for n, i in enumerate(product) if i.name == "tdpbssd"]
    assert [product[n].operands for n in at] == [
        "%tmm4,%tmm2,%tmm0",
        "%tmm5,%tmm2,%tmm1",
        "%tmm6,%tmm3,%tmm0",
        "%tmm7,%tmm3,%tmm1",
    ]
    assert sum(i.name.startswith("tileload") for i in product[at[0] : at[-1]]) == 1
    assert sum(i.name == "tilestored" for i in product) == 4
    # configured for whole tiles or narrow ones, and released on every way out
    assert sum(i.name == "ldtilecfg" for i in product) == 1
    assert sum(i.name == "tilerelease" for i in product) == 1


def neon_loops(table: str, march: str, step: str, directory: Path) -> list[Loop]:
    """Innermost of the loops of a table for AArch64 that multiply, compiled with the flags of CMakeLists.txt."""
    need("aarch64-linux-gnu-gcc", "aarch64-linux-gnu-objdump")
    command = ["aarch64-linux-gnu-gcc", "-dumpfullversion"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if int(version.split(".")[0]) < 12:
        pytest.skip(f"the register blocks were chosen by reading what gcc 12 and later make of them, this is {version}")
    path = directory / f"{table}.o"
    flags = ["-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-schedule-insns"]
    source = REPOSITORY / "csrc/kernels" / f"{table}.c"
    command = ["aarch64-linux-gnu-gcc", *flags, march, f"-I{REPOSITORY / 'csrc'}", "-c", str(source)]
    subprocess.run([*command, "-o", str(path)], check=True)
    command = ["aarch64-linux-gnu-objdump", "-d", "--no-show-raw-insn", str(path)]
    return multiplying_loops(subprocess.run(command, capture_output=True, text=True, check=True).stdout, step)


def test_matrix_steps_of_aarch64_read_operands_and_multiply(tmp_path: Path) -> None:
    """Eight tokens times eight rows: sixteen smmla for eight operands, in registers, for products, scores and values."""
    loops = neon_loops("kernels_neon_i8mm", "-march=armv8.2-a+dotprod+i8mm", "smmla", tmp_path)
    assert {loop.function.split(".")[0] for loop in loops} == {"matmul_strip", "scores_strip", "values_strip"}
    for loop in loops:
        assert loop.count("smmla") == 16
        assert loop.count("smmla") >= 0.6 * len(loop.body), (loop.function, "too much beside the multiplications")
        assert not [i for i in loop.body if "[sp" in i.operands], loop.function


def test_prefill_block_of_aarch64_spills_little(tmp_path: Path) -> None:
    loops = neon_loops("kernels_neon_dotprod", "-march=armv8.2-a+dotprod", "sdot", tmp_path)
    largest = max((loop for loop in loops if loop.function == "matmul"), key=lambda loop: loop.count("sdot"))
    assert largest.count("sdot") == 4 * 4 * 16  # four registers of rows, four tokens, the sixteen fours of a group
    assert largest.count("sdot") >= 0.4 * len(largest.body), "too much beside the multiplications"


def test_wide_registers_stay_in_their_files() -> None:
    """One wheel runs everywhere: what is called before a table was chosen may use the baseline alone."""
    gcc_version()
    directory = build("pyengine_core") / OBJECTS
    names = sorted(str(path.relative_to(directory))[:-2] for path in directory.rglob("*.o"))
    if "file format elf64-x86-64" not in disassemble(names[0]):
        pytest.skip("not an x86-64 machine")
    assert len(names) > 10
    for name in names:
        forbidden = [] if "avx512" in name or "amx" in name else ["zmm"] if "avx" in name else ["zmm", "ymm"]
        for function, instructions in functions(disassemble(name)).items():
            if name == "probe.c" and "avx" in function:  # each has a target attribute, and is chosen at run time
                continue
            operands = " ".join(i.operands for i in instructions)
            assert not [width for width in forbidden if f"%{width}" in operands], (name, function)


def test_the_reader_of_listings_sees_loops_and_spills() -> None:
    listing = """
0000000000000000 <matmul>:
   0:\txor    %eax,%eax
   2:\tvpdpbusd %zmm1,%zmm0,%zmm2
   8:\tvmovdqa64 %zmm2,0x40(%rsp)
  10:\tvmovaps %zmm3,-0x80(%rbp)
  18:\tvmovdqu8 0x40(%rsi),%zmm4
  19:\tvmovdqa32 %zmm5,0x80(%rsp)
  1a:\tvcvtdq2ps 0x80(%rsp),%zmm5
  1b:\tvmovdqa32 %zmm6,0xc0(%rsp)
  1c:\tvcvtdq2ps 0xc0(%rsp),%zmm7
  1d:\tvmovdqa32 0xc0(%rsp),%zmm6
  20:\tjne    2 <matmul+0x2>
  22:\tjne    0 <matmul>
  24:\tjmp    30 <matmul+0x30>
"""
    (loop,) = multiplying_loops(listing)
    assert (loop.function, len(loop.body), loop.count("vpdpbusd")) == ("matmul", 10, 1)
    assert [i.address for i in loop.integer_vector_spills] == [0x8, 0x1D]
