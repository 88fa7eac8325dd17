"""What made the first nonfinite value of a batch is named, and nothing is left behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_gradguard.core.forensics import Origin, investigate, out_of_range_elements
from lightning_gradguard.core.incidents import CAUSES
from lightning_gradguard.core.snapshots import rng_state, set_rng_state

NAN, INF = math.nan, math.inf


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


def inputs(value: float | None = None) -> Tensor:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    if value is not None:
        x[2, 1] = value
    return x


def examine(
    module: nn.Module,
    loss_of: Callable[[], Tensor],
    batch: Any = None,
    out_of_range: Mapping[str, int] | None = None,
    scale: float = 1.0,
) -> Origin:
    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        loss = loss_of()
        parameters = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss * scale, parameters, allow_unused=True)
        return [loss], [g for g in found if g is not None]

    origin = investigate(module, run, batch, out_of_range=out_of_range)
    assert origin.cause in CAUSES
    assert origin.detail
    return origin


def told(origin: Origin) -> tuple[str, str, str, str]:
    return origin.cause, origin.phase, origin.module, origin.operation


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
def test_nonfinite_inputs_are_named_by_their_place_in_the_batch(
    value: float, wrap: Callable[[Tensor], Any], name: str
) -> None:
    x, net = inputs(value), network()
    origin = examine(net, lambda: net(x).square().mean(), wrap(x))
    assert (origin.cause, origin.where) == ("bad_input", (name,))


def test_nonfinite_inputs_are_found_through_views_of_them() -> None:
    x, net = inputs(NAN), network()
    origin = examine(net, lambda: net(x.view(2, 3, 4)[:, 1:].flatten(0, 1)).mean(), (x,))
    assert (origin.cause, origin.where) == ("bad_input", ("batch[0]",))


def test_a_nonfinite_part_of_the_batch_that_is_not_read_is_not_blamed() -> None:
    x, unread, net = inputs(), inputs(NAN), network()
    origin = examine(net, lambda: net(x).mean().sub(net(x).mean()).log().sum(), (unread, x))
    assert told(origin)[0] == "loss"
    assert origin.operation == "aten::log"


def test_huge_inputs_are_told_as_such() -> None:
    x, net = inputs(3e30), network()
    origin = examine(net, lambda: net(x).square().mean(), (x,))
    assert (origin.cause, origin.where) == ("bad_input", ("batch[0]",))
    assert "3e+30" in origin.detail


def test_huge_inputs_that_do_no_harm_are_not_blamed_for_the_loss() -> None:
    x, time, net = inputs(), torch.full((6,), 1.7e9), network()
    origin = examine(net, lambda: net(x).relu().mul(0.0).log().mean(), (x, time))
    assert told(origin) == ("loss", "forward", "", "aten::log")


def test_the_logarithm_of_zero() -> None:
    x, net = inputs(), network()
    origin = examine(net, lambda: net(x).relu().mul(0.0).log().mean(), (x,))
    assert told(origin) == ("loss", "forward", "", "aten::log")
    assert (origin.low, origin.high, origin.dtype) == (0.0, 0.0, "float32")
    assert "aten::log" in origin.detail


def test_a_division_by_zero_within_a_module_is_that_module_s() -> None:
    class Normalize(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x / (x - x).sum(1, keepdim=True)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(Normalize()), nn.Linear(8, 1))
    x = inputs()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert told(origin) == ("forward_pass", "forward", "1.0", "aten::div")
    assert origin.where == ("1.0",)


def test_a_module_that_computes_the_loss_is_the_loss() -> None:
    class Loss(nn.MSELoss):
        def forward(self, input: Tensor, target: Tensor) -> Any:
            return super().forward(input, target) / target.sum()

    torch.manual_seed(0)
    net = nn.ModuleDict({"body": nn.Linear(4, 1), "loss": Loss()})
    x, y = inputs(), torch.zeros(6, 1)
    origin = examine(net, lambda: net["loss"](net["body"](x), y), (x, y))
    assert told(origin) == ("loss", "forward", "loss", "aten::div")


def test_the_square_root_at_zero_is_found_in_the_backward_pass() -> None:
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


def test_the_norm_at_zero_under_where() -> None:
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


def test_a_mean_over_no_labels_at_all() -> None:
    x, y, net = inputs(), torch.full((6,), -100), network()
    origin = examine(net, lambda: F.cross_entropy(net(x), y), (x, y))
    assert told(origin) == ("loss", "forward", "", "aten::nll_loss_forward")
    within = nn.ModuleDict({"net": net, "loss": nn.CrossEntropyLoss()})
    origin = examine(within, lambda: within["loss"](within["net"](x), y), (x, y))
    assert told(origin) == ("loss", "forward", "loss", "aten::nll_loss_forward")


class Attention(nn.Module):
    """One head; the mask is filled with `-inf`, as everybody does."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor, mask: Tensor) -> Any:
        q, k, v = self.project(x).chunk(3, dim=-1)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~mask, -INF)
        return scores.softmax(-1) @ v


