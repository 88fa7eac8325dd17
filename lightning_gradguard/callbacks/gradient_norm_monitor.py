"""The callback that logs the norms of gradients, weights and updates."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import pytorch_lightning as pl
from torch import Tensor
from typing_extensions import override

from lightning_gradguard.core import arguments, tags
from lightning_gradguard.core.clipping import Scalar
from lightning_gradguard.core.detectors import NormBand
from lightning_gradguard.core.norms import total_norm_from_norms
from lightning_gradguard.core.parameter_names import warn_unmatched
from lightning_gradguard.runtime.logging.chart_groups import MAX_ROWS, ChartGroups, Level
from lightning_gradguard.runtime.logging.heat_map_schedule import HeatMapSchedule
from lightning_gradguard.runtime.logging.hyperparameters import non_defaults
from lightning_gradguard.runtime.logging.metrics import log_scalars
from lightning_gradguard.runtime.other_clipping import clip_norm, clips_otherwise, suite_clips
from lightning_gradguard.runtime.steps.logged_step import LoggedStep, log_gradient_histograms
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback
from lightning_gradguard.runtime.steps.suite import is_logging_step


class _NonfiniteFraction:
    """Share of tensors with a nonfinite gradient since the last logged step."""

    def __init__(self) -> None:
        self._finite: Scalar = 0
        self._seen = 0

    def add(self, step: Step, norm_type: float) -> None:
        """Counts the tensors of a step, on the host if their total norm is known there."""
        n, total_norm = len(step.gradients.names), step.gradients.known_norm
        is_finite = total_norm is not None and math.isfinite(total_norm)
        self._finite = self._finite + (n if is_finite else (step.tensor_norms[norm_type] < math.inf).sum())
        self._seen += n

    def value(self) -> Scalar:
        """Returns the share, on the device unless all steps are known to be finite."""
        return 1 - self._finite / self._seen


class GradientNormMonitor(StepCallback):
    """Logs the norms of gradients, weights and updates.

    Norms are those before clipping; with several optimizers the optimizer's index joins the family, as in
    `grad_norm.1/total`. Nothing is written to the module, its optimizers or the random number generators. A
    skipped step has no norm; a nonfinite norm that no callback skips is logged as it is.

    `TrainingDiagnosis` names what is wrong with them.

    | tag | value |
    |---|---|
    | `grad_norm/total` | norm of all gradients together |
    | `grad_norm_clipped/total` | what clipping by the Trainer, or by a hook of the module, leaves of it |
    | `grad_norm/<name>` | norm of the gradient of a parameter or module |
    | `grad_norm/nonfinite_fraction` | share of tensors with a nonfinite gradient since the last log |
    | `grad_norm_band/low` · `grad_norm_band/high` | the middle 90 % of the 100 logged total norms before |
    | `grad_norm_band/total` | the total norm once more, where it has a band |
    | `weight_norm/<name>` | norm of the weights |
    | `update_ratio/<name>` | norm of the update of this step over the norm of the weights |

    Args:
        norm_type: Any number of at least 1, or `inf`.
        every_n_steps: Steps between logs; `trainer.log_every_n_steps` if `None`.
        level: One chart for each `"parameter"`, each `"module"`, or the `"total"` alone; `"auto"` is by
            parameter up to 12 of them and by module above; where modules are more than 24, by the deepest
            modules around them that are no more than that, or by groups of neighbours. The heat map has up
            to 50 rows.
        include: Names of parameters or modules, or wildcards, that get charts; all if `None`.
        exclude: Those that get none.
        update_ratio: Measure updates, by a copy of the weights at logged steps.
        histograms: Log histograms of gradients as well; slow. For a sharded gradient it is the histogram of
            the first rank's shard.
        figure_every_n_steps: Steps between heat maps of layers over time; the last one is drawn when
            training ends; 0 for none.
        prog_bar: Show the total norm of the last logged step on the progress bar.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_gradguard import GradientNormMonitor
        >>> monitor = GradientNormMonitor(level="module", exclude=["head"])
    """

    def __init__(
        self,
        norm_type: float | Literal["inf"] = 2.0,
        every_n_steps: int | None = None,
        level: Level = "auto",
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        update_ratio: bool = True,
        histograms: bool = False,
        figure_every_n_steps: int = 1000,
        prog_bar: bool = False,
    ) -> None:
        super().__init__()
        self.settings = non_defaults(GradientNormMonitor, locals())
        self.norm_type = (
            math.inf if norm_type == "inf" else float(arguments.number("norm_type", norm_type, at_least=1))
        )
        if every_n_steps is not None:
            arguments.whole_number("every_n_steps", every_n_steps)
        arguments.one_of("level", level, *get_args(Level))
        arguments.whole_number("figure_every_n_steps", figure_every_n_steps, at_least=0)
        arguments.flag("update_ratio", update_ratio)
        arguments.flag("histograms", histograms)
        arguments.flag("prog_bar", prog_bar)
        self.norm_types = (self.norm_type,)
        self.every_n_steps = every_n_steps
        self.level: Level = level
        self.include = None if include is None else arguments.names("include", include)
        self.exclude = arguments.names("exclude", exclude)
        self.update_ratio = update_ratio
        self.histograms = histograms
        self.prog_bar = prog_bar
        self.state_arguments = {"norm_type": self.norm_type, "level": level}
        if self.include:  # no part of the key in checkpoints of 0.5, as the next one
            self.state_arguments["include"] = self.include
        if self.exclude:
            self.state_arguments["exclude"] = self.exclude
        self._charts: dict[int, ChartGroups] = defaultdict(
            partial(ChartGroups, level, self.include, self.exclude, self.norm_type)
        )
        self._bands: dict[int, NormBand] = defaultdict(NormBand)
        self._fractions: dict[int, _NonfiniteFraction] = defaultdict(_NonfiniteFraction)
        self._logged: dict[int, LoggedStep] = {}
        self._pending: list[LoggedStep] = []
        self._heat_map = HeatMapSchedule(figure_every_n_steps)
        self._rows = ChartGroups(level, self.include, self.exclude, self.norm_type, MAX_ROWS)

    @override
    def on_begin(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Discards pending steps of an earlier fit."""
        warn_unmatched("include", self.include, pl_module, trainer.optimizers)
        warn_unmatched("exclude", self.exclude, pl_module, trainer.optimizers)
        if self.prog_bar:
            n = len(trainer.optimizers)
            totals = (tags.tag(tags.GRAD_NORM_TOTAL, optimizer=i, of=n) for i in range(n))
            self.suite.metrics.show_on_bar(*totals)
        self._logged = {}
        self._pending = []
        self._heat_map.clear()
        self._charts.clear()

    @override
    def wants_weight_norms(self, trainer: pl.Trainer) -> bool:
        """True at logged steps."""
        if self.every_n_steps is None:
            return self.suite.is_logged
        return is_logging_step(trainer, self.every_n_steps)

    @override
    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Measures the gradients; at a logged step the weights and the update as well."""
        if self._pending:
            self._add_pending()  # the reduction of this step has summed the updates of the last logged one
        index = step.optimizer_index
        if index in self._logged or not step.gradients.names:
            return
        self._fractions[index].add(step, self.norm_type)
        if self.wants_weight_norms(trainer):
            self._logged[index] = LoggedStep(
                self.suite, trainer, step, self.norm_type, self.update_ratio, clips_otherwise(trainer)
            )
            if self.histograms and step.accepted:
                log_gradient_histograms(trainer, step.gradients, self._charts[index])
        elif trainer.is_last_batch and step.accepted:
            norms = step.tensor_norms[self.norm_type]
            self._publish_total(trainer, index, total_norm_from_norms(norms, self.norm_type))

    @override
    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        steps, self._logged = self._logged, {}
        for index, logged in steps.items():
            logged.close(self._fractions.pop(index).value())
            if not logged.is_pending:
                self.suite.metrics.add_numbers(self, logged, logged.values())
                continue
            self._pending.append(logged)
            if logged.accepted:
                self._publish_total(trainer, index, logged.total_norm())

    def on_host_numbers(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, record: LoggedStep, numbers: list[float]
    ) -> None:
        """Logs the numbers of a logged step."""
        scalars = self._process(trainer, record, numbers)
        self.suite.metrics.add_scalars_at(record.step, scalars)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the last logged step if its update was pending, and the last heat map."""
        super().on_train_end(trainer, pl_module)
        if self._pending:
            self._add_pending()
            self.suite.metrics.flush(trainer, pl_module)
        self._heat_map.finish(trainer)

    @override
    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Logs a pending step without its update, which needs the other ranks; drops the one that raised."""
        for logged in self._logged.values():
            logged.close(nonfinite_fraction=0.0)
        self._logged = {}
        pending, self._pending = self._pending, []
        for logged in pending:
            scalars = self._process(trainer, logged, logged.values().tolist())
            log_scalars(trainer, scalars, logged.step)
        self._heat_map.finish(trainer)
        super().on_exception(trainer, pl_module, exception)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the bands of usual norms."""
        return {"detectors": {i: band.state_dict() for i, band in self._bands.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._bands.clear()
        for index, state in state_dict["detectors"].items():
            self._bands[index].load_state_dict(state)

    #: A rollback restores them with the weights.
    snapshot_state_dict, load_snapshot_state_dict = state_dict, load_state_dict

    def _add_pending(self) -> None:
        pending, self._pending = self._pending, []
        for logged in pending:
            self.suite.metrics.add_numbers(self, logged, logged.values())

    def _publish_total(self, trainer: pl.Trainer, index: int, total: Tensor | float) -> None:
        """Publishes the total norm to `EarlyStopping`, at least once an epoch."""
        tag = tags.tag(tags.GRAD_NORM_TOTAL, optimizer=index, of=len(trainer.optimizers))
        self.suite.metrics.publish_total(tag, total)

    def _process(self, trainer: pl.Trainer, logged: LoggedStep, host: list[float]) -> dict[str, float]:
        """Publishes the totals of a logged step, and returns its scalars."""
        numbers, index = logged.read(host), logged.optimizer_index
        band = self._bands[index].band()  # of the steps before
        if logged.accepted:
            self._bands[index].add(numbers.total_norm)
        if logged.accepted and not logged.is_late:
            self._publish_total(trainer, index, numbers.total_norm)
        charts = self._charts[index]
        if index == 0:
            self._heat_map.append(trainer, logged.step, self._rows.norms(logged.names, numbers.grad_norms))
        scalars = logged.scalars(numbers, charts, band, len(trainer.optimizers))
        largest = clip_norm(trainer)
        if logged.accepted and largest is not None and not suite_clips(trainer):
            tag = tags.tag(tags.CLIPPED_NORM_TOTAL, optimizer=index, of=len(trainer.optimizers))
            scalars[tag] = min(numbers.total_norm, largest)
        return scalars
