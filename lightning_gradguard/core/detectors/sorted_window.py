"""The last numbers of a series, in the order of time and of size."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable


class SortedWindow:
    """The last numbers of a series, from which a quantile is read without sorting them again.

    Args:
        size: Largest number of values.
        values: First ones, without NaN; the last `size` of them are kept.

    Attributes:
        values: In the order of time.
        ordered: The same in the order of size.
        median: The lower of two; NaN without a number.

    Example:
        >>> window = SortedWindow(3, [5.0, 1.0, 4.0])
        >>> window.append(3.0)
        >>> list(window.values), window.ordered, window.median
        ([1.0, 4.0, 3.0], [1.0, 3.0, 4.0], 3.0)
    """

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self.values = deque(values, maxlen=size)
        self.ordered = sorted(self.values)
        self.median = self.ordered[(len(self.ordered) - 1) // 2] if self.ordered else math.nan

    def append(self, value: float) -> None:
        """Adds a number in place of the oldest, once the window is full."""
        ordered, values = self.ordered, self.values
        if len(ordered) == values.maxlen:
            del ordered[bisect_left(ordered, values[0])]
        values.append(value)
        insort(ordered, value)
        self.median = ordered[(len(ordered) - 1) // 2]

    def clear(self) -> None:
        """Removes all numbers."""
        self.values.clear()
        self.ordered.clear()
        self.median = math.nan
