"""Steps at which the heat map of gradient norms is logged."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl

from lightning_gradguard.core import tags
from lightning_gradguard.runtime.logging.heat_map import GradientHistory
from lightning_gradguard.runtime.logging.metrics import log_figure

#: Numbers of logged steps after which the first heat maps are drawn, so that there is one early on.
EARLY_COLUMNS = (2, 10)


class HeatMapSchedule:
    """Logs a heat map of the first steps, one every so many steps, 0 for none, and one when training ends."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._history = GradientHistory()
        self._drawn = -1

    def clear(self) -> None:
        """Forgets the logged steps."""
        self._history = GradientHistory()

    def append(self, trainer: pl.Trainer, step: int, norms: Mapping[str, float]) -> None:
        """Adds a logged step, and logs the heat map if it is due."""
        if not self.every_n_steps or not norms:
            return
        self._history.append(step, norms)
        is_due = (step + 1) % self.every_n_steps == 0
        if is_due or (len(self._history) in EARLY_COLUMNS and step < self.every_n_steps):
            self._drawn = step
            log_figure(trainer, tags.HEAT_MAP, self._history.draw, step)

    def finish(self, trainer: pl.Trainer) -> None:
        """Logs the last heat map, unless it is logged already, and forgets the logged steps."""
        last = self._history.last_step
        if len(self._history) >= EARLY_COLUMNS[0] and last != self._drawn:
            log_figure(trainer, tags.HEAT_MAP, self._history.draw, last)
        self.clear()
