"""Any LightningModule: manual optimization, LBFGS, compilation, tuners, no loss at all."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from pytorch_lightning.tuner.tuning import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradguard import (
    AdaptiveGradientClipping,
    ClippingPolicy,
    GlobalNormClipping,
    GradientNormMonitor,
    InitializationCheck,
    NaNRollback,
    default_callbacks,
)
from tests.tasks import Adversaries, Batch, Classifier, batches, fit, plain_loader, poisoned, same, weights


def finite(module: nn.Module) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in weights(module))


class Gan(Adversaries):
    """Some losses of the generator are NaN."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.bad = bad

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        real, noise = batch[0], torch.ones(32, 4) / (batch_idx + 1)
        for index, (network, sign) in enumerate(((self.critic, 1), (self.generator, -1))):
            self.toggle_optimizer(optimizers[index])
            fake = self.generator(noise + torch.arange(32.0).view(32, 1))
            loss = sign * (self.critic(fake).mean() - self.critic(real).mean())
            if batch_idx in self.bad and network is self.generator:
                loss = loss * math.nan
            optimizers[index].zero_grad()
            self.manual_backward(loss)
            optimizers[index].step()
            self.untoggle_optimizer(optimizers[index])


def test_gan_skips_only_the_bad_step(tmp_path: Path) -> None:
    bare, clean, bad = Gan(), Gan(), Gan(bad=(7,))
    fit(bare, batches(8))
    rollback = NaNRollback()
    fit(clean, batches(8), [NaNRollback()])
    fit(bad, batches(8), [rollback])
    assert same(weights(bare), weights(clean))
    assert rollback.skips == 1
    assert same(weights(clean.critic), weights(bad.critic))
    assert not same(weights(clean.generator), weights(bad.generator))
    # of the bad batch, the critic's step and its forward pass through the generator stay
    norm: Any = bad.generator[1]
    assert norm.num_batches_tracked.item() == 2 * 8 - 1
    before = Gan()
    fit(before, batches(7))
    assert same(
        [p.detach() for p in before.generator.parameters()], [p.detach() for p in bad.generator.parameters()]
    )


def test_tags_of_several_optimizers(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Gan(), batches(10), default_callbacks(), logger=logger, log_every_n_steps=2)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    for tag in ("grad_norm.0/total", "grad_norm.1/total", "clip.1/coefficient", "lr_backoff.1/lr/0"):
        assert tag in header


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(line_search: str | None) -> None:
    class Lbfgs(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn=line_search)

    clean = batches(6, size=128)
    bad = [*clean[:3], poisoned(clean, nan=[0])[0], *clean[3:]]
    bare, watched, guarded = Lbfgs(norm=True), Lbfgs(norm=True), Lbfgs(norm=True)
    fit(bare, clean)
    rollback = NaNRollback()
    with pytest.warns(UserWarning, match="does not act under LBFGS"):
        fit(guarded, bad, [rollback, AdaptiveGradientClipping(), GradientNormMonitor(every_n_steps=1)])
    assert rollback.skips == 1
    assert same(weights(bare), weights(guarded))
    fit(watched, clean, [GradientNormMonitor(every_n_steps=1)])
    assert same(weights(bare), weights(watched))


def test_lbfgs_that_leaves_nonfinite_weights_is_rolled_back() -> None:
    class Wild(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1e18, max_iter=3)

    module = Wild()
    before = weights(module)
    rollback = NaNRollback(patience=50)
    fit(module, batches(3), [rollback])
    assert rollback.skips > 0
    assert finite(module)
    assert len(before) == len(weights(module))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: Any) -> None:
    module, rollback = Classifier("adam", norm=True), NaNRollback()
    data = poisoned(batches(20), nan=[5])
    fit(module, data, default_callbacks(nan_rollback=rollback), precision=precision)
    assert rollback.skips == 1
    assert finite(module)


