"""`lightning-gradguard fit`: LightningCLI on a module and data of the user's, with the suite in place."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import lightning_gradguard
from lightning_gradguard.cli.errors import UsageError, one_line, place_of, told
from lightning_gradguard.cli.help_pages import fit_page
from lightning_gradguard.cli.lightning_cli import command_line, typed


def main(arguments: Sequence[str]) -> None:
    """Train.

    Args:
        arguments: Those of `LightningCLI fit`: `--model`, `--data`, `--trainer.*`, `--config`; and for each
            callback of the suite an option by its name.

    Raises:
        SystemExit: With code 2 and one short message, if an argument is wrong; with code 1 if training
            diverged, or was not begun because of the initialization.
    """
    if {"-h", "--help"} & set(arguments):
        print(fit_page())
        return
    with told("fit"), typed(["--help" if a == "--help.all" else a for a in arguments]):
        command = command_line(arguments)
        try:
            command.trainer.fit(**command.fit_arguments)
        except (lightning_gradguard.TrainingDivergedError, lightning_gradguard.InitializationError) as error:
            print(f"lightning-gradguard fit: {error}", file=sys.stderr)
            raise SystemExit(1) from None
        except Exception as error:
            # each package of Lightning has this class; where the user's code has a part in it, it is shown
            if type(error).__name__ == "MisconfigurationException" and not place_of(error):
                raise UsageError(one_line(str(error))) from None
            raise
