"""Steps at which the heat map of gradient norms is logged."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl

from lightning_gradguard.core import tags
from lightning_gradguard.runtime.logging.heat_map import GradientHistory
from lightning_gradguard.runtime.logging.metrics import log_figure

#: Logged steps that make a heat map worth reading when training ends.
MIN_COLUMNS = 10


class HeatMapSchedule:
    """Logs a heat map every so many steps, 0 for none, and once more when training ends."""

    def __init__(self, every_n_steps: int) -> None:
        self.every_n_steps = every_n_steps
        self._history = GradientHistory()

    def clear(self) -> None:
        """Forgets the logged steps."""
        self._history = GradientHistory()

    def append(self, trainer: pl.Trainer, step: int, norms: Mapping[str, float]) -> None:
        """Adds a logged step, and logs the heat map if it is due."""
        if not self.every_n_steps or not norms:
            return
        self._history.append(step, norms)
        if self._is_due(step):
            log_figure(trainer, tags.HEAT_MAP, self._history.draw, step)

    def finish(self, trainer: pl.Trainer) -> None:
        """Logs the last heat map, unless it is logged already, and forgets the logged steps."""
        last = self._history.last_step
        if len(self._history) >= MIN_COLUMNS and not self._is_due(last):
            log_figure(trainer, tags.HEAT_MAP, self._history.draw, last)
        self.clear()

    def _is_due(self, step: int) -> bool:
        return (step + 1) % self.every_n_steps == 0
