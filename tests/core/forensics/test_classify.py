"""The cause of the first nonfinite value of a batch is named."""

from __future__ import annotations

import linecache
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradguard.core.forensics import OutOfRange, investigate, operations, out_of_range_elements
from lightning_gradguard.core.snapshots import rng_state, set_rng_state
from tests.core.forensics.cases import examine, inputs, network, summary

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda x: x, "batch"),
        (lambda x: [x, torch.zeros(6, dtype=torch.long)], "batch[0]"),
        (lambda x: {"image": x, "label": 3}, "batch['image']"),
        (lambda x: ("text", {"more": [torch.ones(1), x]}), "batch[1]['more'][1]"),
    ],
)
def test_nonfinite_inputs_are_named_by_their_path_in_the_batch(
    value: float, wrap: Callable[[Tensor], Any], name: str
) -> None:
    x, net = inputs(value), network()
    origin = examine(net, lambda: net(x).square().mean(), wrap(x))
    assert (origin.cause, origin.where) == ("bad_input", (name,))


def test_nonfinite_inputs_are_found_through_views() -> None:
    x, net = inputs(NAN), network()
    origin = examine(net, lambda: net(x.view(2, 3, 4)[:, 1:].flatten(0, 1)).mean(), (x,))
    assert (origin.cause, origin.where) == ("bad_input", ("batch[0]",))


@pytest.mark.parametrize("kind", ["product", "where", "weights", "no mask"])
def test_nan_that_a_mask_is_to_hide_are_told_as_that(kind: str) -> None:
    module, x = network(), inputs()
    targets = torch.zeros(6, 3)
    targets[2, 1] = math.nan
    mask = targets.isfinite()

    def loss(y: Tensor) -> Tensor:
        error: Tensor = (module(x) - y).square()
        if kind == "where":
            return torch.where(mask, error, 0.0).sum()
        if kind == "weights":
            return (error * mask.all(1, keepdim=True).float()).mean()
        return (error * mask).mean() if kind == "product" else error.mean()

    origin = examine(module, lambda: loss(targets), (x, targets))
    assert (origin.cause, origin.where, origin.rows) == ("bad_input", ("batch[1]",), (2,))
    assert ("torch.nan_to_num(y) (`y` is batch[1])" in origin.advice) == (kind != "no mask")
    assert (kind == "no mask") or "error" in origin.code
    cured = examine(module, lambda: loss(torch.nan_to_num(targets)), (x, targets))
    assert cured.cause == "transient"


def test_unread_nonfinite_part_of_the_batch_is_not_blamed() -> None:
    x, unread, net = inputs(), inputs(NAN), network()
    origin = examine(net, lambda: net(x).mean().sub(net(x).mean()).log().sum(), (unread, x))
    assert summary(origin)[0] == "loss"
    assert origin.operation == "aten::log"


def test_huge_inputs_are_bad_input() -> None:
    x, net = inputs(3e30), network()
    origin = examine(net, lambda: net(x).square().mean(), (x,))
    assert (origin.cause, origin.where) == ("bad_input", ("batch[0]",))
    assert "3e+30" in origin.detail


@pytest.mark.parametrize(
    ("kind", "is_named"),
    [("raw", True), ("usual", False), ("not read", False), ("one row", False), ("its own fault", False)],
)
def test_inputs_far_from_unit_scale_are_named_before_the_operation(kind: str, is_named: bool) -> None:
    net, x = network(), inputs() * (1.0 if kind in ("usual", "not read") else 3e3)
    if kind == "one row":
        x = torch.cat([inputs()[:5], torch.full((1, 4), 5e4)])
    y = torch.full((6, 1), 700.0)
    shift = 0.0 if kind in ("raw", "one row") else 200.0
    before = x.clone()
    origin = examine(net, lambda: (net(x).abs() + shift).exp().mean() + y.mean(), (x, y))
    assert (origin.operation, origin.cause) == ("aten::exp", "loss")
    assert (
        origin.advice.startswith("First standardize batch[0] and batch[1], (t - t.mean(0)) / t") == is_named
    )
    assert "exp overflows float32 above 88" in origin.advice
    assert torch.equal(x, before)


def test_harmless_huge_inputs_are_not_blamed() -> None:
    x, time, net = inputs(), torch.full((6,), 1.7e9), network()
    origin = examine(net, lambda: net(x).relu().mul(0.0).log().mean(), (x, time))
    assert summary(origin) == ("loss", "forward", "", "aten::log")


def test_logarithm_of_zero_in_the_loss() -> None:
    x, net = inputs(), network()
    origin = examine(net, lambda: net(x).relu().mul(0.0).log().mean(), (x,))
    assert summary(origin) == ("loss", "forward", "", "aten::log")
    assert (origin.low, origin.high, origin.dtype) == (0.0, 0.0, "float32")
    assert "aten::log" in origin.detail


def test_division_by_zero_within_a_module_names_the_module() -> None:
    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x / (x - x).sum(1, keepdim=True)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Normalize()), nn.Linear(8, 1))
    x = inputs()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert summary(origin) == ("forward_pass", "forward", "1.0", "aten::div")
    assert origin.where == ("1.0",)


