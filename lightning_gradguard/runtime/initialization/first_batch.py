"""Measurements of a freshly initialized network on its first batch."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_gradguard.core.detectors import DEPTH_DECADES, depth_profile
from lightning_gradguard.core.forensics import investigate, parts_of, parts_out_of_scale, standardizing
from lightning_gradguard.core.incidents import first_names
from lightning_gradguard.core.initialization import (
    SEVERITIES,
    Finding,
    copied_units,
    fails,
    improves,
    measure,
    nonfinite_weights,
    repair,
    values_of,
    with_cures,
)
from lightning_gradguard.core.initialization.propagation import SignalPropagation
from lightning_gradguard.core.initialization.repair import Repair
from lightning_gradguard.core.initialization.trials import Trial
from lightning_gradguard.core.parameter_names import plain_name
from lightning_gradguard.core.remedies import advice
from lightning_gradguard.core.snapshots import preserve_state, preserve_weights
from lightning_gradguard.runtime.diagnosis.traced_pass import traced_pass
from lightning_gradguard.runtime.distributed import (
    broadcast_tensors,
    complete_gradients,
    gather_objects,
    whole,
    world_size,
)
from lightning_gradguard.runtime.incidents.present import present_in
from lightning_gradguard.runtime.incidents.replay import training_loss, without_logging
from lightning_gradguard.runtime.lightning_api import (
    allows_extra_pass,
    flat_shards,
    flattens_parameters,
    takes_iterator,
)
from lightning_gradguard.runtime.lightning_packages import FRAMEWORKS
from lightning_gradguard.runtime.logging import console
from lightning_gradguard.runtime.optimizer_hooks import is_scale_free
from lightning_gradguard.runtime.steps.measuring import norms_over_shards
from lightning_gradguard.runtime.steps.parameters import ParameterLayout
from lightning_gradguard.runtime.training_step import is_replaced_by_others

#: Criteria that a nonfinite value breaks, whose origin is looked for.
NONFINITE = ("loss", "nonfinite_gradients")


class FirstBatch:
    """The first training batch, run through the network in extra passes that leave no trace.

    Attributes:
        problem: The reason if the network could not be checked.
        entry: The layer that gets the inputs, known where these are large.
    """

    def __init__(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.problem: Exception | None = None
        self.entry: tuple[str, ...] = ()
        self._trainer = trainer
        self._pl_module = pl_module
        self._batch = batch
        self._batch_idx = batch_idx
        self._cures: list[Trial] = []

    def input_rms(self, large: float) -> float:
        """Returns the rms of the largest floating-point tensor of the batch, the largest of all ranks.

        It is 0 without one. If it is `large`, a further pass shows the rms that the first layer gets, as the
        network may standardize its inputs.
        """
        leaves = [t for t in tree_leaves(self._batch) if isinstance(t, Tensor) and t.is_floating_point()]
        largest = max(leaves, key=Tensor.numel, default=None)
        own = 0.0 if largest is None else float(largest.detach().double().square().mean().sqrt())
        of_batch: float = max(gather_objects(own))
        if not of_batch > large or any(gather_objects(self.problem is not None)):
            return of_batch
        batch = copy.deepcopy(self._batch)
        with preserve_state(self._pl_module):
            sample = traced_pass(self._pl_module, batch, lambda: self._loss_of(batch))
        self.entry = sample.entry
        of_layers: list[float] = gather_objects(sample.input_rms)
        return max(of_layers)

    def with_huge_inputs(self, findings: Sequence[Finding], rms: float) -> list[Finding]:
        """Returns the findings and, among them, that of inputs so large that no initialization helps."""
        scales = parts_out_of_scale(parts_of(self._batch))
        if not scales:
            return [*findings]
        cure = standardizing(scales)
        of_inputs = ("loss_over_guessing", "dead_units", "saturated_units")
        explained = [
            replace(f, cure=cure, is_tried=False) if f.criterion in of_inputs else f for f in findings
        ]
        explained.append(Finding("input_rms", "", rms, "about 1", "warn", cure))
        return sorted(explained, key=lambda f: SEVERITIES.index(f.severity))

    def check(self) -> tuple[list[Finding], dict[str, float]]:
        """Returns findings and measured values, the same on every rank; none if there is a problem."""
        with preserve_state(self._pl_module):  # to read a weight runs its parametrization, which may write
            return self._check()

    def _check(self) -> tuple[list[Finding], dict[str, float]]:
        findings, values, measured = self._measure()
        # on every rank, for the training step may communicate
        if any(gather_objects(any(f.criterion in NONFINITE for f in findings))):
            try:
                findings = self._explained(findings)
            except Exception as error:
                self.problem = self.problem or error
        if self.problem is not None:
            reason = str(self.problem).partition("\n")[0]  # torch may list all its kernels
            console.print_message(self._trainer, f"Initialization not checked: {reason}")
            findings, values = [], {}
        has_problem = any(gather_objects(self.problem is not None))
        findings, values = _worst_over_ranks(findings, values)
        if findings and not has_problem and _is_alike_on_ranks(measured):
            findings, self._cures = with_cures(
                self._pl_module, self._run_loss, findings, measured, self._measure_under
            )
        return findings, values

    @contextmanager
    def cured(self) -> Iterator[bool]:
        """Makes the changes by which criteria that fail are cured; True if then none fails."""
        with preserve_weights(self._pl_module), preserve_state(self._pl_module), ExitStack() as changes:
            torch.manual_seed(0)
            passes = False
            with suppress(Exception):  # changes that do not fit together
                for cure in self._cures:
                    changes.enter_context(cure.applied())
                passes = bool(self._cures) and not fails(self._measure_under(nullcontext()))
            yield passes

    def repair(self, names: Collection[str], seed: int, before: list[Finding]) -> Repair:
        """Initializes layers, the same on every rank; undone if the findings are no better afterwards."""
        parameters = list(self._pl_module.parameters())
        saved = [parameter.detach().clone() for parameter in parameters]
        try:
            done = repair(self._pl_module, self._run_loss, names=names, seed=seed)
        except Exception as error:
            done = Repair((), ())
            console.print_message(self._trainer, f"Repair did not finish: {error}")
        broadcast_tensors(parameters)
        try:
            if improves(before, self._measure_under(nullcontext())):
                return done
        except RuntimeError as error:
            console.print_message(self._trainer, f"Not measured after the repair: {error}")
        with torch.no_grad():
            for parameter, value in zip(parameters, saved, strict=True):
                parameter.copy_(value)
        return Repair((), done.left_alone)

    def _measure(self) -> tuple[list[Finding], dict[str, float], SignalPropagation | None]:
        """Returns findings, values and measurements of this rank; sets the problem if there is one."""
        findings: list[Finding] = []
        measured: SignalPropagation | None = None
        self.problem = None
        scale_free = all(map(is_scale_free, self._trainer.optimizers))
        try:
            findings, measured = measure(self._pl_module, self._run_loss, scale_free=scale_free)
        except Exception as error:
            self.problem = error
        return findings, values_of(measured), measured

    def _measure_under(self, change: AbstractContextManager[None]) -> list[Finding]:
        """Returns the findings under a change, the same on every rank.

        Raises:
            RuntimeError: On every rank if a rank could not make the change, or could not measure.
        """
        findings: list[Finding] = []
        values: dict[str, float] = {}
        try:
            with change:
                findings, values, _ = self._measure()
        except Exception as error:
            self.problem = error
        problems = gather_objects(None if self.problem is None else str(self.problem))
        self.problem = None
        if any(problems):
            raise RuntimeError(*filter(None, problems))
        return _worst_over_ranks(findings, values)[0]

    def _run_loss(self) -> Tensor:
        return self._loss_of(copy.deepcopy(self._batch))  # the step may write to its batch

    def _loss_of(self, batch: Any) -> Tensor:
        with without_logging(self._pl_module):
            return training_loss(self._pl_module, batch, self._batch_idx)

    def _explained(self, findings: Sequence[Finding]) -> list[Finding]:
        """Returns the findings with the operation that made the first nonfinite value.

        Raises:
            ValueError: If the batch is nonfinite, which is no fault of the network.
        """
        parameters = [p for p in self._pl_module.parameters() if p.requires_grad]
        batch = copy.deepcopy(self._batch)

        def run() -> tuple[list[Tensor], Sequence[Tensor]]:
            loss = self._loss_of(batch)
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            return [loss], [gradient for gradient in found if gradient is not None]

        is_alone = world_size() == 1
        origin = investigate(self._pl_module, run, batch, repeats_finite=is_alone, frameworks=FRAMEWORKS)
        if origin.cause == "bad_input":
            raise ValueError(origin.detail)
        explained = []
        for finding in findings:
            if finding.criterion == "nonfinite_input" and origin.phase:
                continue  # it follows from what is found
            if finding.criterion in NONFINITE and origin.phase:
                cure = f"{origin.remedy()} {origin.detail}".strip()
                place = finding.module or first_names(1, origin.where)
                finding = replace(
                    finding, module=place, cure=cure, cause=origin.cause, location=origin.location
                )
            explained.append(finding)
        return explained


def reason_against_extra_pass(trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
    """Returns what forbids a pass that training does not make; empty if nothing does."""
    if takes_iterator(pl_module):
        return "training_step(dataloader_iter) takes its batches itself"
    if not allows_extra_pass(trainer):
        return f"{type(trainer.strategy).__name__} communicates in each pass"
    if not pl_module.automatic_optimization:
        return "a training_step under manual optimization steps the optimizers"
    if is_replaced_by_others(pl_module):
        return "what has replaced the training_step of this object may count its calls"
    return ""


def check_weights_alone(trainer: pl.Trainer, pl_module: pl.LightningModule) -> list[Finding]:
    """Returns findings about the weights, where no extra pass is possible."""
    findings, _ = _worst_over_ranks(nonfinite_weights(pl_module), {})
    # FSDP1 shards within rows
    if not findings and not flattens_parameters(trainer):
        with preserve_state(pl_module):
            findings = copied_units(pl_module, whole)
    return findings


def check_first_step(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Finding | None:
    """Returns a finding if the gradients of the first step vanish or explode between last and first layer."""
    layout = ParameterLayout(flat_shards(trainer), pl_module.device)
    everything = layout.select(pl_module.named_parameters())
    named = zip(everything.names, everything.parameters, everything.is_matrix, strict=True)
    layers = layout.select([(plain_name(name), p) for name, p, is_matrix in named if is_matrix][:-1])
    complete_gradients(layers.parameters)
    gradients, weights = norms_over_shards(layers, layers.gradients(), layers.parameters).tolist()
    profile = depth_profile(gradients, weights)
    if abs(profile) <= DEPTH_DECADES:
        return None
    first = layers.names[0]
    symptom = "vanishing_gradient" if profile > 0 else "exploding_gradient"
    cure = advice(symptom, [first], present_in(trainer))
    return Finding("gradient_profile", first, profile, "-3 .. 3", "warn", cure)


def _is_alike_on_ranks(measured: SignalPropagation | None) -> bool:
    """True if the batches of all ranks have run the same layers, for which the same changes are tried."""
    ran: Any = None
    if measured is not None:
        ran = [(layer.name, layer.activation) for layer in measured.layers], list(measured.recurrent_steps)
    by_rank = gather_objects(ran)
    return all(other == by_rank[0] for other in by_rank)


def _worst_over_ranks(
    findings: list[Finding], values: dict[str, float]
) -> tuple[list[Finding], dict[str, float]]:
    """Returns the most findings of any rank, for ranks have other batches, or other shards."""
    all_ranks: list[tuple[list[Finding], dict[str, float]]] = gather_objects((findings, values))
    return max(all_ranks, key=lambda found: (fails(found[0]), len(found[0]), len(found[1])))
