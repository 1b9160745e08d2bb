"""Dependencies point down only, start-up loads nothing heavy, the core asks little of libc."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from engine.import_graph import imports, modules

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"

# ---------------------------------------------------------------------- Python

# What each component of pyengine/ may import, from the bottom up, be it inside a function. A component is a module or a folder.
COMPONENTS: dict[str, set[str]] = {
    "errors": set(),
    "fork": set(),
    "system": set(),
    "files": {"errors", "system"},
    "arguments": {"errors"},
    "background": set(),
    "results": set(),
    "_core": {"errors"},
    "_step_lock": {"errors"},
    "_probe": {"errors"},
    "_sampler": {"errors", "_core"},
    "_draft": {"errors"},
    "format": {"errors", "files", "system"},
    "text": {"errors", "fork", "arguments"},
    "sampling_values": {"errors", "arguments"},
    "sampling": {"errors", "arguments", "sampling_values"},
    "sampling_options": set(),  # types alone
    "cpu_watch": {"_core"},
    "golden": {"_core", "format"},
    "freeze": {"errors", "arguments", "files", "system", "format", "golden", "text", "pyengine"},
    "hub": {"errors", "arguments", "freeze"},
    "run": {
        "errors", "arguments", "system", "fork", "results", "format", "_core", "_step_lock", "_sampler", "_draft", "text",
        "sampling", "cpu_watch",
    },
    "draft_file": {"errors", "_core", "format"},
    "opening": {"errors", "fork", "arguments", "files", "format", "run", "_core", "sampling", "freeze", "hub"},
    "attachments": {"errors", "format", "run", "sampling", "text"},
    "embeddings": {"errors", "arguments"},
    "adapters": {"errors", "fork", "arguments", "_core", "format", "freeze", "run"},
    "engine_base": {
        "adapters", "attachments", "opening", "draft_file", "errors", "background", "_core", "_sampler", "format", "text",
        "sampling", "cpu_watch", "run", "fork",
    },
    "scoring": {"engine_base", "errors", "arguments", "results", "_sampler", "text", "embeddings", "run", "fork"},
    "reranking": {"scoring", "errors", "arguments", "results", "_sampler", "run"},
    "beam": {"engine_base", "errors", "fork", "arguments", "results", "_sampler", "run", "text", "sampling"},
    "prefixes": {"engine_base", "errors", "fork", "_core", "format", "run", "sampling", "text"},
    "engine": {
        "adapters", "beam", "prefixes", "reranking", "opening", "errors", "arguments", "results", "text", "sampling", "freeze",
        "run", "hub",
    },
    "eval": {"engine", "errors", "run", "freeze", "_sampler"},
    "async_engine": {"embeddings", "engine", "errors", "reranking", "results", "run", "sampling", "text"},
    "serve": {
        "pyengine", "arguments", "async_engine", "beam", "embeddings", "engine", "errors", "fork", "reranking", "results",
        "run", "sampling", "text", "format", "_core", "_sampler",
    },
    "compat": {"errors", "arguments", "engine", "results", "run", "sampling", "text", "format", "_sampler", "serve",
        "hub", "freeze", "pyengine", "opening",
    },
    "pyengine": {"errors"},  # its names are looked up when they are asked for
    "cli": {
        "errors", "files", "pyengine", "text", "_core", "_draft", "_probe", "format", "sampling", "cpu_watch", "golden", "freeze",
        "engine", "serve", "hub", "eval", "opening", "system",
    },
    "__main__": {"cli"},
}  # fmt: skip


def python_component(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_python_components_import_only_what_they_may() -> None:
    graph = imports(modules(ROOT, "pyengine"), at_import=False)
    assert {python_component(module) for module in graph} == COMPONENTS.keys()
    wrong = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if python_component(other) not in COMPONENTS[python_component(module)] | {python_component(module)}
    ]
    assert not wrong
    assert len(list(TopologicalSorter(COMPONENTS).static_order())) == len(COMPONENTS)  # or CycleError


@pytest.mark.parametrize(("root", "package"), [(ROOT, "pyengine"), (ROOT / "training", "pyengine_training")])
def test_python_imports_have_no_circle(root: Path, package: str) -> None:
    """Of modules, while they are imported: TopologicalSorter raises CycleError."""
    graph = imports(modules(root, package), at_import=True)
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph) > 30
    assert sum(map(len, graph.values())) > 60


def test_no_import_is_hidden_in_a_function_to_close_a_circle() -> None:
    """Of the engine's modules. A package may look its own modules up when they are wanted, as `pyengine` and `cli` do."""
    graph = imports(modules(ROOT, "pyengine"), at_import=False)
    down = {module: {one for one in others if not one.startswith(f"{module}.")} for module, others in graph.items()}
    assert len(list(TopologicalSorter(down).static_order())) == len(down)  # or CycleError


