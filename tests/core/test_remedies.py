"""Every kind of incident has advice."""

from __future__ import annotations

import re

import pytest
from torch import nn

from lightning_gradguard.core.incidents import CAUSES, KINDS, SYMPTOM_CAUSES
from lightning_gradguard.core.remedies import Present, advice, advice_for_cause, remedies


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


@pytest.mark.parametrize("kind", KINDS)
def test_advice_leaves_away_what_is_there(kind: str) -> None:
    present: list[Present] = ["clipping", "backoff", "rollback", "check", "feed_forward"]
    text = " ".join((advice(kind, ["head"], present), *remedies(kind, ["head"], present)))
    for there in ("AdaptiveGradientClipping", "LearningRateBackoff", "NaNRollback", "LSTM", "recurrent"):
        assert there not in text
    assert "InitializationCheck()" not in text
    assert "clip gradients" not in text.lower()
    assert not re.search(r"[\[\]|]|  |,[.;,]|;[.,]| [.,;]", text), text


def test_code_in_advice_is_that_of_the_model() -> None:
    model = nn.ModuleDict({"0": nn.Linear(2, 2)})
    assert "model['0'].weight" in advice_for_cause("small_weights", ["0"], model=model)
    assert "model[0].weight" in advice_for_cause("small_weights", ["0"])


@pytest.mark.parametrize("cause", [*CAUSES, *SYMPTOM_CAUSES])
def test_every_cause_but_an_unknown_one_has_advice(cause: str) -> None:
    text = advice_for_cause(cause, ["head"], ["clipping"])
    assert bool(text) is (cause != "unknown")
    assert "AdaptiveGradientClipping" not in text
    assert "[clipping" not in text
