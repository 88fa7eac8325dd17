"""What plain learners reach shows how much of the loss is noise of the data, of vectors with classes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_gradguard.treatment.learning import learned_enough, learning_of
from lightning_gradguard.treatment.trials.reachable import reachable_loss
from lightning_gradguard.treatment.trials.trial import Job, Trial


def samples(wrong: float) -> tuple[Tensor, Tensor]:
    """Vectors on both sides of a line, and these as classes, some of them wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 2, generator=generator)
    is_wrong = torch.rand(1000, generator=generator) < wrong
    return 100 * x, ((x[:, 0] > 0) ^ is_wrong).long()


@pytest.mark.parametrize(("wrong", "least", "most"), [(0.0, 0.0, 0.2), (0.2, 0.6, 0.9)])
def test_noise_of_the_data_is_what_no_learner_explains(wrong: float, least: float, most: float) -> None:
    x, y = samples(wrong)
    state = torch.get_rng_state()
    batches = [(x[i::10], y[i::10]) for i in range(10)]
    assert least < reachable_loss(batches) < most
    assert reachable_loss([*batches, *batches]) == reachable_loss(batches), "epochs repeat their samples"
    assert torch.equal(state, torch.get_rng_state())


def test_unknown_of_other_samples_and_after_the_deadline() -> None:
    x, y = samples(0.0)
    assert math.isnan(reachable_loss([(x.reshape(1000, 1, 2), y)]))
    assert math.isnan(reachable_loss([(x, x[:, :1])]))
    assert math.isnan(reachable_loss([(x, y), (x[:, :1], y)])), "vectors of two lengths"
    assert math.isnan(reachable_loss([(x[:, :0], y)]))
    assert math.isnan(reachable_loss([(x.fill_(math.nan), y)]))
    assert math.isnan(reachable_loss([samples(0.0)], deadline=0.0))


@pytest.mark.parametrize(
    ("reachable", "has_learned"), [(math.nan, False), (0.1, False), (0.55, True), (1.0, False)]
)
def test_run_has_learned_that_explains_most_of_what_can_be_learned(
    reachable: float, has_learned: bool
) -> None:
    """Of a parity, plain learners reach nothing, which shows nothing."""
    curve = [(0, 0.7), (300, 0.43), (400, 0.42)]
    trial = Trial(
        job=Job((), 0, 400), curve=curve, over_constant=0.6, is_likelihood=True, reachable=reachable
    )
    assert learning_of(trial).has_learned == has_learned
    assert not learned_enough(trial)
    assert learned_enough(replace(trial, over_constant=0.54)) == has_learned
