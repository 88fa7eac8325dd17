"""A skipped step leaves no trace; a rollback is exact; every budget ends with a reason."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GradientNormMonitor,
    Incident,
    LearningRateBackoff,
    NaNRollback,
    TrainingDivergedError,
)
from lightning_gradguard.runtime.steps.step import StepFlags
from tests.tasks import (
    OPTIMIZERS,
    Batch,
    Classifier,
    Listener,
    StateRecorder,
    batches,
    copy_late,
    exponential_averages,
    fit,
    optimizer_state,
    plain_loader,
    poisoned,
    same,
    weights,
)


class Watched(Classifier):
    """With everything that a forward pass may write."""

    seen: Tensor

    def __init__(self, **arguments: Any) -> None:
        super().__init__(norm=True, **arguments)
        self.mean_input = MeanMetric(nan_strategy="disable")
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.seen = self.seen + batch[0].abs().sum()
        self.mean_input.update(batch[0].mean())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_step_leaves_no_trace(optimizer: str) -> None:
    clean = batches(30)
    bad = [*clean[:10], poisoned(clean, nan=[3])[3], *clean[10:]]
    expected, module = Watched(optimizer=optimizer), Watched(optimizer=optimizer)
    twin = fit(expected, clean, [*exponential_averages(), NaNRollback()])
    trainer = fit(module, bad, [*exponential_averages(), NaNRollback()])
    assert same(weights(expected), weights(module))
    assert same(optimizer_state(twin), optimizer_state(trainer))
    assert torch.equal(expected.mean_input.compute(), module.mean_input.compute())
    assert torch.equal(
        twin.callback_metrics["train_loss_epoch"], trainer.callback_metrics["train_loss_epoch"]
    )


def test_batch_norm_validates_as_without_the_nan_batch() -> None:
    clean = batches(20)
    held_out, target = batches(1, seed=5)[0]
    losses = []
    for data in (clean, [*clean[:8], poisoned(clean, nan=[0])[0], *clean[8:]]):
        module = Classifier(norm=True)
        fit(module, data, [NaNRollback()])
        losses.append(nn.functional.cross_entropy(module.eval().net(held_out), target))
    assert torch.equal(*losses)
    poisoned_run = Classifier(norm=True)
    fit(poisoned_run, poisoned(clean, nan=[8]))
    assert not math.isfinite(poisoned_run.eval().net(held_out).sum().item())


def test_accumulation_loses_its_window_only() -> None:
    clean = batches(24)
    bad = [*clean[:8], *poisoned(clean, nan=[9])[8:12], *clean[8:]]
    expected, module, rollback = Classifier(norm=True), Classifier(norm=True), NaNRollback()
    fit(expected, clean, accumulate_grad_batches=4)
    fit(module, bad, [rollback], accumulate_grad_batches=4)
    assert rollback.skips == 1
    assert same(weights(expected), weights(module))


def test_rollback_is_exact() -> None:
    """After three lost batches the run goes on as if it had never seen what followed the snapshot."""
    clean = batches(60)
    bad = [*clean[:31], *[poisoned(clean, nan=[0])[0]] * 3, *clean[31:]]

    class Dropout(Classifier):
        def __init__(self) -> None:
            super().__init__("adam", norm=True, dropout=0.3)

        def configure_optimizers(self) -> Any:
            optimizer = OPTIMIZERS["adam"](self.parameters())
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    rollback = NaNRollback(snapshot_every_n_steps=10, restore_rng=True, rewind_schedulers=True)
    module, expected = Dropout(), Dropout()
    torch.manual_seed(1)
    trainer = fit(module, bad, [rollback, AdaptiveGradientClipping()])
    assert (rollback.skips, rollback.rollbacks) == (3, 1)
    # the newest snapshot with ten good steps behind it is that of step 20
    torch.manual_seed(1)
    twin = fit(expected, [*clean[:20], *clean[31:]], [AdaptiveGradientClipping()])
    assert same(weights(expected), weights(module))
    assert same(optimizer_state(twin), optimizer_state(trainer))
    assert twin.optimizers[0].param_groups[0]["lr"] == trainer.optimizers[0].param_groups[0]["lr"]


class Target(Classifier):
    """Writes running statistics, and a frozen network of its own, in each forward pass."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.target = nn.Linear(20, 64).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        first: Any = self.net[0]
        self.target.weight.lerp_(first.weight.detach(), 0.1)
        loss = super().training_step(batch, batch_idx)
        return None if len(batch[1]) == 7 else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize(("accumulate", "without_loss"), [(1, False), (2, False), (1, True)])
