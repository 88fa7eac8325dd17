"""The command `lightning-gradguard`: which verb, and what to say when there is no such verb."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_gradguard import __version__
from lightning_gradguard.cli.errors import nearest

VERBS = {
    "fit": "train a module of yours with the suite in place (LightningCLI)",
    "check": "tell whether a module of yours can train, as it is initialized; trains nothing",
    "report": "read what a run left: what went wrong, where, and what to do",
    "replay": "see an incident happen again, from its dossier",
    "demo": "watch a network die, and live with the suite",
    "completion": "print a script that completes all this in bash or zsh",
}
#: Those that run code of the user's.
_ON_A_MODULE = ("fit", "check", "replay")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a verb.

    Args:
        arguments: What was typed after the command; `sys.argv` if `None`.

    Raises:
        SystemExit: With code 2 and one short message, if there is no such verb; else as the verb says.
    """
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("-h", "--help"):
        print(usage())
    elif verb == "--version":
        print(__version__)
    elif verb in VERBS:
        if verb in _ON_A_MODULE:
            # a console script does not look into the folder it is called from, where the user's module is
            sys.path.insert(0, os.getcwd())
            # ahead of the callbacks, which inherit from the package of Lightning that is loaded by then
            import_module("lightning_gradguard.cli.preparse").named_class(rest)
        import_module(f"lightning_gradguard.cli.{verb}").main(rest)
    else:
        hint = nearest(verb, VERBS) or f" There are: {', '.join(VERBS)}."
        print(f"lightning-gradguard: no command '{verb}'.{hint}", file=sys.stderr)
        raise SystemExit(2)


def usage() -> str:
    """What `--help` prints.

    Example:
        >>> "demo" in usage()
        True
    """
    verbs = "\n".join(f"  {verb:<11} {what}" for verb, what in VERBS.items())
    return (
        "lightning-gradguard COMMAND ...\n\n"
        f"{verbs}\n\n"
        "lightning-gradguard COMMAND --help tells what a command takes."
    )
