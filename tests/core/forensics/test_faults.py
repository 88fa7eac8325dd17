"""Each entry of the table: a program that fails for this reason is told so, and trains with the printed "
"cure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as d
from torch.nn import functional as F

from lightning_gradguard.core.forensics.faults import FAULTS
from lightning_gradguard.core.forensics.faults.logarithms import in_logarithms
from lightning_gradguard.core.forensics.operations import known_fault, short_name, what_made_it_large
from lightning_gradguard.core.forensics.records import OperationRecord, nonfinite_sources
from lightning_gradguard.core.forensics.trace import OperationTrace, is_nonfinite

INF = math.inf
Program = Callable[..., Tensor]
#: Rows of the outputs of the network: the first is the one in which the fault is.
ROWS, COLUMNS = 6, 4


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, COLUMNS)


def outputs(net: nn.Module) -> Tensor:
    """Positive numbers around 1, which depend on the weights."""
    h: Tensor = net(torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1)))
    return h.sigmoid() + 0.5


def first(h: Tensor, value: float) -> Tensor:
    """The same with a constant in the first row."""
    is_first = torch.arange(len(h))[:, None] == 0
    return h * ~is_first + value * is_first


def shifted(h: Tensor, by: float) -> Tensor:
    return h + by * (torch.arange(len(h))[:, None] == 0)


def zero(h: Tensor) -> Tensor:
    return first(h, 0.0)


def one(h: Tensor) -> Tensor:
    return first(h * 0.5, 1.0)


def none(h: Tensor) -> Tensor:
    return h[h > 9]


def masked(h: Tensor) -> Tensor:
    return h.masked_fill(torch.arange(len(h))[:, None] == 0, -INF)


def targets(h: Tensor) -> Any:
    return torch.tensor([[1, 2, 3, 1, 2, 3, 1]]), torch.tensor([ROWS]), torch.tensor([7])


def ignored(h: Tensor) -> Tensor:
    return torch.full((ROWS,), -100)


def square(h: Tensor) -> Tensor:
    return zero(h)[:COLUMNS]


def scores(h: Tensor) -> Tensor:
    """Log-probabilities of which the last one in the first row is masked."""
    hidden = torch.zeros_like(h, dtype=torch.bool)
    hidden[0, -1] = True
    return h.masked_fill(hidden, -INF).log_softmax(-1)


def mean(h: Tensor) -> Tensor:
    return h.mean()


def rated(x: Tensor, y: Tensor) -> Tensor:
    return F.poisson_nll_loss(x, y, log_input=False)


def column(h: Tensor) -> Tensor:
    return h[:, :1]


def attention(mask: Tensor, h: Tensor) -> Tensor:
    torch.manual_seed(0)
    attended: Tensor = nn.MultiheadAttention(COLUMNS, 1, batch_first=True)(*[h[:, None]] * 3, mask)[0]
    return attended


#: Name, the operation that fails, its argument, the other one, and a word of the cause.
CASES: list[tuple[str, Program, Program, Callable[[Tensor], Any] | None, str]] = [
    ("log of 0", torch.log, zero, None, "logarithm of 0"),
    ("log2 of 0", torch.log2, zero, None, "logarithm of 0"),
    ("log10 of 0", torch.log10, zero, None, "logarithm of 0"),
    ("entropy", lambda x: -(x * x.log()), zero, None, "logarithm of 0"),
    ("log of a negative", torch.log, lambda h: shifted(h, -5), None, "negative"),
    ("log with an epsilon in half", lambda x: (x.half() + 1e-8).log(), zero, None, "float16"),
    ("log1p of -1", torch.log1p, lambda h: first(h, -1), None, "log1p"),
    ("xlogy", lambda x, y: torch.xlogy(x, y), lambda h: h, zero, "xlogy"),
    ("xlogy of a number", lambda x, y: torch.xlogy(0.3, y), lambda h: h, zero, "xlogy"),
    ("xlog1py", torch.special.xlog1py, lambda h: h, lambda h: first(h, -1.0), "xlog1py"),
    ("logit of 1", torch.logit, one, None, "logit"),
    ("logit of 0", torch.logit, lambda h: zero(h) * 0.5, None, "logit"),
    ("softmax of a masked row", lambda x: x.softmax(-1), masked, None, "all positions"),
    ("log_softmax of a masked row", lambda x: x.log_softmax(-1), masked, None, "masked"),
    ("logsumexp of a masked row", lambda x: x.logsumexp(-1), masked, None, "masked"),
    ("exp of 100", torch.exp, lambda h: shifted(h, 100), None, "exponent"),
    ("square of exp of 60", lambda x: x.exp().square(), lambda h: shifted(h, 60), None, "exponent"),
    ("log of the sum of exp", lambda x: x.exp().sum(-1).log(), lambda h: shifted(h, 100), None, "logsumexp"),
    (
        "softmax by hand",
        lambda x: x.exp() / x.exp().sum(-1, True),
        lambda h: shifted(h, 100),
        None,
        "exponent",
    ),
    (
        "poisson loss",
        F.poisson_nll_loss,
        lambda h: shifted(h, 100),
        lambda h: torch.ones_like(h),
        "logarithm",
    ),
    ("exp2", torch.exp2, lambda h: shifted(h, 200), None, "exp2"),
    ("expm1", torch.expm1, lambda h: shifted(h, 100), None, "expm1"),
    ("sinh", torch.sinh, lambda h: shifted(h, 100), None, "sinh"),
    ("cosh", torch.cosh, lambda h: shifted(h, -100), None, "sinh"),
    ("matrix exponential", torch.linalg.matrix_exp, lambda h: h[:COLUMNS] + 200, None, "matrix"),
    ("Bessel function", torch.special.i0, lambda h: shifted(h, 100), None, "Bessel"),
    ("exp in half", lambda x: x.half().exp(), lambda h: shifted(h, 15), None, "float16"),
    ("division in half", lambda x, y: x.half() / (y.half() + 1e-8), lambda h: h, zero, "float16"),
    ("0/0", lambda x, y: x / y, zero, zero, "0/0"),
    ("unit vector of 0", lambda x, y: x / y, zero, lambda h: zero(h).norm(dim=-1, keepdim=True), "norm of 0"),
    (
        "standardized constants",
        lambda x, y: (x - x.mean(0)) / y,
        lambda h: h * 0 + 1,
        lambda h: (h * 0 + 1).std(0),
        "standard deviation",
    ),
    (
        "cosine similarity",
        lambda x, y: F.cosine_similarity(x, y, eps=0),
        zero,
        lambda h: h,
        "eps of cosine_similarity",
    ),
    (
        "normalize",
        lambda x: F.normalize(x, dim=-1, eps=0),
        zero,
        None,
        "eps of normalize",
    ),
    ("rms_norm", lambda x, y: F.rms_norm(x, y, eps=0), zero, lambda h: (COLUMNS,), "eps of rms_norm"),
    ("mean with a mask", lambda x: x.mean(), masked, None, "infinity of a mask"),
    ("sum with a mask", lambda x: x.sum(-1), masked, None, "infinity of a mask"),
    (
        "mean of a count",
        lambda x, y: none(x).sum() / y.sum(),
        lambda h: h,
        lambda h: h > 9,
        "empty selection",
    ),
    ("unit vector by hand", lambda x: x / x.square().sum(-1, True).sqrt(), zero, None, "root of 0"),
    ("unit of a power", lambda x, y: x / x**y, zero, lambda h: 0.5, "root of 0"),
    ("inverse of a power", lambda x, y: 1 / x**y, zero, lambda h: 0.5, "root of 0"),
    ("reciprocal of a root", lambda x: x.sqrt().reciprocal(), zero, None, "root of 0"),
    ("reciprocal of a power", lambda x, y: (x**y).reciprocal(), zero, lambda h: 0.5, "root of 0"),
    ("division by 0", lambda x, y: x / y, lambda h: h, zero, "divisor is 0"),
    ("division by a signed 0", lambda x, y: x / y, lambda h: h, lambda h: first(-h, 0), "either sign"),
    ("reciprocal of a signed 0", torch.reciprocal, lambda h: first(-h, 0), None, "either sign"),
    ("division by the number 0", lambda x, y: x / y, lambda h: h, lambda h: 0, "divisor is 0"),
    ("division by a small number", lambda x, y: x / y, lambda h: h, lambda h: 1e-39, "far below 1"),
    ("division by 1e-38", lambda x, y: x * 9 / y, lambda h: h, lambda h: first(h, 1e-38), "far below 1"),
    ("reciprocal", torch.reciprocal, zero, None, "divisor is 0"),
    ("rsqrt of 0", torch.rsqrt, zero, None, "rsqrt of 0"),
    ("rsqrt of a negative", torch.rsqrt, lambda h: shifted(h, -5), None, "negative"),
    ("fmod", torch.fmod, lambda h: h, zero, "remainder"),
    ("remainder", torch.remainder, lambda h: h, zero, "remainder"),
    ("sqrt of a negative", torch.sqrt, lambda h: shifted(h, -5), None, "negative"),
    ("power of a negative", torch.pow, lambda h: shifted(h, -5), lambda h: 1.5, "whole number"),
    (
        "power of a negative, of tensors",
        torch.pow,
        lambda h: shifted(h, -5),
        lambda h: 0.4 * torch.ones_like(h),
        "whole number",
    ),
    ("negative power of 0", torch.pow, zero, lambda h: -1.5, "negative power"),
    (
        "square of 1e20",
        lambda x, y: x**y,
        lambda h: torch.cat([shifted(h, 1e20), 0 * h]),
        lambda h: 2,
        "overflows",
    ),
    ("square of -1e20", lambda x, y: x**y, lambda h: -1e20 * h, lambda h: 2, "overflows"),
    ("product", lambda x: x.prod(), lambda h: shifted(h, 1e20), None, "product"),
    ("cumulative product", lambda x: x.cumprod(-1), lambda h: shifted(h, 1e20), None, "product"),
    ("acos beyond 1", torch.acos, lambda h: first(h * 0.5, 1.1), None, "acos"),
    ("acosh below 1", torch.acosh, lambda h: first(h + 1, 0.5), None, "acosh"),
    ("atanh of 1", torch.atanh, one, None, "atanh"),
    ("erfinv of 1", torch.erfinv, one, None, "erfinv"),
    ("normal quantile", torch.special.ndtri, one, None, "quantile"),
    ("lgamma", torch.lgamma, zero, None, "poles"),
    ("digamma", torch.digamma, zero, None, "poles"),
    ("tan", lambda x: x.tan() ** 6, lambda h: first(h, math.pi / 2), None, "poles"),
    ("entropy of masked scores", lambda x, y: x * y, scores, lambda h: scores(h).exp(), "0 times"),
    ("ratio of masked scores", lambda x, y: (x - y).exp(), scores, lambda h: scores(h) * 1, "inf - inf"),
    (
        "target that is masked",
        lambda x, y: F.nll_loss(x, y),
        scores,
        lambda h: torch.full((ROWS,), COLUMNS - 1),
        "masked",
    ),
    (
        "gather of a target that is masked",
        lambda x, y: -x.gather(1, y[:, None]),
        scores,
        lambda h: torch.full((ROWS,), COLUMNS - 1),
        "masked",
    ),
    ("smallest of what is masked", lambda x: x.min(-1).values, lambda h: -masked(h), None, "throughout"),
    ("largest of what is masked", lambda x: x.amax(-1), masked, None, "throughout"),
    (
        "attention of padding alone",
        attention,
        lambda h: (h[:, :1] * 0 + 1).bool(),
        lambda h: h,
        "all padding",
    ),
    ("temperature of 0", lambda x, y: F.gumbel_softmax(x, tau=y), lambda h: h, lambda h: 0.0, "tau is 0"),
    ("unit vector of 0 in half", lambda x: F.normalize(x.half()), zero, None, "normalize"),
    (
        "probabilities of 0",
        lambda x: torch.distributions.Categorical(probs=x, validate_args=False).entropy(),
        zero,
        None,
        "throughout a row",
    ),
    (
        "scale of a normal distribution",
        lambda x, y: torch.distributions.Normal(x, y, validate_args=False).log_prob(torch.zeros(())),
        lambda h: h,
        lambda h: first(h, 1e-30),
        "bound it",
    ),
    ("mean of nothing", lambda x: x.mean(), none, None, "empty"),
    ("median of nothing", lambda x: x.median(), none, None, "empty"),
    ("squared error of nothing", F.mse_loss, none, lambda h: none(h).detach(), "mean of nothing"),
    ("absolute error of nothing", F.l1_loss, none, lambda h: none(h).detach(), "mean of nothing"),
    (
        "BCE of nothing",
        F.binary_cross_entropy_with_logits,
        none,
        lambda h: none(h).detach(),
        "mean of nothing",
    ),
    (
        "cross entropy of nothing",
        F.cross_entropy,
        lambda h: h[:0],
        lambda h: torch.zeros(0, dtype=torch.long),
        "no sample is left",
    ),
    ("std of nothing", lambda x: x.std(), none, None, "empty"),
    ("std of one sample", lambda x: x.std(0), lambda h: h[:1], None, "one sample"),
    ("var of one sample", lambda x: x.var(0), lambda h: h[:1], None, "one sample"),
    ("var_mean of one sample", lambda x: torch.var_mean(x, 0)[0], lambda h: h[:1], None, "one sample"),
    ("var in half", lambda x: x.half().var(0), lambda h: h * 4e3, None, "float16"),
    ("layer norm without eps", lambda x: F.layer_norm(x, (COLUMNS,), eps=0.0), zero, None, "eps is 0"),
    ("group norm without eps", lambda x: F.group_norm(x, 2, eps=0.0), zero, None, "eps is 0"),
    (
        "CTC",
        lambda x, y: F.ctc_loss(x, *y),
        lambda h: h[:, None].log_softmax(-1),
        targets,
        "longer than its input",
    ),
    ("cross entropy of ignored labels", F.cross_entropy, lambda h: h, ignored, "ignored"),
    (
        "BCE with an infinite target",
        F.binary_cross_entropy_with_logits,
        lambda h: h,
        lambda h: torch.full_like(h, INF),
        "0..1",
    ),
    ("system of equations", lambda x, y: torch.linalg.solve_ex(x, y)[0], square, lambda h: h[:4], "singular"),
    ("inverse", lambda x: torch.linalg.inv_ex(x)[0], square, None, "singular"),
    ("slogdet", lambda x: torch.linalg.slogdet(x)[1], square, None, "singular"),
    ("matmul in half", lambda x, y: x.half() @ y.half(), lambda h: h * 300, lambda h: h.T * 300, "float16"),
    (
        "linear in half",
        lambda x, y: F.linear(x.half(), y.T.half()),
        lambda h: h * 300,
        lambda h: h.T * 300,
        "float16",
    ),
    (
        "bmm in half",
        lambda x, y: x.half()[None].bmm(y.half()[None]),
        lambda h: h * 300,
        lambda h: h.T * 300,
        "float16",
    ),
    (
        "convolution in half",
        lambda x, y: F.conv1d(x.half(), y.half()),
        lambda h: h[:, None] * 300,
        lambda h: 100 * torch.ones(1, 1, 4),
        "float16",
    ),
    ("sum in half", lambda x: x.half().sum(), lambda h: h * 2e4, None, "accumulate"),
    ("cumulative sum in half", lambda x: x.half().cumsum(0), lambda h: h * 2e4, None, "accumulate"),
    ("error in half", F.mse_loss, lambda h: (h * 3e3).half(), lambda h: (h * 0).half(), "error exceeds"),
    ("error of 1e20", F.mse_loss, lambda h: h * 1e20, lambda h: h * 0, "huge"),
    ("sum of two in half", torch.add, lambda h: (h * 3e4).half(), lambda h: (h * 3e4).half(), "accumulate"),
    ("difference in half", torch.sub, lambda h: (h * 3e4).half(), lambda h: (-h * 3e4).half(), "accumulate"),
    ("product in half", torch.mul, lambda h: (h * 300).half(), lambda h: (h * 300).half(), "accumulate"),
    ("cube in half", lambda x, y: x.half() ** y, lambda h: h * 300, lambda h: 3, "float16"),
    (
        "divergence of a normal distribution",
        lambda x, y: torch.distributions.kl_divergence(
            torch.distributions.Normal(x, y, validate_args=False), torch.distributions.Normal(0.0, 1.0)
        ),
        lambda h: h,
        zero,
        "bound it",
    ),
    ("square in half", lambda x, y: x.half().square(), lambda h: h * 300, lambda h: 2, "float16"),
    ("a value too large for half", lambda x: x.half(), lambda h: h * 1e5, None, "does not fit"),
    ("matmul of 1e20", torch.matmul, lambda h: h * 1e20, lambda h: h.T * 1e20, "huge"),
    ("convolution of 1e20", F.conv1d, lambda h: h.T[None] * 1e20, lambda h: h[:, :, None] * 1e20, "huge"),
    ("product of 1e20", torch.mul, lambda h: h * 1e20, lambda h: h * 1e20, "huge"),
    ("addition of 1e38", torch.add, lambda h: h * 2.2e38, lambda h: h * 2.2e38, "huge"),
    ("two masks of the least number", torch.add, lambda h: h * -2.2e38, lambda h: h * -2.2e38, "two masks"),
    ("product of -1e20", lambda x: x.prod(), lambda h: h * -1e20, None, "logarithms"),
    ("difference of 1e38", torch.sub, lambda h: h * 2.2e38, lambda h: h * -2.2e38, "huge"),
    ("sum of 1e38", lambda x: x.sum(-1), lambda h: h * 2e38, None, "huge"),
    # the value is finite, its gradient is not
    ("gradient of sqrt", torch.sqrt, zero, None, "sqrt at 0"),
    ("gradient of a norm by hand", lambda x: x.square().sum(-1).sqrt(), zero, None, "sum of squares"),
    ("gradient of a power", torch.pow, zero, lambda h: 0.3, "power below 1"),
    ("gradient of a power of abs", lambda x, y: x.abs() ** y, zero, lambda h: 0.5, "power below 1"),
    (
        "gradient of an exponent",
        torch.pow,
        lambda h: torch.full_like(h, -2.0),
        lambda h: h * 0 + 2,
        "exponent",
    ),
    ("gradient of acos", torch.acos, one, None, "acos"),
    ("gradient of asin", torch.asin, lambda h: -one(h), None, "acos"),
    ("gradient of a clamped acos", lambda x: x.clamp(-1, 1).acos(), one, None, "acos"),
    ("gradient of acosh", torch.acosh, lambda h: first(h + 1, 1.0), None, "acosh"),
    ("gradient of log", torch.log, lambda h: zero(h) + 1e-45, None, "next to 0"),
    ("entropy by xlogy", torch.xlogy, zero, zero, "xlogy"),
    ("entropy by entr", torch.special.entr, zero, None, "entr"),
    (
        "gradient of a product in half",
        lambda x, y: (x.half() @ y.half()).float() * 1e6,
        lambda h: h,
        lambda h: h.T,
        "gradient exceeds",
    ),
    (
        "gradient of a convolution in half",
        lambda x, y: F.conv1d(x.half(), y.half()).float() * 1e5,
        lambda h: h[:, None],
        lambda h: torch.full((1, 1, 4), 100.0),
        "gradient exceeds",
    ),
    ("gradient of a cast", lambda x: x.half().float() * 1e7, lambda h: h, None, "gradient exceeds"),
    (
        "gradient of a factor in half",
        lambda x, y: (x * y).float() * 1e5,
        lambda h: h.half(),
        lambda h: 100 * torch.ones_like(h).half(),
        "gradient exceeds",
    ),
    ("gradient of hypot", torch.hypot, zero, zero, "hypot"),
    ("where over log", lambda x: torch.where(x > 0, x.log(), 0.0), zero, None, "torch.where"),
    ("where over a division", lambda x: torch.where(x > 0, 1 / x, 0.0), zero, None, "divisor is 0"),
    ("where over sqrt", lambda x: torch.where(x > 0, x.sqrt(), 0.0), zero, None, "torch.where"),
    (
        "where over a quotient",
        lambda x, y: torch.where(y > 0, x / y, torch.zeros_like(x)),
        zero,
        zero,
        "divisor before",
    ),
    ("norm of equal pairs", lambda x: F.relu(0 - x.square().sum(-1).sqrt()), zero, None, "sum of squares"),
    ("where over a power", lambda x, y: torch.where(x > 0, x**y, 0.0), zero, lambda h: -1.5, "power below 1"),
    ("gradient of a geometric mean", lambda x: x.log().mean().exp(), zero, None, "0/0"),
    (
        "gradient of eigenvectors",
        lambda x: torch.linalg.eigh(x)[1],
        lambda h: torch.eye(4) * h.mean(),
        None,
        "Eigenvalues",
    ),
    (
        "gradient of singular vectors",
        lambda x: torch.linalg.svd(x)[0],
        lambda h: torch.eye(4) * h.mean(),
        None,
        "Singular values",
    ),
    ("masked scores over a temperature", lambda x, y: (x / y).softmax(-1), scores, mean, "divisor"),
    ("masked scores times a scale", lambda x, y: (x * y).softmax(-1), scores, mean, "factor"),
    ("negative rate", rated, lambda h: shifted(h, -5), lambda h: torch.ones_like(h), "log_input=True"),
    (
        "weight_norm of a row of zeros",
        lambda x, y: nn.utils.parametrizations._WeightNorm()(y, x),
        zero,
        column,
        "weight_norm",
    ),
    (
        "spectral_norm of zeros",
        lambda x: nn.utils.parametrizations._SpectralNorm(x.detach())(x),
        lambda h: 0 * h,
        None,
        "spectral_norm",
    ),
    ("gradient of QR", lambda x: torch.linalg.qr(x)[1], lambda h: 0 * h[:COLUMNS], None, "inverse"),
]
CASES += [
    (
        "quotient next to 0",
        lambda x: torch.log(torch.exp(x) / torch.exp(x).sum(1, keepdim=True)),
        lambda h: shifted(h, -103),
        None,
        "keep its argument above",
    )
]
CASES += [
    (
        "log of a sigmoid by hand",
        lambda x: torch.log(1 / (1 + torch.exp(x))),
        lambda h: shifted(h, 200),
        None,
        "softplus(x)",
    )
]
CASES += [("log of sigmoid", lambda x: x.sigmoid().log(), lambda h: shifted(h, -200), None, "logsigmoid(x)")]
CASES += [
    (
        "log of 1 - sigmoid",
        lambda x: (1 - x.sigmoid()).log(),
        lambda h: shifted(h, 200),
        None,
        "logsigmoid(-x)",
    )
]
#: Logarithms of what underflows to 0, or next to it, where their gradient overflows.
for place, by, small in (("log", -200.0, 1e-15), ("gradient of log", -95.0, 1e-10)):
    squared = partial(torch.mul, other=small**2)
    tiny, low, far = partial(torch.mul, other=small), partial(torch.add, other=by), by * torch.eye(COLUMNS)[0]
    CASES += [
        (f"{place} of a product", lambda x: x.prod(-1).log(), tiny, None, "factors"),
        (f"{place} of exp", lambda x: x.exp().sum(-1).log(), low, None, "logsumexp"),
        (
            f"{place} of softmax",
            lambda x: x.softmax(-1).log(),
            partial(torch.sub, other=far),
            None,
            "log_softmax",
        ),
        (f"{place} of x * y", lambda x, y: (x * y).log(), squared, squared, "recursion"),
    ]
CASES += [
    (
        "log-probabilities as targets",
        lambda x, y: F.kl_div(x, y, reduction="batchmean"),
        lambda h: h.log_softmax(-1),
        lambda h: h.detach().log_softmax(-1),
        "log_target",
    ),
    (
        "a target at its bound",
        lambda x, y: d.Beta(x, x, validate_args=False).log_prob(y),
        lambda h: h,
        lambda h: zero(0.5 * h.detach()),
        "keep targets inside",
    ),
    (
        "a part of a whole is 0",
        lambda x, y: d.Dirichlet(x, validate_args=True).log_prob(y),
        lambda h: h.sigmoid(),
        lambda h: F.one_hot(h.argmax(-1), h.shape[-1]).to(h),
        "a sum of 1",
    ),
    (
        "a waiting time of 0",
        lambda x, y: d.Gamma(x, x, validate_args=False).log_prob(y),
        lambda h: h,
        lambda h: zero(h.detach()),
        "above 0",
    ),
    ("a divisor of exp", lambda x: 2 / x.exp(), lambda h: h - 200, None, "temperature"),
    ("divided by exp", lambda x: x / x.exp(), lambda h: h - 200, None, "temperature"),
    ("negative determinant", lambda x: torch.logdet(x), lambda h: -h[0].diag()[:3, :3], None, "slogdet"),
    ("determinant of a rank of 1", lambda x: torch.logdet(x), lambda h: -zero(h)[:COLUMNS], None, "slogdet"),
    (
        "an action at its bound",
        lambda x, y: d.TransformedDistribution(
            d.Normal(x, 1.0), [d.TanhTransform()], validate_args=False
        ).log_prob(y),
        lambda h: h,
        lambda h: one(h.detach()),
        "ahead of its transform",
    ),
    (
        "label smoothing over masked classes",
        lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
        lambda h: h.masked_fill(torch.arange(COLUMNS) == 1, -INF),
        lambda h: torch.zeros(ROWS, dtype=torch.long),
        "label_smoothing",
    ),
    (
        "a second derivative of a norm",
        lambda x: torch.autograd.grad(x.norm(dim=-1).exp().sum(), x, create_graph=True)[0],
        zero,
        None,
        "second derivative of a norm",
    ),
    ("correlation of a constant", lambda x: torch.corrcoef(x), zero, None, "little noise"),
    ("covariance of one sample", lambda x: torch.cov(x[:, :1]), lambda h: h, None, "drop_last"),
    ("mean of NaN alone", lambda x: x.nanmean(), lambda h: torch.where(h > 9, h, math.nan), None, "count"),
]
NAMES = [case[0] for case in CASES]


def examined(program: Callable[[Tensor], Tensor]) -> OperationRecord:
    """The operation that made the first nonfinite value of a loss or its gradients."""
    net = network()
    with OperationTrace(net, dict(net.named_parameters())) as trace:
        loss, gradients = loss_and_gradients(net, program)
    nonfinite = next(t for t in (loss, *gradients) if is_nonfinite(t))
    record = trace.record_of(nonfinite)
    assert record is not None
    found = nonfinite_sources(record)[0]
    assert isinstance(found, OperationRecord)
    return what_made_it_large(found, FAULTS)


def loss_and_gradients(net: nn.Module, program: Callable[[Tensor], Tensor]) -> tuple[Tensor, list[Tensor]]:
    loss = program(outputs(net)).float().mean()
    found = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    return loss, [g for g in found if g is not None]


def call(
    f: Callable[..., Tensor], x: Program, y: Callable[[Tensor], Any] | None
) -> Callable[[Tensor], Tensor]:
    return lambda h: f(x(h)) if y is None else f(x(h), y(h))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom", "ignore:reduction")
@pytest.mark.parametrize(("name", "f", "x", "y", "word"), CASES, ids=NAMES)
def test_a_fault_is_told_and_its_cure_trains(
    name: str, f: Program, x: Program, y: Callable[[Tensor], Any] | None, word: str
) -> None:
    record = examined(call(f, x, y))
    fault = known_fault(record, FAULTS)
    assert fault is not None, record
    advice = fault.advice(short_name(record))
    assert word in advice
    assert "(`x` is" not in advice or re.search(r"\bx\b", fault.cure)
    assert record.location is not None
    assert record.location.file == __file__

    def cured(h: Tensor) -> Tensor:
        given, other = x(h), None if y is None else y(h)
        names = {"torch": torch, "F": F, "x": given, "key_padding_mask": given, "y": other}
        result: Any = eval(fault.cure, names)
        result = result[-1] if isinstance(result, tuple) else result
        if isinstance(result, torch.distributions.Distribution):
            result = result.log_prob(torch.zeros(()))
        elif result.dtype == torch.bool:
            result = f(result, other)
        elif fault.cure.startswith("y."):
            result = f(given, result)
        elif fault.cure.startswith("torch.exp(x.clamp_min(-15"):
            result = f(result.log())
        loss: Tensor = result
        return loss

    trains(cured)


def trains(program: Callable[[Tensor], Tensor]) -> None:
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    for _ in range(3):
        loss, gradients = loss_and_gradients(net, program)
        assert not is_nonfinite(loss)
        assert not any(map(is_nonfinite, gradients))
        for parameter, gradient in zip(net.parameters(), gradients, strict=False):
            parameter.grad = gradient
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in net.parameters())


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
def test_every_entry_has_a_case() -> None:
    found = {id(known_fault(examined(call(f, x, y)), FAULTS)) for _, f, x, y, _ in CASES}
    assert [fault.why for fault in FAULTS if id(fault) not in found] == []


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("torch.log(1 - torch.sigmoid(h))", "logsigmoid(-x)"),
        ("torch.log(1 - torch.sigmoid(h)[:, :2])", "logsigmoid(-x)"),
        ("torch.log(torch.sigmoid(h))", "logsigmoid(x)"),
        ("torch.log(torch.ones_like(h) - torch.sigmoid(h))", "clamp_min"),
        ("torch.log(-torch.sigmoid(h) + 1)", "clamp_min"),
        ("torch.log(2 - 2 * torch.sigmoid(h))", "clamp_min"),
        ("torch.log(1 - torch.softmax(h, 1))", "clamp_min"),
        ("torch.log(1 - torch.exp(h.clamp(max=0)))", "clamp_min"),
        ("torch.log(1 - torch.tanh(h))", "clamp_min"),
        ("torch.log(torch.sigmoid(h) * (h < 0).float() + 1 - torch.sigmoid(h))", "clamp_min"),
    ],
)
def test_a_difference_is_0_where_its_terms_are_alike_and_not_by_an_underflow(
    code: str, function: str
) -> None:
    far = 400 * (torch.eye(ROWS, COLUMNS) - torch.eye(ROWS, COLUMNS).roll(1, 1))  # both ends of each function
    record = examined(lambda h: eval(code, {"torch": torch, "h": h + far}))
    fault = known_fault(record, FAULTS)
    assert fault is not None
    assert function in fault.cure, fault


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        ("torch.arccos(h)", "torch.acos(h.clamp(-1 + 1e-6, 1 - 1e-6))"),
        ("h.arcsin()", "torch.asin(h.clamp(-1 + 1e-6, 1 - 1e-6))"),
        ("torch.arctanh(h)", "torch.atanh(h.clamp(-1 + 1e-6, 1 - 1e-6))"),
        ("torch.arccosh(h + 0)", "torch.acosh((h + 0).clamp_min(1 + 1e-6))"),
        ("torch.special.gammaln(h - 1)", "torch.lgamma((h - 1).clamp_min(1e-6))"),
        ("torch.special.psi(h - 1)", "torch.digamma((h - 1).clamp_min(1e-6))"),
        ("h.divide(h - 1)", "(h / torch.where((h - 1).abs() < 1e-6, 1.0, (h - 1)))"),
        ("torch.divide(h, h - 1)", "(h / torch.where((h - 1).abs() < 1e-6, 1.0, (h - 1)))"),
    ],
)
def test_another_name_of_a_function_is_read(code: str, cure: str) -> None:
    record = examined(lambda h: eval(code, {"torch": torch, "h": one(h)}))
    fault = known_fault(record, FAULTS)
    assert fault is not None
    assert fault.advice(short_name(record), code).endswith(f"In place of {code} use {cure}.")


@pytest.mark.parametrize("code", ["h.prod(1)", "torch.cumprod(h, 1)", "h * h"])
@pytest.mark.parametrize(("sign", "is_product"), [(1, True), (-1, False)])
def test_factors_below_0_have_no_logarithms_to_add(code: str, sign: int, is_product: bool) -> None:
    record = examined(lambda h: torch.log(eval(code, {"torch": torch, "h": sign * tiny(h).square()})))
    fault = known_fault(record, FAULTS)
    assert fault is not None
    assert bool(fault.underflow) == is_product


@pytest.mark.parametrize("function", ["asin", "acos"])
def test_a_cure_has_the_function_that_failed(function: str) -> None:
    record = examined(lambda h: getattr(torch, function)(one(h)))
    fault = known_fault(record, FAULTS)
    assert fault is not None
    assert f"torch.{function}(x.clamp(-1 + 1e-6, 1 - 1e-6))" in fault.advice(short_name(record))


@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize(
    ("code", "x"),
    [
        ("9 / h.reciprocal()", zero),
        ("h / h.square().sqrt()", zero),
        ("1 / h.sqrt()", zero),
        ("1 / torch.exp(-h)", lambda h: h + 200.0),
        ("2 * F.l1_loss(h, h + 1) ** 2", none),
        ("2 * F.cross_entropy(h, h.argmax(1)) ** 2", lambda h: h[:0]),
        ("torch.div(h, h).sum() ** 2", zero),
        ("1 / h.mean()", none),
        ("h.mean() ** 2", none),
        ("h.std() * h.sum()", none),
        ("2 * F.mse_loss(h, h + 1) ** 2", none),
        ("h - torch.log(input=h)", zero),
        ("torch.div(h, other=h).sum()", zero),
        ("F.normalize(h, dim=1, eps=0.0)", zero),
        ("h.log_softmax(-1).sum((0, 1))", lambda h: h.masked_fill(torch.arange(COLUMNS) == 1, -INF)),
        ("h - torch.logsumexp(h, -1, keepdim=True)", masked),
        ("torch.fmod(h, h)", zero),
        ("2 * (h + 1) ** 2", lambda h: shifted(h, 1e20)),
        ("2 * (h + 1).square()", lambda h: shifted(h, 1e20)),
        ("(1 - h) / h.square()", zero),
        ("2 + 1 / h", zero),
        ("h.pow(-0.5)", zero),
        ("torch.digamma(h)", zero),
        ("torch.log(h.prod(1)).exp()", lambda h: h * 1e-15),
        ("torch.log(h * h).exp()", lambda h: h * 1e-30),
        ("h + torch.log(torch.exp(h).sum(1, keepdim=True))", lambda h: shifted(h, -200)),
        ("h + torch.log(torch.sum(h.exp(), dim=1, keepdim=True))", lambda h: shifted(h, -200)),
        ("h + torch.log(torch.cumsum(torch.exp(h), dim=0))", lambda h: shifted(h, -200) + 90 * zero(h)),
        ("torch.log(torch.softmax(h, 0))", lambda h: shifted(h, 500)),
        ("torch.linalg.slogdet(h[:4]).logabsdet", zero),
    ],
)
def test_a_cure_pasted_into_a_line_gives_the_number_of_the_line(code: str, x: Program) -> None:
    def run(line: str, h: Tensor) -> Tensor:
        result: Tensor = eval(line, {"torch": torch, "F": F, "h": h})
        return result

    record = examined(lambda h: run(code, x(h)))
    fault = known_fault(record, FAULTS)
    assert fault is not None
    underflow = next((a.underflow for a in record.arguments if fault.underflow and a.underflow), None)
    function = record.called if fault.called else short_name(record)
    function = underflow.operation if underflow else function
    advice = fault.advice(function, code)
    logarithms = in_logarithms(code, 1, function) if underflow else []
    replaced, cure = (logarithms or re.findall(r"In place of (.*) use (.*)\.$", advice))[0]
    assert replaced in code
    h = outputs(network()).detach() + torch.eye(ROWS, COLUMNS)
    torch.testing.assert_close(run(code.replace(replaced, cure), h), run(code, h), rtol=0.05, atol=0.0)


LOGARITHMS = [
    "torch.log(torch.exp(h)) - torch.log(torch.exp(h).sum(1, keepdim=True))",
    "-torch.log(torch.exp(h / 2)[:, 0] / torch.exp(h / 2).sum(1)).mean()",
    "-(h[:, 0].exp().log() - h.exp().sum(axis=1).log())",
    "2 * torch.log((torch.exp(h) * (torch.arange(h.shape[1]) > 0)).sum(1))",
    "torch.log(torch.exp(h).sum(1) * float(h.size(0)) * math.exp(0.5) / h.shape[1])",
    "torch.log(h.exp().mean()) - torch.log(torch.exp(h).mean(1))",
    "torch.log1p(torch.exp(h)) + (1 + torch.exp(h.T)).log().T",
    "torch.log(torch.softmax(h, 1)[:, :2]) - torch.log(h.sigmoid()[:, :2])",
]
FUNCTIONS = [
    ("return torch.log(1 / (1 + torch.exp(-h)))", True),
    ("p = 1 / (1 + torch.exp(h))\nreturn torch.log(p)", True),
    ("p = torch.exp(h[:, 0])\nn = torch.exp(h).sum(1)\nreturn -torch.log(p / (p + 2 * n + 1e-8))", True),
    ("if True:\n  p = torch.exp(h)\nelse:\n  p = 0\nreturn torch.log(p)", False),
    ("p = torch.exp(h)\nh = h / 2\nreturn torch.log(p)", False),
    ("p = torch.exp(h)\np = p * 2\nreturn torch.log(p)", False),
    ("for _ in range(3):\n  p = torch.exp(h)\n  h = torch.log(p) / 2\nreturn h", True),
    ("p = torch.exp(h)\nfor _ in range(3):\n  p = p * 2\nreturn torch.log(p)", False),
    ("return torch.log(torch.exp(h).sum(1) - torch.exp(h[:, 0]))", False),
    ("return torch.log(torch.exp(torch.relu(h)).mean(1))", False),
    # a row without any has the logarithm of the epsilon
    ("return torch.log((torch.exp(h) * (torch.arange(h.shape[1]) > 9)).sum(1) + 1e-8)", False),
    ("return torch.log(torch.exp(h) + 0.5 + torch.tanh(h) / 2)", False),
    ("return torch.log1p(torch.exp(h) * torch.tanh(h) / 9)", False),
    ("p = torch.exp(h)\np[:, 0] = 0\nreturn torch.log(p.sum(1))", False),
    ("p = torch.exp(h[:4, :4])\np.fill_diagonal_(0)\nreturn torch.log(p.sum(1))", False),
    ("p = torch.exp(h)\nfor _ in range(3):\n  q = torch.log(p.sum(1))\n  p = p * 2\nreturn q", False),
    ("p = torch.exp(torch.dropout(h, 0.5, False))\nreturn torch.log(p / p.sum())", False),
    ("p = torch.exp(f.net(h)) if 0 else torch.exp(abs(h))\nreturn torch.log(p)", False),
    ("p = torch.exp(abs(h))\nq = h.exp()\nf = lambda p: torch.log(p.sum(1))\nreturn f(h**2)", False),
    ("return torch.log(sum(torch.exp(h)))", False),
    ("return torch.log(torch.exp(h).sum(1, dtype=torch.float32))", False),
]


@pytest.mark.parametrize(
    ("code", "is_rewritten"), [*((f"return {line}", True) for line in LOGARITHMS), *FUNCTIONS]
)
def test_a_logarithm_of_exponentials_has_the_number_of_the_code_and_trains(
    code: str, is_rewritten: bool
) -> None:
    def run(code: str, h: Tensor) -> Tensor:
        names: dict[str, Any] = {"torch": torch, "math": math}
        exec(code, names)
        result: Tensor = names["f"](h)
        return result

    code = "def f(h):\n" + "\n".join(f"  {line}" for line in code.split("\n"))
    line = next(i for i, text in enumerate(code.split("\n"), 1) if "exp" in text or "softmax" in text)
    pairs = in_logarithms(code, line, "exp") or in_logarithms(code, line, "softmax")
    assert bool(pairs) == is_rewritten
    cured = code
    for replaced, cure in pairs:
        cured = cured.replace(replaced, cure)
    h = outputs(network()).detach() + torch.eye(ROWS, COLUMNS)
    torch.testing.assert_close(run(cured, h), run(code, h))
    if pairs:
        trains(lambda h: run(cured, h + 200))
        trains(lambda h: run(cured, h - 200))


@pytest.mark.parametrize(
    ("code", "operation"),
    [
        ("return torch.log(x.prod(1) + 1)", "prod"),
        ("return torch.log(x.prod(1) + 1e-8)", "prod"),
        ("return torch.log1p(x * y)", "mul"),
        ("return torch.log((x * y).sum(1))", "mul"),
        ("x = torch.log((x * y))", "mul"),
        ("return torch.log(self.softmax(x))", "softmax"),
        ("return torch.log(self.act.sigmoid(x))", "sigmoid"),
        ("p = torch.exp(self.net(x))\n  return torch.log(p / p.sum(1))", "exp"),
        ("p = torch.exp(self.a)\n  self.a = x\n  return torch.log(p.sum(1))", "exp"),
        ("return torch.log(eps + eps) + torch.log(x.exp())", "mul"),
    ],
)
def test_a_logarithm_without_another_form_of_the_same_number_is_left(code: str, operation: str) -> None:
    pairs = in_logarithms(f"def f(self, x, y, eps):\n  {code}", 2, operation)
    assert [
        new for _, new in pairs if new != "(torch.log(torch.as_tensor(x)) + torch.log(torch.as_tensor(y)))"
    ] == []


def test_the_logarithm_of_a_masked_state_remains_that_of_nothing() -> None:
    """The forward algorithm of a model in which no state leads to the first one."""

    def total(h: Tensor, log: Callable[[Tensor], Tensor]) -> Tensor:
        allowed = torch.ones(h.shape[1], h.shape[1]).index_fill(1, torch.tensor([0]), 0.0)
        forward = h.softmax(1)
        for row in h:
            forward = torch.exp(log(forward @ allowed) + row - 2)
        return forward.sum(1)

    record = examined(lambda h: total(h, torch.log))
    fault = known_fault(record, FAULTS)
    assert fault is not None
    cured = partial(total, log=lambda x: eval(fault.cure, {"torch": torch, "x": x}))
    trains(cured)
    h = outputs(network()).detach()
    torch.testing.assert_close(cured(h), total(h, torch.log))


@pytest.mark.parametrize(
    ("function", "other"),
    [
        ("var_mean", "std"),
        ("linalg_solve_triangular", "linalg_inv"),
        ("LinalgInvEx", "linalg_qr"),
    ],
)
def test_the_cure_of_another_function_is_not_that_of_the_line(function: str, other: str) -> None:
    fault = next(
        f for f in reversed(FAULTS) if function in f.operations and not f.dtypes and len(f.operations) > 1
    )
    assert f"For {other}, use " in fault.advice(function, f"a.{function}(b)")


def test_the_floor_of_a_kernel_trains_through_many_divisions() -> None:
    fault = next(fault for fault in FAULTS if fault.underflow == ("exp",) and "div" in fault.operations)

    def scaled(h: Tensor, kernel_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The iterations of Sinkhorn, where one row of the kernel underflows."""
        kernel = kernel_of(shifted(-h, -150.0))
        v = torch.ones(h.shape[1])
        for _ in range(3):
            u = 1 / (kernel @ v)
            v = 1 / (kernel.mT @ u)
        return u[:, None] * kernel * v

    record = examined(lambda h: scaled(h, torch.exp))
    assert known_fault(record, FAULTS) is not None
    trains(lambda h: scaled(h, lambda x: eval(fault.cure, {"torch": torch, "x": x})))
