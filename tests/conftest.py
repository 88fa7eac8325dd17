"""What every test stands on."""

from __future__ import annotations

import logging
import os
import sys
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
    """How `make strategies` writes the page that the tests are held to."""
    parser.addoption("--write-strategies", action="store_true", help="write the table of docs/strategies.md")
    parser.addoption("--pictures", help="the folder in which `make browser-test` keeps what it saw")


def pytest_configure(config: pytest.Config) -> None:
    """How a test says which package of an extra it is about."""
    config.addinivalue_line("markers", "needs(package): left out at collection where it is not installed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests of what the installed Lightning does not have yet, or of a package that is not here."""
    here = Version(version("pytorch-lightning"))
    left_out = [
        item
        for item in items
        if any(Version(mark.args[0]) > here for mark in item.iter_markers("lightning"))
        or any(find_spec(mark.args[0]) is None for mark in item.iter_markers("needs"))
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread, a seed, an empty folder to write to, the environment's commands by name, no chatter."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