def test_a_row_of_attention_that_is_masked_altogether() -> None:
    torch.manual_seed(0)
    net = nn.ModuleDict({"attention": Attention(), "head": nn.Linear(4, 1)})
    x, mask = torch.randn(2, 5, 4), torch.ones(2, 5, 5).tril().bool()
    mask[1, 3] = False
    origin = examine(net, lambda: net["head"](net["attention"](x, mask)).mean(), (x, mask))
    assert told(origin) == ("forward_pass", "forward", "attention", "aten::_softmax")


@pytest.mark.parametrize("kind", ["fill", "buffer", "batch"])
def test_a_mask_that_does_no_harm_is_not_blamed(kind: str) -> None:
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
    assert told(origin) == ("loss", "forward", "", "aten::log")


def test_an_infinity_that_a_module_made_is_followed_to_where_it_began() -> None:
    class Exp(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (200 + x.abs()).exp()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Exp(), nn.LayerNorm(8), nn.Linear(8, 1))
    x = inputs()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert told(origin) == ("forward_pass", "forward", "1", "aten::exp")
    assert origin.low is not None
    assert origin.low >= 200


def test_an_overflow_of_half_precision_names_layer_and_type() -> None:
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


def test_an_overflow_by_the_loss_scale_is_the_backward_pass() -> None:
    net, x = network(), inputs()

    def loss() -> Any:
        with torch.autocast("cpu", torch.float16):
            return net(x).float().square().mean()

    assert examine(net, loss, (x,)).cause == "transient"
    origin = examine(net, loss, (x,), scale=2.0**30)
    assert (origin.cause, origin.phase, origin.dtype) == ("backward_pass", "backward", "float16")


def test_one_nan_in_a_weight_is_named() -> None:
    net, x = network(), inputs()
    with torch.no_grad():
        net[2].weight[1, 5] = NAN  # type: ignore[operator]
    origin = examine(net, lambda: net(x).square().mean(), (x,))
    assert (origin.cause, origin.where) == ("corrupted_weights", ("2.weight",))


def test_a_nan_in_a_bias_is_named() -> None:
    net, x = network(), inputs()
    with torch.no_grad():
        net[0].bias[3] = NAN  # type: ignore[operator]
    origin = examine(net, lambda: net(x).square().mean(), (x,))
    assert (origin.cause, origin.where) == ("corrupted_weights", ("0.bias",))


def test_a_sick_running_statistic_that_is_used_is_named() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    buffers = dict(net.named_buffers())
    buffers["1.running_var"][2] = NAN
    x = inputs()
    assert examine(net, lambda: net(x).mean(), (x,)).cause == "transient"  # training mode does not read it
    net[1].eval()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert (origin.cause, origin.where) == ("corrupted_weights", ("1.running_var",))
    assert not net[1].training


def test_one_absurd_element_of_a_weight_is_corruption() -> None:
    net, x = network(), inputs()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with torch.no_grad():
        net[0].weight[1, 2] = 1e30  # type: ignore[operator]
    out_of_range = out_of_range_elements((name, p, before[name]) for name, p in net.named_parameters())
    assert out_of_range == {"0.weight": 1}
    origin = examine(net, lambda: net(x).square().mean(), (x,), out_of_range)
    assert (origin.cause, origin.where) == ("corrupted_weights", ("0.weight",))


def test_many_absurd_elements_are_a_step_that_was_too_large() -> None:
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_infinity_is_absurd_in_any_precision(dtype: torch.dtype) -> None:
    sick = torch.tensor([1.0, INF], dtype=dtype)
    assert out_of_range_elements([("momentum", sick, torch.tensor(1e33))]) == {"momentum": 1}


