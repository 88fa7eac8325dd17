"""Numbers of one step on the host, and the bounds beyond which it is skipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_gradguard.core.incidents import IncidentKind

#: Largest total norm of a step that is not skipped: the largest number of float32.
OVERFLOW = torch.finfo(torch.float32).max
#: Ranks disagree if the largest total norm on any of them is this many times the smallest.
DISAGREEMENT = 1000.0


@dataclass(slots=True)
class Measurement:
    """Numbers of one step on the host, the same on every rank.

    Args:
        optimizer_index: Index of the Trainer's optimizer that is about to step.
        loss: Mean over ranks and over the accumulation window; NaN if none was seen.
        nonfinite_losses: Number of nonfinite losses among them.
        total_norm: L2 norm of all gradients of the optimizer before clipping; nonfinite if any gradient is,
            on any rank.
        is_collapsed: True if no weight of two dimensions or more has a nonzero gradient while another
            parameter has.
        ranks_disagree: True if gradients that ranks have averaged are nonfinite, or a thousand times larger,
            on some ranks only: they were written to after the reduction.
        nonfinite_weights: True if any rank has reported nonfinite weights since the step before.
        nonfinite_buffers: True if the forward passes of any rank left nonfinite buffers.
        repeats_lost_batch: True if any rank has a batch that the run, before it was resumed, had lost.
        rejected_by: Names of the callbacks whose `check_step` has rejected the step, although it is finite.
        weight_norm: L2 norm of all weights with a gradient, before the step; 0 if it was not measured.
    """

    optimizer_index: int
    loss: float
    nonfinite_losses: int
    total_norm: float
    is_collapsed: bool
    ranks_disagree: bool
    nonfinite_weights: bool
    nonfinite_buffers: bool
    repeats_lost_batch: bool
    rejected_by: tuple[str, ...] = ()
    weight_norm: float = 0.0

    @property
    def is_corrupt(self) -> bool:
        """True if the step must be skipped for a reason other than the overflow of a loss scale."""
        seen = self.nonfinite_losses or self.nonfinite_weights or self.nonfinite_buffers
        return bool(seen or self.ranks_disagree or self.repeats_lost_batch)

    @property
    def must_skip(self) -> bool:
        """True if the step must not be taken."""
        return self.is_corrupt or not self.total_norm <= OVERFLOW

    def incident_kind(self, *, has_scaler: bool = False) -> IncidentKind:
        """Returns the kind of incident that it is to skip the step.

        Args:
            has_scaler: True if a GradScaler scales gradients to the edge of overflow.
        """
        if self.repeats_lost_batch:
            return "lost_batch"
        if self.rejected_by:
            return "rejected_step"
        if self.nonfinite_weights:
            return "nonfinite_weights"
        if self.nonfinite_losses:
            return "nonfinite_loss"
        if self.nonfinite_buffers:
            return "nonfinite_buffers"
        if self.ranks_disagree:
            return "corrupted_gradient"
        return "amp_overflow" if has_scaler else "nonfinite_gradient"
