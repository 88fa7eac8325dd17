"""Lines of code are read for the argument that a cure is to be applied to."""

from __future__ import annotations

import pytest

from lightning_gradguard.core.forensics.location import argument_in


@pytest.mark.parametrize(
    ("code", "function", "argument"),
    [
        ("log_rate = torch.log(rate)", "log", "rate"),
        ("return F.relu(self.net(x).log_().mean())", "log", "self.net(x)"),
        ("y = (p - q).sqrt() + nn.functional.softplus(z)", "sqrt", "(p - q)"),
        ("y = log(p[0])", "log", "p[0]"),
        ("y = x.pow(0.5)", "pow", ""),
        ("y = torch.log(torch.log(x))", "log", ""),
        ("y = torch.log(first_of_all_the_values + second_of_all_the_values)", "log", ""),
        ("if torch.log(x) > 0:", "log", ""),
        ("", "log", ""),
    ],
)
def test_argument_of_the_only_call(code: str, function: str, argument: str) -> None:
    assert argument_in(code, function) == argument
