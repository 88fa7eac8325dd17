"""Messages on the console, above the progress bar, through the logger `lightning_gradguard`.

Interventions have the level WARNING, everything else INFO. The usual calls of `logging` turn messages off, or
send them elsewhere, whatever is done with Lightning's own logger.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm

from lightning_gradguard.runtime.lightning_packages import is_instance_by_name
from lightning_gradguard.runtime.logging.hyperparameters import Configured

LOGGER = logging.getLogger("lightning_gradguard")


class _AboveBar(logging.Handler):
    """Prints above the progress bar, or to standard error if there is none."""

    def emit(self, record: logging.LogRecord) -> None:
        if LOGGER.propagate and _prints(logging.getLogger()):
            return  # `logging.basicConfig` was called, or the like: the root logger prints it
        bar = getattr(record, "progress_bar", None)
        if bar is None:
            sys.stderr.write(record.getMessage() + "\n")
        elif not is_instance_by_name(bar, "TQDMProgressBar"):
            bar.print(record.getMessage())
        elif getattr(Tqdm, "_instances", True):
            # the `print` of this bar drops messages while the bar is not on the screen
            Tqdm.write(record.getMessage())
        else:
            sys.stdout.write(record.getMessage() + "\n")


def _prints(logger: logging.Logger) -> bool:
    screens = (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
    return any(getattr(handler, "stream", None) in screens for handler in logger.handlers)


LOGGER.addHandler(_AboveBar())


def _is_shown(level: int) -> bool:
    """True for the level of the logger or, if it has none, for that of a root logger that prints, or INFO."""
    if LOGGER.level == logging.NOTSET and not _prints(logging.getLogger()):
        return level >= logging.INFO and level > logging.root.manager.disable
    return LOGGER.isEnabledFor(level)


def shell_command(command: str) -> str:
    """Returns a command of this environment as it can be typed: by path if the shell does not find its name.

    Example:
        >>> shell_command("no-such-command")
        'no-such-command'
    """
    own = Path(sys.executable).with_name(command)
    if shutil.which(command) is not None or not own.exists():
        return command
    return relative_to_cwd(own)


def relative_to_cwd(path: Path) -> str:
    """Returns a path relative to the current folder, if it lies below that.

    Example:
        >>> relative_to_cwd(Path.cwd() / "lightning_logs"), relative_to_cwd(Path("runs"))
        ('lightning_logs', 'runs')
    """
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def print_message(trainer: pl.Trainer, message: str, level: int = logging.INFO) -> None:
    """Logs a message, after the name of the suite, on the first rank, above the progress bar if there is one.

    An INFO message is dropped if a callback of the suite is not `verbose`.
    """
    callbacks: Sequence[object] = trainer.callbacks  # type: ignore[attr-defined]
    is_quiet = any(isinstance(callback, Configured) and not callback.verbose for callback in callbacks)
    if trainer.is_global_zero and _is_shown(level) and not (is_quiet and level < logging.WARNING):
        bar = trainer.progress_bar_callback
        shown = bar if bar is not None and getattr(bar, "is_enabled", True) else None
        text, extra = "gradguard: %s", {"progress_bar": shown}
        LOGGER.handle(LOGGER.makeRecord(LOGGER.name, level, "", 0, text, (message,), None, extra=extra))


def print_last_message(trainer: pl.Trainer, message: str) -> None:
    """Prints a message when training has ended, below the progress bar."""
    bar = trainer.progress_bar_callback
    if (
        is_instance_by_name(bar, "RichProgressBar")
        and (progress := getattr(bar, "progress", None)) is not None
    ):
        progress.stop()  # before its own hook, which may run later
    print_message(trainer, message)
