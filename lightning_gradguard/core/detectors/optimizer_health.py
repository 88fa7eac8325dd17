"""Detection from finite steps that weights are bad: divergence, and collapse; and alarms on spikes."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal

from lightning_gradguard.core.detectors.spike import SPIKE_THRESHOLD, SpikeAlarm, SpikeDetector

#: Steps whose medians are compared for a divergence, and that a collapse must last.
EVIDENCE_STEPS = 10
#: Medians of so many steps, the latest, are not compared with: a divergence must not hide behind its
#: beginning.
REFERENCE_DELAY = 10
#: Ratio of losses below which nothing is a divergence.
MIN_LOSS_RATIO = 1.5
#: Steps that a spike of loss and norm lasts before weights are suspected.
SPIKE_PATIENCE = 10
#: Ratio to all that was seen, of loss times norm, from which on training may have diverged.
DIVERGENCE_RATIO = 300.0
#: The same for adversarial optimizers, whose losses may rise tenfold in healthy training.
ADVERSARIAL_DIVERGENCE_RATIO = 1e6
#: Spreads above the median from which on a loss or norm of an adversarial optimizer is a spike: losses of a
#: healthy GAN (`python -m benchmarks.faults --part false-alarms`) rise with their norms by up to 5.1.
ADVERSARIAL_SPIKE_THRESHOLD = 6.0
#: Ratio to the first loss below which a run has made progress.
PROGRESS = 0.9
#: Steps after which a run without progress is suspected, and again after as many.
NO_PROGRESS_STEPS = 50
#: Share of the progress since the first step that must be lost for a suspicion.
LOST = 0.5
#: First steps, in which a loss is compared with the very first one until it was once below this share of it,
#: and the ratio below which it has not risen.
FIRST_STEPS, LEARNED, EARLY_LOSS_RATIO = 20, 0.2, 1.2
#: Share of the decrease of the loss that a spike of one step gives back; tails of a healthy run give less.
GIVEN_BACK = 0.5
#: Ratio of loss times norm, times the distance of the weights (1 at most), from which on that is a
#: divergence; docs/evidence_rates.md has those of healthy programs.
EARLY_RISE = 20.0
#: Faults of steps whose numbers are finite.
Anomaly = Literal[
    "",
    "loss_spike",
    "lasting_spike",
    "divergence",
    "early_rise",
    "worse_than_first",
    "no_progress",
    "lost_progress",
    "gradient_collapse",
]


class DivergenceDetector:
    """Measures by how much loss and gradient norm exceed all that training has seen.

    The medians of ten steps are compared with the highest such medians that are at least a hundred steps old,
    and with the very first step, which precedes all updates. The result is the ratio of losses, if it is at
    least one and a half, times the ratio of norms: a small rise of the loss counts if norms explode. A loss
    that rises alone, as in a saturated network, counts as if the norm had risen as much. Losses that grow
    slowly, as those of a Q network do along with its values, raise what they are compared with. Where losses
    fall to 0 or below, they are measured from the lowest, in units of the range seen so far.

    In the first 20 steps, until the loss has once fallen to a fifth, the ratio of a single step to the first
    one is an early rise if the next loss is above the first one, too: after one bad batch it is not.

    Attributes:
        n_steps: Steps so far.
        recent_losses: The last ten.
        made_progress: True if the loss was ever a tenth lower than at the first step.
        lost_progress: True if half of that progress, and a third of the loss, have been lost again.
        early_rise: That ratio; 0 without an early rise.

    Example:
        >>> detector = DivergenceDetector()
        >>> [detector.update(2.0, 1.0) for _ in range(50)][-1]
        0.0
        >>> [detector.update(20.0, 1000.0) for _ in range(10)][-1]
        10000.0
    """

    def __init__(self) -> None:
        self.recent_losses: deque[float] = deque(maxlen=EVIDENCE_STEPS)
        self._norms: deque[float] = deque(maxlen=EVIDENCE_STEPS)
        self._recent: deque[tuple[float, float]] = deque()
        self._highest: tuple[float, float] | None = None
        self._lowest = math.inf
        self._first = 0.0
        self.n_steps = 0
        self._rise = 0.0
        self._has_learned = False
        self.early_rise = 0.0
        self.made_progress = self.lost_progress = False

    @property
    def suspicion(self) -> Anomaly:
        """Suspicion after each 50 steps without progress."""
        is_due = self.n_steps > 0 and self.n_steps % NO_PROGRESS_STEPS == 0
        if not is_due or self.made_progress or self._first <= 0:
            return ""
        return (
            "worse_than_first" if median(self.recent_losses) > MIN_LOSS_RATIO * self._first else "no_progress"
        )

    def update(self, loss: float, total_norm: float) -> float:
        """Adds a step with finite numbers; returns the ratio to what was seen, 0 without a rise."""
        if self._highest is None:
            self._highest, self._first = (loss, total_norm), loss
        self.recent_losses.append(loss)
        self._norms.append(total_norm)
        self.n_steps += 1
        self._has_learned |= loss < LEARNED * self._first
        is_first = self.n_steps <= FIRST_STEPS and self._first > 0 and not self._has_learned
        self.early_rise = self._rise if loss > self._first else 0.0
        self._rise = self._ratio(loss, total_norm, *self._highest, EARLY_LOSS_RATIO) if is_first else 0.0
        is_due = self.n_steps % EVIDENCE_STEPS == 0
        self.lost_progress = False
        # no median is above the largest
        may_rise = is_due or self._ratio(max(self.recent_losses), 0.0, *self._highest) > 0
        if len(self.recent_losses) < EVIDENCE_STEPS or not may_rise:
            return 0.0
        now = (median(self.recent_losses), median(self._norms))
        ratio = self._ratio(*now, *self._highest)
        if is_due:
            if self.made_progress and self._lowest > 0 and self.n_steps > NO_PROGRESS_STEPS:
                lost = self._lowest + LOST * (self._first - self._lowest)
                self.lost_progress = now[0] > max(lost, MIN_LOSS_RATIO * self._lowest)
            self._lowest = min(self._lowest, now[0])
            self.made_progress |= now[0] < self._first - (1 - PROGRESS) * abs(self._first)
            self._recent.append(now)
            if len(self._recent) > REFERENCE_DELAY:
                loss, total_norm = self._recent.popleft()
                self._highest = (max(self._highest[0], loss), max(self._highest[1], total_norm))
        return ratio

    def gives_back(self, loss: float) -> bool:
        """True for a loss with which half of what training has gained is lost."""
        lowest = min(self._lowest, self._first)
        return loss - lowest >= GIVEN_BACK * (self._first - lowest)

    def jumps(self, loss: float) -> bool:
        """True for a loss that rises above the last ones by more than these differ."""
        highest, lowest = max(self.recent_losses, default=0.0), min(self.recent_losses, default=0.0)
        return loss - highest > highest - lowest

    def accept_rise(self) -> None:
        """Takes the highest of the last steps for what training has seen, and for its progress so far."""
        if not self.recent_losses:
            return
        loss, norm = max(self.recent_losses), max(self._norms)
        highest_loss, highest_norm = self._highest or (loss, norm)
        self._highest = (max(highest_loss, loss), max(highest_norm, norm))
        self._first = max(self._first, loss)
        if self._lowest > 0:
            self._lowest = loss

    def forget(self) -> None:
        """Discards the last steps after a rollback: they were made with other weights."""
        self.recent_losses.clear()
        self._norms.clear()
        self.n_steps -= self.n_steps % EVIDENCE_STEPS

    def state_dict(self) -> dict[str, Any]:
        """Returns the last steps, and what they are compared with."""
        return {
            "losses": list(self.recent_losses),
            "norms": list(self._norms),
            "recent": list(self._recent),
            "start": self._highest,
            "lowest": self._lowest,
            "first": self._first,
            "n_steps": self.n_steps,
            "made_progress": self.made_progress,
            "rise": self._rise,
            "has_learned": self._has_learned,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues with saved steps; those of version 0.5 have less."""
        self.recent_losses = deque(state_dict["losses"], maxlen=EVIDENCE_STEPS)
        self._norms = deque(state_dict["norms"], maxlen=EVIDENCE_STEPS)
        self._recent = deque(state_dict.get("recent", ()))
        self._highest = state_dict["start"]
        self._lowest = state_dict.get("lowest", math.inf)
        self._first = state_dict.get("first", 0.0)
        self.n_steps = state_dict.get("n_steps", len(self.recent_losses))
        self.made_progress = state_dict.get("made_progress", True)
        self._rise, self._has_learned = state_dict.get("rise", 0.0), state_dict.get("has_learned", True)

    def _ratio(
        self,
        loss: float,
        total_norm: float,
        highest_loss: float,
        highest_norm: float,
        least: float = MIN_LOSS_RATIO,
    ) -> float:
        if min(self._lowest, highest_loss) > 0:
            loss_ratio = loss / highest_loss
        else:
            lowest = min(self._lowest, highest_loss)
            scale = max(highest_loss - lowest, abs(self._first))
            loss_ratio = (loss - lowest) / scale if scale > 0 else 0.0
        norm_ratio = total_norm / highest_norm if highest_norm > 0 else 0.0
        return loss_ratio * max(norm_ratio, loss_ratio) if loss_ratio >= least else 0.0


