"""Logarithms in the user's code of what exponentials or products give, rewritten without these."""

from __future__ import annotations

import ast

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
    except (RecursionError, SyntaxError):  # of magic commands in a notebook, for instance
        return []


def _in_logarithms(source: str, fault: tuple[str, int]) -> list[tuple[str, str]]:
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.Module, ast.FunctionDef)))
    here = [n for n in functions if isinstance(n, ast.Module) or fault[1] in _lines(n)][-1]
    scope = _Scope(here, of_tensors=fault[0] in ("mul", *_PRODUCTS))
    found: list[tuple[str, str]] = []
    for statement in ast.walk(here):
        if isinstance(statement, ast.stmt) and not hasattr(statement, "body"):
            calls = (n for n in ast.walk(statement) if isinstance(n, ast.Call))
            logarithms = [(n, *scope.rewritten(n)) for n in calls if _called(n)[0] in ("log", "log1p")]
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
        stored = [n for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        self._bound = [(name.id, name.lineno) for name in stored]
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
        self._computed: set[tuple[str, int]] = set()

    def rewritten(self, node: ast.Call) -> tuple[str, set[tuple[str, int]]]:
        """Returns other code for a logarithm, empty if none is known, and the operations that it replaces."""
        name, value, _ = _called(node)
        self._at, self._computed = node.lineno, set()
        try:
            text = self._log(value)
        except _UnknownError:
            return "", self._computed
        text = f"torch.nn.functional.softplus({text})" if name == "log1p" else text
        return ast.unparse(ast.parse(text, mode="eval")), self._computed

    def _value(self, node: ast.expr) -> ast.expr:
        """Returns the value of a name, if the logarithm can have its code in place of the name."""
        if not isinstance(node, ast.Name):
            return node
        last = max((line for name, line in self._bound if name == node.id and line <= self._at), default=0)
        for name, assigned, end in self._assigned:
            if (name, assigned.lineno) == (node.id, last) and self._at <= end:
                since = {name for name, line in self._bound if last <= line < self._at}
                used = {n.id for n in ast.walk(assigned.value) if isinstance(n, ast.Name)}
                return node if used & since else assigned.value
        return node

    def _log(self, node: ast.expr) -> str:
        """Returns code for the logarithm of an expression."""
        node = self._value(node)
        match node:
            case ast.BinOp(left, ast.Mult(), right):
                self._computed |= {("mul", line) for line in _lines(node)}
                return f"({self._log(left)} + {self._log(right)})"
            case ast.BinOp(left, ast.Div(), right):
                return f"({self._log(left)} - {self._log(right)})"
            case ast.BinOp(left, ast.Add(), right):
                terms = [term for term in (left, right) if not _is_epsilon(term)]
                logarithms = [self._log(term) for term in terms if ast.unparse(term) != "1"]
                if len(logarithms) < len(terms):
                    return f"torch.nn.functional.softplus({logarithms[0]})"
                return f"torch.logaddexp({', '.join(logarithms)})" if len(terms) == 2 else logarithms[0]
            case ast.Subscript(value, index):
                indexed = ast.Subscript(ast.Name("x"), index)
                return f"({self._log(value)}){ast.unparse(indexed)[1:]}"
            case ast.Call():
                return self._log_of_call(node)
        return self._plain(node)

    def _log_of_call(self, node: ast.Call) -> str:
        name, value, options = _called(node)
        if name in (*_EXPONENTIALS, *_PRODUCTS):
            self._computed |= {(name, line) for line in _lines(node)}
        if name == "exp":
            return f"({ast.unparse(value)})"
        if name in _BOUNDED:
            return f"{_BOUNDED[name]}({', '.join([ast.unparse(value), *options])})"
        if name in _PRODUCTS:
            return f"({self._plain(value)}).{_PRODUCTS[name]}({', '.join(options)})"
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

    def _plain(self, node: ast.expr) -> str:
        """Returns the logarithm of an expression that has no exponential."""
        names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        values = [assigned.value for name, assigned, _ in self._assigned if name in names]
        if any(_called(inner)[0] in _EXPONENTIALS for part in (node, *values) for inner in ast.walk(part)):
            raise _UnknownError
        is_tensor = isinstance(node, ast.Call) or (self._of_tensors and not isinstance(node, ast.Constant))
        return f"torch.log({ast.unparse(node) if is_tensor else f'torch.as_tensor({ast.unparse(node)})'})"


def _called(node: ast.AST) -> tuple[str, ast.expr, list[str]]:
    """Returns the name of a function of a tensor, what it is called on, and its other arguments as code."""
    match node:
        case ast.Call(ast.Attribute(value, name), arguments, keywords) if not is_namespace(value):
            arguments = [value, *arguments]
        case ast.Call(ast.Attribute(_, name) | ast.Name(name), arguments, keywords):
            pass
        case _:
            return "", ast.Constant(None), []
    given = [*arguments, *(k.value for k in keywords if k.arg == "input")]
    options = [*given[1:], *(k for k in keywords if k.arg != "input")]
    codes = [ast.unparse(option).replace("axis=", "dim=") for option in options]
    return name, given[0] if given else ast.Constant(None), codes


def _lines(node: ast.stmt | ast.expr) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _is_epsilon(node: ast.expr) -> bool:
    number = node.value if isinstance(node, ast.Constant) else None
    is_small = isinstance(number, float) and abs(number) <= _EPSILON
    return is_small or ("eps" in ast.unparse(node).lower() and isinstance(node, (ast.Name, ast.Attribute)))
