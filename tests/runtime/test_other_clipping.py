"""Clipping by the Trainer or by code of the module: advice does not propose it, and who clips is named."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.nn.utils import clip_grad_norm_ as clip

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradientNormMonitor,
    Incident,
    NaNRollback,
    TrainingDiagnosis,
    TrainingDivergedError,
    default_callbacks,
)
from lightning_gradguard.report.analysis.present import present_in
from lightning_gradguard.report.analysis.run_log import GradientLog, RunLog, Series
from lightning_gradguard.report.render.text import to_text
from lightning_gradguard.runtime.other_clipping import describe_other_clipper
from tests.report.runs import report_of
from tests.tasks import Classifier, batches, fit, poisoned, same, weights

BY_NORM: dict[str, Any] = {"gradient_clip_val": 0.5}
BY_VALUE: dict[str, Any] = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}


class Hot(Classifier):
    """Diverges within a few steps, clipped or not."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=100.0, momentum=0.9)


class ClipsInHook(Hot):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")


class ClipsBeforeStep(Hot):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.bound()

    def bound(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)


class LogsBeforeStep(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("norm", nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))


class ClipsByHand(Hot):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)
        optimizer.step()
        return loss


CLIPPED: dict[str, tuple[type[Hot], dict[str, Any], str]] = {
    "by norm": (Hot, BY_NORM, "gradient_clip_val=0.5 of the Trainer"),
    "by value": (Hot, BY_VALUE, "gradient_clip_val=0.05 by value of the Trainer"),
    "in a hook": (ClipsInHook, {}, "ClipsInHook.configure_gradient_clipping"),
    "before the step": (ClipsBeforeStep, {}, "ClipsBeforeStep.on_before_optimizer_step"),
    "by hand": (ClipsByHand, {}, ""),
}


@pytest.mark.parametrize("with_own", [False, True], ids=["alone", "beside the suite's"])
@pytest.mark.parametrize("name", CLIPPED)
def test_advice_does_not_propose_what_is_there_and_says_who_clips(
    name: str, with_own: bool, tmp_path: Path
) -> None:
    class Listener(TrainingDiagnosis):
        def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
            super().on_training_incident(trainer, pl_module, incident)
            found.append(incident)

    make, arguments, who = CLIPPED[name]
    found: list[Incident] = []
    own = [AdaptiveGradientClipping()] if with_own else []
    callbacks = [GradientNormMonitor(), Listener(), NaNRollback(max_rollbacks=1), *own]
    logger = CSVLogger(tmp_path, "", "run")
    said = []
    try:
        fit(make(), batches(60), callbacks, logger=logger, log_every_n_steps=1, **arguments)
    except TrainingDivergedError as error:
        said.append(str(error))
    said += [i.advice for i in found]
    assert not [text for text in said if "clip gradients" in text.lower()]
    exploding = [i.detail for i in found if i.kind == "exploding_gradient"]
    assert exploding
    if who:
        assert f"after clipping by {'AdaptiveGradientClipping or ' * with_own}{who}" in exploding[0]
    report = to_text([report_of(tmp_path / "run")], 500)
    assert "clip gradients" not in report.lower()
    assert "not at fault" not in report
    assert ("by AdaptiveGradientClipping" in report) == with_own
    if who and not with_own:
        assert "of the logged steps clipped by the Trainer or the module" in report


@pytest.mark.parametrize("make", [Classifier, LogsBeforeStep])
def test_of_healthy_gradients_nothing_is_said_to_be_clipped(make: type[Classifier], tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "", "run")
    callbacks = [GradientNormMonitor(), NaNRollback()]
    arguments: dict[str, Any] = {**BY_VALUE, "gradient_clip_val": 100.0} if make is Classifier else {}
    fit(make(), batches(20), callbacks, logger=logger, log_every_n_steps=1, **arguments)
    assert "clipped" not in to_text([report_of(tmp_path / "run")], 500)
    columns = (tmp_path / "run" / "metrics.csv").read_text().partition("\n")[0]
    assert ("grad_norm_clipped/total" in columns) == (make is Classifier)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("with_own", [False, True], ids=["alone", "beside the suite's"])
def test_norm_after_clipping_is_that_which_the_optimizer_gets(
    with_own: bool, precision: Any, tmp_path: Path
) -> None:
    class Spy(Classifier):
        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            super().optimizer_step(*args, **kwargs)
            norms.append(nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))

    norms: list[Any] = []
    logger = CSVLogger(tmp_path, "", "run")
    callbacks = [GradientNormMonitor(), *([AdaptiveGradientClipping()] if with_own else [])]
    more: dict[str, Any] = {"precision": precision, "log_every_n_steps": 1, **BY_VALUE}
    fit(Spy(), batches(10), callbacks, logger=logger, **more)
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["grad_norm_clipped/total"]]
    logged = [float(row["grad_norm_clipped/total"]) for row in rows]
    assert logged == pytest.approx([float(norm) for norm in norms], rel=1e-5)
    before = [float(row["grad_norm/total"]) for row in rows]
    assert any(after < 0.99 * norm for after, norm in zip(logged, before, strict=True))


