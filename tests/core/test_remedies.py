"""Every kind of incident has advice."""

from __future__ import annotations

import pytest

from lightning_gradguard.core.incidents import KINDS
from lightning_gradguard.core.remedies import advice


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_advice(kind: str) -> None:
    assert advice(kind, ["layer.7"]).endswith(".")
    assert "{" not in advice(kind)


@pytest.mark.parametrize(
    ("kind", "remedies"),
    [
        ("vanishing_gradient", ["non-saturating", "He", "residual", "normalization", "LSTM", "layer-wise"]),
        ("exploding_gradient", ["clip", "learning rate", "orthogonal", "max-norm", "truncated BPTT"]),
    ],
)
def test_advice_names_the_standard_remedies(kind: str, remedies: list[str]) -> None:
    text = advice(kind, ["rnn.weight_hh_l0"])
    assert all(remedy in text for remedy in remedies)
    assert "rnn.weight_hh_l0" in text


def test_unknown_kind_has_no_advice() -> None:
    assert advice("coffee_machine_empty") == ""
