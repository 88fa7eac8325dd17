"""Files and folders stay small, imports make no cycle, and callbacks do not write to the suite."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from benchmarks.structure import PACKAGE, entries, folders, lines

ROOT = PACKAGE.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
MAX_LINES, MAX_ENTRIES = 400, 14


def imported(node: ast.AST) -> Iterator[str]:
    """Modules of the package that are imported when a module is loaded, but for type checkers."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in MODULES)
    elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
        names = {f"{node.module}.{alias.name}" for alias in node.names}
        yield from names & MODULES.keys() or {node.module}
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


def targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []


def test_files_are_short() -> None:
    assert not {name: lines(path) for name, path in MODULES.items() if lines(path) > MAX_LINES}


def test_folders_have_few_entries() -> None:
    assert not {str(folder): entries(folder) for folder in folders() if len(entries(folder)) > MAX_ENTRIES}


def test_imports_make_no_cycle() -> None:
    graph = {name: {module for module in imported(tree) if module != name} for name, tree in TREES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" <- ".join(error.args[1])) from None


def test_callbacks_do_not_assign_to_the_suite() -> None:
    found = [
        f"{name}:{target.lineno}: {ast.unparse(target)}"
        for name, tree in TREES.items()
        if name.startswith("lightning_gradguard.callbacks")
        for node in ast.walk(tree)
        for target in targets(node)
        if isinstance(target, ast.Attribute)
        and ast.unparse(target.value).rpartition(".")[2] in ("suite", "_suite")
    ]
    assert not found
