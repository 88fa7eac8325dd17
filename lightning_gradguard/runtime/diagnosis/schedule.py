"""The steps of which samples are taken."""

from __future__ import annotations

import itertools

#: Steps that are sampled, before every `every_n_steps`-th one.
FIRST_STEPS = (0, 1, 2, 5, 10, 20, 35)
#: Interval at the start of training, and the step at which it ends.
DENSE_INTERVAL, DENSE_UNTIL = 25, 250


def is_sampled(step: int, every_n_steps: int) -> bool:
    """True for the steps of which samples are taken: dense at the start, then at an interval.

    Example:
        >>> [step for step in range(400) if is_sampled(step, 100)]
        [0, 1, 2, 5, 10, 20, 25, 35, 50, 75, 100, 125, 150, 175, 200, 225, 250, 300]
    """
    if step <= DENSE_UNTIL:
        return step in FIRST_STEPS or (step > 0 and step % DENSE_INTERVAL == 0)
    return step % every_n_steps == 0


def next_sample(step: int, every_n_steps: int) -> int:
    """Returns the first of the sampled steps from a step on.

    Example:
        >>> next_sample(36, 100), next_sample(50, 100)
        (50, 50)
    """
    return next(later for later in itertools.count(step) if is_sampled(later, every_n_steps))
