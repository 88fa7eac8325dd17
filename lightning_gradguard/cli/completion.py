"""`lightning-gradguard completion`: a script that makes a shell complete commands, options and values."""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from lightning_gradguard.cli.main import VERBS
from lightning_gradguard.cli.messages import UsageError, usage_errors_reported

_EPILOG = """\
Save the script, once, in the folder that the shell searches:
  lightning-gradguard completion bash > ~/.local/share/bash-completion/completions/lightning-gradguard
  lightning-gradguard completion zsh > "${fpath[1]}/_lightning-gradguard"
Completion then starts no Python."""


def main(arguments: Sequence[str]) -> None:
    """Prints the script for a shell."""
    shell = argument_parser().parse_args(arguments).shell
    with usage_errors_reported("completion"):
        if find_spec("shtab") is None:
            raise UsageError("this needs shtab: pip install 'lightning-gradguard[completion]'")
    print(script(shell), end="")


def argument_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="lightning-gradguard completion",
        description="Prints a script that makes a shell complete commands, options and values.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=["bash", "zsh"])
    return parser


def script(shell: str) -> str:
    """Returns the script of shtab for all commands."""
    jsonargparse, shtab = import_module("jsonargparse"), import_module("shtab")
    parser = jsonargparse.ArgumentParser(prog="lightning-gradguard")
    verbs = parser.add_subcommands()
    for verb, description in VERBS.items():
        command = import_module(f"lightning_gradguard.cli.{verb}").argument_parser()
        if not isinstance(command, jsonargparse.ArgumentParser):
            for action in command._actions:
                if action.type is Path:
                    action.complete = shtab.FILE
            command = jsonargparse.ArgumentParser(parents=[command], add_help=False)
        verbs.add_subcommand(verb, command, help=description)
    if hasattr(parser, "get_completion_script"):
        return str(parser.get_completion_script(f"shtab-{shell}"))
    # before, jsonargparse could print it only
    with contextlib.redirect_stdout(io.StringIO()) as printed, contextlib.suppress(SystemExit):
        parser.parse_args([f"--print_shtab={shell}"])
    return printed.getvalue()
