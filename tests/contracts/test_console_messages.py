"""Console output during and after a run: on the progress bar, above it, below it."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import RichProgressBar, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lightning_gradguard import (
    AdaptiveGradientClipping,
    GlobalNormClipping,
    GradientNormMonitor,
    LearningRateBackoff,
    NaNRollback,
    PercentileClipping,
    TrainingDivergedError,
    default_callbacks,
)
from lightning_gradguard.cli.main import main
from lightning_gradguard.core.incidents import CURE
from lightning_gradguard.runtime.incidents.journal import incident_now, publish, remember_cures
from lightning_gradguard.runtime.logging.console import print_message, shell_command
from tests.fake_cuda import BatchTracker, fake_cuda, strategy
from tests.launching import launch
from tests.tasks import Batch, Classifier, batches, fit, plain_loader, poisoned

#: A single NaN batch, and three in a row that need a rollback.
STORM = poisoned(batches(30), nan=[4, 17, 18, 19])
TITLE = "gradguard: Run summary"
BARS = [TQDMProgressBar, pytest.param(RichProgressBar, marks=pytest.mark.needs("rich"))]


def suite(prog_bar: bool = False) -> list[Any]:
    return default_callbacks(
        gradient_norm_monitor=GradientNormMonitor(prog_bar=prog_bar),
        adaptive_gradient_clipping=AdaptiveGradientClipping(PercentileClipping(50.0)),
        learning_rate_backoff=LearningRateBackoff(prog_bar=prog_bar),
    )


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Returns the lines on the screen, without those that the bar has overwritten."""
    printed = capsys.readouterr().out
    return [line.rpartition("\r")[2].rstrip() for line in printed.splitlines() if line.strip()]


def fit_with_bar(callbacks: Sequence[Any], data: Sequence[Batch] = STORM, **arguments: Any) -> pl.Trainer:
    module = arguments.pop("module", None) or Classifier()
    return fit(module, data, callbacks, **{"enable_progress_bar": True, **arguments})


class Shown(pl.Callback):
    """Records the numbers on the bar after each batch."""

    def __init__(self) -> None:
        self.norms: list[float | None] = []
        self.scales: list[float | None] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.norms.append(trainer.progress_bar_metrics.get("grad_norm/total"))
        self.scales.append(trainer.progress_bar_metrics.get("lr_backoff/scale"))