def test_the_graph_of_imports_sees_every_form(tmp_path: Path) -> None:
    files = {
        "p/__init__.py": "from .a import x\nfrom . import b",
        "p/a.py": "import p.b\nimport os, p.c.d\nif TYPE_CHECKING:\n    from .c import e\nelse:\n    from .c import f",
        "p/b.py": "def f():\n    from .c.d import g\nclass C:\n    from . import a",
        "p/c/__init__.py": "",
        "p/c/d.py": "try:\n    from .. import b\nexcept ImportError:\n    from ..a import y",
        "p/c/f.py": "from p import z\nfrom .d import *",
        "p/e.pyx": "from p.a cimport q\nfrom p.c import d\ncdef int x = 1\nimport p.b\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    at_import = {
        "p": {"p.a", "p.b"},
        "p.a": {"p.b", "p.c.d", "p.c.f"},
        "p.b": {"p.a"},
        "p.c": set(),
        "p.c.d": {"p.b", "p.a"},
        "p.c.f": {"p", "p.c.d"},
        "p.e": {"p.c.d", "p.b"},
    }
    known = modules(tmp_path, "p")
    assert imports(known, at_import=True) == at_import
    assert imports(known, at_import=False) == at_import | {"p.b": {"p.a", "p.c.d"}}
    with pytest.raises(CycleError):
        list(TopologicalSorter(at_import).static_order())


def test_engine_and_training_do_not_import_each_other() -> None:
    """Only the command `pyengine train` is a door to the training half, and only chat templates and the models that draft heads
    are trained for are doors to the engine's."""
    for path in (ROOT / "pyengine").rglob("*.py"):
        if "cli" not in path.parts:
            assert "pyengine_training" not in path.read_text(), path
    allowed = {
        "pyengine",
        "pyengine.freeze",
        "pyengine.errors",
        "pyengine.text.chat",  # on use, for conversations: a model's template, rendered as the engine does it
    }
    frozen = {f"pyengine.format.{name}" for name in ("reader", "quantize", "draft_head")}  # on use: draft heads' models
    for path in (ROOT / "training").rglob("*.py"):
        may = allowed | frozen if path.parts[-2:] == ("draft", "target.py") else allowed
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] != "pyengine" or name in may, f"{path} imports {name}"


def test_import_pyengine_loads_nothing_heavy() -> None:
    code = "import sys, pyengine; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    heavy = {"numpy", "tokenizers", "jinja2", "gguf", "numba", "torch", "transformers"}
    assert not heavy & set(result.stdout.split())


def test_threads_are_started_by_one_module() -> None:
    """Each extension module has a copy of the core. The pool must be that of `_core`, whose contexts keep it: in another copy
    every call would start threads and end them. (`_probe` measures once, with threads of its own.)"""
    from pyengine import _core

    directory = Path(_core.__file__).parent
    suffix = Path(_core.__file__).name.removeprefix("_core")
    built = {name: path.read_bytes() for name in COMPONENTS if (path := directory / f"{name}{suffix}").exists()}
    found = {name for name, code in built.items() if b"pthread_create" in code or b"_beginthreadex" in code}
    assert found == {"_core", "_probe"}