def test_snapshot_is_consistent_with_late_copies(
    accumulate: int, without_loss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the first batch after it was due makes no step."""

    copy_late(monkeypatch)
    remember, clean = StateRecorder(), batches(60 * accumulate)
    data = [
        *clean[: 20 * accumulate],
        *([(x[:7], y[:7]) for x, y in clean[:accumulate]] if without_loss else []),
        *clean[20 * accumulate : 31 * accumulate],
        *poisoned(clean, nan=range(len(clean)))[: 3 * accumulate],
        *clean[31 * accumulate :],
    ]
    fit(
        Target(), data, [remember, NaNRollback(snapshot_every_n_steps=10)], accumulate_grad_batches=accumulate
    )
    assert remember.restored is not None
    step, landed = remember.restored
    assert step == 20
    assert same(landed, remember.at[20])
    assert not same(landed, remember.at[21])


def test_optimizer_with_closure_synchronizes_with_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lbfgs(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    clean = batches(30, size=128)
    bad = [*clean[:12], *poisoned(clean, nan=range(3))[:3], *clean[12:]]
    at_once, late = Lbfgs(), Lbfgs()
    rollbacks = [NaNRollback(snapshot_every_n_steps=5) for _ in range(2)]
    fit(at_once, bad, rollbacks[:1])
    copy_late(monkeypatch)
    fit(late, bad, rollbacks[1:])
    assert rollbacks[0].rollbacks == rollbacks[1].rollbacks >= 1
    assert same(weights(at_once), weights(late))


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_nonfinite_weights_in_half_precision_are_rolled_back(value: float, precision: Any) -> None:
    """Minus infinity makes a dead unit, which no loss or gradient tells of."""

    class Flips(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                module.net[0].bias.data[0] = value

    module, rollback = Classifier(), NaNRollback(snapshot_every_n_steps=10)
    trainer = fit(module, batches(60), [Flips(), rollback], precision=precision)
    assert rollback.rollbacks == 1
    assert all(bool(torch.isfinite(t).all()) for t in (*weights(module), *optimizer_state(trainer)))


@pytest.mark.parametrize("norm", [True, False])
def test_without_statistics_there_is_no_flag_of_them(norm: bool) -> None:
    """On a GPU, one that is made on the host would have to be waited for."""
    flags = []

    class Look(NaNRollback):
        def step_flags(self) -> StepFlags:
            found = super().step_flags()
            flags.append(found.nonfinite_buffers)
            return found

    fit(Classifier(norm=norm), batches(5), [Look()])
    assert [flag is not None for flag in flags] == [norm] * 5


def test_weights_unfrozen_later_are_rolled_back() -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: Any) -> None:
            self.freeze(pl_module.net[0])

        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=1e-3)

    class Partly(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], 3e-3)

    class Overshoots(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 32:
                module.net[0].weight.data.fill_(math.nan)

    module, rollback = Partly(), NaNRollback(snapshot_every_n_steps=10)
    fit(module, batches(30), [Unfreeze(), Overshoots(), rollback], max_epochs=2)
    assert rollback.rollbacks == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_without_rewinding_the_schedule_moves_on() -> None:
    clean = batches(30)
    bad = [*clean[:20], *[poisoned(clean, nan=[0])[0]] * 3, *clean[20:]]

    class Scheduled(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), 0.1)
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9), "interval": "step"}
            ]

    trainer = fit(Scheduled(), bad, [NaNRollback()])
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.9**33)


def test_nonfinite_weights_are_rolled_back_at_once() -> None:
    class Overshoots(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                module.net[0].weight.data[0, 0] = math.nan

    module, rollback = Classifier(), NaNRollback(patience=10)
    fit(module, batches(40), [Overshoots(), rollback])
    assert rollback.rollbacks == 1
    assert rollback.skips == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (4, [("loss_spike", 70), ("rollback", 79)]),
        (15, [("loss_spike", 70), ("divergence", 74), ("rollback", 74)]),
    ],
)
def test_lasting_spike_is_rolled_back(tmp_path: Path, factor: float, expected: list[tuple[str, int]]) -> None:
    class Jolt(pl.Callback):
        """What a bit flip, or one step that was far too large, does to finite weights."""

        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 70:
                for weight in module.parameters():
                    weight.data.mul_(factor)

    class Slow(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-6)

    module, before = Slow(), weights(Slow())
    rollback = NaNRollback(snapshot_every_n_steps=5)
    fit(module, batches(120), [Jolt(), rollback], tmp_path)
    assert (rollback.skips, rollback.rollbacks) == (0, 1)
    records = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [(r["kind"], r["step"]) for r in records] == expected
    assert records[-1]["value"] <= 70
    for one, two in zip(before, weights(module), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-3)


def test_the_budget_of_rollbacks_stops_with_a_reason(tmp_path: Path) -> None:
    data = poisoned(batches(60), nan=range(20, 60))
    module, rollback = Classifier(), NaNRollback(max_rollbacks=2, snapshot_every_n_steps=5)
    with pytest.raises(TrainingDivergedError, match=r"after 2 rollbacks.*bad input.*incidents.jsonl"):
        fit(module, data, [rollback], tmp_path)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))
    records = [json.loads(line) for line in (tmp_path / "incidents.jsonl").read_text().splitlines()]
    assert [r["kind"] for r in records].count("rollback") == 2
    assert records[-1]["kind"] == "training_diverged"
    assert records[-1]["action"] == "stopped"


def test_trainer_can_continue_after_a_stop() -> None:
    rollback = NaNRollback(max_rollbacks=0)
    module, monitor = Classifier(), GradientNormMonitor(every_n_steps=1)
    trainer = fit(module, batches(3), [rollback, monitor])
    trainer.fit_loop.max_epochs = 5
    with pytest.raises(TrainingDivergedError):
        trainer.fit(module, plain_loader(poisoned(batches(10), nan=range(5, 10))))
    trainer.fit(module, plain_loader(batches(20)))
    assert trainer.callback_metrics["grad_norm/total"] > 0
    assert trainer.callback_metrics["rollback/skips"] == 3


def test_skipping_every_other_batch_stops_in_the_end() -> None:
    data = poisoned(batches(400), nan=[i for i in range(400) if i % 3 != 2])
    with pytest.raises(TrainingDivergedError, match="max_skip_fraction"):
        fit(Classifier(), data, [NaNRollback()])


def test_no_checkpoint_holds_nonfinite_weights(tmp_path: Path) -> None:
    data = poisoned(batches(40), nan=[3, 10, 11, 12, 13, 14, 39])
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1)
    fit(Classifier(norm=True), data, [keep, NaNRollback()], enable_checkpointing=True)
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == 40
    for file in files:
        state = torch.load(file, weights_only=False)["state_dict"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values())


def half_precision() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**40))]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
def test_an_overflow_is_left_to_the_scaler(optimizer: str) -> None:
    rollback = NaNRollback()
    bare, module = Classifier(optimizer), Classifier(optimizer)
    fit(bare, batches(40), plugins=half_precision())
    trainer = fit(module, batches(40), [rollback], plugins=half_precision())
    assert rollback.amp_overflows > 5
    assert rollback.skips == 0
    assert same(weights(bare), weights(module))
    assert trainer.callback_metrics["rollback/skips"].item() == 0


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
def test_a_nan_batch_under_the_scaler_is_skipped(optimizer: str) -> None:
    module, rollback = Classifier(optimizer, norm=True), NaNRollback()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=128.0))
    fit(module, poisoned(batches(30), nan=[5, 20]), [rollback, LearningRateBackoff()], plugins=[plugin])
    assert rollback.skips == 2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_overflow_that_repeats_at_the_floor_is_no_longer_left_alone() -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            if batch_idx >= 5:  # finite loss, infinite gradient
                first: Any = self.net[0]
                first.weight.register_hook(lambda gradient: gradient * math.inf)
            return loss

    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=1.0))
    rollback = NaNRollback(max_rollbacks=1)
    with pytest.raises(TrainingDivergedError):
        fit(Overflows(), batches(40), [rollback], plugins=[plugin])
    assert rollback.amp_overflows == 3
    assert rollback.skips > 0


def test_incidents_reach_callbacks_module_and_file(tmp_path: Path) -> None:
    class Listens(Classifier):
        heard: list[Incident]

        def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
            self.heard = [*getattr(self, "heard", []), incident]

    module, listener = Listens(), Listener()
    fit(module, poisoned(batches(20), nan=[6]), [NaNRollback(incident_dir=str(tmp_path)), listener])
    (incident,) = module.heard
    assert listener.found == [incident]
    assert (incident.kind, incident.step, incident.batch_idx) == ("nonfinite_loss", 6, 6)
    assert incident.action == "skipped"
    assert json.loads((tmp_path / "incidents.jsonl").read_text())["kind"] == "nonfinite_loss"


def test_an_unwritable_folder_costs_no_training(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    module = Classifier()
    with (
        pytest.warns(UserWarning, match="Incidents are no longer written"),
        pytest.warns(UserWarning, match="lost batches are no longer written"),
    ):
        fit(module, poisoned(batches(10), nan=[2, 5]), [NaNRollback(incident_dir=str(file))])
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("patience", 0),
        ("patience", 2.5),
        ("snapshot_every_n_steps", 0),
        ("keep_snapshots", 0),
        ("max_rollbacks", -1),
        ("snapshot_device", "disk"),
        ("max_skip_fraction", 0.0),
        ("max_skip_fraction", 1.5),
    ],
)
def test_bad_arguments_are_quoted(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        NaNRollback(**{name: value})


def test_statistics_corrupted_by_a_finite_step_are_restored() -> None:
    """Inputs so large that their variance overflows: batch normalization makes zeros of them, all finite."""
    clean = batches(30)
    huge = [(1e20 * x, y) for x, y in clean[:1]]
    expected, module, rollback = Classifier(norm=True), Classifier(norm=True), NaNRollback()
    fit(expected, clean, [NaNRollback()])
    fit(module, [*clean[:10], *huge, *clean[10:]], [rollback])
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert same(weights(expected), weights(module))


def mildly_scaled() -> MixedPrecision:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return MixedPrecision("16-mixed", "cpu", scaler=scaler)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw fused"])
def test_the_scale_of_a_scaler_outlives_a_skip(optimizer: str) -> None:
    clean = batches(30)
    bad = [*clean[:10], poisoned(clean, nan=[3])[3], *clean[10:]]
    expected, module = Watched(optimizer=optimizer), Watched(optimizer=optimizer)
    twin = fit(expected, clean, [NaNRollback()], plugins=mildly_scaled())
    trainer = fit(module, bad, [NaNRollback()], plugins=mildly_scaled())
    assert same(weights(expected), weights(module))
    assert same(optimizer_state(twin), optimizer_state(trainer))
    assert trainer.precision_plugin.scaler.get_scale() == 1024  # type: ignore[attr-defined]


@pytest.mark.parametrize("optimizer", ["sgd fused", "adam fused"])
def test_skipped_first_step_leaves_no_optimizer_state(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused SGD makes momentum of memory that nobody has written, and leaves it so if it finds infinity."""
    unwritten = functools.partial(torch.full_like, fill_value=math.nan)
    monkeypatch.setattr(torch, "empty_like", unwritten)
    clean = batches(10)
    expected, module, rollback = Classifier(optimizer), Classifier(optimizer), NaNRollback()
    twin = fit(expected, clean, plugins=mildly_scaled())
    trainer = fit(module, [*poisoned(clean, nan=[0])[:1], *clean], [rollback], plugins=mildly_scaled())
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert same(weights(expected), weights(module))
    assert same(optimizer_state(twin), optimizer_state(trainer))


def test_nan_written_after_the_check_of_the_scaler_is_skipped() -> None:
    class Corrupts(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
            if trainer.global_step == 12:
                module.net[0].weight.grad[0, 0] = math.nan

    module, rollback = Classifier(), NaNRollback()
    fit(module, batches(30), [Corrupts(), rollback], plugins=mildly_scaled())
    assert (rollback.amp_overflows, rollback.rollbacks) == (1, 0)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_finite_weights_out_of_range_are_rolled_back() -> None:
    class Flips(pl.Callback):
        """The top bit of the exponent, where a dead unit hides it from the loss."""

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 15:
                module.net[0].bias.data[0] = -1e30

    module, rollback = Classifier(), NaNRollback(snapshot_every_n_steps=10)
    fit(module, batches(60), [Flips(), rollback])
    assert rollback.rollbacks == 1
    assert all(float(tensor.abs().max()) < 1e3 for tensor in weights(module) if tensor.numel())


def test_network_with_dead_units_is_rolled_back() -> None:
    class Dies(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if trainer.global_step == 25:
                module.net[4].bias.data.fill_(-100.0)

    module, rollback = Classifier(), NaNRollback(snapshot_every_n_steps=5)
    fit(module, batches(80), [Dies(), rollback])
    assert rollback.rollbacks == 1
    assert float(weights(module.net[4])[1].min()) > -1


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_run_that_was_stopped_and_resumed_has_its_budgets_anew(tmp_path: Path) -> None:
    clean = batches(60)
    storm = poisoned(clean, nan=range(20, 60))
    with pytest.raises(TrainingDivergedError, match=r"last_good.ckpt"):
        fit(Classifier(), storm, [NaNRollback(max_rollbacks=1)], tmp_path)
    module, rollback = Classifier(), NaNRollback(max_rollbacks=1)
    again = poisoned(batches(60, seed=9), nan=[5, 6, 7])
    fit(module, again, [rollback], tmp_path, ckpt_path=str(tmp_path / "last_good.ckpt"))
    assert rollback.rollbacks == 2  # one before the stop
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_another_run_with_the_same_callbacks_counts_from_0() -> None:
    """As in cross-validation: neither counts nor budgets nor a lowered rate are those of the run before."""
    rollback, backoff = NaNRollback(patience=2, max_rollbacks=1, max_dossiers=0), LearningRateBackoff()
    data = poisoned(batches(20), nan=[6, 7])
    for _ in range(2):
        fit(Classifier(), data, [rollback, backoff])
        assert (rollback.skips, rollback.rollbacks) == (2, 1)
        assert 0 < backoff.final_counts()["lr_backoff/scale"] < 1
    fit(Classifier(), batches(3), [rollback, backoff])
    assert (rollback.skips, backoff.scale) == (0, 1.0)