class CollapseDetector:
    """Detects that no weight matrix has a gradient any more.

    When all units of a layer are dead, no weight matrix gets a gradient, while the last bias still does. Ten
    such steps in a row, after a step with gradients, are a collapse; training does not recover from it.

    Example:
        >>> detector = CollapseDetector()
        >>> any(detector.update(is_collapsed) for is_collapsed in [False] + [True] * 9)
        False
        >>> detector.update(True)
        True
    """

    def __init__(self) -> None:
        self._had_gradients = False
        self._in_a_row = 0

    def update(self, is_collapsed: bool) -> bool:
        """Adds a step; returns True if the gradients have collapsed."""
        self._had_gradients = self._had_gradients or not is_collapsed
        self._in_a_row = self._in_a_row + 1 if is_collapsed and self._had_gradients else 0
        return self._in_a_row >= EVIDENCE_STEPS

    def forget(self) -> None:
        """Starts counting again after a rollback."""
        self._in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns whether there were gradients, and the number of steps without."""
        return {"was_alive": self._had_gradients, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self._had_gradients = state_dict["was_alive"]
        self._in_a_row = state_dict["in_a_row"]


class OptimizerHealth:
    """Detects from finite steps of one optimizer, perhaps an adversarial one, that its weights may be bad.

    Attributes:
        spiking: Consecutive steps with a spike of both loss and norm.
    """

    def __init__(self, is_adversarial: bool) -> None:
        self._is_adversarial = is_adversarial
        self._bound = ADVERSARIAL_DIVERGENCE_RATIO if is_adversarial else DIVERGENCE_RATIO
        threshold = ADVERSARIAL_SPIKE_THRESHOLD if is_adversarial else SPIKE_THRESHOLD
        self._loss, self._norm = SpikeDetector(threshold), SpikeDetector(threshold)
        self._alarm = SpikeAlarm()
        self._divergence = DivergenceDetector()
        self._collapse = CollapseDetector()
        self.spiking = 0

    @property
    def early_rise(self) -> float:
        """That of `DivergenceDetector`; 0 for adversarial optimizers."""
        return 0.0 if self._is_adversarial else self._divergence.early_rise

    @property
    def highest_recent_loss(self) -> float:
        """The largest of the last ten losses."""
        return max(self._divergence.recent_losses)

    @property
    def n_steps(self) -> int:
        """Steps since the start of the run."""
        return self._divergence.n_steps

    def update(self, loss: float, total_norm: float, is_collapsed: bool) -> Anomaly:
        """Adds a step; returns its anomaly, the most certain first.

        A lasting spike, a divergence and a lack of progress are suspicions: the caller must see if the
        weights have moved that far.
        """
        loss_spikes, norm_spikes = self._loss.update(loss), self._norm.update(total_norm)
        if self._is_adversarial and not self.spiking:
            loss_spikes &= self._divergence.jumps(loss)  # a drift is how players learn
        self.spiking = self.spiking + 1 if loss_spikes and norm_spikes else 0
        # of two players, one loses what the other wins
        is_rise = self._loss.is_persistent and not self._is_adversarial
        ratio = self._divergence.update(loss, total_norm)
        # one step of a heavy tail that leaves training where it was is no spike
        is_spike = self.spiking > 1 or (self.spiking > 0 and self._divergence.gives_back(loss))
        is_new_spike = self._alarm.update(is_spike or is_rise)
        if self._collapse.update(is_collapsed):
            return "gradient_collapse"
        if ratio >= self._bound:
            return "divergence"
        if self.early_rise > EARLY_RISE:
            return "early_rise"
        if not self._is_adversarial and (suspicion := self._divergence.suspicion):
            return suspicion
        if self.spiking >= SPIKE_PATIENCE:
            return "lasting_spike"
        if is_new_spike:
            return "loss_spike"
        has_lost = self._divergence.lost_progress and not self._is_adversarial
        return "lost_progress" if has_lost else ""

    def accept_rise(self) -> None:
        """Compares later losses with the last ones, which the data have raised."""
        self._divergence.accept_rise()

    def on_rollback(self) -> None:
        """Discards what was detected of weights that are no longer in use."""
        self.spiking = 0
        self._divergence.forget()
        self._collapse.forget()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every detector."""
        return {
            "loss": self._loss.state_dict(),
            "norm": self._norm.state_dict(),
            "alarm": self._alarm.state_dict(),
            "divergence": self._divergence.state_dict(),
            "collapse": self._collapse.state_dict(),
            "spiking": self.spiking,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from a saved state."""
        self._loss.load_state_dict(state_dict["loss"])
        self._norm.load_state_dict(state_dict["norm"])
        if "alarm" in state_dict:  # version 0.5 has none
            self._alarm.load_state_dict(state_dict["alarm"])
        self._divergence.load_state_dict(state_dict["divergence"])
        self._collapse.load_state_dict(state_dict["collapse"])
        self.spiking = state_dict["spiking"]
