"""One object between `loss.backward()` and `optimizer.step()` of your own training loop."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_gradguard.core.arguments import one_of, whole_number, within
from lightning_gradguard.core.backoff import Backoff, ScaledLearningRate
from lightning_gradguard.core.clipping import (
    ClippingPolicy,
    RelativeNormClipping,
    Scalar,
    smallest,
    step_context,
)
from lightning_gradguard.core.detectors import HARD_CLIPPING, ConstantClippingDetector
from lightning_gradguard.core.incidents import IncidentKind, TrainingDivergedError
from lightning_gradguard.core.norms import (
    Gradients,
    Measurement,
    measure_gradients,
    scale_gradients_,
    tensor_norms,
    total_norm_from_norms,
)
from lightning_gradguard.core.recovery import Decision, RecoveryPolicy
from lightning_gradguard.core.snapshots import (
    BufferCopies,
    FiniteBuffers,
    Snapshot,
    SnapshotRing,
    any_nonfinite,
)


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of one `TrainingGuard.step`.

    Args:
        action: `"stepped"`: the optimizer made its update. `"skipped"`: it did not. `"rolled_back"`: it did
            not, and a snapshot was restored.
        loss: Loss of the batch.
        total_norm: L2 norm of all gradients, before clipping.
        kind: Kind of the incident, as in `core.incidents.KINDS`; empty on a healthy step.
        where: Names of the parameters whose gradients are nonfinite.
        coefficient: Factor by which gradients were clipped, the smallest if there are several; 1 without an
            update. A tensor, not yet synchronized with the host, if the policy computes it on the device.
        learning_rate_scale: Factor of the learning rates in this update; 1 without an update.
    """

    action: Literal["stepped", "skipped", "rolled_back"]
    loss: float
    total_norm: float
    kind: IncidentKind | Literal[""] = ""
    where: tuple[str, ...] = ()
    coefficient: Scalar = 1.0
    learning_rate_scale: float = 1.0


