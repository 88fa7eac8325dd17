"""Each entry of the table: a step that raises for this reason is told so, and trains with the cure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as d
from torch.nn import functional as F

from lightning_gradguard.core.forensics.rejections import REJECTIONS, rejection
from tests.core.forensics.cases import examine

ROWS, BAD = 6, 2
Program = Callable[[Tensor, Tensor], Any]


def network() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4)


def matrix(h: Tensor) -> Tensor:
    """One matrix a row, symmetric and positive; in the bad row, singular."""
    m = h.sigmoid().reshape(ROWS, 2, 2)
    m = m @ m.mT + 0.1 * torch.eye(2)
    return m * (torch.arange(ROWS) != BAD)[:, None, None]


def positive(h: Tensor) -> Tensor:
    return h.sigmoid() + 0.1 - 9 * (torch.arange(ROWS) == BAD)[:, None]


def alike(n: int, bad: int) -> Tensor:
    """Whole numbers of which one is rejected."""
    values = torch.full((ROWS,), n)
    values[BAD] = bad
    return values


def targets(bad: float) -> Tensor:
    values = torch.full((ROWS, 4), 0.5)
    values[BAD] = bad
    return values


def labels(bad: float) -> Tensor:
    values = F.one_hot(torch.zeros(ROWS, dtype=torch.long), 4).float()
    values[BAD] = bad
    return values


def one_hot(h: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(h, F.one_hot(y, 4).float())


def normed(h: Tensor, y: Tensor) -> Tensor:
    return F.batch_norm(h[:1], None, None, training=True)


def ctc(h: Tensor, lengths: Tensor) -> Tensor:
    scores = h.reshape(2, ROWS, 2).log_softmax(-1)
    return F.ctc_loss(scores, torch.ones(ROWS, 1, dtype=torch.long), lengths, torch.ones_like(lengths))


def packed(h: Tensor, lengths: Tensor) -> Tensor:
    sequences = h.reshape(ROWS, 4, 1)
    return nn.utils.rnn.pack_padded_sequence(sequences, lengths, True, enforce_sorted=False).data


def through_gru(h: Tensor, lengths: Tensor) -> Tensor:
    sequences = nn.utils.rnn.pack_padded_sequence(h.reshape(ROWS, 4, 1), lengths, True, enforce_sorted=False)
    hidden: Tensor = nn.GRU(1, 1)(sequences)[1]
    return hidden


def sampled(w: Tensor, y: Tensor) -> Tensor:
    return w.gather(1, torch.multinomial(w, 1))


#: A word of the cause, the argument `x` that is rejected, what is called with it, the data `y`, and the kind
#: of cure: of `x`, of `y`, of the call, or none.
CASES: list[tuple[str, Callable[[Tensor], Tensor], Program, Tensor, str]] = [
    ("one sample", lambda h: h, normed, torch.zeros(ROWS), ""),
    ("one position", lambda h: h[..., None], lambda x, y: F.instance_norm(x), torch.zeros(ROWS), ""),
    ("positive", positive, lambda x, y: d.Normal(0.0, x, validate_args=True).log_prob(y), targets(0.5), "x"),
    ("variance", positive, lambda x, y: F.gaussian_nll_loss(x, y, x), targets(0.5), "x"),
    ("interval", positive, lambda x, y: d.Bernoulli(x, validate_args=True).entropy(), targets(0.5), "logits"),
    (
        "upper bound",
        lambda h: h - h.max(),
        lambda x, y: d.Uniform(y - 0.1, x, validate_args=True).entropy(),
        targets(0.5),
        "x",
    ),
    (
        "0 or 1",
        lambda h: h,
        lambda x, y: d.Bernoulli(logits=x, validate_args=True).log_prob(y),
        labels(0.5),
        "y",
    ),
    (
        "one-hot",
        lambda h: h,
        lambda x, y: d.OneHotCategorical(logits=x, validate_args=True).log_prob(y),
        labels(0.5),
        "y",
    ),
    (
        "add up to 1",
        lambda h: h.sigmoid() - 2 * F.one_hot(torch.tensor(0), 4) * (torch.arange(ROWS) == BAD)[:, None],
        lambda x, y: d.Categorical(x, validate_args=True).entropy(),
        targets(0.5),
        "logits",
    ),
    (
        "triangular",
        matrix,
        lambda x, y: d.MultivariateNormal(torch.zeros(2), scale_tril=x, validate_args=True).log_prob(y),
        torch.ones(ROWS, 2),
        "x",
    ),
    (
        "positive definite",
        matrix,
        lambda x, y: d.MultivariateNormal(torch.zeros(2), x, validate_args=True).log_prob(y),
        torch.ones(ROWS, 2),
        "x",
    ),
    ("positive definite", matrix, lambda x, y: torch.linalg.cholesky(x), targets(0.5), "x"),
    (
        "keep the bounds of the distribution",
        lambda h: h.sigmoid() + 0.1,
        lambda x, y: d.Pareto(x, 1.0, validate_args=True).log_prob(y),
        targets(0.01) * 4,
        "",
    ),
    (
        "keep the bounds of the distribution",
        lambda h: h.sigmoid(),
        lambda x, y: d.Uniform(x, x + 3, validate_args=True).log_prob(y),
        targets(9) * 2,
        "",
    ),
    (
        "has to be positive",
        positive,
        lambda x, y: d.StudentT(x, validate_args=True).log_prob(y),
        targets(0.5),
        "x",
    ),
    (
        "has to be positive",
        positive,
        lambda x, y: d.HalfNormal(x, validate_args=True).log_prob(y),
        targets(1),
        "x",
    ),
    (
        "within 0 to 1",
        lambda h: h.sigmoid() + 1,
        lambda x, y: d.Beta(x, x, validate_args=True).log_prob(y),
        targets(1.5),
        "y",
    ),
    (
        "add up to 1",
        torch.sigmoid,
        lambda x, y: d.Dirichlet(x, validate_args=True).log_prob(y),
        targets(0.9) / 2,
        "y",
    ),
    ("positive", positive, lambda x, y: d.Dirichlet(x, validate_args=True).entropy(), targets(0.5), "x"),
    (
        "A probability is 0",
        lambda h: h.sigmoid() * (torch.arange(ROWS) != BAD)[:, None],
        lambda x, y: d.Geometric(x, validate_args=True).log_prob(y),
        targets(2) * 2,
        "x",
    ),
    ("counts", torch.exp, lambda x, y: d.Poisson(x, validate_args=True).log_prob(y), targets(1.25) * 2, "y"),
    (
        "correct the labels",
        lambda h: h,
        lambda x, y: d.Categorical(logits=x, validate_args=True).log_prob(y),
        alike(2, 4),
        "",
    ),
    (
        "to be positive",
        torch.exp,
        lambda x, y: d.LogNormal(x, 1.0, validate_args=True).log_prob(y),
        targets(-1.0),
        "y",
    ),
    ("Targets are beyond", torch.sigmoid, lambda x, y: F.binary_cross_entropy(x, y), targets(255), "y"),
    ("Probabilities are beyond", positive, lambda x, y: F.binary_cross_entropy(x, y), targets(1), "call"),
    ("sampled", lambda h: positive(h).clamp_min(0), sampled, targets(1), "x"),
    ("CTC", lambda h: h, ctc, alike(2, 9), ""),
    ("one_hot", lambda h: h, one_hot, alike(2, 9), ""),
    ("one_hot", lambda h: h, one_hot, alike(2, -9), ""),
    ("empty", lambda h: h, packed, alike(2, 0), ""),
    ("goes beyond", lambda h: h, through_gru, alike(2, 9), ""),
    ("float16", lambda h: h.half(), lambda x, y: x.masked_fill(y > 0, -1e9), targets(0.5), "call"),
    ("more values", lambda h: h, lambda x, y: x.topk(9), targets(0.5), "call"),
    ("empty selection", lambda h: h[h > 99], lambda x, y: x.max(), targets(0.5), "call"),
    ("empty selection", lambda h: h[:, :0], lambda x, y: x.max(1).values, targets(0.5), "call"),
]


@pytest.mark.parametrize(
    ("word", "x", "f", "y", "cures"), CASES, ids=[f"{n} {c[0]}" for n, c in enumerate(CASES)]
)
def test_a_rejected_value_is_told_and_its_cure_trains(
    word: str, x: Callable[[Tensor], Tensor], f: Program, y: Tensor, cures: str
) -> None:
    net, data = network(), torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(1))

    def loss(program: Program) -> Tensor:
        result = program(x(net(data)), y)
        mean: Tensor = (result[0] if isinstance(result, tuple) else result).float().mean()
        return mean

    origin = examine(net, lambda: loss(f), (data, y))
    assert word in origin.advice
    assert origin.detail.startswith("The step raised ")
    assert __file__.endswith(origin.location.partition(":")[0])
    if origin.cause == "bad_input":
        assert origin.rows in ((BAD,), ())
    replaced, _, code = origin.advice.rpartition(". ")[2].removeprefix("In place of ").partition(" use ")
    code = code.rstrip(".") or origin.advice.partition(" Use ")[2].partition(" (`")[0]
    if cures == "logits":
        assert (replaced, code) == ("x", "logits=x")

    def cured(given: Tensor, other: Tensor) -> Any:
        if cures == "logits":
            return d.Categorical(logits=given, validate_args=True).entropy()
        value = eval(code, {"torch": torch, "x": given, "y": other, "w": given})
        if cures == "call":
            return value
        return f(value, other) if cures == "x" else f(given, value)

    if cures:
        gradients = torch.autograd.grad(loss(cured), list(net.parameters()))
        assert all(bool(g.isfinite().all()) for g in gradients)


def test_every_entry_has_a_case() -> None:
    raised = [rejection(RuntimeError("linalg.svd: (Batch element 0): The algorithm failed to converge"))]
    for _, x, f, y, _ in CASES:
        with pytest.raises(Exception) as error:  # noqa: PT011
            f(x(network()(torch.ones(ROWS, 3))), y)
        raised.append(rejection(error.value))
    assert [known.why for known in REJECTIONS if known not in raised] == []


@pytest.mark.parametrize(
    ("name", "index", "words"),
    [
        ("cross entropy", lambda h, y: F.cross_entropy(h, y), "subtract 1"),
        ("gather", lambda h, y: h.gather(1, y[:, None]), "an output of the network for each class"),
        ("index", lambda h, y: h[torch.arange(len(y)), y], "Correct the indices"),
        ("margin", lambda h, y: F.multi_margin_loss(h, y), "Correct the labels"),
        ("sum by index", lambda h, y: h.T.index_add(0, y, h), "Correct the indices"),
        ("embedding", lambda h, y: F.embedding(y, h.T), "num_embeddings"),
        ("bags", lambda h, y: F.embedding_bag(y[:, None], h.T), "num_embeddings"),
    ],
)
def test_an_index_beyond_its_range_is_told_with_its_row(name: str, index: Program, words: str) -> None:
    net, data, y = network(), torch.ones(ROWS, 3), alike(1, 4)
    origin = examine(net, lambda: index(net(data), y).float().mean(), (data, y))
    assert (origin.cause, origin.where, origin.rows) == ("bad_input", ("batch[1]",), (BAD,))
    assert words in origin.advice


def test_a_target_beyond_the_support_is_named_by_its_part_of_the_batch() -> None:
    net, data, y = network(), torch.ones(ROWS, 3), torch.ones(ROWS, 1)
    y[BAD] = -2.0

    def loss() -> Tensor:
        poisson: Any = d.Poisson(net(data)[:, :1].exp(), validate_args=True)
        log_likelihood: Tensor = poisson.log_prob(y)
        return -log_likelihood.mean()

    origin = examine(net, loss, (data, y))
    assert (origin.cause, origin.where, origin.rows) == ("bad_input", ("batch[1]",), (BAD,))
    assert "In place of y use y.round().clamp_min(0)." in origin.advice


@pytest.mark.parametrize(
    ("distribution", "cure"),
    [
        (
            lambda x: d.NegativeBinomial(4, torch.sigmoid(x), validate_args=True),
            "torch.sigmoid(x) use logits=x",
        ),
        (lambda x: d.Geometric(torch.sigmoid(-x), validate_args=True), "torch.sigmoid(-x) use logits=(-x)"),
        (lambda x: d.Bernoulli(probs=x + 1, validate_args=True), "probs=x + 1 use logits=(x + 1)"),
        (lambda x: d.StudentT(-x, validate_args=True), "-x use torch.nn.functional.softplus((-x)) + 1e-3"),
    ],
)
def test_parameters_are_those_of_the_code(distribution: Callable[[Tensor], Any], cure: str) -> None:
    net, data = network(), 999 * torch.ones(ROWS, 3)

    def loss() -> Tensor:
        mean: Tensor = distribution(net(data).abs()).log_prob(torch.ones(())).mean()
        return mean

    assert f"In place of {cure}." in examine(net, loss, (data,)).advice


def test_a_target_of_another_shape_is_not_told_to_have_wrong_labels() -> None:
    net, data, y = network(), torch.ones(ROWS, 3), alike(1, 4)
    origin = examine(net, lambda: F.cross_entropy(net(data), y[:, None]), (data, y))
    assert origin.cause == "unknown"
    assert "multi-target not supported" in origin.detail


def test_a_label_that_losses_ignore_is_no_index() -> None:
    net, data, y = network(), torch.ones(ROWS, 3), alike(1, -100)
    origin = examine(net, lambda: net(data).scatter(1, y[:, None], 1.0).mean(), (data, y))
    assert (origin.cause, origin.where, origin.rows) == ("bad_input", ("batch[1]",), (BAD,))
    assert "index with y.clamp(min=0)" in origin.advice
    net(data).scatter(1, y.clamp(min=0)[:, None], 1.0).mean().backward()
