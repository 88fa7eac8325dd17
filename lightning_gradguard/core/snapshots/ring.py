"""A ring of snapshots, whose memory is recycled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

from lightning_gradguard.core.snapshots.snapshot import Snapshot

#: Good steps after which a pending snapshot is qualified.
GOOD_STEPS = 10
#: A snapshot whose loss is higher than at the trusted one before by this share of it is not trusted.
WORSE = 0.5
#: Share of the loss at the start below which a run has learned.
LEARNED = 0.9
#: Snapshots in a row that are not trusted, after which the level of the loss counts as changed for good; and
#: those that have not learned, after which the start is far.
PATIENCE = 4


class SnapshotRing:
    """The last qualified snapshots, and one that is pending.

    A snapshot is *qualified* when ten good steps have followed it, and *pending* until then. A qualified
    one is *trusted* if the loss is not worse than at the trusted one before: a run that drifts into a
    divergence takes snapshots on the way. The last trusted one is kept while up to four follow that are not,
    and the one of the start while up to four follow whose loss is as high: units may be dying in these.
    Memory is recycled: at most `keep + 1` snapshots exist.

    Args:
        keep: Number of qualified snapshots that are kept.
        device: See `Snapshot`.

    Attributes:
        pending: The pending snapshot, if there is one.
    """

    def __init__(self, keep: int, device: str = "cpu") -> None:
        self._keep = keep
        self._device = device
        self._qualified: deque[Snapshot] = deque()
        self._free: list[Snapshot] = []
        self.pending: Snapshot | None = None
        self._start: Snapshot | None = None
        self._newest_was_tried = False
        self._untrusted_in_a_row = 0
        self._since_start = 0

    def capture(self, fill: Callable[[Snapshot], None], *, qualified: bool = False) -> None:
        """Takes a snapshot, which `fill` writes and which replaces the pending one.

        It is qualified by definition as the state at the first training batch.
        """
        self.discard_pending()
        snapshot = self._free.pop() if self._free else Snapshot(self._device)
        fill(snapshot)
        if qualified:
            self._promote(snapshot)
            self._start, self._since_start = snapshot, 0
        else:
            self.pending = snapshot

    def good_step(self, loss: float | None = None) -> None:
        """Counts a good step; the last of those that a pending snapshot needs qualifies it.

        Without losses, every qualified snapshot is trusted.
        """
        if self.pending is None:
            if loss is not None and self._qualified and not self._qualified[-1].losses:
                self._qualified[-1].losses.append(loss)
            return
        self.pending.good_steps += 1
        if loss is not None:
            self.pending.losses.append(loss)
        if self.pending.good_steps >= GOOD_STEPS:
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
        self._start = None
        self._newest_was_tried = False
        self._untrusted_in_a_row = 0

    def __len__(self) -> int:
        """Returns the number of qualified snapshots."""
        return len(self._qualified)

    def roll_back(self, *, trusted: bool = False, learned: bool = False) -> Snapshot:
        """Returns the snapshot to restore: the newest qualified one, or the one before if that was tried.

        Args:
            trusted: True to discard those that are newer than the newest trusted one first.
            learned: True to discard those since the start while none has learned.
        """
        self.discard_pending()
        is_discarded, to_start = False, learned and self._start is not None
        while len(self._qualified) > 1 and (to_start or (trusted and not self._qualified[-1].is_trusted)):
            self._free.append(self._qualified.pop())
            is_discarded = True
        if self._newest_was_tried and not is_discarded and len(self._qualified) > 1:
            self._free.append(self._qualified.pop())
        self._newest_was_tried = True
        self._untrusted_in_a_row = 0
        return self._qualified[-1]

    def oldest(self) -> Snapshot:
        """Returns the oldest qualified snapshot."""
        return self._qualified[0]

    def newest(self) -> Snapshot:
        """Returns the newest qualified snapshot; does not count as a try."""
        return self._qualified[-1]

    def trusted(self) -> Snapshot:
        """Returns the newest trusted snapshot, or the oldest if there is none."""
        return next((s for s in reversed(self._qualified) if s.is_trusted), self._qualified[0])

    def _promote(self, snapshot: Snapshot) -> None:
        if self._qualified:
            before = self.trusted()
            snapshot.is_trusted = not _has_risen(snapshot.losses, before.losses, WORSE)
            self._since_start += 1
            start_losses = [] if self._start is None else self._start.losses
            if self._since_start > PATIENCE or not _has_risen(snapshot.losses, start_losses, LEARNED - 1):
                self._start = None
            self._untrusted_in_a_row = 0 if snapshot.is_trusted else self._untrusted_in_a_row + 1
            if self._untrusted_in_a_row > PATIENCE:
                snapshot.is_trusted, self._untrusted_in_a_row = True, 0
        self._qualified.append(snapshot)
        self._newest_was_tried = False
        while len(self._qualified) > self._keep:
            # the last trusted one is worth more than the newer ones that are not
            keeps_oldest = self._keep > 1 and self._qualified[0] in (self.trusted(), self._start)
            oldest = self._qualified[1] if keeps_oldest else self._qualified[0]
            self._qualified.remove(oldest)
            self._free.append(oldest)
            self._start = None if oldest is self._start else self._start


def _has_risen(losses: list[float], before: list[float], share: float) -> bool:
    if not (losses and before):
        return False
    level, level_before = median(losses), median(before)
    return level - level_before > share * abs(level_before)
