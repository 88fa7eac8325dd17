"""The heat map shows every layer and marks nonfinite norms."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lightning_gradguard.runtime.logging.heat_map import MAX_COLUMNS, MAX_LETTERS, MAX_NAMES, GradientHistory


def history(n_layers: int, n_steps: int, **odd: float | None) -> GradientHistory:
    """Returns norms that grow by layer; `odd` replaces that of the first layer at the last step."""
    seen = GradientHistory()
    for step in range(n_steps):
        norms = {f"blocks.{i}.attention.query": 10.0**i for i in range(n_layers)}
        if step == n_steps - 1 and odd:
            norms.pop("blocks.0.attention.query")
            norms |= {"blocks.0.attention.query": odd["norm"]} if odd["norm"] is not None else {}
        seen.append(step * 10, norms)
    return seen


def red(figure: Figure) -> int:
    """Counts the pure red pixels of the image that TensorBoard receives."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    pixels = np.asarray(Image.open(stream).convert("RGB"))
    return int((pixels == (255, 0, 0)).all(axis=2).sum())


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_nonfinite_norms_are_red(norm: float) -> None:
    assert red(history(4, 20, norm=norm).draw()) > 20
    assert red(history(4, 20).draw()) == 0
    assert red(history(4, MAX_COLUMNS, norm=norm).draw()) > 20, "visible although narrower than a pixel"


def test_missing_gradients_are_not_marked_as_nonfinite() -> None:
    figure = history(4, 20, norm=None).draw()
    assert red(figure) == 0
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label[:8] for label in labels] == [f"blocks.{i}" for i in range(4)]


def test_zero_norm_is_not_marked() -> None:
    assert red(history(4, 20, norm=0.0).draw()) == 0


def test_names_are_few_and_short() -> None:
    labels = [label.get_text() for label in history(100, 5).draw().axes[0].get_yticklabels()]
    assert len(labels) <= MAX_NAMES
    assert all(len(label) <= MAX_LETTERS for label in labels)
    assert labels[0] == "blocks.0", "without the common parts of all names"
    assert len(set(labels)) == len(labels)


def test_names_keep_the_part_that_differs() -> None:
    seen = GradientHistory()
    for step in range(3):
        seen.append(step, {f"model.transformer.blocks.{i}.mlp.fc.weight": 1.0 for i in range(12)})
    labels = [label.get_text() for label in seen.draw().axes[0].get_yticklabels()]
    assert labels == [f"blocks.{i}" for i in range(12)]


def test_history_keeps_the_last_columns() -> None:
    seen = history(2, MAX_COLUMNS + 50)
    assert len(seen) == MAX_COLUMNS
    assert seen.last_step == (MAX_COLUMNS + 49) * 10
    assert seen.draw().axes[0].get_xlim()[0] == 500
