"""Deferred checks: a bad step is undone one step later, as if neither batch had been seen."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_gradguard import AdaptiveGradientClipping, Incident, NaNRollback
from tests.tasks import (
    OPTIMIZERS,
    Adversaries,
    Batch,
    Classifier,
    averaged,
    batches,
    exponential_averages,
    fit,
    optimizer_state,
    plain_loader,
    poisoned,
    same,
    weights,
)

ALL_OPTIMIZERS = {
    **OPTIMIZERS,
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=3e-3, foreach=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=3e-3, amsgrad=True),
}
NOT_A_NUMBER = poisoned(batches(1, seed=3), nan=[0])[0]


class Rich(Classifier):
    """With everything that a forward pass, and a step, may write."""

    seen: Tensor

    def __init__(self, optimizer: str = "adam", dropout: float = 0.3, **arguments: Any) -> None:
        super().__init__(optimizer, norm=True, dropout=dropout, **arguments)
        self.mean_input = MeanMetric(nan_strategy="disable")
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        self.seen = self.seen + batch[0].abs().sum()
        self.mean_input.update(batch[0].mean())
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = ALL_OPTIMIZERS[self.optimizer](self.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Validated(Rich):
    """Keeps the weights that it was validated with."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.validated: list[list[Tensor]] = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(weights(self))
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class Observer(pl.Callback):
    """Records incidents, and keeps the weights before averages replace them at the end."""

    def __init__(self) -> None:
        self.received: list[tuple[str, int]] = []
        self.restored = -1
        self.final: list[Tensor] = []

    def on_training_incident(self, trainer: Any, pl_module: Any, incident: Incident) -> None:
        self.received.append((incident.kind, incident.step))
        if incident.kind == "rollback":
            self.restored = int(incident.value or 0)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.final = weights(pl_module)


def deferred(**arguments: Any) -> NaNRollback:
    settings = {"check": "deferred", "restore_rng": True, "rewind_schedulers": True, "max_dossiers": 0}
    return NaNRollback(**{**settings, **arguments})


class Run:
    """A fit with a deferred check and an average, and its final state."""

    def __init__(
        self,
        data: Sequence[Batch],
        rollback: NaNRollback | None = None,
        module: Rich | None = None,
        callbacks: Sequence[pl.Callback] = (),
        **arguments: Any,
    ) -> None:
        self.module = module or Rich()
        self.rollback = rollback or deferred()
        self.averages, self.observer = exponential_averages(), Observer()
        torch.manual_seed(1)
        suite = [self.observer, *self.averages, self.rollback, *callbacks]
        self.trainer = fit(self.module, data, suite, **arguments)

    def tensors(self) -> dict[str, list[Tensor]]:
        return {
            "weights and buffers": self.observer.final,
            "optimizer": optimizer_state(self.trainer),
            "metric": [self.module.mean_input.mean_value.clone(), self.module.mean_input.weight.clone()],
            "average": averaged(self.averages),
            "epoch mean": [self.trainer.callback_metrics["train_loss_epoch"]],
            "learning rate": [torch.as_tensor(o.param_groups[0]["lr"]) for o in self.trainer.optimizers],
        }


def assert_same(run: Run, twin: Run) -> None:
    expected = twin.tensors()
    for name, tensors in run.tensors().items():
        assert same(tensors, expected[name]), name
        assert all(bool(t.isfinite().all()) for t in tensors), name
    assert run.rollback.snapshot_state_dict() == twin.rollback.snapshot_state_dict()


def insert(data: Sequence[Batch], at: int, *more: Batch) -> list[Batch]:
    return [*data[:at], *more, *data[at:]]


@pytest.mark.parametrize("optimizer", ALL_OPTIMIZERS)
def test_nan_batch_and_the_next_one_leave_no_trace(optimizer: str) -> None:
    clean = batches(20)
    after = batches(1, seed=4)[0]
    twin = Run(clean, module=Rich(optimizer))
    run = Run(insert(clean, 9, NOT_A_NUMBER, after), module=Rich(optimizer))
    assert (run.rollback.skips, run.rollback.rollbacks) == (1, 0)
    assert run.observer.received == [("nonfinite_loss", 9)]
    assert_same(run, twin)


