"""Code is read for the arguments that a cure is to be applied to."""

from __future__ import annotations

import pytest

from lightning_gradguard.core.forensics.arguments import replacement

MASK = "key_padding_mask & ~key_padding_mask.all(-1)"
STD = "x.std(0, unbiased=False)"
LOG = "torch.log(x.clamp_min(1e-6))"


def test_a_method_that_writes_in_place_still_does() -> None:
    cured = replacement("p.grad.div_(n)", "div", "x / y.clamp_min(1e-6)")
    assert cured == ("p.grad.div_(n)", "p.grad.div_(n.clamp_min(1e-6))")


def test_comments_between_the_lines_of_a_call_are_left_out() -> None:
    code = "torch.log(\n    p\n    - 1.0  # shift\n)"
    assert replacement(code, "log", LOG) == ("torch.log(p - 1.0)", LOG.replace("x.", "(p - 1.0)."))


@pytest.mark.parametrize(
    ("code", "function", "cure", "place", "text"),
    [
        ("log_rate = torch.log(rate)", "log", LOG, "torch.log(rate)", "torch.log(rate.clamp_min(1e-6))"),
        ("return F.relu(f(x).log_())", "log", LOG, "f(x).log_()", "torch.log(f(x).clamp_min(1e-6))"),
        ("y = (p - q).log() + exp(z)", "log", LOG, "(p - q).log()", "torch.log((p - q).clamp_min(1e-6))"),
        ("e.log()", "log", LOG, "e.log()", "torch.log(e.clamp_min(1e-6))"),
        ("log(-log(u))", "log", LOG, "log(-log(u))", "torch.log((-log(u)).clamp_min(1e-6))"),
        ("(1 - p) ** g", "pow", "(x.abs() + 1e-6).pow(y)", "(1 - p) ** g", "((1 - p).abs() + 1e-6).pow(g)"),
        ("a / (b + 1e-8)", "div", "x / y.clamp_min(1)", "a / (b + 1e-8)", "a / (b + 1e-8).clamp_min(1)"),
        ("loss / 0", "div", "x / max(y, 1e-6)", "loss / 0", "loss / max(0, 1e-6)"),
        ("2 / std", "reciprocal", "1 / x.clamp_min(1e-6)", "2 / std", "2 / std.clamp_min(1e-6)"),
        ("linalg.eigh(c)", "linalg_eigh", "eigh(x + 1)", "linalg.eigh(c)", "eigh(c + 1)"),
        ("torch.log(input=p)", "log", LOG, "torch.log(input=p)", "torch.log(p.clamp_min(1e-6))"),
        ("h.std(1, correction=1)", "std", STD, "h.std(1, correction=1)", "h.std(1, unbiased=False)"),
        ("h.std(dim=(0, 2))", "std", STD, "h.std(dim=(0, 2))", "h.std((0, 2), unbiased=False)"),
        (
            "torch.inverse(c)",
            "linalg_inv",
            "torch.linalg.inv(x + 1)",
            "torch.inverse(c)",
            "torch.linalg.inv(c + 1)",
        ),
        ("h.std(dim=1)", "std", "x.std(0, unbiased=False)", "h.std(dim=1)", "h.std(1, unbiased=False)"),
        ("h.std()", "std", "x.std(0, unbiased=False)", "h.std()", "h.std(unbiased=False)"),
        ("g /= g.norm()", "div", "x / y.clamp_min(1)", "g /= g.norm()", "g /= g.norm().clamp_min(1)"),
        ("g /= (a + b)", "div", "x / y.clamp_min(1)", "g /= (a + b)", "g /= (a + b).clamp_min(1)"),
        ("h.norm(2, 1)", "linalg_vector_norm", "x.sum(-1, keepdim=True)", "h.norm(2, 1)", "h.sum(1)"),
        ("norm(h, p=2)", "linalg_vector_norm", "x.sum(-1, keepdim=True)", "norm(h, p=2)", "h.sum()"),
        ("h.std(1, keepdim=True)", "std", "x.std(0)", "h.std(1, keepdim=True)", "h.std(1, keepdim=True)"),
        (
            "torch.cat(h).log()",
            "log",
            "torch.log(x + 1)",
            "torch.cat(h).log()",
            "torch.log(torch.cat(h) + 1)",
        ),
        ("h.mean() ** 2", "mean", "x.sum() / len(x)", "h.mean()", "(h.sum() / len(h))"),
    ],
)
def test_a_cure_of_the_arguments_of_a_call(
    code: str, function: str, cure: str, place: str, text: str
) -> None:
    assert replacement(code, function, cure) == (place, text)