# ---------------------------------------------------------------------- C

# What each component of csrc/ may include, from the bottom up. A component is a pair X.h, X.c, or a folder; kernels/ knows
# nothing of models or threads, and nothing below context knows what a context is.
C_COMPONENTS: dict[str, set[str]] = {
    "pyengine": set(),
    "float_env": set(),
    "platform": set(),
    "status": {"pyengine"},
    "kernels": {"pyengine", "status"},
    "threadpool": {"pyengine", "status", "platform", "float_env"},
    "cgroup": {"pyengine", "cpu_limits"},
    "cpu_limits": {"pyengine", "platform", "threadpool"},
    "job_object": {"pyengine", "cpu_limits"},
    "platform_posix": {"platform"},
    "platform_windows": {"platform"},
    "threads_posix": {"platform"},
    "threads_windows": {"platform"},
    "probe": {"pyengine", "status", "platform", "threadpool", "kernels"},
    "key_bias": {"kernels", "platform"},
    "tensors": {"pyengine", "status", "threadpool", "kernels"},
    "model": {"pyengine", "status", "platform", "threadpool", "float_env", "kernels", "key_bias", "tensors"},
    "embedding": {"kernels", "model"},
    "slice": {"pyengine", "status", "platform", "threadpool", "kernels", "model"},
    "kv_pages": {"pyengine", "platform", "kernels"},
    "kv_sequences": {"kv_pages", "model"},
    "kv_cache": {"status", "kv_sequences", "model"},
    "kv_snapshot": {"kernels", "status", "kv_sequences", "kv_cache"},
    "kv_check": {"status", "kv_sequences", "kv_cache"},
    "matmul": {"kernels", "model", "slice"},
    "attention": {"kernels", "model", "slice", "kv_cache"},
    "block": {"slice", "kv_cache", "matmul", "adapter", "attention"},
    "experts": {"kernels", "model", "slice", "matmul"},
    "adapter": {"pyengine", "status", "platform", "threadpool", "model", "slice", "matmul"},
    "mlp": {"slice", "matmul", "adapter", "experts"},
    "context": {"status", "platform", "slice", "kv_cache", "kv_snapshot", "matmul", "attention"},
    "forward": {
        "status", "platform", "float_env", "embedding", "slice", "kv_cache", "matmul", "adapter", "block", "mlp",
        "context",
    },
    "draft_head": {"pyengine", "status", "platform", "float_env", "embedding", "tensors", "slice", "matmul", "mlp"},
    "sampler": {"pyengine", "status", "float_env", "kernels", "threadpool"},
    "draft": {"pyengine", "status", "kernels"},
}


def sources() -> list[Path]:
    return sorted([*CSRC.rglob("*.c"), *CSRC.rglob("*.h")])


def component(path: Path) -> str:
    first = path.relative_to(CSRC).parts[0]
    return first.split(".")[0]


def includes_of(path: Path) -> list[Path]:
    """The files of csrc/ that a file includes: beside it, or from csrc/ down."""
    found = []
    for name in re.findall(r'^[ \t]*#[ \t]*include[ \t]*"(.+?)"', path.read_text(), re.M):
        places = [place for place in (path.parent / name, CSRC / name) if place.is_file()]
        assert places, f"{path} includes {name}, which is not there"
        found.append(places[0].resolve())
    return found


def test_c_components_include_only_what_they_may() -> None:
    assert {component(path) for path in sources()} == C_COMPONENTS.keys()
    wrong = [
        f"{path.relative_to(CSRC)} includes {included.relative_to(CSRC)}"
        for path in sources()
        for included in includes_of(path)
        if component(included) not in C_COMPONENTS[component(path)] | {component(path)}
    ]
    assert not wrong