def test_a_step_is_undone_exactly_one_step_later() -> None:
    class Look(pl.Callback):
        def __init__(self) -> None:
            self.finite: list[bool] = []
            self.skips: list[int] = []

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            self.finite.append(all(bool(t.isfinite().all()) for t in weights(module)))
            self.skips.append(rollback.skips)

    rollback, look = deferred(), Look()
    Run(insert(batches(10), 4, NOT_A_NUMBER), rollback, callbacks=[look])
    assert look.finite == [i != 4 for i in range(11)]
    assert look.skips == [int(i > 4) for i in range(11)]


def test_the_very_first_step_is_undone_too() -> None:
    clean = batches(8)
    run, twin = Run([NOT_A_NUMBER, clean[0], *clean]), Run(clean)
    assert run.rollback.skips == 1
    assert_same(run, twin)


def test_finite_losses_with_nonfinite_gradients_are_undone() -> None:
    class Infinite(Rich):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            if batch[1].shape[0] == 7:
                loss.register_hook(lambda gradient: gradient * math.inf)
            return loss

    clean = batches(12)
    bad = (clean[0][0][:7], clean[0][1][:7])
    twin = Run(clean, module=Infinite())
    run = Run(insert(clean, 5, bad, clean[1]), module=Infinite())
    assert run.observer.received == [("nonfinite_gradient", 5)]
    assert_same(run, twin)


@pytest.mark.parametrize("position", range(4))
def test_under_accumulation_two_windows_are_lost(position: int) -> None:
    clean, more = batches(24), batches(8, seed=5)
    more[position] = NOT_A_NUMBER
    run = Run(insert(clean, 8, *more), accumulate_grad_batches=4)
    twin = Run(clean, accumulate_grad_batches=4)
    assert run.rollback.skips == 1
    assert_same(run, twin)


def test_last_batch_of_an_epoch_is_checked_at_once() -> None:
    clean = batches(12)
    run, twin = Run([*clean, NOT_A_NUMBER]), Run(clean)
    assert run.rollback.skips == 1
    assert_same(run, twin)


def test_the_last_batch_of_an_epoch_costs_no_batch_of_the_next() -> None:
    class Epochs(Rich):
        """The last batch of the first epoch is NaN."""

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            if self.current_epoch == 0 and batch_idx == 12:
                batch = (batch[0] * math.nan, batch[1])
            return super().training_step(batch, batch_idx)

    class Loader:
        def __init__(self, module: Rich, first: int) -> None:
            self.module, self.first = module, first

        def __iter__(self) -> Any:
            return iter(data[: self.first] if self.module.current_epoch == 0 else data)

    data = batches(13)
    module, expected = Epochs(), Rich()
    run = Run([], module=module, loader=Loader(module, 13), max_epochs=2)
    twin = Run([], module=expected, loader=Loader(expected, 12), max_epochs=2)
    assert run.trainer.global_step == 1 + twin.trainer.global_step == 26
    assert run.rollback.skips == 1
    assert_same(run, twin)


def test_max_steps_on_the_bad_step() -> None:
    clean = batches(12)
    run = Run(insert(clean, 7, NOT_A_NUMBER), max_steps=8)
    twin = Run(clean, max_steps=7)
    assert run.rollback.skips == 1
    assert_same(run, twin)