@pytest.mark.parametrize("bar", BARS)
def test_numbers_on_the_bar(bar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Shown()
    fit_with_bar([*suite(prog_bar=True), shown, bar()], batches(30), log_every_n_steps=10)
    assert "grad_norm/total" in capsys.readouterr().out
    for found in (shown.norms, shown.scales):
        assert found[:9] == [None] * 9
        assert [len(set(found[start : start + 10])) for start in (9, 19)] == [1, 1]  # those of logged steps
    assert shown.norms[9] != shown.norms[19]
    assert shown.scales[9] == 1


class TwoOptimizers(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss = self.net(batch[0]).square().mean()
        self.manual_backward(loss)
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return super().configure_optimizers(), super().configure_optimizers()


def test_two_optimizers_and_two_monitors(capsys: pytest.CaptureFixture[str]) -> None:
    """A number that one of two monitors wants on the bar is on it; Lightning gets it from both."""

    monitors = [
        GradientNormMonitor(every_n_steps=2),
        GradientNormMonitor(every_n_steps=3, level="total", prog_bar=True),
    ]
    trainer = fit_with_bar(monitors, batches(6), module=TwoOptimizers())
    assert trainer.progress_bar_metrics.keys() == {"grad_norm.0/total", "grad_norm.1/total"}


def test_bar_shows_nothing_by_default() -> None:
    trainer = fit_with_bar(suite(), log_every_n_steps=1)
    assert not {"grad_norm/total", "lr_backoff/scale"} & trainer.progress_bar_metrics.keys()


def synchronizations(shown: bool) -> list[str]:
    """Returns the synchronizations of host and device in batches that are not logged."""
    callbacks = suite(prog_bar=shown)
    with fake_cuda() as cuda:
        arguments = {"strategy": strategy(), "accelerator": "auto", "log_every_n_steps": 6}
        fit_with_bar([BatchTracker(cuda), *callbacks, TQDMProgressBar()], batches(20), **arguments)
    hot = [found for found in cuda.seen if 8 <= found.batch < 19 and (found.batch + 1) % 6]
    assert any(found.is_own for found in hot)
    return [f"{found.batch} {found.kind} {found}" for found in hot]


def test_numbers_on_the_bar_need_no_synchronization() -> None:
    assert synchronizations(shown=True) == synchronizations(shown=False)


class Talk(pl.Callback):
    """Prints a message in every hook in which a callback may have to."""

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        print_message(trainer, "at the start: layers[0].weight")

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, i: int) -> None:
        if i == 1:
            print_message(trainer, "in between: [bold]layers[0].weight[/bold] :warning:")

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        print_message(trainer, "at the end: layers[0].weight")


@pytest.mark.parametrize("bar_first", [True, False])
@pytest.mark.parametrize("bar", BARS)
def test_messages_are_printed_above_the_bar(
    bar: Any, bar_first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, with or without the bar on the screen."""
    callbacks: list[pl.Callback] = [bar(), Talk()] if bar_first else [Talk(), bar()]
    fit_with_bar(callbacks, batches(3))
    printed = lines(capsys)
    for text in (
        "gradguard: at the start: layers[0].weight",
        "gradguard: in between: [bold]layers[0].weight[/bold] :warning:",
        "gradguard: at the end: layers[0].weight",
    ):
        assert printed.count(text) == 1, printed


@pytest.mark.parametrize("bar", BARS)
def test_one_line_for_an_intervention(bar: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fit_with_bar([*suite(), bar()])
    printed = " ".join(lines(capsys))  # Rich folds lines that are long
    assert printed.count("gradguard: Nonfinite loss at step") == 3, "of 4: the last follows another one"
    assert "Not examined: it follows a skipped step. Further ones like it are only written" in printed
    assert printed.count("gradguard: Rolled back to step 0 at step 19 (epoch 0, batch 19)") == 1


def table(printed: Sequence[str], title: str = TITLE) -> dict[str, str]:
    """Returns the rows of the only table with this title."""
    assert sum(title in line for line in printed) == 1, printed
    rows = list(itertools.takewhile(lambda line: line.startswith("  "), printed[printed.index(title) + 1 :]))
    return {name: value.strip() for name, _, value in (row.strip().partition("  ") for row in rows)}


def test_commands_are_printed_as_they_can_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shell_command("tensorboard") == "tensorboard"
    monkeypatch.setenv("PATH", "")
    assert shell_command("tensorboard") == str(Path(sys.executable).with_name("tensorboard"))
    monkeypatch.chdir(Path(sys.executable).parents[1])
    assert shell_command("tensorboard") == "bin/tensorboard"


@pytest.mark.parametrize("bar_first", [True, False])
@pytest.mark.parametrize("bar", BARS)
def test_a_table_at_the_end(bar: Any, bar_first: bool, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [bar(), *suite()] if bar_first else [*suite(), bar()]
    logger = TensorBoardLogger("logs", name="storm")
    fit_with_bar(callbacks, logger=logger)
    printed = lines(capsys)
    last_of_bar = max(i for i, line in enumerate(printed) if "30/30" in line)
    assert last_of_bar < printed.index(TITLE)
    rows = table(printed)
    norm, share = (rows.pop(name) for name in ("largest norm", "steps clipped"))
    assert rows == {
        "steps": "30",
        "steps skipped": "4 of 30 (13.3%); a skip does not mend its cause",
        "rollbacks": "1",
        "learning rate": "unchanged by 1 of the rollbacks, whose cause is not the rate",
        "incidents": "nonfinite loss (4), rollback (1)",
        "written to": "logs/storm/version_0/incidents.jsonl",
        "pages": "logs/storm/version_0/incidents, one for the first skip of each episode",
    }
    assert table(printed, "Next steps") == {
        "nonfinite loss": (
            "Look at batch[0]: the data holds nonfinite or huge values. Clean or exclude the samples, and "
            "normalize inputs."
        ),
        "report": "lightning-gradguard report logs/storm/version_0",
        "charts": "tensorboard --logdir logs/storm",
    }
    assert float(norm.removesuffix(" of accepted steps")) > 0
    assert share.endswith("%")


def test_a_run_that_was_clipped_all_the_time_is_not_called_clean(capsys: pytest.CaptureFixture[str]) -> None:
    clipping = AdaptiveGradientClipping(GlobalNormClipping(1e-3))
    fit_with_bar([GradientNormMonitor(), clipping], batches(30), logger=TensorBoardLogger("logs", name="all"))
    printed = lines(capsys)
    rows = table(printed)
    assert rows["incidents"] == "none"
    clipped = re.fullmatch(r"(100% .* clipped, to (\S+) of their norm), usual: up to 50%", rows["unusual"])
    assert clipped is not None
    assert "written to" not in rows
    next_steps = table(printed, "Next steps")
    assert next_steps["report"] == "lightning-gradguard report logs/all/version_0"
    assert f"multiply the learning rate by {clipped[2]}: steps" in next_steps["clipping"]
    capsys.readouterr()
    main(["report", "logs/all/version_0"])
    assert clipped[1] in " ".join(capsys.readouterr().out.split()), "the report has the same figures"


class Steep(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if loss is None else loss * 1e5


def test_a_run_with_a_huge_norm_is_not_called_clean(capsys: pytest.CaptureFixture[str]) -> None:
    fit_with_bar([GradientNormMonitor()], batches(3), module=Steep(optimizer="adam"), log_every_n_steps=1)
    assert table(lines(capsys))["unusual"].endswith("usual: below 1000 for a mean loss")


class Spiking(Classifier):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = super().training_step(batch, batch_idx)
        return None if loss is None else loss * (300 if batch_idx == 8 else 1)


def test_a_spike_that_nothing_has_clipped_is_not_called_clean(capsys: pytest.CaptureFixture[str]) -> None:
    """As `report` calls it exploding gradients."""
    module = Spiking(optimizer="adam")
    fit_with_bar([GradientNormMonitor()], batches(12), module=module, log_every_n_steps=1)
    rows = table(lines(capsys))
    assert rows["incidents"] == "none"
    assert re.fullmatch(r"a gradient norm of \d+(\.\d)?, after a median of 0\.\d+", rows["unusual"])
    fit_with_bar([GradientNormMonitor(), AdaptiveGradientClipping()], batches(12), module=Spiking())
    assert "unusual" not in "".join(lines(capsys))


def test_the_last_printed_line_names_the_kind_that_is_no_longer_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = poisoned(batches(60), nan=range(0, 60, 6))
    fit_with_bar([NaNRollback(max_skip_fraction=1.0)], data)
    printed = " ".join(lines(capsys))
    assert printed.count("Further incidents of nonfinite loss") == printed.count(
        "are only written to the file"
    )
    assert "Further ones" not in printed


def test_advice_does_not_name_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    fit_with_bar(default_callbacks(), poisoned(batches(30), nan=[17, 18, 19]))
    printed = " ".join(lines(capsys))
    assert "Rolled back to step 0" in printed
    assert "add LearningRateBackoff" not in printed
    assert "lower the learning rate" not in printed  # no rate avoids a NaN of the data


def test_steps_of_several_optimizers_are_those_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    fit(TwoOptimizers(), batches(4), [NaNRollback()], enable_progress_bar=True)
    assert any("No incident; 8 steps of 2 optimizers, in 4 batches" in line for line in lines(capsys))


@pytest.mark.parametrize("order", range(4))
def test_one_table_for_any_callbacks(order: int, capsys: pytest.CaptureFixture[str]) -> None:
    callbacks = [AdaptiveGradientClipping(), GradientNormMonitor(), NaNRollback(), LearningRateBackoff()]
    fit_with_bar([*callbacks[order:], *callbacks[:order]])
    assert table(lines(capsys))["rollbacks"] == "1"


def test_one_line_where_nothing_happened(capsys: pytest.CaptureFixture[str]) -> None:
    fit_with_bar(suite(), batches(10), log_every_n_steps=5)
    (line,) = [line for line in lines(capsys) if "gradguard" in line]
    assert line.startswith("gradguard: No incident; 10 steps, ")
    assert "largest norm 0." in line
    fit_with_bar([LearningRateBackoff()], batches(10))
    assert any(line.startswith("gradguard: No incident; 10 steps, largest norm 0.") for line in lines(capsys))


@pytest.mark.parametrize("callback", [GradientNormMonitor, AdaptiveGradientClipping, LearningRateBackoff])
def test_nonfinite_gradients_are_an_incident_where_nothing_checks_steps(
    callback: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_with_bar([callback()], poisoned(batches(10), nan=[4]), logger=CSVLogger("logs", "nan"))
    printed = lines(capsys)
    assert table(printed)["incidents"] == "nonfinite gradients (1)"
    assert any("Nonfinite gradients at step 4" in line and "add NaNRollback()" in line for line in printed)
    (written,) = Path("logs/nan/version_0/incidents.jsonl").read_text().splitlines()
    assert (json.loads(written)["kind"], json.loads(written)["step"]) == ("nonfinite_gradient", 4)


def test_the_remedy_of_a_known_cause_is_a_next_step(capsys: pytest.CaptureFixture[str]) -> None:
    class Found(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            for kind in ("exploding_gradient", "divergence"):
                facts = {"cause": "update_too_large", "advice": "Lower the learning rate."}
                publish(trainer, pl_module, incident_now(trainer, kind, **facts))
            cure = CURE + "nn.init.xavier_normal_(model.net[0].weight)\n" * 3
            for kind in ("dead_units", "stuck_loss"):
                publish(trainer, pl_module, incident_now(trainer, kind, advice=cure))
            publish(trainer, pl_module, incident_now(trainer, "gradient_collapse"))

    fit_with_bar([Found(), AdaptiveGradientClipping(GlobalNormClipping(1e-3))], batches(30), logger=False)
    next_steps = table(lines(capsys), "Next steps")
    assert "a sum where the loss needs a mean" not in next_steps.pop("clipping")
    assert "no longer gets gradients" in next_steps.pop("collapsed gradients")
    assert next_steps == {
        "exploding gradients": "Lower the learning rate.",
        "dead units, stuck loss": "the cure printed above, at step 0",
        "report": "give the Trainer a logger: lightning-gradguard report reads what it writes",
    }


def test_a_cure_of_the_table_before_the_first_step_is_named_by_its_place(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Found(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            cures = [f"nn.init.xavier_normal_(model.net[{i}].weight)" for i in range(12)]
            remember_cures(trainer, cures)
            facts = {"advice": CURE + "; ".join(cures)}
            publish(trainer, pl_module, incident_now(trainer, "poor_initialization", **facts))

    fit_with_bar([Found(), GradientNormMonitor()], batches(10), logger=False)
    next_steps = table(lines(capsys), "Next steps")
    assert "the cure in the table of the check, before step 1" in next_steps.values()


@pytest.mark.parametrize("n_batches", [4, 20])
def test_a_cure_is_not_printed_with_each_message_on_it(
    n_batches: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Undefined(Classifier):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss: Tensor = (self.net(batch[0]).relu() * 0).log().mean()
            return loss

    error = ""
    try:
        fit_with_bar(default_callbacks(), batches(n_batches), module=Undefined())
    except TrainingDivergedError as stopped:
        error = str(stopped)
    printed = "\n".join(lines(capsys))
    cure = "use torch.log((self.net(batch[0]).relu() * 0).clamp_min(1e-6))"
    assert bool(error) == (n_batches == 20)
    assert (printed.count(cure), error.count(cure)) == ((1, 1) if error else (2, 0))
    assert "The table of the check has its cure." in printed
    if error:
        assert (
            table(printed.splitlines(), "Next steps")["nonfinite loss"]
            == "the cure in the error that ends the run"
        )


def test_residual_connections_come_before_weights_of_a_network_that_is_too_deep(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Found(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            cure = f"{CURE}nn.init.kaiming_normal_(model.net[0].weight)"
            publish(trainer, pl_module, incident_now(trainer, "poor_initialization", advice=cure))
            facts = {"cause": "depth", "advice": "Use residual connections."}
            publish(trainer, pl_module, incident_now(trainer, "vanishing_gradient", **facts))

    fit_with_bar([Found(), GradientNormMonitor()], batches(10), logger=False)
    first, second, *_ = table(lines(capsys), "Next steps").items()
    assert first == ("vanishing gradients", "Use residual connections.")
    assert second[1].startswith("Only where that is not possible: Cure: nn.init.kaiming_normal_")


def test_what_to_try_with_a_loss_that_is_stuck_for_no_known_cause_is_a_next_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Found(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            publish(trainer, pl_module, incident_now(trainer, "stuck_loss", cause="unknown"))

    fit_with_bar([Found(), GradientNormMonitor()], batches(10), logger=False)
    printed = lines(capsys)
    assert "overfit_batches=1" in " ".join(printed)
    assert "10 times higher" in table(printed, "Next steps")["stuck loss"]


def test_what_to_do_about_dead_units_is_a_next_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Dead(pl.Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            publish(trainer, pl_module, incident_now(trainer, "dead_units", advice="Use LeakyReLU."))
            publish(trainer, pl_module, incident_now(trainer, "loss_spike", advice="Check the batch."))

    fit_with_bar([Dead(), GradientNormMonitor()], batches(10), logger=False)
    next_steps = table(lines(capsys), "Next steps")
    assert (next_steps.pop("dead units"), [*next_steps]) == ("Use LeakyReLU.", ["report"])


class Accumulating(Classifier):
    """Steps at every fourth batch, by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        self.manual_backward(loss)
        if batch_idx % 4 == 3:
            optimizer: Any = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()


def test_a_run_whose_first_step_is_late_was_not_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    fit_with_bar([NaNRollback()], batches(12), module=Accumulating())
    assert "gradguard: No incident; 3 steps, " in " ".join(lines(capsys))


class Stopped(Classifier):
    """Raises an exception at the tenth batch."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.error = error

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        if batch_idx == 10:
            raise self.error
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("check", ["exact", "deferred"])
@pytest.mark.parametrize("order", range(4))
def test_a_table_after_an_exception(order: int, check: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The last step is checked and counted by then, at any position of `NaNRollback` in the list."""
    callbacks = [
        AdaptiveGradientClipping(),
        GradientNormMonitor(),
        LearningRateBackoff(),
        NaNRollback(check=check),
    ]
    data = poisoned(batches(30), nan=[4, 9])
    module = Stopped(ValueError("by the user"))
    with pytest.raises(ValueError, match="by the user"):
        fit_with_bar([*callbacks[order:], *callbacks[:order]], data, module=module)
    rows = table(lines(capsys))
    assert (rows["steps"], rows["steps skipped"].split()[:3]) == ("10", ["2", "of", "10"])


def test_a_table_after_control_c(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fit_with_bar(suite(), module=Stopped(KeyboardInterrupt()))
    assert table(lines(capsys))["steps"] == "10"


def test_a_table_when_the_suite_stops_training(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TrainingDivergedError):
        fit_with_bar([NaNRollback(max_rollbacks=0)])
    assert "training stopped (1)" in table(lines(capsys))["incidents"]


def test_table_is_printed_once_a_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """Also if the fit before ended with an exception, and something else fails in between."""
    callbacks, module = suite(), Stopped(ValueError("by the user"))
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=callbacks
    )
    data = plain_loader(STORM)
    with pytest.raises(ValueError, match="by the user"):
        trainer.fit(module, data)
    assert TITLE in lines(capsys)
    with pytest.raises(MisconfigurationException, match="validation_step"):
        trainer.validate(module, data)
    module.error = ValueError("again")
    assert not any("gradguard" in line for line in lines(capsys))
    with pytest.raises(ValueError, match="again"):
        trainer.fit(module, data)
    assert lines(capsys).count(TITLE) == 1


@pytest.mark.parametrize("arguments", [{"fast_dev_run": 3}, {"barebones": True}], ids=str)
def test_no_table_without_training(arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    module = Classifier()
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    pl.Trainer(accelerator="cpu", callbacks=[NaNRollback()], max_epochs=1, **arguments).fit(
        module, plain_loader(batches(3))
    )
    printed = capsys.readouterr()
    assert "gradguard" not in printed.out + printed.err
    assert not Path("incidents.jsonl").exists()


ON_TWO_RANKS = """
import pytorch_lightning as pl
import torch.distributed as dist

from lightning_gradguard import default_callbacks
from tests.tasks import Classifier, batches, plain_loader, poisoned

pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, enable_checkpointing=False,
    enable_model_summary=False, callbacks=default_callbacks(), use_distributed_sampler=False,
).fit(Classifier(), plain_loader(poisoned(batches(30), nan=[4, 17, 18, 19])))
dist.barrier()  # a rank that ends early closes the connection of the other
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_one_rank_prints(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(ON_TWO_RANKS)
    printed = launch([str(script)])
    assert printed.count(TITLE) == 1
    assert printed.count("gradguard: Rolled back to step") == 1
    assert "lightning-gradguard report lightning_logs/version_0" in printed


ONE_RANK_LOGS = """
import os

import pytorch_lightning as pl
import torch.distributed as dist

from lightning_gradguard import default_callbacks
from tests.runtime.logging.test_loggers import Service
from tests.tasks import Classifier, batches, plain_loader, poisoned

pl.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, enable_checkpointing=False,
    enable_model_summary=False, callbacks=default_callbacks(), use_distributed_sampler=False,
    logger=Service() if os.environ.get("LOCAL_RANK", "0") == "0" else False,
).fit(Classifier(), plain_loader(poisoned(batches(10), nan=[4])))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_ranks_with_different_loggers_do_not_hang(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(ONE_RANK_LOGS)
    assert "service/project/run-7/incidents.jsonl" in launch([str(script)])


def test_skipped_last_step_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Its check ends after the exception; the incident is written and logged all the same."""
    logger = TensorBoardLogger("logs", name="", version="run")
    with pytest.raises(ValueError, match="by the user"):
        fit_with_bar(
            [NaNRollback(check="deferred")],
            poisoned(batches(30), nan=[9]),
            module=Stopped(ValueError("by the user")),
            logger=logger,
            log_every_n_steps=1,
        )
    assert table(lines(capsys))["incidents"] == "nonfinite loss (1)"
    (record,) = map(json.loads, Path("logs/run/incidents.jsonl").read_text().splitlines())
    assert (record["kind"], record["step"], record["action"]) == ("nonfinite_loss", 9, "skipped")
    events = EventAccumulator("logs/run")
    events.Reload()
    assert events.Scalars("rollback/skips")[-1].value == 1


def test_resumed_run_prints_its_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = fit(Classifier(), poisoned(batches(10), nan=[4]), [NaNRollback()], tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    capsys.readouterr()
    rollback = NaNRollback()
    path = str(tmp_path / "half.ckpt")
    data = poisoned(batches(10), nan=[7])
    fit_with_bar([rollback], data, ckpt_path=path, max_epochs=2)
    rows = table(lines(capsys))
    assert rows["steps skipped"].startswith("2 of 20 (10%)")
    assert rows["incidents"] == "nonfinite loss (1)"
    assert rows["resumed"] == "at step 10; skips and rollbacks are of the whole run"
    with pytest.warns(UserWarning, match="NaNRollback{'patience': 3}"):
        fit_with_bar([NaNRollback(patience=5)], data, ckpt_path=path, max_epochs=2)
    rows = table(lines(capsys))
    assert rows["steps skipped"].startswith("1 of 10"), (
        "the state of a callback with another patience is not restored"
    )
    assert rows["resumed"] == "at step 10; skips and rollbacks are counted since step 10"


def test_table_of_incidents_is_rewritten_at_intervals() -> None:
    """The first ones, one in fifty, and at the end; the last of them are in it."""
    logger = TensorBoardLogger("logs", name="", version="run")
    data = poisoned(batches(400), nan=range(0, 240, 2))
    callback = NaNRollback(max_skip_fraction=1.0, max_dossiers=0)
    fit(Classifier(), data, [callback], logger=logger)
    events = EventAccumulator("logs/run", size_guidance={"tensors": 0})
    events.Reload()
    tables = [e.tensor_proto.string_val[0].decode() for e in events.Tensors("incidents/text_summary")]
    assert len(tables) == 5 + 2 + 1, "of 120"
    assert tables[-1].startswith("nonfinite loss (120)")
    rows = [line for line in tables[-1].splitlines() if line.startswith("| ") and "Nonfinite" in line]
    (row,) = rows
    assert row == "| 180 to 238 | **Nonfinite loss** (30 times) |  |  | skipped | not examined |"
