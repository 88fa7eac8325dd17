"""`lightning-gradguard completion`: a script that makes a shell complete verbs, options and files."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

from lightning_gradguard.cli.main import VERBS

_BASH = """\
# completion of lightning-gradguard for bash; written by `lightning-gradguard completion bash`
_lightning_gradguard() {
    local word=${COMP_WORDS[COMP_CWORD]} options=
    if [[ $COMP_CWORD -eq 1 ]]; then
        mapfile -t COMPREPLY < <(compgen -W "@VERBS@" -- "$word")
        return
    fi
    case ${COMP_WORDS[1]} in
@CASES@
    esac
    if [[ $word == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$word")
    else
        mapfile -t COMPREPLY < <(compgen -f -- "$word")
    fi
}
complete -o filenames -F _lightning_gradguard lightning-gradguard
"""

_ZSH = """\
#compdef lightning-gradguard
# completion of lightning-gradguard for zsh; written by `lightning-gradguard completion zsh`
_lightning_gradguard() {
    local -a options
    if (( CURRENT == 2 )); then
        compadd -- @VERBS@
        return
    fi
    case ${words[2]} in
@CASES@
    esac
    if [[ ${words[CURRENT]} == -* ]]; then
        compadd -- $options
    else
        _files
    fi
}
compdef _lightning_gradguard lightning-gradguard
"""

#: A script, and how it says which options a verb has.
_SHELLS = {
    "bash": (_BASH, '        {verb}) options="{options}" ;;'),
    "zsh": (_ZSH, "        {verb}) options=({options}) ;;"),
}
_PAGE = """\
lightning-gradguard completion bash|zsh

Prints a script; keep it where the shell looks, once:
  lightning-gradguard completion bash > ~/.local/share/bash-completion/completions/lightning-gradguard
  lightning-gradguard completion zsh > "${fpath[1]}/_lightning-gradguard"
Pressing TAB then starts no Python."""


def main(arguments: Sequence[str]) -> None:
    """Print the script.

    Args:
        arguments: The name of the shell.

    Raises:
        SystemExit: With code 2 and one short message, if it is none of those.
    """
    if {"-h", "--help"} & set(arguments):
        print(_PAGE)
    elif len(arguments) == 1 and arguments[0] in _SHELLS:
        print(script(arguments[0], {verb: options_of(verb) for verb in VERBS}), end="")
    else:
        given = " ".join(arguments) or "nothing"
        told = f"name one shell, {' or '.join(_SHELLS)}; given was {given}."
        print(f"lightning-gradguard completion: {told}", file=sys.stderr)
        raise SystemExit(2)


def script(shell: str, options: Mapping[str, Sequence[str]]) -> str:
    """What a shell has to be told.

    Args:
        shell: `"bash"` or `"zsh"`.
        options: By verb.

    Example:
        >>> 'demo) options="--seed" ;;' in script("bash", {"demo": ["--seed"]})
        True
    """
    text, case = _SHELLS[shell]
    cases = "\n".join(case.format(verb=verb, options=" ".join(options[verb])) for verb in options)
    return text.replace("@VERBS@", " ".join(options)).replace("@CASES@", cases)


def options_of(verb: str) -> list[str]:
    """The options of a verb: those that its `--help` lists, of the suite's callbacks, and of the Trainer.

    Args:
        verb: One of the command.
    """
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        import_module(f"lightning_gradguard.cli.{verb}").main(["--help"])
    # an option begins a line, or comes after its short form
    found = re.findall(r"^ +(?:-\w(?: \w+)?, )?(--[\w.]*\w)", page.getvalue(), re.MULTILINE)
    if verb == "fit":
        found += [f"--{name}" for name in _arguments_of_callbacks()]
    if verb in ("fit", "check"):
        trainer = import_module("pytorch_lightning").Trainer
        found += [f"--trainer.{name}" for name in inspect.signature(trainer).parameters]
    placeholders = {"--trainer.NAME", "--model.NAME", "--data.NAME"}
    return sorted({*found, "--help"} - placeholders)


def _arguments_of_callbacks() -> list[str]:
    names = []
    for name, kind in import_module("lightning_gradguard.callbacks.defaults").DEFAULTS.items():
        names += [name, *(f"{name}.{argument}" for argument in inspect.signature(kind).parameters)]
    return names
