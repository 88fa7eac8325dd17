"""Groups logged scalars into series by tag."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lightning_gradguard.report.analysis.run_log import Series

#: Step, tag and value.
LoggedScalar = tuple[int, str, float]


@dataclass(frozen=True)
class Abandoned:
    """Steps that were logged again by a resumed run.

    Args:
        first: The first of them.
        last: The last that was logged before the resume.
    """

    first: int
    last: int


def to_series(
    scalars: Iterable[LoggedScalar], is_wanted: Callable[[str], bool]
) -> tuple[dict[str, Series], Abandoned | None]:
    """Groups scalars by tag.

    A step that is logged again after later ones replaces them, as a resumed run continues from there.

    Args:
        scalars: In the order in which they were logged.
        is_wanted: True for tags to keep.

    Returns:
        Series by tag, in the order in which tags appear; and the steps that a resume has replaced, if any.

    Example:
        >>> to_series([(0, "loss", 2.0), (1, "loss", 9.0), (0, "loss", 3.0)], lambda tag: True)
        ({'loss': Series(steps=[0], values=[3.0])}, Abandoned(first=0, last=1))
    """
    steps: dict[str, list[int]] = {}
    values: dict[str, list[float]] = {}
    wanted: dict[str, bool] = {}
    replaced: list[tuple[int, int]] = []
    for step, tag, number in scalars:
        if tag not in wanted:
            wanted[tag] = is_wanted(tag)
        if not wanted[tag]:
            continue
        past = steps.setdefault(tag, [])
        numbers = values.setdefault(tag, [])
        if past and step <= past[-1]:
            if step < past[-1]:
                replaced.append((step, past[-1]))
            while past and past[-1] >= step:
                past.pop()
                numbers.pop()
        past.append(step)
        numbers.append(number)
    abandoned = Abandoned(min(replaced)[0], max(last for _, last in replaced)) if replaced else None
    return {tag: Series(steps[tag], values[tag]) for tag in steps}, abandoned
