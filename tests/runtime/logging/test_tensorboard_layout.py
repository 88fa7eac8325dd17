"""Scalars that share a chart, and scalars on a scale of decades."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lightning_gradguard.runtime.logging.tensorboard_layout import decades, layout


@given(st.floats(min_value=0))
def test_every_norm_has_decades(norm: float) -> None:
    (found,) = decades({"grad_norm/total": norm}).values()
    assert found == (math.log10(norm) if norm > 1e-38 else -38)


def test_nonfinite_stays_nonfinite() -> None:
    assert math.isnan(decades({"grad_norm/total": math.nan})["log10/grad_norm/total"])
    assert decades({"grad_norm/total": math.inf})["log10/grad_norm/total"] == math.inf


def test_what_spans_no_decades_has_none() -> None:
    for tag in ("grad_norm/nonfinite_fraction", "clip/fraction", "rollback/skips", "weight_norm/a", "loss"):
        assert decades({tag: 1.0}) == {}
    assert set(decades({"grad_norm.1/total": 1.0, "clip.0/threshold": 1.0})) == {
        "log10/grad_norm.1/total",
        "log10/clip.0/threshold",
    }


def test_only_charts_that_are_filled() -> None:
    assert layout([]) == {}
    assert layout(["train_loss"]) == {}
    assert list(layout(["log10/grad_norm/total"])["Gradients"]) == [
        "total norm, clipped norm, threshold (log10)"
    ]
    assert list(layout(["grad_norm.1/body.0"])["Gradients"]) == ["gradient norm of layers"]
    assert layout(["grad_norm/nonfinite_fraction"]).keys() == {"Guard"}


def test_each_optimizer_has_a_band_of_its_own() -> None:
    bands = layout(["log10/grad_norm_band.0/low", "log10/grad_norm_band.1/low"])["Gradients"]
    assert list(bands) == [f"total norm of optimizer {i} and its usual band (log10)" for i in (0, 1)]
    kind, tags = bands["total norm of optimizer 1 and its usual band (log10)"]
    assert kind == "Margin"
    assert tags == [f"log10/grad_norm_band.1/{part}" for part in ("total", "low", "high")]