def test_c_includes_have_no_circle() -> None:
    """Neither between components nor between files: TopologicalSorter raises CycleError."""
    components = list(TopologicalSorter(C_COMPONENTS).static_order())
    assert components.index("kernels") < components.index("model") < components.index("slice") < components.index("forward")
    assert len(list(TopologicalSorter({path: includes_of(path) for path in sources()}).static_order())) > 40


def test_platform_calls_are_in_one_place() -> None:
    """cpu_features.c asks Linux for the CPU's features, cgroup.c and job_object.c for the quota; everything else of an operating
    system is in the files of platform.h."""
    marks = re.compile(r"__linux__|__APPLE__|_WIN32|<sys/|<linux/|<sched\.h>|<unistd\.h>|<windows\.h>|pthread|\"/proc")
    found = {str(path.relative_to(CSRC)) for path in sources() if marks.search(path.read_text())}
    system = {"platform.h", *(f"{what}_{of}.c" for what in ("platform", "threads") for of in ("posix", "windows"))}
    system |= {"cgroup.c", "job_object.c"}
    assert found == system | {"kernels/cpu_features.c"}


@pytest.fixture(scope="module")
def undefined_symbols(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What the core, linked into one object, asks of the outside."""
    compiler, nm = shutil.which("cc"), shutil.which("nm")
    if compiler is None or nm is None:
        pytest.skip("no C compiler, or no nm")
    directory = tmp_path_factory.mktemp("core")
    flags = ["-std=gnu11", "-O1", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    flags += ["-fno-stack-protector", "-U_FORTIFY_SOURCE", f"-I{CSRC}", "-c"]
    avx512 = ["-mfma", "-mf16c", *(f"-mavx512{x}" for x in ("f", "bw", "vl", "dq", "vnni"))]
    own = {
        "kernels_avx2.c": ["-mavx2", "-mfma", "-mf16c"],
        "kernels_avxvnni.c": ["-mavx2", "-mfma", "-mf16c", "-mavxvnni"],
        "kernels_avx512vnni.c": avx512,
        "kernels_amx.c": [*avx512, "-mamx-tile", "-mamx-int8"],
    }
    symbols: dict[str, set[str]] = {"U": set(), "defined": set()}
    for path in CSRC.rglob("*.c"):
        if "neon" in path.name or (path.name in own and sys.platform != "linux"):
            continue
        out = directory / f"{path.stem}.o"
        extra = own.get(path.name, [])
        command = [compiler, *flags, *extra, str(path), "-o", str(out)]
        subprocess.run(command, check=True)
        listing = subprocess.run([nm, str(out)], capture_output=True, text=True, check=True)
        for line in listing.stdout.splitlines():
            *_, kind, name = line.split()
            symbols["U" if kind == "U" else "defined"].add(name)
    return {name for name in symbols["U"] - symbols["defined"] if name != "_GLOBAL_OFFSET_TABLE_"}


MATH = {"fmaf", "sqrtf", "rintf", "lrintf", "fabsf"}


def test_core_uses_five_functions_of_libm(undefined_symbols: set[str]) -> None:
    """exp, log, sin, cos are ours: a C library may round them as it likes."""
    libm = {"exp", "log", "sin", "cos", "tan", "pow", "sqrt", "rint", "lrint", "fma", "fabs", "floor", "ceil", "round"}
    libm |= {f"{name}f" for name in libm} | {"exp2f", "log2f", "log2", "nearbyintf", "llrintf"}
    assert undefined_symbols & libm <= MATH


def test_core_neither_prints_nor_exits(undefined_symbols: set[str]) -> None:
    forbidden = {"printf", "puts", "putchar", "fprintf", "fputs", "fwrite", "perror", "vprintf"}
    forbidden |= {"exit", "_exit", "abort", "__assert_fail", "raise", "signal", "sigaction"}
    forbidden |= {"stdout", "stderr", "system", "popen"}
    assert not undefined_symbols & forbidden
    assert "snprintf" in undefined_symbols  # the list is of real symbols