def test_a_bad_input_is_not_laid_on_the_weights() -> None:
    net, x = network(), inputs(NAN)
    origin = examine(net, lambda: net(x).square().mean(), (x,), {"0.weight": 3})
    assert (origin.cause, origin.where) == ("bad_input", ("batch[0]",))


def test_what_is_finite_the_second_time_is_transient() -> None:
    net, x = network(), inputs()
    origin = examine(net, lambda: net(x).square().mean(), (x,))
    assert told(origin) == ("transient", "", "", "")
    # whatever became of weights, finite numbers accuse nobody
    assert examine(net, lambda: net(x).square().mean(), (x,), {"0.weight": 1}).cause == "transient"


def test_a_norm_beyond_float32_is_the_backward_pass() -> None:
    net, x = network(), inputs()
    origin = examine(net, lambda: net(x).sum(), (x,), scale=3e38)
    assert (origin.cause, origin.phase) == ("backward_pass", "backward")


def test_operations_in_place_are_followed() -> None:
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Any:
            y = x.clone()
            y.sub_(y.detach().clone())
            y.log_()
            y.mul_(2.0)
            return y.add_(1.0)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), InPlace(), nn.LeakyReLU(inplace=True), nn.Linear(8, 1))
    x = inputs()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert told(origin) == ("forward_pass", "forward", "1", "aten::log_")
    assert (origin.low, origin.high) == (0.0, 0.0)


def test_an_input_changed_in_place_is_still_the_input() -> None:
    net = network()
    x = inputs(NAN)
    x_used = x.clone()

    def loss() -> Any:
        x_used.mul_(0.5)
        return net(x_used).mean()

    origin = examine(net, loss, (x_used,))
    assert (origin.cause, origin.where) == ("bad_input", ("batch[0]",))


