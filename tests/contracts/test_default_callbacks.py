"""The callbacks together: separate, in any order, watching without touching."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradientNormMonitor,
    InitializationCheck,
    LearningRateBackoff,
    NaNRollback,
    PercentileClipping,
    TrainingDiagnosis,
    default_callbacks,
)
from tests.tasks import (
    Classifier,
    ResumableLoader,
    accuracy,
    averaged,
    batches,
    clusters,
    exponential_averages,
    fit,
    optimizer_state,
    poisoned,
    same,
    weights,
)

#: Spikes, single NaN batches, and two series of them that need a rollback.
DATA = poisoned(batches(90), nan=[4, 17, 40, 41, 42, 60, 61, 62, 63, 64, 65], spikes=[9, 30, 31, 55, 80])
ORDERS = list(itertools.permutations(range(4)))


def four() -> list[pl.Callback]:
    return [
        GradientNormMonitor(),
        AdaptiveGradientClipping(),
        NaNRollback(snapshot_every_n_steps=10),
        LearningRateBackoff(rewarm_steps=5, cooldown_steps=2),
    ]


def ordered(order: tuple[int, ...], on_failure: str, ema_first: bool) -> list[pl.Callback]:
    callbacks = [four()[i] for i in order]
    check = InitializationCheck(on_failure=on_failure)  # type: ignore[arg-type]
    callbacks.insert(order[0] + 1, check)
    averages = exponential_averages()
    return [*averages, *callbacks] if ema_first else [*callbacks, *averages]


def deep(seed: int = 0) -> Classifier:
    """So deep that its default initialization fails, and is repaired if `on_failure` is "repair"."""
    module: Any = Classifier(norm=True, dropout=0.1, seed=seed)
    layers = [layer for _ in range(10) for layer in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
    module.net = torch.nn.Sequential(*module.net[:6], *layers, module.net[6])
    return cast(Classifier, module)


@pytest.mark.slow
@pytest.mark.timeout(240)  # thirty runs
@pytest.mark.parametrize(("on_failure", "orders"), [("warn", ORDERS), ("repair", ORDERS[::4])])
def test_every_order_gives_the_same_weights(on_failure: str, orders: Sequence[tuple[int, ...]]) -> None:
    results, averages, counts = [], [], set()
    for number, order in enumerate(orders):
        torch.manual_seed(0)
        callbacks = ordered(order, on_failure, ema_first=number % 2 == 0)
        module = deep()
        torch.manual_seed(1)
        captured: list[list[torch.Tensor]] = []

        class Last(pl.Callback):
            def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
                captured[:] = [weights(trainer.lightning_module), averaged(callbacks)]  # noqa: B023

        fit(module, DATA, [*callbacks, Last()])
        results.append(captured[0])
        averages.append(captured[1])
        (rollback,) = [c for c in callbacks if isinstance(c, NaNRollback)]
        counts.add((rollback.skips, rollback.rollbacks))
    assert all(same(results[0], other) for other in results)
    assert all(same(averages[0], other) for other in averages)
    assert counts == {(11, 3)}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in results[0] + averages[0])


def test_watching_changes_nothing(tmp_path: Path) -> None:
    def run(callbacks: list[pl.Callback]) -> tuple[list[torch.Tensor], torch.Tensor]:
        module = Classifier("adam", norm=True, dropout=0.2)
        trainer = fit(module, batches(40), callbacks, tmp_path, log_every_n_steps=2)
        return weights(module) + optimizer_state(trainer), torch.get_rng_state()

    bare, bare_rng = run([])
    watched, rng = run([GradientNormMonitor(histograms=True, figure_every_n_steps=10), InitializationCheck()])
    assert same(bare, watched)
    assert torch.equal(bare_rng, rng)


@pytest.mark.parametrize("index", range(5))
def test_each_callback_works_alone(index: int) -> None:
    module = Classifier()
    fit(module, batches(30), [default_callbacks()[index]])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("seed", range(4))
def test_nan_storm_is_survived(optimizer: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bad = torch.nonzero(torch.rand(600, generator=generator) < 0.02).flatten().tolist()
    assert bad
    data = poisoned(clusters(600, seed=seed), nan=bad)
    bare, guarded = Classifier(optimizer, seed=seed), Classifier(optimizer, seed=seed)
    fit(bare, data)
    fit(guarded, data, default_callbacks())
    assert accuracy(bare) < 0.4
    assert accuracy(guarded) == 1.0


@pytest.mark.parametrize("where", [10, 30])
def test_resume_in_mid_epoch_decides_as_the_uninterrupted_run(tmp_path: Path, where: int) -> None:
    data = poisoned(batches(60), nan=[7, 35, 50], spikes=[20, 45])

    def suite() -> list[pl.Callback]:
        return [
            GradientNormMonitor(),
            AdaptiveGradientClipping(PercentileClipping(50.0, window=20)),
            NaNRollback(),
            LearningRateBackoff(),
        ]

    whole, resumed, callbacks = Classifier("adam"), Classifier("adam", seed=5), suite()

    def keep() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, "middle", every_n_train_steps=where)

    arguments: dict[str, Any] = {"max_steps": 2 * where - 1, "enable_checkpointing": True}
    fit(whole, data, [*suite(), keep()], loader=ResumableLoader(data), **arguments)
    path = str(tmp_path / "middle.ckpt")
    callbacks += [keep()]
    fit(resumed, data, callbacks, ckpt_path=path, loader=ResumableLoader(data), **arguments)
    assert same(weights(whole), weights(resumed))
    assert isinstance(callbacks[2], NaNRollback)
    assert callbacks[2].skips == sum(i < 2 * where - 1 for i in (7, 35, 50))


def test_stochastic_weight_averaging() -> None:
    module, rollback = Classifier(norm=True), NaNRollback()
    average = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    data = poisoned(batches(10), nan=[3, 9])
    fit(module, data, [average, *default_callbacks(nan_rollback=rollback)], max_epochs=3)
    assert rollback.skips >= 6
    assert all(bool(torch.isfinite(p).all()) for p in module.parameters())


def test_barebones_and_charts_of_totals_only(tmp_path: Path) -> None:
    unset = dict.fromkeys(
        ("logger", "log_every_n_steps", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    )
    quiet = Classifier()
    quiet.log = lambda *_, **__: None  # type: ignore[method-assign]
    fit(quiet, batches(3), default_callbacks(), barebones=True, **unset)
    monitor = GradientNormMonitor(level="total", figure_every_n_steps=1, every_n_steps=1)
    fit(Classifier(), batches(3), [monitor], logger=TensorBoardLogger(tmp_path))


def test_figures_and_histograms_of_anything(tmp_path: Path) -> None:
    monitor = GradientNormMonitor(histograms=True, figure_every_n_steps=2, every_n_steps=1)
    data = poisoned(batches(8), nan=[0, 1, 2, 5])
    data += [(inputs * 1e30, target) for inputs, target in batches(2)]
    fit(Classifier(), data, [monitor, TrainingDiagnosis()], logger=TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(tmp_path / "lightning_logs" / "version_0"))
    events.Reload()
    assert "grad_norm/layers" in events.Tags()["images"]
    assert "incidents/text_summary" in events.Tags()["tensors"]


def test_accumulation_logs_each_step_once(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    fit(Classifier(), batches(42), default_callbacks(), logger=logger, accumulate_grad_batches=4)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for tag in ("grad_norm/total", "clip/coefficient", "lr_backoff/lr/0"):
        assert [point.step for point in events.Scalars(tag)] == [9], tag
    for tag in ("rollback/skips", "lr_backoff/scale"):
        assert [point.step for point in events.Scalars(tag)] == [9, 10], tag


def test_two_of_a_kind(tmp_path: Path) -> None:
    monitors = [GradientNormMonitor(), GradientNormMonitor(norm_type=math.inf, level="total")]
    trainer = fit(Classifier(), batches(10), monitors)
    trainer.save_checkpoint(tmp_path / "two.ckpt")


def test_replacements() -> None:
    replaced = default_callbacks(nan_rollback=NaNRollback(patience=5), learning_rate_backoff=None)
    assert [type(c).__name__ for c in replaced] == [
        "InitializationCheck",
        "GradientNormMonitor",
        "TrainingDiagnosis",
        "NaNRollback",
        "AdaptiveGradientClipping",
    ]


def test_mistaken_arguments_are_told_what_is_meant(tmp_path: Path) -> None:
    known = r"\(\) has no argument 'nan_rolback'. Did you mean nan_rollback\?"
    with pytest.raises(TypeError, match=known):
        default_callbacks(nan_rolback=None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"NaNRollback\(\) has no argument 'patienc'. Did you mean patience"):
        NaNRollback(patienc=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"LearningRateBackoff\(\) has no argument 'q'. It has factor, "):
        LearningRateBackoff(q=3)  # type: ignore[call-arg]
    wrong = r"nan_rollback=LearningRateBackoff\(...\) is no NaNRollback: pass an instance, NaNRollback"
    with pytest.raises(ValueError, match=wrong):
        default_callbacks(nan_rollback=LearningRateBackoff())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="verbose='yes' must be True or False"):
        default_callbacks(verbose="yes")  # type: ignore[arg-type]
    nested: Any = [default_callbacks()]
    with pytest.raises(AttributeError, match=r"or callbacks=\[\*default_callbacks\(\), another\]"):
        fit(Classifier(), batches(1), nested, default_root_dir=tmp_path)
