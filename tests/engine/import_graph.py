"""Who imports whom, read from the sources of a package: Python modules, relative imports included, and Cython ones."""

from __future__ import annotations

import ast
import re
from pathlib import Path

Graph = dict[str, set[str]]


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of every module of a package that lies in ``root``, whatever the depth."""
    paths = [path for suffix in ("py", "pyx") for path in sorted((root / package).rglob(f"*.{suffix}"))]
    names = {path: path.relative_to(root).with_suffix("").parts for path in paths}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


class _Imports(ast.NodeVisitor):
    """Collects the import statements that may run, or with ``at_import`` those that run when the module is imported."""

    def __init__(self, at_import: bool) -> None:
        self.at_import = at_import
        self.found: list[ast.Import | ast.ImportFrom] = []

    def visit_Import(self, node: ast.Import) -> None:
        self.found.append(node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.found.append(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        if not self.at_import:
            self.generic_visit(node)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):  # for the type checker alone
            self.generic_visit(node)
        else:
            for statement in node.orelse:
                self.visit(statement)


def _tree(path: Path) -> ast.Module:
    text = path.read_text()
    if path.suffix == ".pyx":  # Cython: the import statements at the margin are Python's
        text = "\n".join(re.findall(r"^(?:from [\w.]+ )?import [\w., ]+$", text, re.M))
    return ast.parse(text)


def _targets(node: ast.Import | ast.ImportFrom, module: str, is_package: bool) -> list[tuple[str, str]]:
    """(module, name taken from it) with relative imports resolved."""
    if isinstance(node, ast.Import):
        return [(alias.name, "") for alias in node.names]
    parts = module.split(".") if node.level else []
    parts = parts[: len(parts) - node.level + is_package] + (node.module.split(".") if node.module else [])
    return [(".".join(parts), alias.name) for alias in node.names]


def imports(known: dict[str, Path], *, at_import: bool) -> Graph:
    """Module -> the known modules that it imports. ``from a import b`` imports a.b if that is a module, else a."""
    graph: Graph = {module: set() for module in known}
    for module, path in known.items():
        visitor = _Imports(at_import)
        visitor.visit(_tree(path))
        for node in visitor.found:
            for source, name in _targets(node, module, path.name == "__init__.py"):
                target = f"{source}.{name}" if f"{source}.{name}" in known else source
                if target in known and target != module:
                    graph[module].add(target)
    return graph
