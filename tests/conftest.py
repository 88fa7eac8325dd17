"""Fixtures and options of all tests."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from packaging.version import Version

# the same examples in every run: a failure on CI is a failure here
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options of `make strategies` and `make browser-test`."""
    parser.addoption("--write-strategies", action="store_true", help="write the table of docs/strategies.md")
    parser.addoption("--pictures", help="the folder that `make browser-test` writes pictures to")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselects tests that need a newer Lightning, or a package that is not installed."""
    installed = Version(version("pytorch-lightning"))
    deselected = [
        item
        for item in items
        if any(Version(mark.args[0]) > installed for mark in item.iter_markers("lightning"))
        or any(find_spec(mark.args[0]) is None for mark in item.iter_markers("needs"))
    ]
    config.hook.pytest_deselected(items=deselected)
    items[:] = [item for item in items if item not in deselected]


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives a test one thread, a seed, an empty folder, the environment's commands, and no info messages."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _logger_as_before() -> Iterator[None]:
    """Restores what a test, or a snippet of the documentation, configures of the suite's logger."""
    logger = logging.getLogger("lightning_gradguard")
    level, handlers, disabled = logger.level, list(logger.handlers), logging.root.manager.disable
    yield
    for added in set(logger.handlers) - set(handlers):
        logger.removeHandler(added)
        added.close()
    logger.setLevel(level)
    logger.propagate = True
    logging.disable(disabled)
