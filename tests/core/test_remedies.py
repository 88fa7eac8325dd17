"""Every kind of incident has advice."""

from __future__ import annotations

import re

import pytest

from lightning_gradguard.core.incidents import KINDS
from lightning_gradguard.core.remedies import Present, advice, advice_for_cause, fitting, remedies


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
    texts = [fitting(text, present) for text in (advice(kind, ["head"]), *remedies(kind, ["head"]))]
    text = " ".join(filter(None, texts))
    for there in ("AdaptiveGradientClipping", "LearningRateBackoff", "NaNRollback", "LSTM", "recurrent"):
        assert there not in text
    assert "InitializationCheck()" not in text
    assert "clip gradients" not in text.lower()
    assert not re.search(r"[\[\]|]|  |,[.;,]|;[.,]| [.,;]", text), text


def test_joined_advice_is_fitted_as_well() -> None:
    text = f"{advice('rollback')} {advice_for_cause('update_too_large')}"
    assert "AdaptiveGradientClipping" in text
    assert "AdaptiveGradientClipping" not in fitting(text, ["clipping"])
    assert fitting(advice("exploding_gradient"), []) == advice("exploding_gradient")