@pytest.mark.parametrize("average_last", [False, True])
def test_validation_in_mid_epoch_sees_healthy_weights(average_last: bool) -> None:
    clean, held_out = batches(16), batches(2, seed=6)

    class Look(pl.Callback):
        def __init__(self) -> None:
            self.at_start: list[list[Tensor]] = []

        def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
            self.at_start.append(weights(module))

    def run(data: list[Batch], interval: int) -> tuple[Validated, Look, pl.Trainer, NaNRollback]:
        module, look, rollback = Validated(), Look(), deferred()
        callbacks: list[pl.Callback] = [rollback, *exponential_averages()]
        torch.manual_seed(1)
        callbacks = [*(callbacks if average_last else callbacks[::-1]), look]
        arguments: dict[str, Any] = {"val_check_interval": interval, "num_sanity_val_steps": 1}
        trainer = fit(module, data, callbacks, validation=held_out, **arguments)
        return module, look, trainer, rollback

    # the bad batch is the tenth, and validation follows at once: no other batch is lost
    module, look, trainer, rollback = run(insert(clean, 9, NOT_A_NUMBER), 10)
    expected, twin_look, twin, _ = run(clean, 9)
    assert rollback.skips == 1
    assert all(bool(t.isfinite().all()) for tensors in (*module.validated, *look.at_start) for t in tensors)
    # the first entry of each is of the sanity check, the next of the ninth good batch
    assert same(look.at_start[1], twin_look.at_start[1])
    assert same(module.validated[1], expected.validated[1])
    assert same(module.validated[2], expected.validated[2])
    assert same(weights(module), weights(expected))
    assert same(optimizer_state(trainer), optimizer_state(twin))


def finite_files(folder: Path) -> list[Path]:
    files = sorted(folder.rglob("*.ckpt"))
    for file in files:
        content = torch.load(file, weights_only=False)
        tensors = [t for t in content["state_dict"].values() if t.is_floating_point()]
        for optimizer in content["optimizer_states"]:
            tensors += [v for s in optimizer["state"].values() for v in s.values() if isinstance(v, Tensor)]
        assert all(bool(t.isfinite().all()) for t in tensors), file.name
    return files


def test_checkpoint_after_the_bad_step_holds_the_state_before(tmp_path: Path) -> None:
    clean = batches(15)
    states = []
    for name, data in (("clean", clean), ("bad", insert(clean, 6, NOT_A_NUMBER))):
        folder = tmp_path / name
        keep = ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, save_last=True)
        run = Run(data, callbacks=[keep], enable_checkpointing=True)
        assert len(finite_files(folder)) == len(data) + 1
        states.append(run)
    assert states[1].rollback.skips == 1
    assert_same(states[1], states[0])  # checked ahead of the file: no other batch is lost
    before = torch.load(tmp_path / "bad" / "epoch=0-step=6.ckpt", weights_only=False)["state_dict"]
    after = torch.load(tmp_path / "bad" / "epoch=0-step=7.ckpt", weights_only=False)["state_dict"]
    assert same(list(before.values()), list(after.values()))


@pytest.mark.filterwarnings("ignore:.*was called without a model", "ignore:.*no last checkpoint available")
@pytest.mark.parametrize("interrupts", ["next training step", "batch end", "ctrl-c"])
def test_exception_after_the_bad_step_saves_the_state_before(tmp_path: Path, interrupts: str) -> None:
    class Breaks(Rich):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            if batch_idx == 7 and interrupts != "batch end":
                raise KeyboardInterrupt if interrupts == "ctrl-c" else RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 6 and interrupts == "batch end":
                raise RuntimeError("out of luck")

    class Keep(OnExceptionCheckpoint):
        def teardown(self, *_: Any, **__: Any) -> None:
            """Keeps the file."""

    clean, expected = batches(15), Rich()
    module, rollback = Breaks(), deferred()
    torch.manual_seed(1)
    with pytest.raises((RuntimeError, SystemExit)):
        fit(
            module,
            insert(clean, 6, NOT_A_NUMBER),
            [*exponential_averages(), rollback, Keep(tmp_path)],
            enable_checkpointing=True,
        )
    assert rollback.skips == 1
    torch.manual_seed(1)
    fit(expected, clean[:6], [deferred()])
    (file,) = finite_files(tmp_path)
    content = torch.load(file, weights_only=False)
    saved = content.get(
        "current_model_state", content["state_dict"]
    )  # beside an average, that is the average's
    assert same(list(saved.values()), list(expected.state_dict().values()))
    assert same(weights(module), weights(expected))