def test_weights_that_rest_because_of_clipping_are_blamed_on_it(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, "", "run")
    arguments: dict[str, Any] = {**BY_VALUE, "gradient_clip_val": 1e-6}
    fit(
        Classifier(),
        batches(20),
        [GradientNormMonitor(every_n_steps=1), TrainingDiagnosis()],
        logger=logger,
        **arguments,
    )
    (incident,) = map(json.loads, (tmp_path / "run" / "incidents.jsonl").read_text().splitlines())
    assert (incident["kind"], incident["cause"]) == ("weight_stagnation", "clip_value_too_small")
    assert "by gradient_clip_val=1e-06 by value of the Trainer" in incident["detail"]
    assert "Raise the value to which gradients are clipped" in incident["advice"]
    assert "lower the learning rate" not in " ".join(report_of(tmp_path / "run").next_steps)


@pytest.mark.parametrize("clips", [False, True])
def test_norms_that_reach_one_value_were_clipped_before_they_were_measured(clips: bool) -> None:
    norms = [0.5 + (37 * step % 101) / 100 for step in range(100)]
    total = Series(range(100), [min(norm, 1.0) if clips else norm for norm in norms])
    present = present_in(RunLog(gradients=(GradientLog(total=total),)))
    assert ("clipping" in present) == clips


@pytest.mark.parametrize("how", ["by norm", "by value", "in a hook", "in a hook by value"])
@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_a_skipped_step_has_nothing_to_clip(how: str, check: Any) -> None:
    class InHook(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            algorithm = "value" if "value" in how else "norm"
            self.clip_gradients(optimizer, gradient_clip_val=0.05, gradient_clip_algorithm=algorithm)

    arguments = {"by norm": BY_NORM, "by value": BY_VALUE}.get(how, {})
    data = batches(8)
    twin, module = (InHook() if "hook" in how else Classifier() for _ in range(2))
    rollback = NaNRollback(check=check)
    fit(twin, data[:3] + data[4:], [], **arguments)
    trainer = fit(module, poisoned(data, nan=[3]), [rollback], **arguments)
    assert rollback.skips == 1
    assert all(weight.isfinite().all() for weight in weights(module))
    if check == "exact":  # a deferred check loses the next step as well
        assert same(weights(twin), weights(module))
    assert "clip_grad_by_value" not in vars(trainer.precision_plugin)


class InHook(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1e-4)


class AfterBackward(Classifier):
    def on_after_backward(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 1e-4)


@pytest.mark.parametrize(
    ("make", "arguments", "who"),
    [
        (InHook, {}, "are clipped to 0.0001 by InHook.on_before_optimizer_step"),
        (
            AfterBackward,
            {},
            "have the size 0.0001 in every sampled step, as code of yours clips them",
        ),
        (Classifier, {"gradient_clip_val": 1e-4}, "by gradient_clip_val=0.0001 of the Trainer"),
    ],
)
def test_only_what_has_clipped_is_named(
    make: Callable[[], Classifier], arguments: dict[str, Any], who: str, tmp_path: Path
) -> None:
    """The suite's own clipping is there, and has not acted."""
    logger = CSVLogger(tmp_path, "", "run")
    fit(make(), batches(20), default_callbacks(), logger=logger, log_every_n_steps=1, **arguments)
    lines = (tmp_path / "run" / "incidents.jsonl").read_text().splitlines()
    found = [one for one in map(json.loads, lines) if one["kind"] == "weight_stagnation"]
    assert [one["cause"] for one in found] == ["clip_value_too_small"]
    assert who in found[0]["detail"]
    assert "AdaptiveGradientClipping" not in found[0]["detail"]


@functools.lru_cache(maxsize=2)
def bound_all(module: nn.Module) -> None:
    for p in module.parameters():
        gradient = p.grad
        if gradient is not None:
            gradient.clamp_(-0.1, 0.1)


class ThroughFunction(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        bound_all(self)


class ThroughAnotherName(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        clip(self.parameters(), 0.1)


class OnInstance(Classifier):
    def __init__(self) -> None:
        super().__init__()
        vars(self)["on_before_optimizer_step"] = lambda _: clip(self.parameters(), 0.1)


class BoundsWeights(Classifier):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.data.clamp_(-1, 1)


@pytest.mark.parametrize("make", [ThroughFunction, ThroughAnotherName, OnInstance, BoundsWeights])
def test_a_hook_that_clips_is_found_by_what_it_calls(make: type[Classifier]) -> None:
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=True)
    trainer.strategy.connect(make())
    clips = make is not BoundsWeights
    assert describe_other_clipper(trainer) == f"{make.__name__}.on_before_optimizer_step" * clips