def test_values_written_into_a_slice_are_followed() -> None:
    class Padded(nn.Module):
        def forward(self, x: Tensor) -> Any:
            out = x.new_zeros(x.shape[0], 10)
            out[:, :8] = (x - x).log()
            return out

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Padded(), nn.Linear(10, 1))
    x = inputs()
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert told(origin) == ("forward_pass", "forward", "1", "aten::log")


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_module(reentrant: bool) -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x * x.gt(0)).sqrt()

    class Log(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x - x).log()

    class Net(nn.Module):
        def __init__(self, middle: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.middle, self.last = nn.Linear(4, 8), middle, nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Any:
            x = self.first(x)
            return self.last(checkpoint(self.middle, x, use_reentrant=reentrant))

    def examined(net: Net) -> Origin:
        def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
            loss = net(x).mean()
            loss.backward()  # what a reentrant checkpoint needs
            gradients = [p.grad for p in net.parameters() if p.grad is not None]
            for p in net.parameters():
                p.grad = None
            return [loss], gradients

        return investigate(net, run, (x,))

    x = inputs()
    assert told(examined(Net(Log()))) == ("forward_pass", "forward", "middle", "aten::log")
    origin = examined(Net(Root()))
    assert (origin.cause, origin.phase) == ("backward_pass", "backward")
    assert "SqrtBackward" in origin.operation
    assert origin.module == "middle"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_network(kind: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.encoder = kind(4, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Any:
            return self.head(self.encoder(x)[0][:, -1])

    x = torch.randn(3, 5, 4)
    net = Net()
    assert examine(net, lambda: net(x).mean(), (x,)).cause == "transient"
    with torch.no_grad():
        net.encoder.weight_hh_l1[2, 3] = NAN
    origin = examine(net, lambda: net(x).mean(), (x,))
    assert (origin.cause, origin.where) == ("corrupted_weights", ("encoder.weight_hh_l1",))
    x[1, 4, 0] = NAN
    net = Net()
    origin = examine(net, lambda: net(x).mean(), {"x": x})
    assert (origin.cause, origin.where) == ("bad_input", ("batch['x']",))


def test_a_module_that_is_used_twice_is_named_once() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x.sqrt()

    class Twice(nn.Module):
        def __init__(self, healthy: float, sick: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.shared, self.root, self.head = nn.Linear(4, 4), Root(), nn.Linear(4, 1)
            self.again = self.shared
            self.offsets = (healthy, sick)

        def forward(self, x: Tensor) -> Any:
            for offset in self.offsets:
                x = self.root(self.again(self.shared(x)).square() * (offset != 0) + offset.real)
            return self.head(x)

    x = inputs()
    for first in (True, False):
        healthy = Twice(1.0, 1.0)
        assert examine(healthy, lambda net=healthy: net(x).mean(), (x,)).cause == "transient"  # type: ignore[misc]
        root = Twice(*((0.0, 1.0) if first else (1.0, 0.0)))
        origin = examine(root, lambda net=root: net(x).mean(), (x,))  # type: ignore[misc]
        assert (origin.cause, origin.phase, origin.module) == ("backward_pass", "backward", "root")
        negative = Twice(*((-1e4, 1.0) if first else (1.0, -1e4)))
        origin = examine(negative, lambda net=negative: net(x).mean(), (x,))  # type: ignore[misc]
        assert told(origin) == ("forward_pass", "forward", "root", "aten::sqrt")


def test_a_compiled_module() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return (x - x).log()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), Log(), nn.Linear(8, 1))
    compiled = torch.compile(net, backend="eager")
    x = inputs()
    compiled(x)  # so that there is compiled code
    origin = examine(compiled, lambda: compiled(x).mean(), (x,))  # type: ignore[arg-type]
    assert told(origin) == ("forward_pass", "forward", "1", "aten::log")
    outer = nn.ModuleDict({"net": compiled})  # type: ignore[dict-item]
    origin = examine(outer, lambda: compiled(x).mean(), (x,))
    assert told(origin) == ("forward_pass", "forward", "net.1", "aten::log")
    with torch.no_grad():
        net[2].weight[0, 0] = NAN  # type: ignore[operator]
    net[1] = nn.Identity()
    origin = examine(compiled, lambda: compiled(x).mean(), (x,))  # type: ignore[arg-type]
    assert (origin.cause, origin.where) == ("corrupted_weights", ("2.weight",))


@pytest.mark.parametrize("value", [None, NAN])
def test_nothing_is_left_behind(value: float | None) -> None:
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


def test_an_error_in_the_run_leaves_nothing_behind_either() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
    before = [b.clone() for b in net.buffers()]

    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        net(inputs())
        raise RuntimeError("the step itself is broken")

    with pytest.raises(RuntimeError, match="the step itself is broken"):
        investigate(net, run, None)
    assert all(map(torch.equal, before, net.buffers()))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert examine(net, lambda: net(inputs()).mean()).cause == "transient"


def test_random_numbers_can_be_those_of_the_first_time() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1))
    x = torch.ones(1, 4)
    for seed in range(20):
        torch.manual_seed(seed)
        served = rng_state()
        sick = not bool(net(x).sub(net[1](x * 2)).abs().log().isfinite())

        def loss() -> Any:
            set_rng_state(served)  # noqa: B023
            return net(x).sub(net[1](x * 2)).abs().log().sum()

        torch.manual_seed(1000)
        # all four inputs were kept: the difference is zero
        assert (examine(net, loss, (x,)).cause != "transient") == sick


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        ([0.9, -0.9], [0.1, 0.01], {}),
        ([1.1, 0.0], [0.1, 0.1], {"w": 1}),
        ([0.9, 0.0], [0.0, 0.0], {}),  # a bias starts at zero
        ([NAN, INF], [0.1, 0.1], {"w": 2}),
        ([-INF, 29.0], [3.0, 1.0], {"w": 1}),
        ([31.0, -31.0], [-3.0, 1.0], {"w": 2}),
        ([], [], {}),
    ],
)
def test_grown_elements(now: list[float], before: list[float], expected: dict[str, int]) -> None:
    assert out_of_range_elements([("w", torch.tensor(now), torch.tensor(before))]) == expected


def test_whole_numbers_do_not_grow() -> None:
    assert out_of_range_elements([("step", torch.tensor([10_000]), torch.tensor([1]))]) == {}


def test_sparse_gradients_are_followed_too() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)

    def run() -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        loss = (embedding(torch.tensor([1, 2])) * 0).square().sum().sqrt()
        return [loss], torch.autograd.grad(loss, list(embedding.parameters()))

    origin = investigate(embedding, run, None)
    assert (origin.cause, origin.phase) == ("backward_pass", "backward")
    assert "Sqrt" in origin.operation


def test_a_sick_weight_is_no_part_of_the_batch_whatever_its_name() -> None:
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