class TrainingGuard:
    """Takes, skips or undoes the steps of your own training loop, as the callbacks do under a Trainer.

    A step is skipped if its loss, a gradient, or a buffer that its forward pass has written is nonfinite. It
    leaves no trace: weights, optimizer state and buffers are as if the batch had never been seen. After
    `patience` skips in a row, nonfinite weights, a divergence, or a collapse of the gradients, training rolls
    back to the last *qualified* snapshot, one that 10 good steps followed, and the learning rate is reduced.
    It is scaled only while the optimizer steps, so that a schedule never sees it.

    A single finite spike is clipped, not skipped: running statistics of batch normalization take it in.

    Each step costs one host synchronization. Gradients must be unscaled when `step` is called; an overflow
    under a GradScaler counts as a skip. Snapshots are not part of `state_dict`: after a resume the loaded
    state is the first of them. Buffers that the caller writes between two steps are restored as well if the
    second is skipped.

    Args:
        modules: The module that the optimizer trains, or several of them, with finite weights that training
            may roll back to. Move them to their device before.
        optimizer: Any optimizer that evaluates the loss once a step.
        policy: Clipping policy; a fresh `RelativeNormClipping()` if `None`.
        patience: Skipped steps in a row after which training rolls back; at least 1.
        max_rollbacks: After so many, the next one raises; 0 or more. After 500 steps without one, one less is
            counted.
        max_skip_fraction: Share of the last 100 steps above which skips raise; in (0, 1].
        snapshot_every_n_steps: A snapshot is taken after this many good steps; at least 1.
        keep_snapshots: Qualified snapshots kept in memory, beside one that is pending; at least 1.
        snapshot_device: `"cpu"` keeps snapshots in host memory, `"same"` beside the weights.
        backoff: Scale of the learning rates after a rollback; a fresh `Backoff()` if `None`.

    Attributes:
        skips: Steps skipped so far.

    Raises:
        ValueError: If an argument is out of range, a weight is nonfinite or not in `modules`, or the
            optimizer is unsupported.
        RuntimeError: If several processes train together: a guard decides for one.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> guard = TrainingGuard(network, optimizer)
        >>> for value in (1.0, torch.nan, 1.0):
        ...     optimizer.zero_grad()
        ...     loss = network(torch.full((4, 2), value)).square().mean()
        ...     loss.backward()
        ...     print(guard.step(loss).action)
        stepped
        skipped
        stepped
    """

    def __init__(
        self,
        modules: nn.Module | Sequence[nn.Module],
        optimizer: Optimizer,
        *,
        policy: ClippingPolicy | None = None,
        patience: int = 3,
        max_rollbacks: int = 10,
        max_skip_fraction: float = 0.5,
        snapshot_every_n_steps: int = 50,
        keep_snapshots: int = 2,
        snapshot_device: Literal["cpu", "same"] = "cpu",
        backoff: Backoff | None = None,
    ) -> None:
        whole_number("patience", patience)
        whole_number("max_rollbacks", max_rollbacks, at_least=0)
        whole_number("keep_snapshots", keep_snapshots)
        within("max_skip_fraction", max_skip_fraction, "(0, 1]")
        one_of("snapshot_device", snapshot_device, "cpu", "same")
        if not isinstance(optimizer, Optimizer):
            raise ValueError(
                f"optimizer is a {type(optimizer).__name__}, no torch optimizer: modules come first, as in "
                "TrainingGuard(network, optimizer)."
            )
        if policy is not None and not isinstance(policy, ClippingPolicy):
            raise ValueError(
                f"policy={policy!r} is not a ClippingPolicy: pass one, such as GlobalNormClipping(1.0)."
            )
        if backoff is not None and not isinstance(backoff, Backoff):
            raise ValueError(f"backoff={backoff!r} is not a Backoff.")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError("LBFGS is unsupported: it evaluates the loss several times in one step.")
        is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if is_distributed and (processes := torch.distributed.get_world_size()) > 1:
            raise RuntimeError(f"TrainingGuard decides for one process; {processes} train together.")
        self._module = modules if isinstance(modules, nn.Module) else nn.ModuleList(modules)
        outside = set(_weights(optimizer)) - set(self._module.parameters())
        if outside:
            raise ValueError(f"{len(outside)} parameters of the optimizer are not in `modules`.")
        self._optimizer = optimizer
        self._snapshot_every_n_steps = whole_number("snapshot_every_n_steps", snapshot_every_n_steps)
        self.policy = RelativeNormClipping() if policy is None else policy
        self.backoff = Backoff() if backoff is None else backoff
        self.recovery = RecoveryPolicy(patience, max_rollbacks, max_skip_fraction)
        self._clipping = ConstantClippingDetector()
        self.skips = 0
        self._learning_rate = ScaledLearningRate(optimizer)
        self._buffers = BufferCopies(self._module)
        self._finite_buffers = FiniteBuffers(self._module)
        self._snapshots = SnapshotRing(keep_snapshots, device=snapshot_device)
        self._start()

    @property
    def rollbacks(self) -> int:
        """Rollbacks so far."""
        return self.recovery.rollbacks

    def step(self, loss: Tensor) -> StepOutcome:
        """Takes the step that `loss.backward()` has prepared, or skips it; rolls back if that is due.

        Args:
            loss: Loss of the batch, or of all that were accumulated; one number.

        Raises:
            TypeError: If the loss is no tensor.
            ValueError: If the loss is not one number, or no parameter has a gradient.
            TrainingDivergedError: If a budget is used up. Weights are then those of the newest qualified
                snapshot.
        """
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"loss={loss!r} is a {type(loss).__name__}, and no tensor: pass the loss that backward() was "
                "called on, as in guard.step(loss)."
            )
        if loss.numel() != 1:
            raise ValueError(f"loss of shape {tuple(loss.shape)} must be one number.")
        parameters = set(_weights(self._optimizer))
        named = self._module.named_parameters()
        gradients = measure_gradients((name, p) for name, p in named if p in parameters)
        if not gradients.names:
            raise ValueError("No parameter of the optimizer has a gradient: call step after backward.")
        measurement, where = self._read(loss, gradients)
        outcome = StepOutcome("stepped", measurement.loss, measurement.total_norm, where=where)
        decision: Decision
        if measurement.must_skip:
            outcome = replace(outcome, action="skipped", kind=measurement.incident_kind())
            decision = self._skip(measurement)
        else:
            decision, anomaly = self.recovery.on_good_step(
                0,
                measurement.loss,
                measurement.total_norm,
                measurement.is_collapsed,
                distance=lambda: self._snapshots.trusted().distance([self._optimizer]),
                clipped=self._clipping.of_last,
            )
            outcome = replace(outcome, kind=cast("IncidentKind", anomaly))
            if decision == "continue":
                self._learning_rate.scale = self.backoff.scale
                return self._commit(outcome, self._with_context(gradients, measurement))
        if decision == "continue":
            return outcome
        self._roll_back(decision, trusted=not measurement.must_skip)
        return replace(outcome, action="rolled_back")

    def state_dict(self) -> dict[str, Any]:
        """Returns counters, histories and budgets, by which a resumed loop decides as this one would."""
        return copy.deepcopy(
            {
                "policy": self.policy.state_dict(),
                "recovery": self.recovery.state_dict(),
                "backoff": self.backoff.state_dict(),
                "clipping": self._clipping.state_dict(),
                "skips": self.skips,
            }
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state; load modules and optimizer before.

        Raises:
            ValueError: If a loaded weight is nonfinite.
        """
        state_dict = copy.deepcopy(state_dict)
        self.policy.load_state_dict(state_dict["policy"])
        self.recovery.load_state_dict(state_dict["recovery"])
        self.backoff.load_state_dict(state_dict["backoff"])
        if "clipping" in state_dict:  # version 0.5 has none
            self._clipping.load_state_dict(state_dict["clipping"])
        self.skips = state_dict["skips"]
        self._buffers.refresh()
        self._snapshots.clear()
        self._start()

    def _start(self) -> None:
        """Takes the present state as the one that training may always roll back to."""
        if bool(self._scan()):
            raise ValueError("Weights, buffers or optimizer state are nonfinite: load healthy ones first.")
        self._nonfinite_state: Tensor | None = None
        self._good_steps = 0
        self._n_snapshots = 0
        self.backoff.begin(0)
        self._snapshots.capture(self._copy_state, qualified=True)

    def _read(self, loss: Tensor, gradients: Gradients) -> tuple[Measurement, tuple[str, ...]]:
        """Returns the numbers of the step, and names of nonfinite gradients: the one synchronization."""
        buffers = list(self._finite_buffers)
        zero = gradients.norms.new_zeros(())  # one made on the host would have to be copied, and synchronize
        in_buffers = any_nonfinite([], buffers) if buffers else zero
        in_state = zero if self._nonfinite_state is None else self._nonfinite_state
        self._nonfinite_state = None
        weight_norm = zero
        if self.policy.wants_weight_norm:
            weight_norm = total_norm_from_norms(tensor_norms(gradients.parameters))
        numbers = (loss.detach().reshape(()), gradients.total_norm, in_buffers, in_state, weight_norm)
        packed = torch.cat([torch.stack([n.to(zero) for n in numbers]), gradients.norms])
        value, total_norm, nonfinite_buffers, nonfinite_weights, weights, *norms = packed.tolist()
        matrices = [norm for p, norm in zip(gradients.parameters, norms, strict=True) if p.ndim > 1]
        measurement = Measurement(
            optimizer_index=0,
            loss=value,
            nonfinite_losses=int(not math.isfinite(value)),
            total_norm=total_norm,
            is_collapsed=total_norm > 0 and not any(matrices),
            ranks_disagree=False,
            nonfinite_weights=bool(nonfinite_weights),
            nonfinite_buffers=bool(nonfinite_buffers),
            repeats_lost_batch=False,
            weight_norm=weights,
        )
        return measurement, tuple(
            n for n, norm in zip(gradients.names, norms, strict=True) if not math.isfinite(norm)
        )

    def _with_context(self, gradients: Gradients, measurement: Measurement) -> Gradients:
        """Returns the gradients with all that the policy may know of the step."""
        context = step_context(
            self._optimizer,
            gradients,
            loss=measurement.loss,
            weight_norm=measurement.weight_norm if self.policy.wants_weight_norm else None,
        )
        return replace(gradients, known_norm=measurement.total_norm, context=context)

    def _commit(self, outcome: StepOutcome, gradients: Gradients) -> StepOutcome:
        coefficients = self.policy.coefficients(gradients)
        scale_gradients_(gradients, coefficients)
        self.policy.commit()
        self._snapshots.wait()
        self._optimizer.step()
        self.backoff.step(outcome.loss)
        if self.backoff.has_returned:
            self.recovery.accept_rise(0)
        self._buffers.refresh()
        if not self.recovery.is_spiking:
            self._snapshots.good_step(outcome.loss)
            self._good_steps += 1
        if self._good_steps >= self._snapshot_every_n_steps and self._snapshots.pending is None:
            self._good_steps = 0
            self._snapshots.capture(self._copy_state)
            self._nonfinite_state = self._scan()
        coefficient, scale = smallest(coefficients), self._learning_rate.scale
        if not isinstance(coefficient, Tensor):  # to read one would synchronize
            self._clipping.update(coefficient < HARD_CLIPPING, 1)
        return replace(outcome, coefficient=coefficient, learning_rate_scale=scale)

    def _skip(self, measurement: Measurement) -> Decision:
        self.skips += 1
        self._buffers.restore()
        self._optimizer.zero_grad()  # none of it may be accumulated
        self._nonfinite_state = self._scan()
        decision = self.recovery.on_skip(0)
        if decision == "continue" and measurement.nonfinite_weights:
            return self.recovery.escalate()
        return decision

    def _roll_back(self, decision: Decision, *, trusted: bool) -> None:
        """Restores a snapshot; raises if the budget is used up."""
        ring = self._snapshots
        learned = trusted and self.recovery.risen_loss == math.inf  # a collapse, or no progress
        snapshot = ring.newest() if decision == "stop" else ring.roll_back(trusted=trusted, learned=learned)
        snapshot.restore([self._module], [self._optimizer])
        self._buffers.refresh()
        self._optimizer.zero_grad()
        self._nonfinite_state = None
        self._good_steps = 0
        extra_state = copy.deepcopy(snapshot.extra_state)
        self.policy.load_state_dict(extra_state["policy"])
        self.recovery.load_detector_state(extra_state["detectors"])
        if decision == "stop":
            raise TrainingDivergedError(
                f"Training was stopped: {self.recovery.stop_reason}. Lower the learning rate, check the "
                "initialization and the skipped batches. Weights are those of the newest qualified snapshot."
            )
        self.recovery.on_rollback()
        risen_loss = self.recovery.risen_loss
        self.backoff.on_rollback(extra_state["index"], has_diverged=trusted, risen_loss=risen_loss)

    def _copy_state(self, snapshot: Snapshot) -> None:
        # the next forward pass writes buffers while the copy is still being made
        buffers = self._buffers
        snapshot.capture([self._module], [self._optimizer], buffers.written(), buffers.saved())
        extra_state = {
            "policy": self.policy.state_dict(),
            "detectors": self.recovery.detector_state(),
            "index": self._n_snapshots,
        }
        self._n_snapshots += 1
        snapshot.extra_state = copy.deepcopy(extra_state)

    def _scan(self) -> Tensor:
        """Flags nonfinite weights, buffers or optimizer state, without a host synchronization."""
        states = (value for state in self._optimizer.state.values() for value in state.values())
        squares = (value for value in states if isinstance(value, Tensor))
        return any_nonfinite(_weights(self._optimizer), [*self._finite_buffers, *squares])


def _weights(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])
