"""Bounds on a loss over that of the best constant answer to the targets."""

#: Below this share of it, or of the first loss, a network learns, here and in trials of a treatment.
LEARNS = 0.9
#: Above this share it has learned nothing.
STUCK = 0.95
#: Below this share it has converged.
CONVERGED = 0.02


def describe_loss(over_constant: float) -> str:
    """Returns the loss at the end of a run in words, the same wherever it is named.

    Example:
        >>> describe_loss(0.9712)
        'the loss, as last sampled, is 0.971 times that of the best constant answer'
    """
    return f"the loss, as last sampled, is {over_constant:.3g} times that of the best constant answer"
