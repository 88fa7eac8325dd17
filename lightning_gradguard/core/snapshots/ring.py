"""The last qualified snapshots, and one that is pending."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from lightning_gradguard.core.snapshots.snapshot import Snapshot


class SnapshotRing:
    """The last proven snapshots, and one that still has to prove itself.

    A snapshot is *qualified* when enough good steps followed it. Memory is recycled: at most `keep + 1`
    snapshots exist.

    Args:
        keep: Qualified snapshots that are kept.
        good_steps: Good steps after which a pending snapshot is qualified.
        device: See `Snapshot`.
    """

    def __init__(self, keep: int, good_steps: int = 10, device: str = "cpu") -> None:
        self._keep = keep
        self._good_steps = good_steps
        self._device = device
        self._qualified: deque[Snapshot] = deque()
        self._free: list[Snapshot] = []
        self._pending: Snapshot | None = None
        self._newest_was_tried = False

    @property
    def is_pending(self) -> bool:
        """Whether a snapshot waits for its good steps."""
        return self._pending is not None

    def pending(self) -> Snapshot | None:
        """The snapshot that waits for its good steps."""
        return self._pending

    def capture(self, fill: Callable[[Snapshot], None], *, qualified: bool = False) -> None:
        """Take a new pending snapshot (or one that counts as proven at once).

        Args:
            fill: Writes the state into the snapshot that it is given.
            qualified: Proven by definition, as the state at the first training batch is.
        """
        self.discard_pending()
        snapshot = self._free.pop() if self._free else Snapshot(self._device)
        fill(snapshot)
        if qualified:
            self._promote(snapshot)
        else:
            self._pending = snapshot

    def good_step(self) -> None:
        """Count a good step; the pending snapshot is qualified by the last one that it needs."""
        if self._pending is None:
            return
        self._pending.good_steps += 1
        if self._pending.good_steps >= self._good_steps:
            self._promote(self._pending)
            self._pending = None

    def wait(self) -> None:
        """See `Snapshot.wait`; of the one captured last."""
        for snapshot in (self._pending, *self._qualified):
            if snapshot is not None:
                snapshot.wait()

    def discard_pending(self) -> None:
        """Drop the snapshot that has not proven itself."""
        if self._pending is not None:
            self._free.append(self._pending)
            self._pending = None

    def clear(self) -> None:
        """Forget every snapshot; their memory is kept for the next ones."""
        self.discard_pending()
        self._free.extend(self._qualified)
        self._qualified.clear()
        self._newest_was_tried = False

    def __len__(self) -> int:
        """Number of qualified snapshots."""
        return len(self._qualified)

    def roll_back(self) -> Snapshot:
        """The snapshot to restore: the newest qualified, or the one before if that was tried already."""
        self.discard_pending()
        if self._newest_was_tried and len(self._qualified) > 1:
            self._free.append(self._qualified.pop())
        self._newest_was_tried = True
        return self._qualified[-1]

    def oldest(self) -> Snapshot:
        """The oldest snapshot that training may go back to."""
        return self._qualified[0]

    def newest(self) -> Snapshot:
        """The newest qualified snapshot, without counting as tried."""
        return self._qualified[-1]

    def _promote(self, snapshot: Snapshot) -> None:
        self._qualified.append(snapshot)
        self._newest_was_tried = False
        while len(self._qualified) > self._keep:
            self._free.append(self._qualified.popleft())
