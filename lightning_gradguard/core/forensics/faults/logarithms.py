"""Logarithms in the user's code of what exponentials or products give, rewritten without these."""

from __future__ import annotations

import ast
import re

import torch

from lightning_gradguard.core.forensics.arguments import enclosed, is_namespace, source_of

#: Characters of code, beyond which a sentence is easier to read.
_MAX_CODE = 240
#: A number up to this is added to keep a logarithm finite.
_EPSILON = 1e-3
#: Methods that move elements, and change none.
_MOVES = (
    *("diag", "diagonal", "expand", "flatten", "gather", "index_select", "masked_select", "permute"),
    *("reshape", "squeeze", "t", "transpose", "unsqueeze", "view"),
)
#: Functions with the sum of logarithms as their own.
_PRODUCTS = {"prod": "sum", "cumprod": "cumsum"}
_BOUNDED = {"softmax": "torch.log_softmax", "sigmoid": "torch.nn.functional.logsigmoid"}
_EXPONENTIALS = ("exp", *_BOUNDED)
#: Options that the functions of the other form lack.
_OPTIONS = re.compile(r"^\*|\bdtype\b|\bout=|torch\.(float|double|half|bfloat)")
#: Functions that return another number each time.
_RANDOM = re.compile("rand|dropout|bernoulli|multinomial|poisson|gumbel|^normal$")


class _UnknownError(Exception):
    """The logarithm has no other form."""


def in_logarithms(source: str, line: int, operation: str = "exp") -> list[tuple[str, str]]:
    """Finds the logarithms of what a line computes, and what gives them without overflow and underflow.

    Args:
        source: Of a file or a function.
        line: Number in it of the line with the operation.
        operation: `exp`, `softmax`, `sigmoid`, `mul`, `prod` or `cumprod`.

    Returns:
        The code of each logarithm of the statement, and the code to use in its place; empty if one of them
        has no such form.

    Example:
        >>> in_logarithms("-torch.log(torch.exp(pos) / torch.exp(neg).sum(1))", 1)
        [('torch.log(torch.exp(pos) / torch.exp(neg).sum(1))', '(pos - torch.logsumexp(neg, 1))')]
    """
    try:
        return _in_logarithms(source, (operation, line))
    except Exception:  # of code that no rule foresees, as magic commands in a notebook
        return []


def _in_logarithms(source: str, fault: tuple[str, int]) -> list[tuple[str, str]]:
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Module, ast.FunctionDef)))
    here = [n for n in functions if isinstance(n, ast.Module) or fault[1] in _lines(n)][-1]
    scope = _Scope(here, of_tensors=fault[0] in ("mul", *_PRODUCTS))
    found: list[tuple[str, str]] = []
    for statement in ast.walk(here):
        if isinstance(statement, ast.stmt) and not hasattr(statement, "body"):
            calls = (n for n in ast.walk(statement) if isinstance(n, ast.Call))
            logs = (n for n in calls if _called(n)[0] in ("log", "log1p"))
            logarithms = [(n, *scope.rewritten(n, statement)) for n in logs]
            if any(fault in computed for _, _, computed in logarithms):
                found += [
                    (source_of(source, node), text)
                    for node, text, computed in logarithms
                    if fault in computed or any(name in _EXPONENTIALS for name, _ in computed)
                ]
    is_readable = all(0 < len(text) < _MAX_CODE for _, text in found)
    return [(code, enclosed(text, code)) for code, text in dict(found).items()] if is_readable else []


