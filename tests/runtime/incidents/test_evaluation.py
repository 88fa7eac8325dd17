"""Nonfinite metrics of validation and test: an incident with the metric and the first bad batch."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from torch import Tensor, nn

from lightning_gradguard import Incident, LearningRateBackoff, default_callbacks
from lightning_gradguard.runtime.incidents import evaluation
from tests.tasks import Batch, Classifier, batches, fit, plain_loader, poisoned

HELD_OUT = poisoned(batches(5, seed=1), nan=[2, 4])


class Evaluated(Classifier):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.incidents: list[Incident] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> Tensor | dict[str, Tensor] | None:
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        if "logs" in self.how:
            self.log("val_loss", loss)
            self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())
        if "dict" in self.how:
            return {"loss": loss, "masked": torch.tensor([0.0, -torch.inf])}
        return loss if "returns" in self.how else None

    test_step = validation_step

    def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
        self.incidents.append(incident)


@pytest.mark.parametrize("how", ["logs", "returns", "returns dict", "logs and returns"])
def test_first_bad_batch_of_validation(how: str) -> None:
    module = Evaluated(how)
    fit(module, batches(4), default_callbacks(), validation=HELD_OUT, num_sanity_val_steps=0)
    (incident,) = module.incidents
    assert (incident.kind, incident.step, incident.batch_idx) == ("nonfinite_validation", 4, 2)
    assert incident.where == (("val_loss",) if "logs" in how else ())
    assert "batch 2 of data loader 0" in incident.detail
    assert incident.advice.startswith("Look at that batch")


def test_nothing_is_published_of_finite_metrics() -> None:
    module = Evaluated("logs and returns dict")
    fit(module, batches(4), default_callbacks(), validation=batches(3, seed=1))
    assert not module.incidents


@pytest.mark.parametrize("check_finite", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_is_explained(first: bool, check_finite: bool) -> None:
    module = Evaluated("logs")
    stopping = EarlyStopping("val_loss", check_finite=check_finite)
    own = [LearningRateBackoff()]
    callbacks: list[Any] = [stopping, *own] if first else [*own, stopping]
    trainer = fit(module, batches(4), callbacks, validation=HELD_OUT, max_epochs=3, num_sanity_val_steps=0)
    says = "stops training" if check_finite else "counts that as no improvement"
    assert f"EarlyStopping(monitor='val_loss') {says}" in module.incidents[0].describe()
    assert trainer.current_epoch == (1 if check_finite else 3)
    assert module.incidents[0].action == ("stopped" if check_finite else "none")


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_outside_of_a_fit(verb: str) -> None:
    module = Evaluated("logs")
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=default_callbacks()
    )
    getattr(trainer, verb)(module, plain_loader(HELD_OUT), verbose=False)
    (incident,) = module.incidents
    kind = "nonfinite_validation" if verb == "validate" else "nonfinite_test"
    assert (incident.kind, incident.batch_idx, incident.where) == (kind, 2, ("val_loss",))


def test_metrics_of_several_loaders_are_named_as_callbacks_monitor_them() -> None:
    class Several(Evaluated):
        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

        def on_validation_epoch_end(self) -> None:
            self.log("at_the_end", 1.0)

    module, name = Several("logs"), "val_loss/dataloader_idx_1"
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=3,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[*default_callbacks(), EarlyStopping(name)],
    )
    loaders = [plain_loader(batches(2, seed=2)), plain_loader(HELD_OUT)]
    trainer.fit(module, plain_loader(batches(4)), loaders)
    (first,) = module.incidents  # not of the sanity check, which sees two batches of each loader
    assert (first.where, first.batch_idx) == ((name,), 2)
    assert "the first such batch is batch 2 of data loader 1" in first.detail
    assert f"EarlyStopping(monitor={name!r}) stops training" in first.describe()


@pytest.mark.parametrize("n_sanity", [0, 2])
def test_a_metric_that_is_nonfinite_at_the_end_alone_is_of_no_batch(n_sanity: int) -> None:
    class AtTheEnd(Evaluated):
        def on_validation_epoch_end(self) -> None:
            self.log("val_loss", torch.tensor(0.0) / 0)

    module = AtTheEnd("returns")
    stopping = EarlyStopping("val_loss")
    fit(
        module,
        batches(4),
        [*default_callbacks(), stopping],
        validation=batches(2, seed=1),
        num_sanity_val_steps=n_sanity,
    )
    (incident,) = module.incidents  # none of the sanity check
    assert incident.batch_idx is None
    assert "that batch" not in incident.advice
    assert "EarlyStopping" in incident.describe()


def test_a_metric_that_is_nonfinite_on_all_ranks_is_of_the_rank_with_the_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of_two_ranks(own: Any) -> list[Any]:
        metrics, _ = own
        return [(metrics, None), (metrics, (3, 0))]  # a mean over ranks, of which the second has NaN

    monkeypatch.setattr(evaluation, "gather_objects", of_two_ranks)
    module = Evaluated("logs")
    fit(module, batches(4), default_callbacks(), validation=HELD_OUT, num_sanity_val_steps=0)
    (incident,) = module.incidents
    assert (incident.where, incident.batch_idx) == (("val_loss",), 3)
    assert "batch 3 of data loader 0 on rank 1" in incident.detail
