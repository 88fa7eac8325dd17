"""Replaces calls in the user's code that are at fault, for the patches that are prescribed."""

from __future__ import annotations

import ast

#: Losses that expect what another one gives, by their own name.
_WITH_LOG_SOFTMAX = {"nll_loss": "cross_entropy", "NLLLoss": "CrossEntropyLoss"}
#: Namespaces whose functions take the tensor as their first argument.
_NAMESPACES = ("torch", "F", "functional", "nn")


def patched_code(fault: str, node: ast.expr) -> str:
    """Returns the code of a call, or of a list of modules, without its fault; empty if only a text helps."""
    if isinstance(node, ast.Call):
        return patched_call(fault, node)
    return f"torch.nn.Module{'Dict' if isinstance(node, ast.Dict) else 'List'}({ast.unparse(node)})"


def patched_call(fault: str, call: ast.Call) -> str:
    """Returns the code of a call without its fault; empty if only a text describes the remedy.

    Example:
        >>> call = ast.parse("self.net(x).softmax(1)", mode="eval").body
        >>> patched_call("softmax_before_loss", call)
        'self.net(x)'
        >>> call = ast.parse("nn.Sigmoid()", mode="eval").body
        >>> patched_call("unreachable_targets", call)
        'nn.Identity()'
    """
    owner, _, name = ast.unparse(call.func).rpartition(".")
    if fault in ("softmax_before_loss", "unreachable_targets", "detached"):
        if "oss" in name or name == "cross_entropy":
            return ""
        return f"{owner}.Identity()".lstrip(".") if name[0].isupper() else _given(call, owner)
    if fault == "saturating_activations":
        return f"torch.nn.functional.gelu({_given(call, owner)})"
    if fault == "not_log_probabilities" and name in _WITH_LOG_SOFTMAX:
        return _called(call, owner, _WITH_LOG_SOFTMAX[name])
    if fault == "single_class" and name == "Softmax":
        return f"{owner}.Sigmoid()".lstrip(".")
    if fault == "broadcast_targets" and len(call.args) == 2:
        output, target = map(ast.unparse, call.args)
        rest = "".join(f", {ast.unparse(word)}" for word in call.keywords)
        return f"{ast.unparse(call.func)}({output}, {target}.view_as({output}){rest})"
    if fault == "not_in_optimizer":
        return _with_argument(call, 0, "params", "self.parameters()")
    if fault == "learning_rate_too_low":
        return _with_argument(call, 1, "lr", "1e-3")
    return ""


def _given(call: ast.Call, owner: str) -> str:
    """Returns the tensor that a function or a method is called on."""
    is_method = isinstance(call.func, ast.Attribute) and owner.rpartition(".")[2] not in _NAMESPACES
    if is_method:
        return owner
    return ast.unparse(call.args[0]) if call.args else ""


def _called(call: ast.Call, owner: str, name: str) -> str:
    arguments = ", ".join([*map(ast.unparse, call.args), *map(ast.unparse, call.keywords)])
    return f"{owner}.{name}({arguments})".lstrip(".")


def _with_argument(call: ast.Call, position: int, name: str, value: str) -> str:
    """Returns a call with another value of an argument, by position or by name."""
    arguments = [*map(ast.unparse, call.args)]
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if position < len(arguments):
        arguments[position] = value
    else:
        words[name] = value
    named = [f"{key}={text}" if key else f"**{text}" for key, text in words.items()]
    return f"{ast.unparse(call.func)}({', '.join([*arguments, *named])})"
