"""Advice leaves away what the network has already, while it trains and in a report on its charts."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_gradguard.core.remedies import advice, remedies
from lightning_gradguard.report.analysis.present import present_in as present_in_log
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog, Series
from lightning_gradguard.runtime.incidents.present import present_in
from tests.tasks import Classifier, batches, fit


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(20, 4)


ASKED = {"no_attention", "normalized", "residual"}
NETWORKS: dict[str, tuple[nn.Module, set[str]]] = {
    "layers alone": (nn.Linear(20, 4), {"no_attention"}),
    "normalized": (nn.ModuleDict({"fc": nn.Linear(20, 8), "bn": nn.BatchNorm1d(8)}), ASKED - {"residual"}),
    "residual": (ResidualBlock(), {"no_attention", "residual"}),
    "transformer": (nn.TransformerEncoderLayer(20, 2, 8), ASKED - {"no_attention"}),
    "parametrized": (nn.utils.parametrizations.weight_norm(nn.Linear(20, 4)), {"no_attention"}),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_advice_leaves_away_what_the_network_has(name: str) -> None:
    network, expected = NETWORKS[name]
    module = Classifier()
    module.add_module("other", network)
    known = present_in(fit(module, batches(1)))
    assert known & ASKED == expected
    for text in (
        advice("vanishing_gradient", present=known),
        " ".join(remedies("vanishing_gradient", present=known)),
    ):
        assert ("residual connections" in text) == ("residual" not in expected)
        assert ("layer normalization" in text) == ("normalized" not in expected)
        assert ("n a transformer" in text) == ("no_attention" not in expected)
    if name != "residual":  # which no name of a parameter tells
        names = [name for name, _ in module.named_parameters() if "parametrizations" not in name]
        layers = {name: Series([0], [1.0]) for name in names}
        assert present_in_log(RunLog(gradients=(GradientLog(layers=layers),))) & ASKED == expected