def test_exception_without_a_checkpoint_leaves_the_state_before() -> None:
    class Breaks(Rich):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            if batch_idx == 7:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    clean, module, expected = batches(15), Breaks(dropout=0.0), Rich(dropout=0.0)
    with pytest.raises(RuntimeError, match="out of luck"):
        fit(module, insert(clean, 6, NOT_A_NUMBER), [deferred()])
    fit(expected, clean[:6], [deferred()])
    assert same(weights(module), weights(expected))


@pytest.mark.parametrize("at", [18, 19, 20, 21])
def test_snapshot_of_a_bad_step_is_never_restored(at: int) -> None:
    """The snapshot that is due after twenty good steps is taken before the bad one is checked."""
    clean = batches(60)
    data = insert(insert(clean, 45, *[NOT_A_NUMBER] * 6), at, NOT_A_NUMBER)
    run = Run(data, deferred(snapshot_every_n_steps=20))
    assert run.rollback.rollbacks == 1
    assert all(bool(t.isfinite().all()) for tensors in run.tensors().values() for t in tensors)


def test_under_a_gradient_scaler_it_is_exact() -> None:
    def scaler() -> list[Any]:
        return [MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**30))]

    class Unscheduled(Rich):
        def configure_optimizers(self) -> Any:
            return super().configure_optimizers()[0]

    data = insert(batches(30), 14, NOT_A_NUMBER)
    exact = Run(data, deferred(check="exact"), Unscheduled(), plugins=scaler())
    late = Run(data, deferred(), Unscheduled(), plugins=scaler())
    assert exact.rollback.skips == late.rollback.skips == 1
    assert exact.rollback.amp_overflows == late.rollback.amp_overflows > 0
    assert_same(late, exact)


def test_under_lbfgs_it_is_exact() -> None:
    class Lbfgs(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)

    clean = batches(6, size=128)
    bare, late, rollback = Lbfgs(norm=True), Lbfgs(norm=True), deferred()
    fit(bare, clean)
    fit(late, insert(clean, 3, NOT_A_NUMBER), [rollback])
    assert rollback.skips == 1
    assert same(weights(bare), weights(late))


class Gan(Adversaries):
    """Every batch names the losses that are NaN."""

    def training_step(self, batch: tuple[Tensor, Tensor, str], batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        real, noise, bad = batch
        for index, sign in enumerate((1, -1)):
            self.toggle_optimizer(optimizers[index])
            is_nan = bad in ("both", "critic" if index == 0 else "generator")
            fake = self.generator(noise * (math.nan if is_nan else 1.0))
            loss = sign * (self.critic(fake).mean() - self.critic(real).mean())
            optimizers[index].zero_grad()
            self.manual_backward(loss)
            optimizers[index].step()
            self.untoggle_optimizer(optimizers[index])


def gan_batches(n: int, bad: dict[int, str] | None = None) -> Any:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(32, 20, generator=generator),
            torch.randn(32, 4, generator=generator),
            (bad or {}).get(i, ""),
        )
        for i in range(n)
    ]


def test_bad_critic_step_skips_the_generator_step_of_the_same_batch(tmp_path: Path) -> None:
    expected, module, rollback = Gan(), Gan(), deferred(max_dossiers=10)
    data = gan_batches(12, {6: "critic"})
    twin = fit(expected, [b for i, b in enumerate(data) if i != 6], [deferred()])
    trainer = fit(module, data, [rollback], tmp_path)
    assert rollback.skips == 1
    assert same(weights(expected), weights(module))
    assert same(optimizer_state(twin), optimizer_state(trainer))
    assert [record["batch_idx"] for record in lost_batches(tmp_path)] == [6]


