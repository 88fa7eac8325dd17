"""The arguments of the call or operator of the user's code that ran an operation, as source code."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from typing import NamedTuple

#: Characters of an argument, beyond which advice is easier to read without it.
MAX_ARGUMENT = 100
#: What functions of torch are called on, and no argument of theirs.
_NAMESPACES = ("torch", "nn", "F", "functional", "linalg", "special")
#: Names of functions whose operation has another one.
_NAMES = {
    "to_copy": ("half", "to", "type"),
    "linalg_vector_norm": ("norm", "vector_norm"),
    "nll_loss_forward": ("cross_entropy",),
    "cudnn_ctc_loss": ("ctc_loss",),
    "pow": ("pow", "square"),
    "linalg_inv": ("inv", "inverse"),
    "native_layer_norm": ("layer_norm",),
    "native_group_norm": ("group_norm",),
    "lgamma": ("lgamma", "gammaln"),
    "digamma": ("digamma", "psi"),
    **{name: (name, f"arc{name[1:]}") for name in ("acos", "asin", "acosh", "asinh", "atan", "atanh")},
    **dict.fromkeys(("div", "true_divide"), ("div", "divide", "true_divide")),
    **{name: (name, longer) for name, longer in (("mul", "multiply"), ("sub", "subtract"))},
}
_ATOMS = (ast.Constant, ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.Tuple, ast.List)
#: One dimension, or several.
_DIMENSIONS = r"-?\d|[\[(]-?\d(, -?\d)*,?[\])]"
_OPERATORS: dict[type[ast.operator], tuple[str, ...]] = {
    ast.Div: ("div", "true_divide", "reciprocal"),
    ast.Pow: ("pow", "float_power"),
    ast.Mult: ("mul",),
    ast.Add: ("add",),
    ast.Sub: ("sub",),
    ast.MatMult: ("mm", "addmm", "bmm", "mv", "dot", "matmul"),
}


class Call(NamedTuple):
    """A call or operator.

    Args:
        code: All of it.
        arguments: Its arguments, each ready to be used in an expression; that of a method begin with what it
            is called on. Empty for those that are long.
        keywords: Its keyword arguments.
    """

    code: str
    arguments: tuple[str, ...]
    keywords: dict[str, str]


def call_in(code: str, function: str) -> Call | None:
    """Returns the call of a function of torch, any one if its name is empty, that code is.

    Else, as a line, the code has to have that one and no other.

    Example:
        >>> call_in("loss = -torch.log(rate).mean()", "log")
        Call(code='torch.log(rate)', arguments=('rate',), keywords={})
        >>> call_in("(p + q) / n", "div").arguments
        ('(p + q)', 'n')
    """
    code = code.strip()
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return None
    whole = [statement.value for statement in tree.body if isinstance(statement, ast.Expr)]
    for nodes in (whole, list(ast.walk(tree)) if function else []):
        found = [call for node in nodes if (call := _call(code, node, function)) is not None]
        if found:
            return found[0] if len(found) == 1 else None
    return None


def replacement(code: str, function: str, cure: str, *, is_inside: bool = False) -> tuple[str, str] | None:
    """Returns what to replace in code that calls a function, and by what: a cure of its arguments.

    Args:
        code: Of the user.
        function: Name of the function.
        cure: Code for the arguments `x` and `y`, or for one of its name.
        is_inside: True if the code may call something else that calls the function.

    Returns:
        Code to replace and the cure; `None` if the cure does not fit.

    Example:
        >>> replacement("a / b", "div", "x / y.clamp_min(1e-6)")
        ('a / b', 'a / b.clamp_min(1e-6)')
        >>> replacement("d.Beta(a, b).log_prob(rate)", "Beta", "y.clamp(1e-6, 1 - 1e-6)", is_inside=True)
        ('rate', 'rate.clamp(1e-6, 1 - 1e-6)')
        >>> replacement("scores.softmax(1)", "softmax", "torch.softmax(torch.nan_to_num(x), -1)")
        ('scores.softmax(1)', 'torch.softmax(torch.nan_to_num(scores), 1)')
    """
    call, whole = call_in(code, function), call_in(code, "") if is_inside else None
    placeholders = set(re.findall(r"\b[xy]\b(?!=)", cure))
    takes_value = whole is not None and ".log_prob(" in whole.code and placeholders == {"y"}
    is_caller = takes_value or call is None
    call = whole if is_caller else call
    if call is None:
        return None
    same = None if is_caller else _with_keywords(cure, function, call)
    if same is not None:
        return (call.code, same) if same else None
    given = call.arguments
    if function == "reciprocal" and len(given) == 2:
        cure, given = cure.replace("1 /", f"{given[0]} /"), given[1:]
        call = call._replace(arguments=given)
    named = {} if is_caller and not takes_value else dict(zip(("x", "y"), given, strict=False))
    named |= call.keywords
    used = [name for name in named if re.search(rf"\b{name}\b(?!=)", cure)]
    if not used or placeholders - set(used) or not all(named[name] for name in used):
        return None
    if any(_is_number(named[n]) and re.search(rf"\b{n}\.|nan_to_num\({n}", cure) for n in used):
        return None
    fitting = (cure, "") if is_caller else _with_options(cure, function, call, used)
    if fitting is None:
        return None
    cure, others = fitting
    text = re.sub(rf"\b({'|'.join(used)})\b(?!=)", lambda name: named[name[0]], cure)
    text = f"{text[:-1]}{others})" if others else text
    if is_caller:
        place = named[used[0]]
        is_enclosed = place[0] == "(" and not isinstance(ast.parse(place, mode="eval").body, _ATOMS)
        return (place[1:-1] if is_enclosed else place), text  # the code has its own parentheses there
    parts = _in_place(call.code)
    if parts is None:
        return call.code, enclosed(text, call.code)
    start, before, after = parts
    return (call.code, f"{before}{text.removeprefix(start)}{after}") if text.startswith(start) else None


def _in_place(code: str) -> tuple[str, str, str] | None:
    """Returns how code that writes in place begins as an expression, and what encloses its other operand.

    `None` for any other code: an expression can take its place.
    """
    match ast.parse(code).body[0]:
        case ast.AugAssign(target):
            written = source_of(code, target)
            sign = code[len(written) :].partition("=")[0].strip()
            return f"{written} {sign} ", f"{written} {sign}= ", ""
        case ast.Expr(ast.Call(ast.Attribute(value, name))) if name.endswith("_"):
            if not isinstance(value, ast.Call):  # what a call returns is in no other's hands
                written = source_of(code, value)
                return f"{written} / ", f"{written}.{name}(", ")"
    return None


def _with_keywords(cure: str, function: str, call: Call) -> str | None:
    """Returns a call with the keyword arguments of a cure that differs in nothing else.

    Empty if there is no place for them, `None` for any other cure.
    """
    same, statement = ast.parse(cure, mode="eval").body, ast.parse(call.code).body[0]
    if not (isinstance(same, ast.Call) and _call(cure, same, function) and isinstance(statement, ast.Expr)):
        return None
    new = {str(k.arg): source_of(cure, k.value) for k in same.keywords if k.arg != "dim"}
    is_plain = all(isinstance(a, (ast.Name, ast.Starred)) for a in same.args)
    node = statement.value
    if not (new and is_plain and isinstance(node, ast.Call)) or re.search(r"\b[xy]\b", str(new.values())):
        return None
    if len(call.arguments) > len(same.args) and not isinstance(same.args[-1], ast.Starred):
        return ""
    kept = [k for k in node.keywords if k.arg not in new]
    given = [source_of(call.code, argument) for argument in node.args]
    given += [(f"{k.arg}=" if k.arg else "**") + source_of(call.code, k.value) for k in kept]
    given += [f"{name}={value}" for name, value in new.items()]
    return f"{source_of(call.code, node.func)}({', '.join(given)})"


def _with_options(cure: str, function: str, call: Call, used: Sequence[str]) -> tuple[str, str] | None:
    """Returns a cure with the dimension of a call, and its other options, which are to be the last arguments.

    `None` if there is no place for them.
    """
    options = {name: value for name, value in call.keywords.items() if name not in used}
    if "unbiased=" in cure:
        options.pop("correction", "")  # another name of it
    extra = list(call.arguments[sum(name in used for name in ("x", "y")) :])
    if function == "linalg_vector_norm":  # the order is ahead of the dimension
        orders = [*extra[:1], *(options.pop(name) for name in ("p", "ord") if name in options)]
        extra = extra[1:]
        if set(orders) - {"2"}:
            return None
    extra += [options.pop("dim")] if "dim" in options else []
    has_dimension = _with_dimension(cure, "9") != cure
    if len(extra) > has_dimension or not all(re.fullmatch(_DIMENSIONS, a) for a in extra):
        return None
    if ", keepdim=True" in cure and options.pop("keepdim", "False") == "False":
        cure = cure.replace(", keepdim=True", "")
    cure = _with_dimension(cure, extra[0] if extra else "")
    whole = ast.parse(cure, mode="eval").body
    inner = whole.left if isinstance(whole, ast.BinOp) else whole
    is_alike = isinstance(inner, ast.Call) and _call(cure, inner, function) is not None
    if options and not (is_alike and all(options.values())):
        return None
    others = "".join(f", {name}={value}" for name, value in options.items() if f"{name}=" not in cure)
    if inner is whole or not is_alike:
        return cure, others
    code = source_of(cure, inner)
    cure = cure.replace(code, f"{code[:-1]}{others})").replace("-100", options.get("ignore_index", "-100"))
    return None if "weight" in options else (cure, "")


def enclosed(text: str, code: str) -> str:
    """Returns an expression that can take the place of another one within a third."""
    new, old = (ast.parse(expression, mode="eval").body for expression in (text, code))
    is_alike = isinstance(new, ast.BinOp) and isinstance(old, ast.BinOp) and type(new.op) is type(old.op)
    return text if is_alike or isinstance(new, _ATOMS) else f"({text})"


def _with_dimension(cure: str, dimension: str) -> str:
    """Returns a cure along another dimension, over all of them if it is empty."""
    if dimension:
        return re.sub(r"(?<=[(, =])(-1|0)(?=[),])", dimension, cure)
    return re.sub(r"(?<=\()(-1|0)(, )?(?=\)|unbiased|keepdim)", "", cure)


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"-?\.?\d[\d.e-]*", text))


def _call(code: str, node: ast.AST, function: str) -> Call | None:
    keywords: list[ast.keyword] = []
    match node:
        case ast.BinOp(left, operator, right) if function in _OPERATORS.get(type(operator), ()):
            given = [left, right]
        case ast.AugAssign(left, operator, right) if function in _OPERATORS.get(type(operator), ()):
            given = [left, right]
        case ast.Call(ast.Attribute(value, name), given, keywords) if _is(name, function):
            is_method = not (is_namespace(value) or name[:1].isupper())
            given = [value, *given] if is_method else given
        case ast.Call(ast.Name(name), given, keywords) if _is(name, function):
            pass
        case _:
            return None
    given += [k.value for name in ("input", "other")[len(given) :] for k in keywords if k.arg == name]
    named = {str(k.arg): _argument(code, k.value) if k.arg else "" for k in keywords if k.value not in given}
    source, arguments = source_of(code, node), tuple(_argument(code, part) for part in given)
    is_square = function == "pow" and len(arguments) == 1
    return Call(source, (*arguments, "2") if is_square else arguments, named)


def _is(name: str, function: str) -> bool:
    names = (function, function.removeprefix("linalg_"), function.removeprefix("special_"))
    return not function or name.rstrip("_") in _NAMES.get(function, names)


def is_namespace(node: ast.expr) -> bool:
    """Returns True for what functions of torch are called on, and no argument of theirs."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in _NAMESPACES


def _argument(code: str, node: ast.expr) -> str:
    text = source_of(code, node)
    if len(text) > MAX_ARGUMENT or isinstance(node, ast.Starred):
        return ""
    return text if isinstance(node, _ATOMS) or _is_number(text) else f"({text})"


def source_of(code: str, node: ast.AST) -> str:
    """Returns the source of a part of code, on one line."""
    segment = ast.get_source_segment(code, node) or ""
    return ast.unparse(node) if "\n" in segment else " ".join(segment.split())  # lines may have comments
