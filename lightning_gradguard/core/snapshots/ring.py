"""A ring of snapshots, whose memory is recycled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lightning_gradguard.core.snapshots.snapshot import Snapshot


class SnapshotRing:
    """The last qualified snapshots, and one that is pending.

    A snapshot is *qualified* when enough good steps have followed it, and *pending* until then. Memory is
    recycled: at most `keep + 1` snapshots exist.

    Args:
        keep: Number of qualified snapshots that are kept.
        good_steps: Good steps after which a pending snapshot is qualified.
        device: See `Snapshot`.

    Attributes:
        pending: The pending snapshot, if there is one.
    """

    def __init__(self, keep: int, good_steps: int = 10, device: str = "cpu") -> None:
        self._keep = keep
        self._good_steps = good_steps
        self._device = device
        self._qualified: deque[Snapshot] = deque()
        self._free: list[Snapshot] = []
        self.pending: Snapshot | None = None
        self._newest_was_tried = False

    def capture(self, fill: Callable[[Snapshot], None], *, qualified: bool = False) -> None:
        """Takes a snapshot, which replaces the pending one.

        Args:
            fill: Writes the state into the given snapshot.
            qualified: True if it is qualified by definition, as the state at the first training batch is.
        """
        self.discard_pending()
        snapshot = self._free.pop() if self._free else Snapshot(self._device)
        fill(snapshot)
        if qualified:
            self._promote(snapshot)
        else:
            self.pending = snapshot

    def good_step(self) -> None:
        """Counts a good step; the last of those that a pending snapshot needs qualifies it."""
        if self.pending is None:
            return
        self.pending.good_steps += 1
        if self.pending.good_steps >= self._good_steps:
            self._promote(self.pending)
            self.pending = None

    def wait(self) -> None:
        """Orders later writes of weights after the copies; see `Snapshot.wait`."""
        for snapshot in (self.pending, *self._qualified):
            if snapshot is not None:
                snapshot.wait()

    def discard_pending(self) -> None:
        """Discards the pending snapshot."""
        if self.pending is not None:
            self._free.append(self.pending)
            self.pending = None

    def clear(self) -> None:
        """Discards every snapshot; their memory is kept for the next ones."""
        self.discard_pending()
        self._free.extend(self._qualified)
        self._qualified.clear()
        self._newest_was_tried = False

    def __len__(self) -> int:
        """Returns the number of qualified snapshots."""
        return len(self._qualified)

    def roll_back(self) -> Snapshot:
        """Returns the snapshot to restore: the newest qualified one, or the one before if that was tried."""
        self.discard_pending()
        if self._newest_was_tried and len(self._qualified) > 1:
            self._free.append(self._qualified.pop())
        self._newest_was_tried = True
        return self._qualified[-1]

    def oldest(self) -> Snapshot:
        """Returns the oldest qualified snapshot."""
        return self._qualified[0]

    def newest(self) -> Snapshot:
        """Returns the newest qualified snapshot; does not count as a try."""
        return self._qualified[-1]

    def _promote(self, snapshot: Snapshot) -> None:
        self._qualified.append(snapshot)
        self._newest_was_tried = False
        while len(self._qualified) > self._keep:
            self._free.append(self._qualified.popleft())
