"""The callback that tells before the first step whether the network can train, and repairs it when asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import pytorch_lightning as pl
from torch import Tensor
from torch.optim import Optimizer

from lightning_gradguard.core.detectors import DEPTH_DECADES, depth_profile
from lightning_gradguard.core.forensics import investigate
from lightning_gradguard.core.initialization import (
    Finding,
    InitializationError,
    check,
    copied_units,
    nonfinite_weights,
    repair,
    table,
)
from lightning_gradguard.core.parameter_names import plain_name
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.runtime.distributed import (
    broadcast_tensors,
    complete_gradients,
    gather_objects,
    whole,
)
from lightning_gradguard.runtime.incidents.journal import incident_now, open_journal, publish
from lightning_gradguard.runtime.incidents.replay import training_loss, without_logging
from lightning_gradguard.runtime.lightning_api import (
    Callback,
    allows_extra_pass,
    batches_that_stepped,
    flat_shards,
    flattens_parameters,
    reject_unsupported,
)
from lightning_gradguard.runtime.logging import console, metrics
from lightning_gradguard.runtime.logging.chart_groups import FEW
from lightning_gradguard.runtime.logging.hyperparameters import Configured
from lightning_gradguard.runtime.steps.measuring import norms_over_shards
from lightning_gradguard.runtime.steps.parameters import ParameterLayout

#: Optimizers that divide gradients by their size.
SCALE_FREE = ("Ada", "Adam", "NAdam", "RAdam", "RMSprop", "Rprop", "Lion", "Muon")


class InitializationCheck(Callback, Configured):
    """Tells before the first step whether the network can train, which layer is at fault, and the cure.

    On one device and under DistributedDataParallel with automatic optimization, the first training batch is
    sent through the network once more, forward and backward, and leaves nothing behind: no gradient, no
    buffer, no random number, no metric, no log. Elsewhere it looks at the weights, and at the gradients of
    the first real step. A resumed run is not checked, nor is a network whose first batch is nonfinite.

    It looks for nonfinite, zero and copied weights, dead and saturated units, a loss above that of guessing,
    and the gradient's gain from the last hidden layer back to the first, which tells best whether a network
    will train.

    | tag | value |
    |---|---|
    | `init/gradient_gain` | log10 of the gain back to the first block |
    | `init/layer_gain/<module>` | log10 of the gain back to a layer |
    | `init/dead_units/<module>` · `init/saturated_units/<module>` | shares |
    | `init/gain_through_time/<module>` | log10, first step over last, of a recurrent module |

    Args:
        on_failure: `"warn"` prints one table; `"raise"` stops the run if a criterion fails; `"repair"`
            initializes the layers at fault anew (He, orthogonal or Xavier as the activation after them
            asks), scales them layer by layer, measures again and says what changed.
        repair_modules: Names of modules that are repaired whatever weights they hold; others only while
            they hold their class's default initialization.
        seed: Of the repair; the global random number generators are not used.

    Raises:
        ValueError: If an argument is not one of the above.
        InitializationError: From `fit`, under `on_failure="raise"`.

    Example:
        >>> from lightning_gradguard import InitializationCheck
        >>> check = InitializationCheck(on_failure="repair")

    References:
        Schoenholz, Gilmer, Ganguli, Sohl-Dickstein, Deep Information Propagation, 2017,
        arXiv:1611.01232. Mishkin, Matas, All you need is a good init, 2015, arXiv:1511.06422.
    """

    def __init__(
        self,
        on_failure: Literal["warn", "raise", "repair"] = "warn",
        repair_modules: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if on_failure not in ("warn", "raise", "repair"):
            raise ValueError(f"on_failure={on_failure!r} must be 'warn', 'raise' or 'repair'.")
        if isinstance(repair_modules, str):
            raise ValueError(f"repair_modules={repair_modules!r} must be a list of names.")
        self.on_failure = on_failure
        self.repair_modules = tuple(repair_modules or ())
        self.seed = seed
        self.findings: list[Finding] = []
        self.values: dict[str, float] = {}
        self.problem: Exception | None = None
        self._is_due = False
        self._looks_at_first_step = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """See to it that incidents are written."""
        if stage == "fit":
            reject_unsupported(trainer, self)
            open_journal(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Only a fresh run is checked."""
        self._is_due = trainer.global_step == 0
        self._looks_at_first_step = False

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Check on the first batch."""
        if not self._is_due:
            return
        self._is_due = False
        if not (allows_extra_pass(trainer) and pl_module.automatic_optimization):
            self._looks_at_first_step = True
            if self.on_failure == "repair":
                console.print_message(
                    trainer,
                    f"gradguard: nothing is repaired under {type(trainer.strategy).__name__} or manual "
                    "optimization; run InitializationCheck(on_failure='repair') on one device first.",
                )
            findings, _ = _agreed(nonfinite_weights(pl_module))
            # FSDP1 cuts rows anywhere
            if not findings and not flattens_parameters(trainer):
                findings = copied_units(pl_module, whole)
            self._settle(trainer, pl_module, findings)
            return

        def run_loss() -> Tensor:
            with without_logging(pl_module):
                return training_loss(pl_module, batch, batch_idx)

        def measure() -> tuple[list[Finding], dict[str, float]]:
            found: list[Finding] = []
            values: dict[str, float] = {}
            self.problem = None
            try:
                found, values = check(pl_module, run_loss, scale_free=_is_scale_free(trainer.optimizers))
            except Exception as error:
                self.problem = error
            # on every rank, for the step may talk to the others
            if any(gather_objects(not math.isfinite(values.get("loss", 0.0)))):
                try:
                    _refuse_bad_input(pl_module, run_loss, batch)
                except Exception as error:
                    self.problem = self.problem or error
            if self.problem is not None:
                console.print_message(
                    trainer, f"gradguard: the initialization was not checked: {self.problem}"
                )
                found, values = [], {}
            return _agreed(found, values)

        findings, values = measure()
        if _fails(findings) and self.on_failure == "repair":
            findings, values = self._repair(trainer, pl_module, run_loss, measure, findings)
        self.values = values
        # of more values, only those of the whole network get charts
        shown = values if len(values) <= FEW else {k: v for k, v in values.items() if "/" not in k}
        scalars = {f"init/{key}": value for key, value in shown.items()}
        metrics.log_scalars(trainer, scalars, batches_that_stepped(trainer))
        self._settle(trainer, pl_module, findings)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Where no extra pass could be made, look at the gradients of the first step."""
        if not self._looks_at_first_step:
            return
        self._looks_at_first_step = False
        layout = ParameterLayout(flat_shards(trainer), pl_module.device)
        everything = layout.select(pl_module.named_parameters())
        named = zip(everything.names, everything.parameters, everything.is_matrix, strict=True)
        layers = layout.select([(plain_name(name), p) for name, p, is_matrix in named if is_matrix][:-1])
        complete_gradients(layers.parameters)
        gradients, weights = norms_over_shards(layers, layers.gradients(), layers.parameters).tolist()
        profile = depth_profile(gradients, weights)
        if abs(profile) > DEPTH_DECADES:
            first = layers.names[0]
            cure = advice("vanishing_gradient" if profile > 0 else "exploding_gradient", [first])
            finding = Finding("gradient_profile", first, profile, "-3 .. 3", "warn", cure)
            self._settle(trainer, pl_module, [finding])

    def _repair(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        run_loss: Callable[[], Tensor],
        measure: Callable[[], tuple[list[Finding], dict[str, float]]],
        before: list[Finding],
    ) -> tuple[list[Finding], dict[str, float]]:
        try:
            done = repair(pl_module, run_loss, names=self.repair_modules, seed=self.seed)
        except Exception as error:
            done = []
            console.print_message(trainer, f"gradguard: the repair did not finish: {error}")
        broadcast_tensors(list(pl_module.parameters()))
        findings, values = measure()
        gain = next((f.value for f in before if f.criterion == "gradient_gain"), None)
        report = [f"gradguard: repaired {len(done)} layers:", *(f"  {line}" for line in done)]
        if gain is not None and "gradient_gain" in values:
            report.append(f"  gradient gain was {gain:.2f}, is {values['gradient_gain']:.2f} decades")
        console.print_message(trainer, "\n".join(report))
        where = tuple(line.partition(":")[0] for line in done)
        facts = incident_now(
            trainer, "poor_initialization", batch_idx=0, where=where, value=gain, action="repaired"
        )
        publish(trainer, pl_module, facts)
        return findings, values

    def _settle(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        findings: list[Finding],
    ) -> None:
        """Tell people what was found; stop if that was asked for."""
        failed = _fails(findings) and self.on_failure == "raise"
        self.findings = self.findings + findings
        serious = [finding for finding in findings if finding.severity != "info"]
        for kind in ("poor_initialization", "nonfinite_loss", "dead_units", "saturated_units"):
            members = [f for f in serious if _kind(f) == kind]
            if members:
                where = tuple(dict.fromkeys(f.module for f in members if f.module))
                facts = incident_now(
                    trainer,
                    kind,
                    batch_idx=0,
                    where=where,
                    value=members[0].value,
                    action="stopped" if failed else "none",
                    advice=advice(kind, where),
                )
                publish(trainer, pl_module, facts)
        if failed:
            raise InitializationError("The network, as it is initialized, will not train:\n" + table(serious))
        if serious:
            console.print_message(trainer, "gradguard: initialization\n" + table(serious))


def _refuse_bad_input(pl_module: pl.LightningModule, run_loss: Callable[[], Tensor], batch: Any) -> None:
    """A network is not to blame for what its batch holds."""
    origin = investigate(pl_module, lambda: ([run_loss()], []), batch)
    if origin.cause == "bad_input":
        raise ValueError(origin.detail)


def _agreed(
    findings: list[Finding], values: dict[str, float] | None = None
) -> tuple[list[Finding], dict[str, float]]:
    """What the rank saw that found most: each has a batch of its own, or other parts of the weights."""
    seen: list[tuple[list[Finding], dict[str, float]]] = gather_objects((findings, values or {}))
    return max(seen, key=lambda found: (_fails(found[0]), len(found[0]), len(found[1])))


def _fails(findings: Sequence[Finding]) -> bool:
    return any(finding.severity == "fail" for finding in findings)


def _kind(finding: Finding) -> str:
    own = {"loss": "nonfinite_loss", "dead_units": "dead_units", "saturated_units": "saturated_units"}
    return own.get(finding.criterion, "poor_initialization")


def _is_scale_free(optimizers: Sequence[Optimizer]) -> bool:
    return all(type(optimizer).__name__.startswith(SCALE_FREE) for optimizer in optimizers)