def test_loss_module_is_the_loss() -> None:
    class Loss(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Any:
            return super().forward(input, target) / target.sum()

    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Linear(4, 1), "loss": Loss()})
    x, y = inputs(), torch.zeros(6, 1)
    origin = examine(net, lambda: net["loss"](net["body"](x), y), (x, y))
    assert summary(origin) == ("loss", "forward", "loss", "aten::div")


def test_square_root_at_zero_is_in_the_backward_pass() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x * x.gt(0)).sqrt()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Root(), nn.Linear(8, 1))
    x = inputs()
    assert bool(net(x).isfinite().all())
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert (origin.cause, origin.phase, origin.module) == ("backward_pass", "backward", "1")
    assert "SqrtBackward" in origin.operation
    assert origin.where == ("1",)


def test_norm_at_zero_under_where_is_in_the_backward_pass() -> None:
    class Unit(nn.Module):
        def forward(self, x: Tensor) -> Any:
            length = x.square().sum(1, keepdim=True).sqrt()
            return torch.where(length > 0, x / length, torch.zeros_like(x))

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8, bias=False), Unit(), nn.Linear(8, 1))
    x = inputs()
    x[2] = 0
    assert bool(net(x).isfinite().all())
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert (origin.cause, origin.phase, origin.module) == ("backward_pass", "backward", "1")


@pytest.mark.parametrize("function", ["norm(dim=-1)", "abs().pow(1.5).sum(-1)", "square().sum(-1).sqrt()"])
def test_a_second_derivative_is_told_by_the_line_of_the_function(function: str) -> None:
    layer = nn.Linear(3, 1)

    def run(radius_of: str) -> tuple[list[Tensor], Sequence[Tensor]]:
        points = torch.tensor([[0.0, 0.0], [1.0, 2.0]], requires_grad=True)
        if radius_of.startswith("norm"):
            radius = points.norm(dim=-1)
        elif radius_of.startswith("abs"):
            radius = points.abs().pow(1.5).sum(-1)
        elif radius_of.startswith("square"):
            radius = points.square().sum(-1).sqrt()
        else:
            radius = eval(radius_of, {"torch": torch, "points": points}).reshape(2, -1).sum(-1)
        value = layer(torch.stack([radius, *points.T], -1)).tanh()
        slope = torch.autograd.grad(value.sum(), points, create_graph=True)[0]
        curvature = torch.autograd.grad(slope.sum(), points, create_graph=True)[0]
        loss = curvature.square().mean()
        return [loss], torch.autograd.grad(loss, list(layer.parameters()))

    origin = investigate(layer, lambda: run(function), None)
    assert (origin.cause, origin.code) == ("backward_pass", f"radius = points.{function}")
    replaced, cure = re.findall(r"In place of (.*) use (.*)\.$", origin.advice)[0]
    assert replaced in origin.code
    assert investigate(layer, lambda: run(cure), None).cause == "transient"


def test_a_product_with_the_number_0_does_not_underflow() -> None:
    net = network()
    origin = examine(net, lambda: (net(inputs()).exp() * 0).log().mean(), None)
    assert "underflow" not in f"{origin.detail} {origin.advice}"
    assert "The logarithm of 0 is -inf" in origin.advice


def test_mean_over_no_labels_is_the_loss() -> None:
    x, y, net = inputs(), torch.full((6,), -100), network()
    origin = examine(net, lambda: F.cross_entropy(net(x), y), (x, y))
    assert summary(origin) == ("loss", "forward", "", "aten::nll_loss_forward")
    within = nn.ModuleDict({"net": net, "loss": nn.CrossEntropyLoss()})
    origin = examine(within, lambda: within["loss"](within["net"](x), y), (x, y))
    assert summary(origin) == ("loss", "forward", "loss", "aten::nll_loss_forward")


