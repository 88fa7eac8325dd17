"""The kinds of changes, and the facts that hold for all changes of a kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lightning_gradguard.core.remedies.surgery.activations import ACTIVATIONS
from lightning_gradguard.core.remedies.surgery.initializers import INITIALIZERS

ChangeKind = Literal[
    "replace_activation",
    "rnn_to_gru",
    "add_normalization",
    "add_residual",
    "standardize_input",
    "scale_output",
    "initialize",
    "orthogonal_recurrent",
    "gate_bias",
    "learning_rate",
    "constant_rate",
    "warm_up",
    "clipping",
    "weight_norm",
    "weight_decay",
    "epsilon",
    "precision",
]
Argument = int | float | str | list[str]
#: What a change alters: structure or weights of the module; optimizers as they are configured; the steps, by
#: a callback of its own; or an argument of the Trainer, which has the name of the kind.
Alters = Literal["structure", "weights", "optimizer", "steps", "trainer"]


@dataclass(frozen=True)
class KindOfChange:
    """Facts that hold for all changes of a kind.

    Args:
        alters: What such a change alters.
        size: How much it alters a program, from 1 to 5: training, then initialization, then architecture. Of
            treatments that are as good, the smallest is adopted.
        arguments: Arguments with their defaults; `None` is found in the module.
        needs_one_optimizer: True if it is not tried under manual optimization and with several optimizers,
            where parts of the module may be trained against one another.
    """

    alters: Alters
    size: int
    arguments: Mapping[str, Argument | None]
    needs_one_optimizer: bool = False


#: Each kind; those of the module in the order in which several of them are applied.
KINDS: Mapping[ChangeKind, KindOfChange] = {
    "replace_activation": KindOfChange(
        "structure", 3, {"to": "relu", "modules": None}, needs_one_optimizer=True
    ),
    "rnn_to_gru": KindOfChange("structure", 5, {"modules": None}, needs_one_optimizer=True),
    "add_normalization": KindOfChange(
        "structure", 4, {"norm": "auto", "modules": None, "norms": None}, needs_one_optimizer=True
    ),
    "add_residual": KindOfChange("structure", 4, {"weight": None, "modules": None}, needs_one_optimizer=True),
    "standardize_input": KindOfChange("structure", 2, {"modules": None}, needs_one_optimizer=True),
    "scale_output": KindOfChange(
        "structure", 2, {"mean": 0.0, "std": 1.0, "modules": None}, needs_one_optimizer=True
    ),
    "initialize": KindOfChange(
        "weights", 2, {"to": "kaiming", "seed": 0, "modules": None, "activations": None}
    ),
    "orthogonal_recurrent": KindOfChange("weights", 2, {"gain": 1.0, "seed": 0, "modules": None}),
    "gate_bias": KindOfChange("weights", 2, {"value": 1.0, "input_value": None, "modules": None}),
    "learning_rate": KindOfChange("optimizer", 1, {"scale": 1.0}),
    "constant_rate": KindOfChange("optimizer", 1, {}, needs_one_optimizer=True),
    "warm_up": KindOfChange("optimizer", 1, {"steps": 100}),
    "clipping": KindOfChange("steps", 1, {"max_norm": 1.0}),
    "weight_norm": KindOfChange("steps", 1, {"max_norm": 3.0}),
    "weight_decay": KindOfChange("optimizer", 1, {"value": 0.01}, needs_one_optimizer=True),
    "epsilon": KindOfChange("optimizer", 1, {"value": 1e-4}, needs_one_optimizer=True),
    "precision": KindOfChange("trainer", 1, {"value": "32-true"}, needs_one_optimizer=True),
}
#: Arguments that are lists, which `resolve` finds.
FOUND = ("modules", "norms", "activations")
#: Values of the arguments that have few.
CHOICES: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("replace_activation", "to"): ACTIVATIONS,
    ("add_normalization", "norm"): ("auto", "batch", "layer"),
    ("initialize", "to"): INITIALIZERS,
}
