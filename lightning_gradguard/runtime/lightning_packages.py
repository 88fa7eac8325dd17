"""Lightning's two packages, `pytorch_lightning` and `lightning.pytorch`, which have the same classes."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.utilities.rank_zero import rank_zero_module  # type: ignore[attr-defined]

#: Folders with code that is never the user's: Lightning's packages, and this one.
FRAMEWORKS = (
    *(
        str(Path(spec.origin).parent)
        for name in ("pytorch_lightning", "lightning", "lightning_fabric")
        if (spec := find_spec(name)) is not None and spec.origin is not None
    ),
    str(Path(__file__).parent),
)


def lightning_package_of(module_class: Any) -> ModuleType:
    """Returns the package whose Trainer a module needs: `lightning.pytorch` or `pytorch_lightning`."""
    other = sys.modules.get("lightning.pytorch")
    if other is None or not isinstance(module_class, type):
        return pl
    return other if issubclass(module_class, other.LightningModule) else pl


def is_instance_by_name(thing: object, name: str) -> bool:
    """True for an instance of a class of Lightning, of either package, or of a subclass."""
    return name in [kind.__name__ for kind in type(thing).__mro__]


def without_output(package: ModuleType) -> dict[str, Any]:
    """Returns arguments with which a Trainer of a package prints and writes nothing."""
    logger = import_module(f"{package.__name__}.loggers.logger")
    return {
        "logger": logger.DummyLogger(),  # accepts all that the user's step may log
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }


def callback_base_class() -> type[pl.Callback]:
    """Returns the class for callbacks to inherit: that of both packages where both are loaded by now.

    The command line of each package accepts only its own callbacks.
    """
    other = sys.modules.get("lightning.pytorch")
    if other is None:
        return pl.Callback
    # the package that was loaded first is the user's, and so are the levels that were set of its loggers
    first = next(name for name in sys.modules if name in {"lightning.pytorch", "pytorch_lightning"})
    rank_zero_module.log = logging.getLogger(f"{first}.utilities.rank_zero")
    return type("Callback", (pl.Callback, other.Callback), {})
