"""`lightning-gradguard fit`: LightningCLI on a module and data of the user's, with the suite in place."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from jsonargparse import ArgumentError

import lightning_gradguard
from lightning_gradguard.cli.user_module import named_class
from lightning_gradguard.runtime.trees import tree_of


class Guarded:
    """Makes a Trainer take in the callbacks of the suite which it was not given."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        given = kwargs.get("callbacks") or []
        callbacks = list(given) if isinstance(given, (list, tuple)) else [given]
        missing = [
            default
            for default in lightning_gradguard.default_callbacks()
            if not any(isinstance(callback, type(default)) for callback in callbacks)
        ]
        kwargs["callbacks"] = callbacks + missing
        super().__init__(*args, **kwargs)


def main(arguments: Sequence[str]) -> None:
    """Train.

    Args:
        arguments: Those of `LightningCLI fit`: `--model`, `--data`, `--trainer.*`, `--config`.

    Raises:
        SystemExit: With code 2 and one short message, if an argument is wrong; with code 1 if training
            diverged.
    """
    tree = tree_of(named_class(arguments))  # loaded ahead of the callbacks, which inherit from what is there
    # short names in YAML, such as `PercentileClipping`, are found among what is loaded
    for name in lightning_gradguard.__all__:
        getattr(lightning_gradguard, name)
    typed = sys.argv
    sys.argv = [typed[0], "fit", *arguments]  # processes of a strategy are started with the same
    try:
        import_module(f"{tree.__name__}.cli").LightningCLI(
            tree.LightningModule,
            tree.LightningDataModule,
            trainer_class=type("GuardedTrainer", (Guarded, tree.Trainer), {}),
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"exit_on_error": False, "fit": {"exit_on_error": False}},
        )
    except ArgumentError as error:
        print(f"lightning-gradguard fit: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except lightning_gradguard.TrainingDivergedError as error:
        print(f"lightning-gradguard fit: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        sys.argv = typed
