"""The command `lightning-gradguard`, which runs one of its verbs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_gradguard import __version__
from lightning_gradguard.cli.messages import usage_errors_reported
from lightning_gradguard.core.arguments import nearest

VERBS = {
    "fit": "train your own module with the suite in place (LightningCLI)",
    "check": "check that your own module can train, as it is initialized; trains nothing",
    "treat": "find by experiment what makes your own module train, within a budget",
    "report": "report on runs from their logs: what went wrong, where, and the remedy",
    "replay": "reproduce an incident from its dossier",
    "demo": "train a network that fails alone, and learns with the suite",
    "completion": "print a script that completes all this in bash or zsh",
}
#: Verbs that import a module of the user's.
_MODULE_VERBS = ("fit", "check", "replay", "treat")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a verb with the arguments of the command, `sys.argv` by default."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        verbs = "\n".join(f"  {name:<11} {description}" for name, description in VERBS.items())
        print(
            f"usage: lightning-gradguard COMMAND ...\n\n{verbs}\n\n"
            "`lightning-gradguard COMMAND --help` shows the options of a command, "
            "`lightning-gradguard --version` the version."
        )
    elif verb == "--version":
        print(__version__)
    elif verb in VERBS:
        if verb in _MODULE_VERBS:
            # a console script does not search the current folder, where the user's module is
            sys.path.insert(0, os.getcwd())
            # ahead of the callbacks, whose base class depends on the package of Lightning that comes first
            with usage_errors_reported(verb):
                rest = import_module("lightning_gradguard.cli.parsing.user_source").import_once(rest)
        import_module(f"lightning_gradguard.cli.{verb}").main(rest)
    else:
        hint = nearest(verb, VERBS) or f" There are: {', '.join(VERBS)}."
        print(f"lightning-gradguard: no command '{verb}'.{hint}", file=sys.stderr)
        raise SystemExit(2)
