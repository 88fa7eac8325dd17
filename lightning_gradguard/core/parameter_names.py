"""Names of modules and parameters, how Python spells them, and the patterns that select them."""

from __future__ import annotations

import keyword
import warnings
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from lightning_gradguard.core.arguments import nearest

if TYPE_CHECKING:  # reports spell names without torch
    from torch import nn
    from torch.optim import Optimizer


def parameter_names(pl_module: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[nn.Parameter, str]:
    """Returns names as the module gives them, without the prefixes of wrappers.

    One of the `parameters` that the module does not hold is called `parameter.<i>`.
    """
    names = {p: f"parameter.{i}" for i, p in enumerate(parameters)}
    for name, parameter in pl_module.named_parameters():
        names[parameter] = plain_name(name)
    return names


def plain_name(name: str) -> str:
    """Returns a parameter's name without the prefixes of `torch.compile` and FSDP1."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def code_of(name: str, model: nn.Module | None = None) -> str:
    """Returns the expression on `model` that is a module or a parameter, to be pasted.

    Args:
        name: As `named_modules` or `named_parameters` has it, without the prefixes of wrappers.
        model: The module that the name is of; if `None`, a number is taken for an index.

    Example:
        >>> code_of("net.2.weight"), code_of("heads.a-b.weight"), code_of("")
        ('model.net[2].weight', "model.get_submodule('heads.a-b').weight", 'model')
    """
    expression, parent, path = "model", model, ""
    for part in filter(None, name.split(".")):
        path = f"{path}.{part}".lstrip(".")
        index = _index_of(part, parent)
        parent = getattr(parent, part, None)
        if index is not None:
            expression += f"[{index!r}]"
        elif part.isidentifier() and not keyword.iskeyword(part):
            expression += f".{part}"
        else:
            expression = f"model.get_submodule({path!r})"
    return expression


def _index_of(part: str, parent: nn.Module | None) -> int | str | None:
    """Returns what a container has its child under, which is the position for one that was sliced."""
    if parent is None:
        return int(part) if part.isdecimal() else None
    from torch import nn

    if isinstance(parent, (nn.ModuleDict, nn.ParameterDict)):
        return part
    if not isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ParameterList)):
        return None
    children = [*parent._modules, *parent._parameters]
    return children.index(part) if part.isdecimal() and part in children else None


def match_names(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """Returns the names that a pattern selects: a parameter's name, a module's, or a shell-style wildcard.

    Example:
        >>> match_names(["head.weight", "body.0.weight", "body.0.bias"], ["head", "*.bias"])
        ['head.weight', 'body.0.bias']
    """
    patterns = list(patterns)
    return [name for name in names if any(name.startswith(f"{p}.") or fnmatchcase(name, p) for p in patterns)]


def warn_unmatched(
    argument: str, patterns: Iterable[str] | None, pl_module: nn.Module, optimizers: Iterable[Optimizer]
) -> None:
    """Warns about patterns of an argument that select no parameter, with or without a gradient.

    The optimizers may also train parameters that the module does not hold.
    """
    names = set(parameter_names(pl_module, []).values())
    for optimizer in optimizers:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        names.update(parameter_names(pl_module, parameters).values())
    unknown = [pattern for pattern in patterns or () if not match_names(names, [pattern])]
    modules = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."}
    warn_unknown(argument, unknown, names | modules)


def warn_unknown(argument: str, unknown: Iterable[str], valid: Iterable[str]) -> None:
    """Warns about each unknown name, with the valid name that is nearest."""
    valid = sorted(valid)
    for name in unknown:
        message = f"{argument}: {name!r} matches nothing in the module.{nearest(name, valid)}"
        warnings.warn(message, stacklevel=3)