def test_second_clipper_is_reported_and_acts_after(caplog: pytest.LogCaptureFixture) -> None:
    class Own(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])

    fit(Classifier(), batches(3), [AdaptiveGradientClipping()], gradient_clip_val=0.5)
    (first,) = (record for record in caplog.records if "clipped twice" in record.getMessage())
    assert first.levelname == "INFO"
    assert "then gradient_clip_val=0.5 of the Trainer. One is enough" in first.getMessage()
    assert "default_callbacks(adaptive_gradient_clipping=None)" in first.getMessage()
    module = Own()
    fit(module, batches(3), [AdaptiveGradientClipping(GlobalNormClipping(0.01))])
    assert "then Own.configure_gradient_clipping. One is enough" in caplog.text
    assert module.norm.item() == pytest.approx(0.01, rel=1e-4)


def test_clipping_is_that_of_the_trainer() -> None:
    ours, theirs = Classifier(), Classifier()
    fit(ours, batches(30), [AdaptiveGradientClipping(GlobalNormClipping(0.1))])
    fit(theirs, batches(30), gradient_clip_val=0.1)
    for one, two in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_excluded_parameters_are_not_clipped() -> None:
    class Spy(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.norms = {n: p.grad.norm().item() for n, p in self.named_parameters() if p.grad is not None}

    free, clipped = Spy(), Spy()
    fit(free, batches(1))
    fit(clipped, batches(1), [AdaptiveGradientClipping(GlobalNormClipping(1e-3), exclude=["net.6"])])
    assert clipped.norms["net.6.weight"] == free.norms["net.6.weight"]
    assert clipped.norms["net.0.weight"] < 1e-3 < free.norms["net.0.weight"]


def test_compiled() -> None:
    module, rollback = Classifier(norm=True), NaNRollback()
    module.net = torch.compile(module.net, backend="eager")  # type: ignore[assignment]
    monitor = GradientNormMonitor(every_n_steps=1)
    trainer = fit(module, poisoned(batches(10), nan=[4]), default_callbacks(nan_rollback=rollback))
    assert rollback.skips == 1
    assert finite(module)
    assert "grad_norm/total" in trainer.callback_metrics
    assert monitor.level == "auto"


def test_gradient_checkpointing() -> None:
    class Checkpointed(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            hidden = checkpoint(self.net[:4], batch[0].requires_grad_(), use_reentrant=False)
            return nn.functional.cross_entropy(self.net[4:](hidden), batch[1])

    module = Checkpointed()
    fit(module, batches(10), default_callbacks())
    assert finite(module)


@pytest.mark.parametrize("arguments", [{"fast_dev_run": True}, {"overfit_batches": 3, "max_epochs": 4}])
def test_modes_of_the_trainer(arguments: dict[str, Any], tmp_path: Path) -> None:
    module = Classifier()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You requested to overfit")
        fit(module, batches(10), default_callbacks(), tmp_path, **arguments)
    assert finite(module)
    assert arguments.get("overfit_batches") or not list(tmp_path.glob("**/incidents.jsonl"))


def test_a_second_fit_with_the_same_trainer() -> None:
    module, rollback = Classifier("adam"), NaNRollback()
    trainer = fit(module, poisoned(batches(20), nan=[3]), default_callbacks(nan_rollback=rollback))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, plain_loader(poisoned(batches(20), nan=[3])))
    assert rollback.skips == 2
    assert finite(module)


def test_tuners_see_the_module_as_it_is() -> None:
    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.batch_size = 1e-3, 2

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

        def train_dataloader(self) -> Any:
            inputs, target = batches(1, size=256)[0]
            data = torch.utils.data.TensorDataset(inputs, target)
            return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

    module = Tuned()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=default_callbacks(),
    )
    tuner = Tuner(trainer)
    tuner.lr_find(module, num_training=20, update_attr=True)
    tuner.scale_batch_size(module, mode="power", max_trials=2, steps_per_trial=2)
    trainer.fit(module)
    assert finite(module)


