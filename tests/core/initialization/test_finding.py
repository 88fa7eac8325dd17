"""The table of findings names layer, value and cure."""

from __future__ import annotations

import math

from lightning_gradguard.core.initialization import check_weights, table
from tests.core.initialization.networks import mlp, planted


def test_table_names_layer_criterion_and_cure() -> None:
    text = table(check_weights(planted(mlp(2), lambda n: n[2].weight[0, 0].fill_(math.nan))))
    assert "FAIL" in text
    assert "nonfinite_weights" in text
    assert "model.2.reset_parameters()" in text
