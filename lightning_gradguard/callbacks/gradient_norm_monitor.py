"""The callback that logs norms and names the symptom when gradients vanish, explode or stagnate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from lightning_gradguard.core.clipping import Scalar
from lightning_gradguard.core.detectors import SymptomDetector
from lightning_gradguard.core.norms import (
    Gradients,
    local_shard,
    norms_from_power_sums,
    power_sums,
    total_norm_from_norms,
)
from lightning_gradguard.core.parameter_names import match_names
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.core.tags import family
from lightning_gradguard.runtime.incidents.journal import incident_now, open_journal, publish
from lightning_gradguard.runtime.lightning_api import batches_that_stepped
from lightning_gradguard.runtime.logging import metrics
from lightning_gradguard.runtime.logging.chart_groups import Level, chart_names
from lightning_gradguard.runtime.logging.heat_map import GradientHistory
from lightning_gradguard.runtime.optimizer_hooks import after_step
from lightning_gradguard.runtime.steps.parameters import Selection
from lightning_gradguard.runtime.steps.step import Step
from lightning_gradguard.runtime.steps.step_callback import StepCallback
from lightning_gradguard.runtime.steps.suite import Suite, is_logging_step

#: Logged steps that make a heat map worth a look when training ends.
LEAST_COLUMNS = 10


class GradientNormMonitor(StepCallback):
    """Logs the norms of gradients, weights and updates, and names what is wrong with them.

    Norms are those before clipping; with several optimizers the optimizer's index joins the family, as in
    `grad_norm.1/total`. Nothing is written to the module, its optimizers or the random number generators. A
    skipped step has no norm; a nonfinite one that nobody skips is logged as it is.

    Symptoms become incidents: `vanishing_gradient` and `exploding_gradient` (3 decades from the last
    weight matrix to the first, or a total norm 100 times the usual), `weight_stagnation`, `stuck_loss`,
    `nonfinite_gradient`. They are looked for at logged steps, not within the first 100, and have to last.

    | tag | value |
    |---|---|
    | `grad_norm/total` | norm of all gradients together |
    | `grad_norm/<name>` | norm of the gradient of a parameter or module |
    | `grad_norm/nonfinite_fraction` | share of tensors with a nonfinite gradient since the last log |
    | `grad_norm_band/low` · `grad_norm_band/high` | the middle 90 % of the 100 logged total norms before |
    | `grad_norm_band/total` | the total norm once more, where it has a band |
    | `weight_norm/<name>` | norm of the weights |
    | `update_ratio/<name>` | how far this step moved the weights, by their norm |

    Args:
        norm_type: Any number of at least 1, or `inf`.
        every_n_steps: Steps between logs; `trainer.log_every_n_steps` if `None`.
        level: What gets a chart: each `"parameter"`, each `"module"`, or the `"total"` alone; `"auto"` is
            by parameter up to 50 of them and by module above; where modules are more than 50, by the
            deepest modules around them that are no more than that, or by neighbours together.
        include: Names of parameters or modules, or wildcards, that get charts; all if `None`.
        exclude: Those that get none.
        update_ratio: Whether updates are measured, by a copy of the weights at logged steps.
        histograms: Whether histograms of gradients are logged as well; slow. Of a sharded gradient it is that
            of the first rank's shard.
        figure_every_n_steps: Steps between heat maps of layers over time, of which the last is drawn when
            training ends; 0 for none.
        progress_bar: Whether the progress bar shows the total norm, as it was at the last logged step.

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
        progress_bar: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(norm_type, bool) or not float(norm_type) >= 1:
            raise ValueError(f"norm_type={norm_type!r} must be a number of at least 1, or inf.")
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} must be at least 1, or None.")
        if level not in get_args(Level):
            raise ValueError(f"level={level!r} must be 'auto', 'parameter', 'module' or 'total'.")
        for name, names in (("include", include), ("exclude", exclude)):
            if isinstance(names, str):
                raise ValueError(f"{name}={names!r} must be a list of names, such as [{names!r}].")
        if figure_every_n_steps < 0:
            raise ValueError(f"figure_every_n_steps={figure_every_n_steps!r} must be 0 or more.")
        self.norm_type = float(norm_type)
        self.norm_types = (self.norm_type,)
        self.every_n_steps = every_n_steps
        self.level: Level = level
        self.include = None if include is None else tuple(include)
        self.exclude = tuple(exclude or ())
        self.update_ratio = update_ratio
        self.histograms = histograms
        self.figure_every_n_steps = figure_every_n_steps
        self.progress_bar = progress_bar
        self.state_arguments = {"norm_type": self.norm_type, "level": level}
        self._detectors: dict[int, SymptomDetector] = defaultdict(SymptomDetector)
        self._finite: dict[int, tuple[Scalar, int]] = {}
        self._looks: dict[int, _Look] = {}
        self._waiting: list[_Look] = []
        self._history = GradientHistory()
        self._charts: dict[int, dict[str, str]] = defaultdict(dict)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Join the suite and see to it that incidents are written."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            open_journal(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget a batch that an exception ended."""
        super().on_train_start(trainer, pl_module)
        if self.progress_bar:
            n = len(trainer.optimizers)
            self.suite.metrics.on_bar |= {f"{family('grad_norm', i, n)}/total" for i in range(n)}
        self._looks = {}
        self._waiting = []
        self._history = GradientHistory()
        self._charts.clear()

    def wants_weight_norms(self, trainer: pl.Trainer) -> bool:
        """At logged steps."""
        return self._is_logged(trainer)

    def on_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, step: Step) -> None:
        """Measure; at a logged step look at weights as well, and at where the step moves them."""
        self._hand_in_waiting(trainer, pl_module)
        index = step.optimizer_index
        if index in self._looks or not step.gradients.names:
            return
        norms = step.tensor_norms[self.norm_type]
        finite, seen = self._finite.get(index, (0, 0))
        known = step.gradients.known_norm
        is_healthy = known is not None and math.isfinite(known)
        n = norms.numel()
        self._finite[index] = (finite + (n if is_healthy else (norms < math.inf).sum()), seen + n)
        if self._is_logged(trainer):
            self._looks[index] = _Look(self.suite, trainer, step, norms, self.update_ratio)
            if self.histograms and step.accepted:
                self._log_histograms(trainer, index, step.gradients)
        elif trainer.is_last_batch and step.accepted:
            self._publish_total(trainer, index, total_norm_from_norms(norms, self.norm_type))

    def on_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int) -> None:
        """Hand what was measured to the report."""
        looks, self._looks = self._looks, {}
        for index, look in looks.items():
            finite, seen = self._finite.pop(index)
            look.close(1 - finite / seen)
            if look.is_waiting:
                self._waiting.append(look)
                if look.accepted:
                    self._publish_total(trainer, index, look.total(self.norm_type))
            else:
                self._hand_in(trainer, pl_module, look)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw what is left to draw; report the last logged step if its update had to wait for shards."""
        super().on_train_end(trainer, pl_module)
        if self._waiting:
            self._hand_in_waiting(trainer, pl_module)
            self.suite.metrics.send(trainer, pl_module)
        self._draw_last(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Log the last logged step without its update, for which no other rank can be asked any more."""
        waiting, self._waiting = self._waiting, []
        for look in waiting:
            scalars = self._read(trainer, pl_module, look, True, look.values(self.norm_type).tolist())
            metrics.log_scalars(trainer, scalars, look.step)
        self._draw_last(trainer)
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """What the detectors remember."""
        return self.snapshot_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with saved detectors."""
        self.load_snapshot_state_dict(state_dict)

    def snapshot_state_dict(self) -> dict[str, Any]:
        """What goes back with the weights when `NaNRollback` puts them back."""
        return {"detectors": {i: detector.state_dict() for i, detector in self._detectors.items()}}

    def load_snapshot_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the detectors back to where the weights are put back to."""
        self._detectors.clear()
        for index, state in state_dict["detectors"].items():
            self._detectors[index].load_state_dict(state)

    def _is_logged(self, trainer: pl.Trainer) -> bool:
        return (
            self.suite.is_logged
            if self.every_n_steps is None
            else is_logging_step(trainer, self.every_n_steps)
        )

    def _hand_in_waiting(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The reduction of this step has brought the updates of the last logged one."""
        waiting, self._waiting = self._waiting, []
        for look in waiting:
            self._hand_in(trainer, pl_module, look, is_late=True)

    def _hand_in(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, look: _Look, *, is_late: bool = False
    ) -> None:
        read = partial(self._read, trainer, pl_module, look, is_late)
        self.suite.metrics.add(look.values(self.norm_type), read, look.step)

    def _publish_total(self, trainer: pl.Trainer, index: int, total: Tensor) -> None:
        """Once an epoch at least, the total is there for `EarlyStopping`."""
        report = self.suite.metrics
        name = family("grad_norm", index, len(trainer.optimizers))

        def read(host: list[float]) -> dict[str, float]:
            report.publish_total(f"{name}/total", host[0])
            return {}

        report.add(total.reshape(1), read)

    def _read(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        look: _Look,
        is_late: bool,
        host: list[float],
    ) -> dict[str, float]:
        """Turn a logged step's numbers into scalars, and look for symptoms on the way."""
        fraction, total, loss, *rest = host
        n, index, n_optimizers = len(look.names), look.optimizer_index, len(trainer.optimizers)
        name = family("grad_norm", index, n_optimizers)
        grads, weights = rest[:n], rest[n : 2 * n]
        ratios = rest[2 * n :] or None
        band = self._detectors[index].band()
        for symptom in self._detectors[index].update(
            look.step,
            names=look.names,
            is_matrix=look.is_matrix,
            grad_norms=grads,
            weight_norms=weights or [math.nan] * n,
            update_ratios=ratios,
            total_norm=total if look.accepted else math.nan,
            loss=loss,
            # whoever judges steps has told of it already
            nonfinite_fraction=0.0 if look.was_judged else fraction,
        ):
            incident = incident_now(
                trainer,
                symptom.kind,
                where=symptom.where,
                value=symptom.value,
                advice=advice(symptom.kind, symptom.where),
                **look.now,
            )
            publish(trainer, pl_module, incident)
        charted = self._charted(index, look.names)
        layers = self._by_chart(charted, grads)
        scalars = {f"{name}/nonfinite_fraction": fraction}
        if look.accepted:
            if not is_late:
                self.suite.metrics.publish_total(f"{name}/total", total)
            if self.norm_type == 2 and math.isfinite(total):
                self.suite.record_norm(total)
            if band is not None:
                around = family("grad_norm_band", index, n_optimizers)
                scalars |= {f"{around}/low": band[0], f"{around}/total": total, f"{around}/high": band[1]}
            scalars |= _under(name, layers)
            scalars[f"{name}/total"] = total  # whatever a module of this name has
            if weights:
                weight_norm = family("weight_norm", index, n_optimizers)
                scalars |= _under(weight_norm, self._by_chart(charted, weights))
            if ratios:
                moved = [ratio * weight for ratio, weight in zip(ratios, weights, strict=True)]
                update_ratio = family("update_ratio", index, n_optimizers)
                scalars |= _under(update_ratio, self._by_chart(charted, moved, relative_to=weights))
        self._draw(trainer, look, layers)
        return scalars

    def _by_chart(
        self, charted: Mapping[int, str], norms: Sequence[float], relative_to: Sequence[float] | None = None
    ) -> dict[str, float]:
        """The norm of what counts in each chart, by the chart's name."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, chart in charted.items():
            groups[chart].append(i)
        values = {}
        for chart, members in groups.items():
            value = _together([norms[i] for i in members], self.norm_type)
            if relative_to is not None:
                value /= _together([relative_to[i] for i in members], self.norm_type) or math.inf
            values[chart] = value
        return values

    def _charted(self, index: int, names: Sequence[str]) -> dict[int, str]:
        """Which parameters get a chart, and its name; a step may give gradients to some of them alone."""
        charts = self._charts[index]
        if not charts.keys() >= set(names):
            known = list(dict.fromkeys([*charts, *names]))
            shown = set(known if self.include is None else match_names(known, self.include))
            shown -= set(match_names(known, self.exclude))
            named = zip(known, chart_names(known, self.level) or [""] * len(known), strict=True)
            charts = self._charts[index] = {name: chart if name in shown else "" for name, chart in named}
        return {i: charts[name] for i, name in enumerate(names) if charts[name]}

    def _draw(self, trainer: pl.Trainer, look: _Look, layers: Mapping[str, float]) -> None:
        if not self.figure_every_n_steps or look.optimizer_index or not layers:
            return
        self._history.append(look.step, layers)
        if (look.step + 1) % self.figure_every_n_steps == 0:
            metrics.log_figure(trainer, "grad_norm/layers", self._history.draw, look.step)

    def _draw_last(self, trainer: pl.Trainer) -> None:
        last = self._history.last_step
        if len(self._history) >= LEAST_COLUMNS and (last + 1) % self.figure_every_n_steps != 0:
            metrics.log_figure(trainer, "grad_norm/layers", self._history.draw, last)
        self._history = GradientHistory()

    def _log_histograms(self, trainer: pl.Trainer, index: int, gradients: Gradients) -> None:
        for i in self._charted(index, gradients.names):
            values = local_shard(gradients.tensors[i].detach())
            values = values.coalesce().values() if values.is_sparse else values
            finite = values[torch.isfinite(values)].float()
            if finite.numel():
                # TensorBoard finds the histogram of larger values empty, and raises
                bounded = finite.clamp(-1e18, 1e18).cpu()
                tag = f"grad_histogram/{gradients.names[i]}"
                metrics.log_histogram(trainer, tag, bounded, batches_that_stepped(trainer))


class _Look:
    """One optimizer step at a logged batch: norms now, and where the step moves the weights.

    Attributes:
        is_waiting: Whether the update is known by parts, and its sum over shards is on its way.
        now: Step and epoch as an incident has them.
    """

    def __init__(
        self, suite: Suite, trainer: pl.Trainer, step: Step, grad_norms: Tensor, update_ratio: bool
    ) -> None:
        self.step = batches_that_stepped(trainer)
        self.optimizer_index = step.optimizer_index
        self.names = step.gradients.names
        self.is_matrix = step.selection.is_matrix
        self.accepted = step.accepted
        self.was_judged = step.is_checked
        self.grad_norms = grad_norms
        self.is_waiting = False
        self.now = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        self._suite = suite
        self._loss = step.loss
        self._weights = step.weight_norms if step.accepted else None
        self._fraction: Scalar = 0.0
        self._updates: Tensor | None = None
        self._handle: RemovableHandle | None = None
        if step.accepted and update_ratio:
            # a copy of each in one operation
            before = list(torch._foreach_mul(_local(step.selection), 1.0))
            self._handle = after_step(step.optimizer, partial(self._measure_updates, step.selection, before))

    def close(self, nonfinite_fraction: Scalar) -> None:
        """Stop waiting for the optimizer, which the GradScaler may have kept from stepping."""
        self._fraction = nonfinite_fraction
        if self._handle is not None:
            self._handle.remove()

    def total(self, norm_type: float) -> Tensor:
        """Total norm of the gradients."""
        return total_norm_from_norms(self.grad_norms, norm_type)

    def values(self, norm_type: float) -> Tensor:
        """Nonfinite fraction, total norm, loss; norms of gradients; of weights and updates if known."""
        total = self.total(norm_type)
        fraction = torch.full_like(total, 0.0) + self._fraction
        parts = [torch.stack([fraction, total, self._loss.to(total)]), self.grad_norms]
        if self._weights is not None:
            parts.append(self._weights)
            if self._updates is not None:
                parts.append(self._updates / self._weights.clamp(min=1e-300))
        return torch.cat(parts)

    def _measure_updates(self, selection: Selection, before: list[Tensor]) -> None:
        torch._foreach_sub_(before, _local(selection))
        self.is_waiting = True
        self._suite.reduce_over_shards(power_sums(before), selection, self._take)

    def _take(self, sums: Tensor) -> None:
        self.is_waiting = False
        self._updates = norms_from_power_sums(sums)


def _local(selection: Selection) -> list[Tensor]:
    return [local_shard(parameter.detach()) for parameter in selection.parameters]


def _under(name: str, by_chart: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{chart}": value for chart, value in by_chart.items()}


def _together(norms: Sequence[float], norm_type: float) -> float:
    largest = max(norms)
    if any(map(math.isnan, norms)):
        return math.nan
    if norm_type == math.inf or largest in (0.0, math.inf):
        return largest
    # by the largest, for powers of it may be more than a float holds
    return float(largest * sum((norm / largest) ** norm_type for norm in norms) ** (1 / norm_type))
