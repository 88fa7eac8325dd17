"""Unusual modules and data: the guard neither breaks them nor misses a bad step."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_gradguard import NaNRollback
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback
from tests.tasks import NOT_A_NUMBER, Batch, Classifier, batches, fit, insert, poisoned, same, weights


class Target(Classifier):
    """With a copy of itself that follows it slowly, and that no optimizer updates."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__("adam", **arguments)
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        for mine, theirs in zip(self.net.parameters(), self.target.parameters(), strict=True):
            with torch.no_grad():
                theirs.lerp_(mine, 0.05)
        distance = nn.functional.mse_loss(self.net(batch[0]), self.target(batch[0]))
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return loss + 0.1 * distance


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_target_network_is_as_without_the_batch(check: Any) -> None:
    clean = batches(40)
    bad = [*clean[:20], poisoned(clean, nan=[0])[0], *clean[20:]]
    lost = 20 if check == "exact" else 21
    expected, module = Target(), Target()
    fit(expected, [*clean[:20], *bad[lost + 1 :]], [NaNRollback(check=check)])
    rollback = NaNRollback(check=check)
    fit(module, bad, [rollback])
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert same(weights(expected), weights(module))


class Recurrent(Classifier):
    """Carries a hidden state from batch to batch as a plain attribute."""

    def __init__(self) -> None:
        super().__init__("adam")
        self.cell = nn.GRUCell(20, 20)
        self.hidden: Tensor | None = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        hidden = self.cell(batch[0], self.hidden)
        self.hidden = hidden.detach()
        return super().training_step((hidden, batch[1]), batch_idx)


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_hidden_state_is_as_without_the_batch(check: Any) -> None:
    clean = batches(12)
    lost = 5 if check == "exact" else 6
    expected, module = Recurrent(), Recurrent()
    bad = insert(clean, 5, NOT_A_NUMBER)
    fit(expected, [*clean[:5], *bad[lost + 1 :]], [NaNRollback(check=check)])
    fit(module, bad, [NaNRollback(check=check)])
    assert same(weights(expected), weights(module))


def test_target_network_is_rolled_back_with_the_network() -> None:
    clean = batches(60)
    bad = [*clean[:31], *[poisoned(clean, nan=[0])[0]] * 3, *clean[31:]]
    rollback = NaNRollback(snapshot_every_n_steps=10, restore_rng=True, rewind_schedulers=True)
    module, expected = Target(), Target()
    fit(module, bad, [rollback])
    assert rollback.rollbacks == 1
    fit(expected, [*clean[:20], *clean[31:]])
    assert same(weights(expected), weights(module))


def test_no_file_holds_a_nonfinite_target_network(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1)
    data = poisoned(batches(60), nan=[30])
    fit(Target(), data, [keep, NaNRollback(check="deferred")], tmp_path, enable_checkpointing=True)
    files = list(tmp_path.glob("*.ckpt"))
    assert len(files) == 8
    for file in files:
        state = torch.load(file, weights_only=False)["state_dict"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in state.values()), file


