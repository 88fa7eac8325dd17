"""Counts of Python calls and of files, which need no package of `make bench`."""

from __future__ import annotations

import sys

import pytest

from benchmarks import structure
from benchmarks.cost import calls
from lightning_gradguard import default_callbacks


@pytest.mark.filterwarnings("ignore")
def test_calls_are_those_of_one_batch_and_repeatable() -> None:
    first, second = calls.count(default_callbacks()), calls.count(default_callbacks())
    assert sys.getprofile() is None
    assert (first.calls, first.moves, first.of_all) == (second.calls, second.moves, second.of_all)
    names = {code.co_name for code in first.calls}
    assert {"on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"} <= names
    assert not {"setup", "on_train_start", "publish", "log_scalars"} & names, "healthy, and not logged"
    assert first.moves < sum(first.calls.values())
    assert calls.table(first).splitlines()[-1] == f"moves between files: {first.moves}"


def test_structure_counts_every_module_once() -> None:
    modules = list(structure.PACKAGE.rglob("*.py"))
    table = structure.table()
    assert f"{len(modules):8}{sum(map(structure.lines, modules)):8,}" in table
    assert "lightning_gradguard/core/norms" in table
