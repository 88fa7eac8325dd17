"""One step's numbers on the host, and the bounds that make it one to skip."""

from __future__ import annotations

from dataclasses import dataclass

import torch

#: Largest total norm that float32 can hold.
OVERFLOW = torch.finfo(torch.float32).max
#: Times by which the largest total norm on any rank exceeds the smallest, where ranks disagree.
DISAGREEMENT = 1000.0


@dataclass(frozen=True)
class Measurement:
    """One step's numbers on the host, the same on every rank; what a judge may look at.

    Args:
        optimizer_index: Which of the Trainer's optimizers is about to step.
        loss: Mean over ranks and over the accumulation window; NaN if none was seen.
        nonfinite_losses: How many of those losses were nonfinite.
        total_norm: L2 norm of all gradients of the optimizer, before anything is clipped; nonfinite if any
            of them is, on any rank.
        is_dead: Whether no weight of two dimensions or more gets a gradient, while something else does.
        ranks_disagree: Whether gradients that ranks have averaged are nonfinite, or a thousand times larger,
            on some of them only: since then, something has written to them.
        nonfinite_weights: Whether any rank reported nonfinite weights since the step before.
        nonfinite_buffers: Whether the forward passes of any rank left nonfinite buffers.
        lost_before: Whether any rank was served a batch that this run, before it was resumed, had lost.
    """

    optimizer_index: int
    loss: float
    nonfinite_losses: int
    total_norm: float
    is_collapsed: bool
    ranks_disagree: bool
    nonfinite_weights: bool
    nonfinite_buffers: bool
    was_lost: bool

    @property
    def is_corrupt(self) -> bool:
        """Whether the step is sick in a way that no loss scale explains, or of a batch that had been lost."""
        seen = self.nonfinite_losses or self.nonfinite_weights or self.nonfinite_buffers
        return bool(seen or self.ranks_disagree or self.was_lost)

    @property
    def must_skip(self) -> bool:
        """Whether the step must not happen."""
        return self.is_corrupt or not self.total_norm <= OVERFLOW
