"""The heat map shows every layer, and marks what is nonfinite."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from lightning_gradguard.runtime.logging.heat_map import COLUMNS, LETTERS, ROWS, GradientHistory


def history(n_layers: int, n_steps: int, **odd: float | None) -> GradientHistory:
    """Norms that grow from layer to layer; `odd` is put in place of the first layer's at the last step."""
    seen = GradientHistory()
    for step in range(n_steps):
        norms = {f"blocks.{i}.attention.query": 10.0**i for i in range(n_layers)}
        if step == n_steps - 1 and odd:
            norms.pop("blocks.0.attention.query")
            norms |= {"blocks.0.attention.query": odd["norm"]} if odd["norm"] is not None else {}
        seen.append(step * 10, norms)
    return seen


def red(figure: Figure) -> int:
    """Pure red pixels of the picture as TensorBoard gets it."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    pixels = np.asarray(Image.open(stream).convert("RGB"))
    return int((pixels == (255, 0, 0)).all(axis=2).sum())


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_what_is_nonfinite_is_red(norm: float) -> None:
    assert red(history(4, 20, norm=norm).draw()) > 20
    assert red(history(4, 20).draw()) == 0
    assert red(history(4, COLUMNS, norm=norm).draw()) > 20, "narrower than a pixel, and still seen"


def test_a_layer_without_a_gradient_is_not_called_nonfinite() -> None:
    figure = history(4, 20, norm=None).draw()
    assert red(figure) == 0
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert [label[:8] for label in labels] == [f"blocks.{i}" for i in range(4)]


def test_a_zero_norm_has_a_place_on_the_scale() -> None:
    assert red(history(4, 20, norm=0.0).draw()) == 0


def test_names_are_few_and_short() -> None:
    labels = [label.get_text() for label in history(100, 5).draw().axes[0].get_yticklabels()]
    assert len(labels) <= ROWS
    assert all(len(label) <= LETTERS for label in labels)
    assert labels[0] == "blocks.0", "without what all names have in common"
    assert len(set(labels)) == len(labels)


def test_names_that_differ_deep_inside_stay_distinct() -> None:
    seen = GradientHistory()
    for step in range(3):
        seen.append(step, {f"model.transformer.blocks.{i}.mlp.fc.weight": 1.0 for i in range(12)})
    labels = [label.get_text() for label in seen.draw().axes[0].get_yticklabels()]
    assert labels == [f"blocks.{i}" for i in range(12)]


def test_old_columns_are_dropped() -> None:
    seen = history(2, COLUMNS + 50)
    assert len(seen) == COLUMNS
    assert seen.last_step == (COLUMNS + 49) * 10
    assert seen.draw().axes[0].get_xlim()[0] == 500