class _Scope:
    """A function, in which a name stands for the value that it is assigned before."""

    def __init__(self, node: ast.AST, *, of_tensors: bool) -> None:
        self._of_tensors = of_tensors  # and of no numbers
        self._bound = _written(node)
        loops = (n for n in ast.walk(node) if isinstance(n, (ast.For, ast.While)))
        self._loops = [_lines(loop) for loop in loops]
        parts = (getattr(parent, name, None) for parent in ast.walk(node) for name in ("body", "orelse"))
        blocks: list[list[ast.stmt]] = [block for block in parts if isinstance(block, list)]
        #: Each assignment of a name, with the last line of its block.
        self._assigned = [
            (statement.targets[0].id, statement, block[-1].end_lineno or 0)
            for block in blocks
            for statement in block
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
        ]
        self._at = 0
        self._is_term = False
        self._within: set[str] = set()  # names that the statement of the logarithm gives values of its own
        self._computed: set[tuple[str, int]] = set()

    def rewritten(self, node: ast.Call, statement: ast.stmt) -> tuple[str, set[tuple[str, int]]]:
        """Returns other code for a logarithm, empty if none is known, and the operations that it replaces."""
        name, value, _ = _called(node)
        self._at, self._computed, self._is_term = statement.lineno, set(), False
        self._within = {name for name, _ in _written(getattr(statement, "value", statement))}
        try:
            text = self._term(value) if name == "log1p" else self._log(value)
        except _UnknownError:
            return "", self._computed
        text = f"torch.nn.functional.softplus({text})" if name == "log1p" else text
        return ast.unparse(ast.parse(text, mode="eval")), self._computed

    def _value(self, node: ast.expr) -> ast.expr:
        """Returns the value of a name, if the logarithm can have its code in place of the name."""
        if not isinstance(node, ast.Name) or node.id in self._within:
            return node
        last = max((line for name, line in self._bound if name == node.id and line < self._at), default=0)
        for name, assigned, end in self._assigned:
            if (name, assigned.lineno) == (node.id, last) and self._at <= end:
                again = [loop for loop in self._loops if self._at in loop and last not in loop]
                changed = {n for n, line in self._bound if any(line in lines for lines in again)}
                since = changed | {n for n, line in self._bound if last <= line < self._at}
                used = {n.id for n in ast.walk(assigned.value) if isinstance(n, ast.Name)}
                is_same = not used & since and name not in changed and _is_repeatable(assigned.value)
                return assigned.value if is_same else node
        return node

    def _log(self, node: ast.expr) -> str:
        """Returns code for the logarithm of an expression."""
        node = self._value(node)
        is_product = isinstance(node, ast.BinOp) and self._of_tensors
        names = (*_EXPONENTIALS, *_PRODUCTS)
        if not (is_product or self._has(node, names)):
            return self._plain(node)
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                self._computed |= {("mul", line) for line in _lines(node)}
                return f"({self._log(left)} + {self._log(right)})"
            case ast.BinOp(left, ast.Div(), right):
                logarithm = self._log(right)
                return f"(-{logarithm})" if _is_one(left) else f"({self._log(left)} - {logarithm})"
            case ast.BinOp(left, ast.Add(), right):
                terms = [term for term in (left, right) if not _is_epsilon(term)]
                logarithms = [self._term(term) for term in terms if not _is_one(term)]
                if not logarithms or len(terms) > len(logarithms) + 1:
                    raise _UnknownError
                if len(logarithms) < len(terms):
                    return f"torch.nn.functional.softplus({logarithms[0]})"
                return f"torch.logaddexp({', '.join(logarithms)})" if len(terms) == 2 else logarithms[0]
            case ast.Subscript(value, index):
                indexed = ast.Subscript(ast.Name("x"), index)
                return f"({self._log(value)}){ast.unparse(indexed)[1:]}"
            case ast.Call():
                return self._log_of_call(node)
        return self._plain(node)

    def _term(self, node: ast.expr) -> str:
        """Returns code for the logarithm of a term, which may be 0 or negative while the sum is not."""
        self._is_term = True
        return self._log(node)

    def _has(self, node: ast.expr, functions: tuple[str, ...]) -> bool:
        """Checks if one of these functions is called in an expression, or in the values of its names."""
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        values = [assigned.value for name, assigned, _ in self._assigned if name in names]
        return any(_called(n)[0] in functions for part in (node, *values) for n in ast.walk(part))

    def _log_of_call(self, node: ast.Call) -> str:
        name, value, options = _called(node)
        if name in (*_EXPONENTIALS, *_PRODUCTS):
            self._computed |= {(name, line) for line in _lines(node)}
        if name == "exp":
            return f"({ast.unparse(value)})"
        if name in _BOUNDED:
            return f"{_BOUNDED[name]}({', '.join([ast.unparse(value), *options])})"
        if name in _PRODUCTS:
            return f"({self._plain(value, is_tensor=True)}).{_PRODUCTS[name]}({', '.join(options)})"
        if name in ("sum", "mean", "cumsum"):
            function = f"torch.log{name.replace('mean', 'sum')}exp"
            shape = ("", options) if options else (".flatten()", ["0"])
            total = f"{function}({', '.join([f'({self._log(value)}){shape[0]}', *shape[1]])})"
            if name != "mean":
                return total
            if any(isinstance(n, ast.Call) and _called(n)[0] != "exp" for n in ast.walk(value)):
                raise _UnknownError  # the number of elements is that of an expression that is computed once
            ones = f"torch.zeros_like({ast.unparse(value)}){shape[0]}"
            return f"({total} - {function}({', '.join([ones, *shape[1]])}))"
        if name in _MOVES:
            return f"({self._log(value)}).{name}({', '.join(options)})"
        return self._plain(node)

    def _plain(self, node: ast.expr, *, is_tensor: bool = False) -> str:
        """Returns the logarithm of an expression that has no exponential."""
        number = node.value if isinstance(node, ast.Constant) else None
        is_positive = isinstance(number, (int, float)) and number > 0
        if self._has(node, _EXPONENTIALS) or (self._is_term and not is_positive):
            raise _UnknownError
        is_tensor |= isinstance(node, ast.Call) and is_namespace(node.func)
        return f"torch.log({ast.unparse(node) if is_tensor else f'torch.as_tensor({ast.unparse(node)})'})"