@pytest.mark.parametrize("snapshot_every_n_steps", [1, 3, 5, 6, 7, 1000])
def test_bad_generator_step_skips_the_next_critic_step(snapshot_every_n_steps: int) -> None:
    class ByHand(Gan):
        """Without the suite: the generator's step of batch 6 and the critic's of batch 7 are omitted."""

        def training_step(self, batch: tuple[Tensor, Tensor, str], batch_idx: int) -> None:
            optimizers: Any = self.optimizers()
            real, noise, _ = batch
            for index, sign in enumerate((1, -1)):
                if (batch_idx, index) in ((6, 1), (7, 0)):
                    continue
                self.toggle_optimizer(optimizers[index])
                fake = self.generator(noise)
                loss = sign * (self.critic(fake).mean() - self.critic(real).mean())
                optimizers[index].zero_grad()
                self.manual_backward(loss)
                optimizers[index].step()
                self.untoggle_optimizer(optimizers[index])

    data = gan_batches(20, {6: "generator"})
    expected, module = ByHand(), Gan()
    rollback = deferred(snapshot_every_n_steps=snapshot_every_n_steps, restore_rng=False)
    twin = fit(expected, data)
    trainer = fit(module, data, [rollback])
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert same(weights(expected), weights(module))
    assert same(optimizer_state(twin), optimizer_state(trainer))