class LazyMask(Classifier):
    """Makes its causal mask when the first batch comes, drops a cache, and keeps a bank that grows."""

    mask: Tensor
    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.empty(0), persistent=False)
        self.register_buffer("cache", torch.zeros(3), persistent=False)
        self.register_buffer("bank", torch.zeros(1, 20), persistent=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if len(self.mask) != 4:
            self.mask = torch.full((4, 4), -math.inf).triu(1)
        self.cache = None
        self.bank = torch.cat([self.bank, batch[0][:1]])
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_buffers_may_be_created_deleted_and_resized(check: Any) -> None:
    clean = batches(40)
    bad = [*clean[:20], poisoned(clean, nan=[0])[0], *clean[20:]]
    module, rollback = LazyMask(), NaNRollback(check=check)
    fit(module, bad, [rollback])
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert bool(torch.isfinite(module.bank).all())
    assert len(module.bank) == 1 + (40 if check == "exact" else 39)


def test_resized_buffer_is_rolled_back() -> None:
    clean = batches(60)
    bad = [*clean[:31], *[poisoned(clean, nan=[0])[0]] * 3, *clean[31:]]
    module, rollback = LazyMask(), NaNRollback(snapshot_every_n_steps=10)
    fit(module, bad, [rollback])
    assert rollback.rollbacks == 1
    assert len(module.bank) == 1 + 20 + 29


class Sparse(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        inputs, target = batch["x"], batch["y"]
        return super().training_step((inputs.to_dense(), target), batch_idx)


@pytest.mark.parametrize("kind", ["sparse", "csr", "user dict"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_batches_of_any_kind_are_guarded(kind: str) -> None:
    kinds: dict[str, Any] = {"sparse": Tensor.to_sparse, "csr": Tensor.to_sparse_csr}
    convert = kinds.get(kind, Tensor.clone)
    data: list[Any] = [{"x": convert(x), "y": y} for x, y in poisoned(batches(20), nan=[6])]
    if kind == "user dict":
        data = [UserDict(batch) for batch in data]
    module, rollback = Sparse(), NaNRollback()
    fit(module, data, [rollback])
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_large_second_moments_are_healthy() -> None:
    class Unscaled(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss: Tensor = (1e12 * self.net(batch[0])).square().mean() / 1e8
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-4)

    rollback = NaNRollback(snapshot_every_n_steps=5)
    trainer = fit(Unscaled(), batches(60), [rollback])
    squares = [state["exp_avg_sq"].max() for state in trainer.optimizers[0].state.values()]
    assert float(max(squares)) > 1e17
    assert (rollback.skips, rollback.rollbacks) == (0, 0)


def test_weights_unfrozen_right_after_a_deferred_step() -> None:
    class Unfreeze(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 21:
                trainer.optimizers[0].add_param_group({"params": list(module.net[0].parameters())})

    class Partly(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.net[2:].parameters(), 3e-3)

    module, rollback = Partly(), NaNRollback(check="deferred")
    fit(module, poisoned(batches(40), nan=[20]), [Unfreeze(), rollback])
    assert (rollback.skips, rollback.rollbacks) == (1, 0)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_good_steps_checked_ahead_of_a_checkpoint_count(tmp_path: Path) -> None:
    data = poisoned(batches(60), nan=[50, 51, 52, 53, 54, 55])
    rollback = NaNRollback(check="deferred", snapshot_every_n_steps=10, incident_dir=str(tmp_path))
    keep = ModelCheckpoint(tmp_path, every_n_train_steps=1)
    fit(Classifier(), data, [keep, rollback], tmp_path, enable_checkpointing=True)
    lines = (tmp_path / "incidents.jsonl").read_text().splitlines()
    (back, *_) = [line for line in lines if '"rollback"' in line]
    assert '"value": 0' not in back


def test_averaging_that_begins_between_a_snapshot_and_a_rollback() -> None:
    average = StochasticWeightAveraging(1e-2, swa_epoch_start=3)
    rollback = NaNRollback(rewind_schedulers=True)
    data = batches(30)
    bad = [poisoned(data, nan=[3, 4, 5]) if epoch == 2 else data for epoch in range(5)]

    class Epochs:
        def __init__(self, module: pl.LightningModule) -> None:
            self.module = module

        def __len__(self) -> int:
            return 30

        def __iter__(self) -> Any:
            return iter(bad[self.module.trainer.current_epoch])

    module = Classifier()
    fit(module, data, [rollback, average], loader=Epochs(module), max_epochs=5)
    assert rollback.rollbacks == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_is_no_part_of_the_next() -> None:
    class Sometimes(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 9 else loss

    clean = batches(30)
    bad = poisoned(clean, nan=[10])
    module, rollback = Sometimes(norm=True), NaNRollback()
    fit(module, bad, [rollback])
    assert rollback.skips == 1
    assert int(module.net[1].num_batches_tracked) == 29  # type: ignore[arg-type]


def test_normalization_that_is_built_by_the_first_batch() -> None:
    class Lazy(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(20, 16), nn.LazyBatchNorm1d(), nn.ReLU(), nn.Linear(16, 4))

    rollback = NaNRollback()
    module = Lazy()
    fit(module, poisoned(batches(20), nan=[6]), [rollback])
    assert rollback.skips == 1
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


def test_layer_that_no_batch_builds() -> None:
    class Unused(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.LazyLinear(3)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.05)

    rollback = NaNRollback()
    module = Unused()
    fit(module, poisoned(batches(8), nan=[6]), [rollback])
    assert rollback.skips == 1
    assert all(bool(torch.isfinite(weight).all()) for weight in module.net.parameters())


def test_values_of_a_skipped_step_reach_no_other_callback() -> None:
    data = poisoned(batches(20), nan=[19])
    stop = EarlyStopping("train_loss_step", patience=100, check_on_train_epoch_end=True)
    trainer = fit(Classifier(), data, [stop, NaNRollback()], max_epochs=3)
    assert trainer.current_epoch == 3
    assert math.isfinite(float(trainer.callback_metrics["train_loss_step"]))


class _Grows(Classifier):
    """Creates a normalization and a metric while it is trained."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if batch_idx == 3:
            self.net[1] = nn.BatchNorm1d(64, affine=False)
            self.mean_input = MeanMetric(nan_strategy="disable")
        if batch_idx >= 3:
            self.mean_input.update(batch[0].mean())
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_tensors_created_in_mid_epoch_are_restored(check: Any) -> None:
    module = _Grows()
    fit(module, insert(batches(10), 6, NOT_A_NUMBER), [NaNRollback(check=check)])
    assert bool(module.net[1].running_mean.isfinite().all())  # type: ignore[operator]
    assert module.mean_input._update_count == (7 if check == "exact" else 6)
    assert bool(module.mean_input.compute().isfinite())


def test_parameters_that_are_unfrozen_are_measured_from_then_on() -> None:
    class Unfreezes(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            self.net[0].requires_grad_(batch_idx >= 2)
            return super().training_step(batch, batch_idx)

    class Names(StepCallback):
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
            self.seen.append("net.0.weight" in step.gradients.names)

    names = Names()
    fit(Unfreezes(), batches(4), [names])
    assert names.seen == [False, False, True, True]


class _SharedFakes(pl.LightningModule):
    """A GAN that makes its fakes once and uses them in both steps, with normalization in its generator.

    Args:
        skipped: The batch in which the critic does not step.
    """

    def __init__(self, skipped: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 20))
        self.critic = nn.Linear(20, 1)
        self.skipped = skipped

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.critic, self.generator)]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        critic, generator = self.optimizers()  # type: ignore[attr-defined]
        fake = self.generator(torch.arange(8.0).reshape(4, 2))
        if batch_idx != self.skipped:
            critic.zero_grad()
            self.manual_backward(self.critic(batch[0]).mean() - self.critic(fake.detach()).mean())
            critic.step()
        generator.zero_grad()
        self.manual_backward(self.critic(fake).mean())
        generator.step()


@pytest.mark.parametrize("check", ["exact", "deferred"])
def test_a_skipped_step_leaves_the_other_optimizer_its_graph(check: Any) -> None:
    guarded, omitting = _SharedFakes(), _SharedFakes(skipped=3)
    fit(guarded, insert(batches(8), 3, NOT_A_NUMBER), [NaNRollback(check=check)])
    fit(omitting, insert(batches(8), 3, NOT_A_NUMBER), [])
    assert all(bool(weight.isfinite().all()) for weight in guarded.parameters())
    if check == "exact":  # else the generator's step is undone with the critic's
        assert same(list(guarded.parameters()), list(omitting.parameters()))


class _UsesItsBuffer(_SharedFakes):
    """The generator's backward pass needs a buffer that its forward pass has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.generator = nn.Sequential(nn.Linear(2, 20), _Scaled(self))


class _Scaled(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.owner = [owner]

    def forward(self, inputs: Tensor) -> Tensor:
        scale = self.owner[0].scale
        scale.mul_(0.5)  # type: ignore[operator]
        return inputs * scale  # type: ignore[operator]


def test_graph_with_a_restored_buffer_raises() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fit(_UsesItsBuffer(), insert(batches(4), 2, NOT_A_NUMBER), [NaNRollback()])
