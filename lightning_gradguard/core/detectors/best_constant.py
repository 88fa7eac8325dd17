"""Bounds on a loss over that of the best constant answer to the targets."""

#: Below this share of it, or of the first loss, a network learns, here and in trials of a treatment.
LEARNS = 0.9
#: Above this share it has learned nothing.
STUCK = 0.95
#: Below this share it has converged.
CONVERGED = 0.02
