"""The one idiom for the first callback to reach a point that all of them pass, and for the last."""

from __future__ import annotations


class Arrivals:
    """Counts members at a point that each of them passes once a round.

    Args:
        n_members: Members that pass the point; it may grow before the first round.

    Example:
        >>> arrivals = Arrivals(n_members=2)
        >>> arrivals.begin("a"), arrivals.begin("b"), arrivals.is_complete, arrivals.begin("a")
        (True, False, True, True)
    """

    def __init__(self, n_members: int = 0) -> None:
        self.n_members = n_members
        self._arrived: set[int] = set()

    def begin(self, member: object) -> bool:
        """Registers a member; true if it is the first of a round.

        A member that arrives again begins the next round, whether or not the last one is complete.
        """
        if id(member) in self._arrived:
            self._arrived.clear()
        self._arrived.add(id(member))
        return len(self._arrived) == 1

    @property
    def is_complete(self) -> bool:
        """True if every member has arrived."""
        return len(self._arrived) == self.n_members

    def end(self, member: object) -> bool:
        """Registers a member; true if it is the last of a round, after which the next one begins."""
        self._arrived.add(id(member))
        if is_complete := self.is_complete:
            self._arrived.clear()
        return is_complete
