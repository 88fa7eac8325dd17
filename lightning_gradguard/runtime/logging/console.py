"""Messages on the console, above the progress bar."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks.progress.tqdm_progress import Tqdm
from pytorch_lightning.utilities import rank_zero_info

from lightning_gradguard.runtime.lightning_packages import is_instance_by_name


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


def print_message(trainer: pl.Trainer, message: str) -> None:
    """Prints a message once, above the progress bar if there is one."""
    bar = trainer.progress_bar_callback
    if bar is None or not getattr(bar, "is_enabled", True):
        rank_zero_info(message)
    elif trainer.is_global_zero:
        # the `print` of this bar drops messages while the bar is not on the screen
        (Tqdm.write if is_instance_by_name(bar, "TQDMProgressBar") else bar.print)(message)


def print_last_message(trainer: pl.Trainer, message: str) -> None:
    """Prints a message when training has ended, below the progress bar."""
    bar = trainer.progress_bar_callback
    if (
        is_instance_by_name(bar, "RichProgressBar")
        and (progress := getattr(bar, "progress", None)) is not None
    ):
        progress.stop()  # before its own hook, which may run later
    print_message(trainer, message)