def test_csv_beside_tensorboard_and_no_logger(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")]
    trainer = fit(Classifier(), batches(20), default_callbacks(), logger=loggers)
    header = (Path(loggers[0].log_dir or "") / "metrics.csv").read_text().splitlines()[0]
    assert "grad_norm/total" in header
    trainer = fit(Classifier(), batches(20), default_callbacks(), logger=False)
    assert trainer.callback_metrics["grad_norm/total"] > 0


def test_a_logger_that_raises_costs_no_training(tmp_path: Path) -> None:
    class Broken(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "grad_norm/total" in metrics:
                raise OSError("no space left on device")

    module = Classifier()
    with pytest.warns(UserWarning, match="Broken could not write.*no space left"):
        fit(module, batches(20), default_callbacks(), logger=Broken(tmp_path))
    assert finite(module)


def test_early_stopping_reads_the_total() -> None:
    stop = EarlyStopping("grad_norm/total", patience=1, min_delta=100.0, check_on_train_epoch_end=True)
    trainer = fit(Classifier(), batches(7), [GradientNormMonitor(), stop], max_epochs=5)
    assert trainer.current_epoch < 5


def test_sparse_embeddings_and_complex_weights() -> None:
    class Odd(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding = nn.Embedding(10, 4, sparse=True)
            self.phase = nn.Parameter(torch.randn(4, dtype=torch.complex64))
            self.unused = nn.Parameter(torch.ones(3))
            self.empty = nn.Parameter(torch.ones(0))

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            vectors = self.embedding(batch[1])
            loss: Tensor = (vectors * self.phase).abs().square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Odd()
    fit(module, batches(20), default_callbacks())
    assert finite(module)


def test_a_loss_that_is_none_is_no_step() -> None:
    class Sometimes(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)

    bare, guarded, rollback = Sometimes(), Sometimes(), NaNRollback()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`training_step` returned `None`")
        fit(bare, batches(12))
        fit(guarded, batches(12), [rollback, GradientNormMonitor(every_n_steps=1)])
    assert rollback.skips == 0
    assert same(weights(bare), weights(guarded))


def test_a_module_without_anything_to_train() -> None:
    class Frozen(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return None

        def configure_optimizers(self) -> Any:
            return None

    module = Frozen().requires_grad_(False)
    before = weights(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning warns that there is no optimizer
        fit(module, batches(5), default_callbacks())
    assert same(before, weights(module))


def test_a_constant_loss_and_an_empty_batch() -> None:
    class Constant(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            loss: Tensor = (self.net(batch[0]) * 0).sum() + 1.0
            return loss

    module = Constant("adam")
    before = weights(module)
    fit(module, batches(30), default_callbacks())
    assert same(before, weights(module))
    other, rollback = Classifier(), NaNRollback()
    empty = (torch.zeros(0, 20), torch.zeros(0, dtype=torch.long))
    fit(other, [*batches(3), empty, *batches(3)], [rollback])
    assert rollback.skips == 1  # the mean over no sample is NaN
    assert finite(other)


def test_a_loss_of_several_elements_is_lightning_s_error_to_raise() -> None:
    class Several(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    module = Several()
    before = weights(module)
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar outputs"):
        fit(module, batches(3), default_callbacks())
    assert same(before, weights(module))


def test_a_policy_that_is_none() -> None:
    with pytest.raises(ValueError, match="policy='zclip' is not a ClippingPolicy"):
        AdaptiveGradientClipping(policy="zclip")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exclude='head' must be a list"):
        AdaptiveGradientClipping(exclude="head")


def test_a_policy_of_ones_own() -> None:
    class Half(ClippingPolicy):
        def coefficients(self, gradients: Any) -> Tensor:
            return torch.full_like(gradients.total_norm, 0.5)

    half, whole = Classifier(), Classifier()
    fit(half, batches(1), [AdaptiveGradientClipping(Half())])
    fit(whole, batches(1))
    start = weights(Classifier())
    for a, b, c in zip(start, weights(half), weights(whole), strict=True):
        torch.testing.assert_close(2 * (b - a), c - a, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm_type": 0.5}, "norm_type=0.5"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"level": "layer"}, "level='layer'"),
        ({"include": "head"}, "include='head'"),
        ({"exclude": "head"}, "exclude='head'"),
        ({"figure_every_n_steps": -1}, "figure_every_n_steps=-1"),
    ],
)
def test_bad_arguments_of_the_monitor(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientNormMonitor(**arguments)


def test_bad_arguments_of_the_check() -> None:
    with pytest.raises(ValueError, match="on_failure='fix'"):
        InitializationCheck(on_failure="fix")  # type: ignore[arg-type]