def _called(node: ast.AST) -> tuple[str, ast.expr, list[str]]:
    """Returns the name of a function of a tensor, what it is called on, and its other arguments as code."""
    match node:
        case ast.Call(ast.Attribute(value, name), arguments, keywords) if not is_namespace(value):
            is_module = _root(value) == "self" and any(isinstance(n, ast.Name) for n in arguments)
            if is_module or _root(value) in ("math", "np", "numpy") or ast.unparse(value) == "self":
                return "", ast.Constant(None), []
            arguments = [value, *arguments]
        case ast.Call(ast.Attribute(_, name) | ast.Name(name), arguments, keywords):
            if isinstance(node.func, ast.Name) and name in ("sum", *_PRODUCTS):  # of Python
                return "", ast.Constant(None), []
        case _:
            return "", ast.Constant(None), []
    given = [*arguments, *(k.value for k in keywords if k.arg == "input")]
    options = [*given[1:], *(k for k in keywords if k.arg != "input")]
    codes = [ast.unparse(option).replace("axis=", "dim=") for option in options]
    is_known = bool(given) and not any(map(_OPTIONS.search, codes)) and bool(codes or name != "softmax")
    return (name, given[0], codes) if is_known else ("", ast.Constant(None), [])


def _written(node: ast.AST) -> list[tuple[str, int]]:
    """Returns the names that code assigns, or whose values it may change, with the lines."""
    found = []
    for n in ast.walk(node):
        if isinstance(n, ast.arg):
            found.append((n.arg, n.lineno))
        elif isinstance(n, (ast.Name, ast.Attribute, ast.Subscript)) and not isinstance(n.ctx, ast.Load):
            found.append((_root(n), n.lineno))
        elif isinstance(n, ast.Call) and (
            re.search(r"[^_]_$", ast.unparse(n.func)) or any(k.arg in ("out", "inplace") for k in n.keywords)
        ):
            found += [(name.id, n.lineno) for name in ast.walk(n) if isinstance(name, ast.Name)]
    return found


def _is_repeatable(node: ast.expr) -> bool:
    """Checks that code gives the same number when it runs once more, as functions of tensors do."""
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        function = call.func
        owner = function.value if isinstance(function, ast.Attribute) else None
        name = function.attr if isinstance(function, ast.Attribute) else ast.unparse(function)
        of = torch.Tensor if owner is not None and not is_namespace(owner) else torch
        is_known = (owner is not None and of is torch) or hasattr(of, name) or name == "len"
        if _RANDOM.search(name) or not is_known or (owner is not None and ast.unparse(owner) == "self"):
            return False
    return True


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def _lines(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _is_one(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 1


def _is_epsilon(node: ast.expr) -> bool:
    number = node.value if isinstance(node, ast.Constant) else None
    is_small = isinstance(number, float) and abs(number) <= _EPSILON
    return is_small or ("eps" in ast.unparse(node).lower() and isinstance(node, (ast.Name, ast.Attribute)))