def test_repeated_bad_generator_steps_leave_no_trace() -> None:
    module, rollback = Gan(), deferred(patience=20)
    fit(module, gan_batches(16, {i: "generator" for i in range(6, 11)}), [rollback])
    assert rollback.rollbacks == 0
    assert all(bool(t.isfinite().all()) for t in weights(module))


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_rollback_restores_all_networks(check: str) -> None:
    """Also those that were toggled off when the snapshot was taken, or is restored."""
    module, rollback = Gan(), deferred(check=check, patience=2)
    before = weights(module)
    n = 2 if check == "exact" else 4
    fit(module, gan_batches(5 + n, {5 + i: "both" for i in range(n)}), [rollback])
    assert rollback.rollbacks > 0
    assert same(weights(module), before)


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_nan_last_batch_keeps_the_scheduler_step_of_the_epoch(check: str) -> None:
    class ByEpoch(Rich):
        def configure_optimizers(self) -> Any:
            (optimizer,), _ = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    rates = []
    for data in (batches(6), insert(batches(6), 6, NOT_A_NUMBER)):
        run = Run(data, deferred(check=check), ByEpoch(), max_epochs=2)
        rates.append(run.trainer.optimizers[0].param_groups[0]["lr"])
    assert rates[0] == rates[1]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_consecutive_bad_steps_lose_pairs_of_batches(n: int) -> None:
    clean, healthy = batches(20), batches(1, seed=8)[0]
    bad = [NOT_A_NUMBER] * n if n % 2 == 0 else [*[NOT_A_NUMBER] * n, healthy]
    run, twin = Run(insert(clean, 8, *bad)), Run(clean)
    assert (run.rollback.skips, run.rollback.rollbacks) == (len(bad) // 2, 0)
    assert_same(run, twin)


def test_rollback_restores_the_state_of_a_twin() -> None:
    clean = batches(60)
    bad = insert(clean, 37, *[NOT_A_NUMBER] * 6)
    run = Run(bad, deferred(snapshot_every_n_steps=10), callbacks=[AdaptiveGradientClipping()])
    assert (run.rollback.skips, run.rollback.rollbacks) == (3, 1)
    assert run.observer.restored == 22
    twin = Run(
        [*clean[:22], *clean[37:]],
        deferred(snapshot_every_n_steps=1000),
        callbacks=[AdaptiveGradientClipping()],
    )
    expected = twin.tensors()
    for name, tensors in run.tensors().items():
        assert same(tensors, expected[name]), name


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_snapshot_is_qualified_by_ten_good_steps(check: str) -> None:
    taken, clean = (20 if check == "exact" else 21), batches(50)
    for n_good in (9, 10):
        n_bad = 3 if check == "exact" else 6
        bad = insert(clean, taken + n_good, *[NOT_A_NUMBER] * n_bad)
        run = Run(bad, deferred(check=check, snapshot_every_n_steps=20))
        assert run.rollback.rollbacks == 1
        assert run.observer.restored == (taken if n_good == 10 else 0)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_clean_run_is_that_of_a_bare_trainer(accumulate: int) -> None:
    data, bare = batches(23), Rich()
    averages = exponential_averages()
    torch.manual_seed(1)
    trainer = fit(bare, data, averages, accumulate_grad_batches=accumulate, max_epochs=2)
    run = Run(data, deferred(snapshot_every_n_steps=5), accumulate_grad_batches=accumulate, max_epochs=2)
    assert run.rollback.skips == 0
    assert same(weights(bare), weights(run.module))
    assert same(optimizer_state(trainer), optimizer_state(run.trainer))
    assert same(averaged(averages), run.tensors()["average"])
    assert torch.equal(
        trainer.callback_metrics["train_loss_epoch"], run.trainer.callback_metrics["train_loss_epoch"]
    )


def lost_batches(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "lost_batches.rank0.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("max_dossiers", [0, 10])
@pytest.mark.parametrize(("accumulate", "lost"), [(1, [5, 6]), (4, list(range(4, 12)))])
def test_all_lost_batches_are_logged(
    tmp_path: Path, max_dossiers: int, accumulate: int, lost: list[int]
) -> None:
    Run(
        poisoned(batches(24), nan=[5]),
        deferred(max_dossiers=max_dossiers),
        folder=tmp_path,
        accumulate_grad_batches=accumulate,
    )
    assert [record["batch_idx"] for record in lost_batches(tmp_path)] == lost


def test_validation_within_a_window_undoes_the_window_before(tmp_path: Path) -> None:
    """Validation after six batches, windows of four: the rest of the second window makes its step."""
    clean, module, rollback = batches(12), Validated(dropout=0.0), deferred()
    fit(
        module,
        poisoned(clean, nan=[2]),
        [rollback],
        tmp_path,
        validation=batches(1, seed=6),
        val_check_interval=6,
        num_sanity_val_steps=0,
        accumulate_grad_batches=4,
    )
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert [record["batch_idx"] for record in lost_batches(tmp_path)] == list(range(6))
    expected = Rich(dropout=0.0)
    (optimizer,), _ = expected.configure_optimizers()
    for window in (clean[6:8], clean[8:12]):
        for inputs, target in window:
            (nn.functional.cross_entropy(expected.net(inputs), target) / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.param_groups[0]["lr"] *= 0.97
    norm: Any = module.net[1]
    assert norm.num_batches_tracked == 6
    assert torch.equal(module.mean_input.weight, torch.tensor(6.0))
    first: Any = module.net[0]
    expected_first: Any = expected.net[0]
    torch.testing.assert_close(first.weight, expected_first.weight)


def test_stop_after_a_bad_step_leaves_finite_weights() -> None:
    class Stops(pl.Callback):
        """Behind the guard in the list: at the end of the batch, it is not known yet to be the last."""

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 11

    module, expected = Classifier(), Classifier()
    fit(module, poisoned(batches(20), nan=[10]), [NaNRollback(check="deferred"), Stops()])
    fit(expected, batches(20)[:10])
    assert same(weights(expected), weights(module))


@pytest.mark.lightning("2.6", "before it, validation does not follow the clock")
def test_validation_by_time_sees_finite_weights() -> None:
    seen: list[bool] = []

    class Validates(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(all(bool(torch.isfinite(p).all()) for p in self.parameters()))

        def val_dataloader(self) -> Any:
            return plain_loader(batches(1))

    interval = {"val_check_interval": timedelta(microseconds=1), "num_sanity_val_steps": 0}
    arguments: dict[str, Any] = {**interval, "check_val_every_n_epoch": None}
    data = poisoned(batches(20), nan=[10])
    fit(Validates(), data, [NaNRollback(check="deferred")], max_steps=20, **arguments)
    assert len(seen) >= 15
    assert all(seen)
