"""Names of parameters, and the patterns that select them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn


def parameter_names(pl_module: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, str]:
    """Returns names as the module gives them, without what wrappers insert.

    Args:
        pl_module: The module in training.
        parameters: Those that need a name; one that the module does not hold is called `parameter.<i>`.
    """
    names = {p: f"parameter.{i}" for i, p in enumerate(parameters)}
    for name, parameter in pl_module.named_parameters():
        names[parameter] = plain_name(name)
    return names


def plain_name(name: str) -> str:
    """Returns a parameter's name without what `torch.compile` and FSDP1 insert.

    Example:
        >>> plain_name("net._fsdp_wrapped_module.weight")
        'net.weight'
    """
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def match_names(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Returns the names that a pattern selects: a parameter's name, a module's, or a shell-style wildcard.

    Example:
        >>> match_names(["head.weight", "body.0.weight", "body.0.bias"], ["head", "*.bias"])
        ['head.weight', 'body.0.bias']
    """
    patterns = list(patterns)
    return [name for name in names if any(name.startswith(f"{p}.") or fnmatchcase(name, p) for p in patterns)]