class Attention(nn.Module):
    """One head; the mask is filled with `-inf`, as usual."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        q, k, v = self.project(x).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -INF)
        return scores.softmax(-1) @ v


#: The first position of the second sample is padding, and the only one that its first query may see.
CAUSAL = torch.full((5, 5), -INF).triu(1)
PADDING = torch.zeros(2, 5)
PADDING[1, 0] = -INF


def test_a_mask_that_is_a_factor_of_a_matrix_product_fails_there() -> None:
    net, x, mask = network(), inputs(), torch.zeros(6, 3).bool()
    mask[2] = True
    weight, bias = torch.ones(2, 3), torch.zeros(2)
    origin = examine(net, lambda: F.linear(net(x).masked_fill(mask, -INF), weight, bias).mean(), (x,))
    assert summary(origin) == ("loss", "forward", "", "aten::addmm")


@pytest.mark.parametrize("number", [NAN, INF])
@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_number_of_the_code_that_is_not_finite_is_told_as_that(number: float, scale: float) -> None:
    net, x = network(), inputs()
    weight = number
    origin = examine(net, lambda: (net(x) * scale).square().mean() * weight, (x,))
    assert summary(origin) == ("loss", "forward", "", "aten::mul")
    assert f"A number that this line gives to mul is {number}: look at the code" in origin.advice


@pytest.mark.parametrize(
    "missing",
    [
        lambda y, m: torch.where(m, y, NAN),
        lambda y, m: y.masked_fill(~m, NAN),
        lambda y, m: torch.full_like(y, NAN).where(~m, y),
    ],
)
def test_nan_that_the_code_writes_is_told_as_that(missing: Callable[[Tensor, Tensor], Tensor]) -> None:
    net, x, mask = network(), inputs(), (torch.arange(6) < 4)[:, None]
    origin = examine(net, lambda: ((net(x) - missing(x[:, :3], mask)) * mask).square().mean(), (x,))
    assert "The NaN that this line writes reaches the loss" in origin.advice


def test_the_divisor_is_cured_beside_a_logarithm_of_it() -> None:
    net, x = network(), inputs()

    def loss() -> Tensor:
        raw: Tensor = net(x) - 200
        var = raw.exp()
        return (1 / var + torch.log(var)).mean()

    advice = examine(net, loss, (x,)).advice
    assert "In place of raw.exp() use torch.exp(raw.clamp_min(-15))." in advice
    assert "In place of torch.log(var) use raw." in advice


def test_fully_masked_attention_row_names_softmax() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": Attention(), "head": nn.Linear(4, 1)})
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5, 5).tril().bool()
    mask[1, 3] = False
    origin = examine(net, lambda: net["head"](net["attention"](x, mask)).mean(), (x, mask))
    assert summary(origin) == ("forward_pass", "forward", "attention", "aten::_softmax")


NUMBER = torch.tensor(-INF)
ROWS = torch.tensor([0, 3])
KEPT = torch.arange(4).expand(2, 5, 4)


@pytest.mark.parametrize(
    "masked",
    [
        pytest.param(lambda s, m: s.index_put((m,), NUMBER), id="index_put"),
        pytest.param(lambda s, m: s.masked_fill(m, NUMBER), id="masked_fill"),
        pytest.param(lambda s, m: torch.where(m, NUMBER, s), id="where"),
        pytest.param(lambda s, m: s.__setitem__(m, -INF) or s, id="mask"),
        pytest.param(lambda s, m: s[1, 3].fill_(NUMBER).expand(2, 5, 5) * 1, id="fill"),
        pytest.param(lambda s, m: s.__setitem__((1, 3), -INF) or s, id="row"),
        pytest.param(lambda s, m: torch.full_like(s, -INF).scatter(-1, KEPT[:1], s[:1, :, :4]), id="scatter"),
        pytest.param(lambda s, m: s.masked_fill(m, -INF).topk(3).values, id="topk"),
        pytest.param(lambda s, m: torch.minimum(s, torch.zeros_like(s).masked_fill(m, -INF)), id="minimum"),
        pytest.param(lambda s, m: s.masked_fill(m, -INF).index_select(1, ROWS), id="index_select"),
    ],
)
def test_a_mask_is_one_however_it_is_written(masked: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net, x, mask = nn.Linear(4, 5), torch.randn(2, 5, 4), torch.zeros(2, 5, 5).bool()
    mask[1, 3] = True
    origin = examine(net, lambda: masked(net(x), mask).softmax(-1).mean(), (x, mask))
    assert summary(origin) == ("loss", "forward", "", "aten::_softmax")


def test_every_softmax_of_masked_rows_is_listed_the_first_one_of_the_forward_pass_first() -> None:
    cured: set[str] = set()

    def before(projected: Tensor, mask: Tensor) -> Tensor:
        q, k, v = projected.chunk(3, dim=-1)
        att = (q @ k.transpose(-1, -2)).masked_fill(~mask, -INF)
        att = att.clamp(-1e4, 1e4) if "before" in cured else att
        return att.softmax(dim=-1) @ v

    def after(projected: Tensor, mask: Tensor) -> Tensor:
        q, k, v = projected.chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -INF)
        scores = scores.clamp(-1e4, 1e4) if "after" in cured else scores
        return torch.softmax(scores, -1) @ v

    torch.manual_seed(0)
    net = nn.ModuleDict({"before": nn.Linear(4, 12), "after": nn.Linear(4, 12)})
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 1, 5).bool()
    mask[1] = False

    def loss() -> Tensor:
        return after(net["after"](before(net["before"](x), mask)), mask).mean()

    first, later = examine(net, loss, (x, mask)).advice.split(" Also at ")
    assert "In place of att.softmax(dim=-1) use torch.softmax(att.clamp(-1e4, 1e4), -1)." in first
    assert "in place of torch.softmax(scores, -1) use torch.softmax(scores.clamp(-1e4, 1e4), -1)." in later
    cured.add("before")
    assert "torch.softmax(scores" in examine(net, loss, (x, mask)).advice
    cured.add("after")
    assert examine(net, loss, (x, mask)).cause == "transient"


def test_lines_with_other_faults_are_listed_and_values_followed_to_those_that_made_them_large() -> None:
    cured: set[str] = set()

    def spread(h: Tensor) -> Tensor:
        return torch.exp((h / 2).clamp(max=20)) if "exp" in cured else torch.exp(h / 2)

    def divergence(h: Tensor) -> Tensor:
        return torch.exp(h.clamp(max=20)) if "other" in cured else torch.exp(h)

    def density(h: Tensor) -> Tensor:
        none = h * 0
        if "log" in cured:
            none = none + 1e-6
        return torch.log(none) - h / none

    net, x = network(), inputs()

    def loss() -> Tensor:
        h = net(x) * 1e-3 + 110
        return spread(h).square().mean() + divergence(h).mean() + density(h).mean()

    first, *others = examine(net, loss, (x,)).advice.split(" Also at ")
    assert first.endswith("In place of torch.exp(h / 2) use torch.exp((h / 2).clamp(max=20)).")
    assert [other.partition(": ")[2] for other in others] == [
        "in place of torch.exp(h) use torch.exp(h.clamp(max=20)).",
        "the logarithm of 0 is -inf. In place of torch.log(none) use torch.log(none.clamp_min(1e-6)).",
        "the divisor is 0. In place of h / none use h / torch.where(none < 1e-6, 1.0, none).",
    ]
    cured.update(("exp", "other", "log"))
    assert examine(net, loss, (x,)).cause == "transient"


@pytest.mark.parametrize("kind", ["fill", "buffer", "batch", "attribute", "attention"])
def test_a_row_that_is_masked_twice_is_told_as_that(kind: str) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project, self.attention = nn.Linear(4, 12), nn.MultiheadAttention(4, 2, batch_first=True)
            self.register_buffer("mask", CAUSAL)
            self.constant = CAUSAL

        def forward(self, x: Tensor) -> Any:
            if kind == "attention":
                return self.attention(x, x, x, PADDING == -INF, attn_mask=CAUSAL < 0)[0]
            q, k, v = self.project(x).chunk(3, dim=-1)
            scores = q @ k.transpose(-1, -2) + PADDING[:, None]
            if kind == "fill":
                scores = scores.masked_fill(CAUSAL < 0, -INF)
            else:
                added = {"buffer": self.get_buffer("mask"), "attribute": self.constant}
                scores = scores + added.get(kind, bias)
            return (scores / 2).softmax(-1) @ v

    torch.manual_seed(0)
    net, x, bias = Masked(), torch.randn(2, 5, 4), CAUSAL.clone()
    origin = examine(net, lambda: net(x).mean(), (x, bias))
    assert origin.operation == "aten::_softmax"
    assert "all positions" in origin.advice


@pytest.mark.parametrize("kind", ["fill", "buffer", "batch"])
def test_harmless_mask_is_not_blamed(kind: str) -> None:
    class Masked(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.full((5, 5), -INF).triu(1))

        def forward(self, x: Tensor, mask: Tensor) -> Any:
            if kind == "fill":
                return super().forward(x, mask)
            q, k, v = self.project(x).chunk(3, dim=-1)
            added = self.get_buffer("mask") if kind == "buffer" else bias
            return (q @ k.transpose(-1, -2) + added).softmax(-1) @ v

    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": Masked(), "head": nn.Linear(4, 1)})
    x, mask = torch.randn(2, 5, 4), torch.ones(5, 5).tril().bool()
    bias = torch.full((5, 5), -INF).triu(1)

    def loss() -> Any:
        return net["head"](net["attention"](x, mask)).mean()

    assert examine(net, loss, (x, mask, bias)).cause == "transient"
    origin = examine(net, lambda: (loss() * 0).log(), (x, mask, bias))
    assert summary(origin) == ("loss", "forward", "", "aten::log")


def test_half_precision_overflow_names_layer_and_dtype() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 1))
    nn.init.constant_(net[2].weight, 3e4)  # type: ignore[arg-type]
    x = inputs()

    def loss() -> Any:
        with torch.autocast("cpu", torch.float16):
            return net(x).mean()

    assert examine(net, lambda: net(x).mean(), (x,)).cause == "transient"
    origin = examine(net, loss, (x,))
    assert (origin.cause, origin.phase, origin.module) == ("forward_pass", "forward", "2")
    assert origin.dtype == "float16"
    assert origin.high is not None
    assert origin.high >= 2.9e4


def test_loss_scale_overflow_is_in_the_backward_pass() -> None:
    net, x = network(), inputs()

    def loss() -> Any:
        with torch.autocast("cpu", torch.float16):
            return net(x).float().square().mean()

    assert examine(net, loss, (x,)).cause == "transient"
    origin = examine(net, loss, (x,), scale=2.0**30)
    assert (origin.cause, origin.phase, origin.dtype) == ("backward_pass", "backward", "float16")


def test_nan_in_a_weight_names_the_weight() -> None:
    net, x = network(), inputs()
    with torch.no_grad():
        net[2].weight[1, 5] = NAN  # type: ignore[operator]
    origin = examine(net, lambda: net(x).square().mean(), (x,))
    assert (origin.cause, origin.where) == ("corrupted_weights", ("2.weight",))


def test_nan_in_a_bias_names_the_bias() -> None:
    net, x = network(), inputs()
    with torch.no_grad():
        net[0].bias[3] = NAN  # type: ignore[operator]
    origin = examine(net, lambda: net(x).square().mean(), (x,))
    assert (origin.cause, origin.where) == ("corrupted_weights", ("0.bias",))


def test_nonfinite_running_statistic_is_named_if_it_is_used() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    buffers = dict(net.named_buffers())
    buffers["1.running_var"][2] = NAN
    x = inputs()
    assert examine(net, lambda: net(x).mean(), (x,)).cause == "transient"  # training mode does not read it
    net[1].eval()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert (origin.cause, origin.where) == ("forward_pass", ("1.running_var",))
    assert "code that computes 1.running_var" in origin.advice
    assert not net[1].training


def test_a_tensor_from_before_the_step_is_not_blamed_on_the_operation() -> None:
    net, x = network(), inputs()
    pos_weight = torch.tensor([1.0, 2.0, INF])
    loss = F.binary_cross_entropy_with_logits
    origin = examine(net, lambda: loss(net(x), torch.zeros(6, 3), pos_weight=pos_weight), (x,))
    assert origin.cause == "loss"
    assert "shape (3,) is nonfinite before" in origin.advice


def test_one_element_out_of_range_is_corruption() -> None:
    net, x = network(), inputs()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        net[0].weight[1, 2] = 1e30  # type: ignore[operator]
    out_of_range = out_of_range_elements((name, p, before[name]) for name, p in net.named_parameters())
    assert [(name, found.n) for name, found in out_of_range.items()] == [("0.weight", 1)]
    origin = examine(net, lambda: net(x).square().mean(), (x,), out_of_range)
    assert (origin.cause, origin.where) == ("corrupted_weights", ("0.weight",))


def test_many_elements_out_of_range_are_an_update_too_large() -> None:
    net, x = network(), inputs()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1e20)
    out_of_range = out_of_range_elements((name, p, before[name]) for name, p in net.named_parameters())
    assert set(out_of_range) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    origin = examine(net, lambda: net(x).square().mean(), (x,), out_of_range)
    assert origin.cause == "update_too_large"
    assert origin.where[0] == "0.weight"  # the most elements
    assert set(origin.where) == set(out_of_range)


def test_bad_input_is_not_blamed_on_the_weights() -> None:
    net, x = network(), inputs(NAN)
    origin = examine(net, lambda: net(x).square().mean(), (x,), {"0.weight": OutOfRange(3, 32, 1e9)})
    assert (origin.cause, origin.where) == ("bad_input", ("batch[0]",))


def test_finite_second_run_is_transient() -> None:
    net, x = network(), inputs()
    origin = examine(net, lambda: net(x).square().mean(), (x,))
    assert summary(origin) == ("transient", "", "", "")
    # finite numbers blame no weight
    assert (
        examine(net, lambda: net(x).square().mean(), (x,), {"0.weight": OutOfRange(1, 32, 1e9)}).cause
        == "transient"
    )


def test_norm_beyond_float32_is_in_the_backward_pass() -> None:
    net, x = network(), inputs()
    origin = examine(net, lambda: net(x).sum(), (x,), scale=3e38)
    assert (origin.cause, origin.phase) == ("backward_pass", "backward")
    assert "sqrt" not in origin.advice, "each gradient is finite"


def test_nonfinite_weight_called_batch_is_no_part_of_the_batch() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.batch_norm = nn.BatchNorm1d(4)
            with torch.no_grad():
                self.batch_norm.weight[0] = math.nan

        def forward(self, x: Tensor) -> Any:
            return self.batch_norm(x)

    x, net = inputs(), Named()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert (origin.cause, origin.where) == ("corrupted_weights", ("batch_norm.weight",))


@pytest.mark.parametrize("value", [None, NAN])
def test_investigate_changes_nothing(value: float | None) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    x = inputs(value)
    for parameter in net.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {name: tensor.clone() for name, tensor in net.state_dict(keep_vars=False).items()}
    rng = torch.get_rng_state()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert origin.cause == ("transient" if value is None else "bad_input")
    assert torch.equal(rng, torch.get_rng_state())
    for name, tensor in net.state_dict().items():
        assert torch.equal(before[name], tensor), name
    assert all(bool((p.grad == 7).all()) for p in net.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in net.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_investigate_changes_nothing_on_an_error() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    before = [b.clone() for b in net.buffers()]

    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        net(inputs())
        raise RuntimeError("the step itself is broken")

    origin = investigate(net, run, None)
    assert origin.cause == "unknown"
    assert "RuntimeError: the step itself is broken" in origin.detail
    assert __file__ in origin.location
    assert all(map(torch.equal, before, net.buffers()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert examine(net, lambda: net(inputs()).mean()).cause == "transient"


def test_second_run_with_the_same_random_numbers_has_the_same_origin() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
    x = torch.ones(1, 4)
    for seed in range(20):
        torch.manual_seed(seed)
        first_state = rng_state()
        is_nonfinite = not bool(net(x).sub(net[1](x * 2)).abs().log().isfinite())

        def loss() -> Any:
            set_rng_state(first_state)  # noqa: B023
            return net(x).sub(net[1](x * 2)).abs().log().sum()

        torch.manual_seed(1000)
        # all four inputs were kept: the difference is zero
        assert (examine(net, loss, (x,)).cause != "transient") == is_nonfinite


@pytest.mark.parametrize("file", ["<ipython-input-3-4f2a>", "<string>"])
def test_code_without_a_file_is_placed_at_its_cell_or_at_the_line_that_runs_it(
    file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "def loss(net, x):\n    return torch.log(net(x) * 0).mean()\n"
    names: dict[str, Any] = {"torch": torch}
    net = network()
    exec(compile(source, file, "exec"), names)
    if file != "<string>":
        lines = source.splitlines(keepends=True)
        monkeypatch.setitem(linecache.cache, file, (len(source), None, lines, file))
    origin = examine(net, lambda: names["loss"](net, inputs()))
    assert origin.operation == "aten::log"
    if file == "<string>":
        assert re.fullmatch(
            r".*test_classify.py:\d+ in <lambda>, which runs <string>:2 in loss of code without a file",
            origin.location,
        )
        assert "In place of log(x)" in origin.advice
    else:
        assert origin.location == f"{file}:2 in loss"
        assert "In place of torch.log(net(x) * 0) use torch.log((net(x) * 0).clamp_min(" in origin.advice


def test_a_failure_of_the_advice_leaves_the_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise IndexError("no such argument")

    monkeypatch.setattr(operations, "replacement", fails)
    net = network()
    origin = examine(net, lambda: (net(inputs()) * 0).log().mean())
    assert (origin.operation, origin.cause) == ("aten::log", "loss")
    assert "test_classify.py" in origin.location
    assert "log" in origin.advice


OLD = pytest.mark.skipif(sys.version_info < (3, 11), reason="the call within a line is not known")


@OLD
@pytest.mark.filterwarnings("ignore:reduction")
@pytest.mark.parametrize("loss", [nn.MSELoss(), nn.SmoothL1Loss(beta=0.5), nn.L1Loss(), nn.KLDivLoss()])
def test_the_cure_of_a_loss_module_is_written_out_with_its_options(loss: nn.Module) -> None:
    net, x, y = network(), inputs(), torch.full((6, 3), 0.5)

    def value(code: str, rows: slice) -> Tensor:
        found: Tensor = eval(code, {"torch": torch, "loss": loss, "p": net(x)[rows], "y": y[rows]})
        return found

    origin = examine(net, lambda: loss(net(x)[:0], y[:0]))
    assert "In place of loss(net(x)[:0], y[:0]) use " in origin.advice
    cure = origin.advice.partition(" use ")[2].rstrip(".").replace("net(x)[:0]", "p").replace("y[:0]", "y")
    assert not value(cure, slice(0, 0)).isnan()
    torch.testing.assert_close(value(cure, slice(0, 6)), value("loss(p, y)", slice(0, 6)))


@OLD
def test_the_cure_of_a_similarity_module_has_its_dimension() -> None:
    net, similarity = network(), nn.CosineSimilarity(dim=-1, eps=0.0)
    origin = examine(net, lambda: similarity(0 * net(inputs()), torch.ones(6, 3)).mean())
    assert (
        "use torch.nn.functional.cosine_similarity(0 * net(inputs()), torch.ones(6, 3), dim=-1, eps=1e-6)"
        in origin.advice
    )


@OLD
def test_a_transcript_is_ignored_by_a_loss_module_with_the_blank_that_it_has() -> None:
    net, x, ctc = network(), inputs(), nn.CTCLoss(blank=2)
    lengths = torch.tensor([6]), torch.tensor([4])
    targets = torch.tensor([[0, 0, 1, 1]])
    origin = examine(net, lambda: ctc(net(x)[:, None].log_softmax(-1), targets, *lengths) + 0 * net(x).sum())
    assert origin.cause == "transient"  # two neighbours are equal twice: 6 frames are enough
    origin = examine(
        net, lambda: ctc(net(x)[:5, None].log_softmax(-1), targets, 5 + 0 * lengths[0], lengths[1])
    )
    assert origin.advice.endswith("5 + 0 * lengths[0], lengths[1], blank=2, zero_infinity=True).")


def test_class_weights_of_a_loss_module_are_not_left_out_of_its_cure() -> None:
    net, x, loss = network(), inputs(), nn.CrossEntropyLoss(torch.ones(3))
    origin = examine(net, lambda: loss(net(x), torch.full((6,), -100)))
    assert "In place of" not in origin.advice


def test_an_underflow_on_another_line_has_a_bound_for_that_of_its_logarithm() -> None:
    net, x = network(), inputs()

    def loss() -> Tensor:
        return likelihood(torch.exp(-200 - net(x)))

    def likelihood(density: Tensor) -> Tensor:
        return -torch.log(density.mean(1)).mean()

    origin = examine(net, loss)
    assert "stay with `x`" in origin.advice
    assert "In place of torch.log(density.mean(1)) use torch.log(density.mean(1).clamp_min(" in origin.advice


def test_large_values_are_not_followed_from_a_logarithm_of_0() -> None:
    net, x = network(), inputs()
    shift = torch.tensor([0.0, 60.0, -200.0])
    origin = examine(net, lambda: torch.log(torch.exp(net(x) + shift)).mean())
    assert origin.operation == "aten::log"
    assert "In place of torch.exp" not in origin.advice


def test_the_logarithm_of_a_one_hot_target_is_no_mask() -> None:
    net, x = network(), inputs()
    target = F.one_hot(torch.arange(6) % 3).float()
    origin = examine(net, lambda: (target * (target.log() - net(x).log_softmax(1))).mean())
    assert origin.operation == "aten::log"
    assert "In place of target.log() use torch.log(target.clamp_min(1e-6))" in origin.advice


@pytest.mark.parametrize("kind", ["recurrent", "deep"])
def test_values_that_grow_from_layer_to_layer_are_followed_to_where_they_begin_to(kind: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module = nn.RNN(4, 32, nonlinearity="relu") if kind == "recurrent" else nn.Linear(4, 32)
    net = nn.ModuleDict({"first": layer, "last": nn.Linear(32, 1)})
    for p in layer.parameters():
        nn.init.normal_(p, 0, 2.0 if kind == "recurrent" else 100.0)
    deep = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(10)])
    for p in deep.parameters():
        nn.init.normal_(p, 0, 20.0)
    net["deep"] = deep if kind == "deep" else nn.Identity()
    x = inputs()

    def loss() -> Tensor:
        h = net["first"](x) if kind == "deep" else net["first"](x.repeat(7, 1))[0]
        found: Tensor = (net["last"](net["deep"](h)) - 1).square().mean()
        return found

    origin = examine(net, loss)
    assert origin.cause == "forward_pass"
    assert origin.where[0] in ("first", "deep.0")
    assert origin.location.endswith("in loss")
    assert "gain of 1" in origin.advice


class Piles(nn.Module):
    """A running sum of the user's own, which grows from step to step."""

    scale: Tensor

    def __init__(self, start: float, *, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.register_buffer("scale", torch.full((4,), start))

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.scale.mul_(1 + x.square().mean(0))
        return x * self.scale


@pytest.mark.parametrize(("writes", "line"), [(True, "self.scale.mul_("), (False, "")])
def test_a_large_buffer_is_told_beside_the_line_that_writes_it(writes: bool, line: str) -> None:
    module = nn.Sequential(Piles(1e21, writes=writes), network())
    origin = examine(module, lambda: module(inputs()).square().mean())
    assert (origin.cause, origin.where) == ("forward_pass", ("0.scale",))
    assert line in origin.code
    assert ("learning rate does not help" if writes else "average there") in origin.advice


def test_a_step_that_writes_its_weights_is_told_so() -> None:
    module = network()
    last: Any = module[2]

    def loss() -> Tensor:
        last.bias.data.fill_(1e30)
        return F.mse_loss(module(inputs()), torch.zeros(6, 3))

    for out_of_range in ({}, {"2.bias": OutOfRange(3, 3, 1e30)}):
        origin = examine(module, loss, out_of_range=out_of_range)
        assert (origin.cause, origin.where) == ("corrupted_weights", ("2.bias",))
        assert "fill_(1e30)" in origin.code


@pytest.mark.parametrize("step", [lambda h: h * 2, lambda h: h @ (2 * torch.eye(3))])
def test_values_that_grow_in_a_loop_are_told_with_their_factor(step: Callable[[Tensor], Tensor]) -> None:
    def loss() -> Tensor:
        h: Tensor = module(inputs())
        for _ in range(150):
            h = step(h)
        return h.mean()

    module = network()
    origin = examine(module, loss)
    assert "lambda" in origin.location
    assert "values grow 2 times each time that this line runs" in origin.detail
    assert origin.advice.startswith("Scale values by 1/2 in the loop")
    assert "In place of h" in origin.advice


@pytest.mark.parametrize("shift", [300, -300])
def test_both_parts_of_a_contrastive_loss_are_told(shift: float) -> None:
    net, x = network(), inputs()

    def similarities() -> Tensor:
        h = F.normalize(net(x), dim=1)
        return 10 * h @ h.T + shift

    def loss() -> Tensor:
        s = similarities()
        return -(torch.log(torch.exp(s.diag())) - torch.log(torch.exp(s).sum(1))).mean()

    def loss_of_lines() -> Tensor:
        s = similarities()
        positive = torch.exp(s.diag())
        negative = torch.exp(s).sum(1)
        return -torch.log(positive / negative).mean()

    both = "In place of torch.log(torch.exp(s.diag())) use s.diag(), and in place of "
    both += "torch.log(torch.exp(s).sum(1)) use torch.logsumexp(s, 1)."
    assert examine(net, loss).advice.endswith(both)
    one = "In place of torch.log(positive / negative) use (s.diag() - torch.logsumexp(s, 1))."
    assert examine(net, loss_of_lines).advice.endswith(one)


def test_a_sum_of_exponentials_that_overflows_within_a_logarithm_is_a_logsumexp() -> None:
    net, x = network(), inputs()

    def partition(score: Tensor) -> Tensor:
        return torch.log(torch.exp(100 * score).sum(1)).mean()

    origin = examine(net, lambda: partition(1 + net(x).square()))
    cure = "In place of torch.log(torch.exp(100 * score).sum(1)) use torch.logsumexp(100 * score, 1)."
    assert origin.advice.endswith(cure)
    assert origin.advice.startswith("exp overflows")
    assert bool(torch.logsumexp(100 * (1 + net(x).square()), 1).isfinite().all())


class Recurrence(nn.Module):
    """A state that a trained factor multiplies at each step."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.full((3,), factor))

    def forward(self, u: Tensor) -> Tensor:
        h = u
        for _ in range(100):
            h = self.decay * h + u
        return h


def test_a_trained_factor_by_which_values_grow_in_a_loop_is_bounded() -> None:
    net = nn.Sequential(network(), recurrence := Recurrence(10.0))
    origin = examine(net, lambda: net(inputs()).mean())
    assert origin.advice.startswith("Scale values by 1/10 in the loop, or normalize them there. ")
    assert "torch.sigmoid(self.decay)" in origin.advice
    assert "torch.exp" not in origin.advice
    assert "step has moved" not in origin.advice
    recurrence.decay.data.sigmoid_()
    assert examine(net, lambda: net(inputs()).mean()).cause == "transient"


@pytest.mark.parametrize(
    ("operation", "value", "is_logarithm"),
    [
        (torch.log, -1.0, True),
        (lambda p: 1 / p.sqrt(), -1.0, True),
        (lambda p: p**0.5, -1.0, True),
        (torch.exp, 200.0, False),
        (torch.asin, 2.0, False),
        (lambda p: (p * 1e30) * (p * 1e30), 1e9, False),
    ],
)
def test_the_logarithm_of_a_weight_is_trained_where_it_has_to_be_positive(
    operation: Callable[[Tensor], Tensor], value: float, is_logarithm: bool
) -> None:
    net = network()
    net.scale = scale = nn.Parameter(torch.full((3,), value))
    origin = examine(net, lambda: (net[2](net[1](net[0](inputs()))) * operation(scale)).mean())
    assert ("train its logarithm" in origin.advice) == is_logarithm, origin.advice
    assert "step has moved" not in origin.advice


def test_an_infinity_that_code_writes_into_features_is_no_overflow_of_the_layer() -> None:
    module = network()

    def loss() -> Tensor:
        x = inputs().clone()
        x[1, 0] = math.inf
        mean: Tensor = module(x).mean()
        return mean

    origin = examine(module, loss)
    assert "x[1, 0] = math.inf" in origin.advice, origin.advice
    assert "finite number" in origin.advice


def test_nan_that_a_hook_writes_is_named_as_that() -> None:
    module = network()

    def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        out = out.clone()
        out[out > 0] = math.nan
        return out

    module[0].register_forward_hook(hook)
    origin = examine(module, lambda: module(inputs()).mean())
    assert "The NaN that this line writes reaches the loss" in origin.advice
    assert "out[out > 0] = math.nan" in origin.code


@pytest.mark.parametrize("apply", [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm])
def test_spectral_norm_of_weights_of_zero(apply: Callable[[nn.Module], nn.Module]) -> None:
    module = network()
    last: Any = module[2]
    last.weight.data.zero_()
    apply(last)
    origin = examine(module, lambda: module(inputs()).mean())
    assert "initialize it otherwise" in origin.advice, origin.advice
    assert "In place of" not in origin.advice
    assert "torch.nn.init.orthogonal_(x) (`x` is its argument)" in origin.advice


def test_a_hook_on_gradients_gets_the_cure_of_its_operation() -> None:
    module = network()
    first: Any = module[0]
    first.weight.register_hook(lambda g: g / (g.norm() * 0))
    origin = examine(module, lambda: module(inputs()).mean())
    assert "In place of g / (g.norm() * 0) use g / " in origin.advice, origin.advice
    assert (origin.cause, origin.phase) == ("backward_pass", "backward")


def test_infinity_that_the_step_writes_to_weights_is_no_large_value() -> None:
    module = network()
    first: Any = module[0]

    def loss() -> Tensor:
        first.weight.data.div_(first.weight.new_zeros(()))
        mean: Tensor = module(inputs()).mean()
        return mean

    origin = examine(module, loss, out_of_range={"0.weight": OutOfRange(9, 9, math.inf)})
    assert "writes inf to 0.weight" in origin.detail


def test_the_logarithm_of_a_sigmoid_by_hand_is_a_softplus() -> None:
    module = network()
    origin = examine(module, lambda: -torch.log(1 / (1 + torch.exp(module(inputs()) + 200))).mean())
    assert "(-torch.nn.functional.softplus(module(inputs()) + 200))" in origin.advice
    assert origin.cause == "loss"