@pytest.mark.parametrize(
    ("code", "function", "cure"),
    [
        ("x.pow(3)", "pow", "x.clamp(-1e3, 1e3).pow(2)"),
        ("y = torch.log(torch.log(x))", "log", LOG),
        ("2 ** -h", "pow", "(x.abs() + 1e-6).pow(y)"),
        (f"torch.log({' + '.join(['a_value_of_many'] * 9)})", "log", LOG),
        ("if torch.log(x) > 0:", "log", LOG),
        ("g /= g.norm()", "div", "torch.nan_to_num(x) / y"),
        ("g *= a / b", "mul", "torch.nan_to_num(x) * y"),
        ("q.log_()", "log", LOG),  # the cure would leave q as it is
        ("h.norm(1)", "linalg_vector_norm", "x.sum(-1)"),
        ("h.norm(-1)", "linalg_vector_norm", "x.sum(-1)"),
        ("h.norm(dim=1, dtype=torch.half)", "linalg_vector_norm", "x.sum(-1)"),
        ("h.softmax(1, **options)", "softmax", "torch.softmax(x + 1, -1)"),
        ("", "log", LOG),
    ],
)
def test_a_cure_that_does_not_fit_the_call(code: str, function: str, cure: str) -> None:
    assert replacement(code, function, cure) is None


@pytest.mark.parametrize(
    ("code", "function", "cure", "place", "text"),
    [
        ("Gamma(a, b).log_prob(t)", "Gamma", "y.clamp_min(1)", "t", "t.clamp_min(1)"),
        ("torch.Gamma(a, b).log_prob(t)", "Gamma", "y.clamp_min(1)", "t", "t.clamp_min(1)"),
        ("Normal(a, b).log_prob(t)", "Normal", "Normal(x, y + 1)", "Normal(a, b)", "Normal(a, b + 1)"),
        (
            "F.kl_div(p, q)",
            "kl_div",
            "F.kl_div(x, y, log_target=True)",
            "F.kl_div(p, q)",
            "F.kl_div(p, q, log_target=True)",
        ),
        ("self.att(h, h, h, key_padding_mask=pad)", "forward", MASK, "pad", "pad & ~pad.all(-1)"),
    ],
)
def test_a_cure_of_what_another_function_is_given(
    code: str, function: str, cure: str, place: str, text: str
) -> None:
    assert replacement(code, function, cure, is_inside=True) == (place, text)


def test_a_cure_does_not_fit_another_function_with_other_arguments() -> None:
    assert replacement("self.att(h, h, h, pad)", "forward", MASK, is_inside=True) is None
    assert replacement("self.p.log_prob(t)", "Normal", "Normal(x, y + 1)", is_inside=True) is None


def test_a_class_of_a_module_is_no_method() -> None:
    replaced = replacement("d.Normal(a, b).log_prob(t)", "Normal", "Normal(x, y + 1)", is_inside=True)
    assert replaced == ("d.Normal(a, b)", "Normal(a, b + 1)")


def test_what_a_distribution_is_given_is_replaced_within_its_parentheses() -> None:
    code, cure = "-d.Gamma(a, b).log_prob(t * (n - 1)).mean()", "y.clamp_min(1e-6)"
    given = "d.Gamma(a, b).log_prob(t * (n - 1))"
    place, text = replacement(given, "Gamma", cure, is_inside=True) or ("", "")
    assert code.replace(place, text) == "-d.Gamma(a, b).log_prob((t * (n - 1)).clamp_min(1e-6)).mean()"


CTC = "F.ctc_loss(x, *y, zero_infinity=True)"
CE = "F.cross_entropy(x, y, reduction='sum') / (y != -100).sum().clamp_min(1)"


@pytest.mark.parametrize(
    ("code", "function", "cure", "text"),
    [
        (
            "F.ctc_loss(p, t, n, m, blank=3)",
            "ctc_loss",
            CTC,
            "F.ctc_loss(p, t, n, m, blank=3, zero_infinity=True)",
        ),
        ("ctc_loss(*given)", "cudnn_ctc_loss", CTC, "ctc_loss(*given, zero_infinity=True)"),
        ("F.normalize(h, 2, eps=0)", "normalize", "F.normalize(x, dim=-1, eps=1e-6)", None),
        (
            "F.normalize(h, **how)",
            "normalize",
            "F.normalize(x, dim=-1, eps=1e-6)",
            "F.normalize(h, **how, eps=1e-6)",
        ),
        (
            "F.cross_entropy(h, t, ignore_index=pad)",
            "nll_loss_forward",
            CE,
            "(F.cross_entropy(h, t, reduction='sum', ignore_index=pad) / (t != pad).sum().clamp_min(1))",
        ),
    ],
)
def test_the_options_of_a_call_are_kept(code: str, function: str, cure: str, text: str | None) -> None:
    assert replacement(code, function, cure) == (text and (code, text))
