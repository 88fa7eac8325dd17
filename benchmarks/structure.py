"""Counts files, lines and entries of the package's folders.

`python -m benchmarks.structure` prints a row for each folder, and the longest files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import lightning_gradguard

PACKAGE = Path(lightning_gradguard.__file__).parent
#: Files that each folder may have beside its entries.
NO_ENTRIES = {"__init__.py", "__pycache__", "py.typed", "ruff.toml"}
#: Number of files listed as the longest.
LONGEST = 5


def lines(path: Path) -> int:
    """Returns the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def folders() -> Iterator[Path]:
    """Yields the package and its subpackages, in the order of their names."""
    return (path.parent for path in sorted(PACKAGE.rglob("__init__.py")))


def entries(folder: Path) -> list[str]:
    """Returns the names of modules, subpackages and other files in a folder, but for hidden ones."""
    names = {path.name for path in folder.iterdir()} - NO_ENTRIES
    return sorted(name for name in names if not name.startswith("."))


def table() -> str:
    """Renders the counts of each folder, without those of its subfolders, and of the package."""
    rows = [f"{'folder':38}{'entries':>8}{'modules':>8}{'lines':>8}"]
    for folder in folders():
        found = [lines(path) for path in folder.glob("*.py")]
        name = folder.relative_to(PACKAGE.parent).as_posix()
        rows.append(f"{name:38}{len(entries(folder)):8}{len(found):8}{sum(found):8,}")
    modules = {path: lines(path) for path in PACKAGE.rglob("*.py")}
    rows.append(f"{'all':38}{'':8}{len(modules):8}{sum(modules.values()):8,}")
    longest = sorted(modules, key=lambda path: -modules[path])[:LONGEST]
    rows += ["", "longest modules"]
    rows += [f"{path.relative_to(PACKAGE).as_posix():48}{modules[path]:8}" for path in longest]
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
