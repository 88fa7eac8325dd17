"""A program of two processes: failing networks under DDP, diagnosed; rank 0 decides, and both publish.

Run by `launch_on`; each rank writes the incidents of its callbacks into the folder.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from lightning_gradguard import TrainingDiagnosis
from tests.callbacks.test_training_diagnosis import Keeping, Task, biased, deep
from tests.tasks import Listener, batches, fit


def main(folder: Path) -> None:
    """Trains, and writes what was published on this rank."""
    found = []
    for module in (Task(biased(deep(nn.ReLU, 4), 2, -20.0)), Keeping()):
        listener = Listener()
        strategy = DDPStrategy(process_group_backend="gloo")
        fit(module, batches(8), [TrainingDiagnosis(), listener], devices=2, strategy=strategy)
        found += [(one.kind, one.cause, one.step, one.where[0]) for one in listener.found]
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
