"""The table of findings names layer, value and cure."""

from __future__ import annotations

import math

from lightning_gradguard.core.initialization import check, table
from tests.core.initialization.networks import loss_of, mlp, planted


def test_table_names_layer_criterion_and_cure() -> None:
    network = planted(mlp(2), lambda n: n[2].weight[0, 0].fill_(math.nan))
    text = table(check(network, loss_of(network))[0])
    assert "FAIL" in text
    assert "nonfinite_weights" in text
    assert "model[2].reset_parameters()" in text
