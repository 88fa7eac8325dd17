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
    """How a command of this environment is typed: by its path, where the shell does not find it by its name.

    Example:
        >>> as_typed("no-such-command")
        'no-such-command'
    """
    own = Path(sys.executable).with_name(command)
    if shutil.which(command) is not None or not own.exists():
        return command
    return relative_to_cwd(own)


def relative_to_cwd(path: Path) -> str:
    """A path as it is shortest to type: from the current folder, where it lies below that.

    Example:
        >>> from_here(Path.cwd() / "lightning_logs"), from_here(Path("runs"))
        ('lightning_logs', 'runs')
    """
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def print_message(trainer: pl.Trainer, message: str) -> None:
    """Tell the person at the console, once, above the progress bar where there is one."""
    bar = trainer.progress_bar_callback
    if bar is None or not getattr(bar, "is_enabled", True):
        rank_zero_info(message)
    elif trainer.is_global_zero:
        # the `print` of this bar swallows what is said while it is not on the screen
        (Tqdm.write if is_instance_by_name(bar, "TQDMProgressBar") else bar.print)(message)


def print_last_message(trainer: pl.Trainer, message: str) -> None:
    """Tell the person at the console when training has ended, below the progress bar."""
    bar = trainer.progress_bar_callback
    if (
        is_instance_by_name(bar, "RichProgressBar")
        and (progress := getattr(bar, "progress", None)) is not None
    ):
        progress.stop()  # it stays until its own turn to end, which may come later
    print_message(trainer, message)
