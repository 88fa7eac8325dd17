"""A pass that is preserved leaves no trace in a module, nor in the objects that it holds."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_gradguard.core.snapshots import preserve_state


class Environment:
    """Moves a point at random; as an environment of a library does."""

    def __init__(self) -> None:
        self.np_random = np.random.default_rng(0)
        self.python_random = random.Random(0)
        self.torch_random = torch.Generator().manual_seed(0)
        self.place = np.zeros(2)
        self.state: tuple[float, ...] = (0.0, 0.0)
        self.n_steps = 0

    def step(self) -> None:
        self.place += self.np_random.standard_normal(2)
        noise = torch.rand(1, generator=self.torch_random).item()
        self.state = (self.python_random.random(), noise)
        self.n_steps += 1


class Agent:
    """Holds what the module holds too."""

    def __init__(self, environment: Environment, buffer: deque[Any]) -> None:
        self.environments, self.buffer = [environment], buffer


class Player(nn.Module):
    """Plays a step in each forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.hidden: tuple[Tensor, ...] = (torch.zeros(2),)
        self.agent = Agent(Environment(), deque(maxlen=5))

    def forward(self, inputs: Tensor) -> Tensor:
        (environment,) = self.agent.environments
        environment.step()
        self.agent.buffer.append(environment.place.copy())
        self.hidden = (self.hidden[0] + 1,)
        self.agent.last = environment.state  # type: ignore[attr-defined]
        outputs: Tensor = self.net(inputs)
        return outputs


def seen(player: Player) -> tuple[Any, ...]:
    (environment,) = player.agent.environments
    places = [place.tolist() for place in player.agent.buffer]
    return (
        environment.n_steps,
        environment.state,
        environment.place.tolist(),
        places,
        player.hidden[0].tolist(),
    )


def test_objects_of_the_module_go_on_as_if_a_preserved_pass_had_not_been() -> None:
    player, twin = Player(), Player()
    environment = player.agent.environments[0]
    for _ in range(3):
        with preserve_state(player):
            player(torch.ones(2))
            player(torch.ones(2))
        player(torch.ones(2))
        twin(torch.ones(2))
        assert seen(player) == seen(twin)
    assert player.agent.environments[0] is environment


def test_an_attribute_that_a_preserved_pass_makes_is_gone() -> None:
    player = Player()
    with preserve_state(player):
        player(torch.ones(2))
    assert not hasattr(player.agent, "last")


def test_what_cannot_be_written_or_has_no_state_is_left_as_it_is() -> None:
    module: Any = nn.Module()
    module.fixed = np.zeros(2)
    module.fixed.flags.writeable = False
    module.system = random.SystemRandom()
    with torch.inference_mode():
        module.from_validation = torch.zeros(2)
    module.expanded, module.sparse = torch.ones(1).expand(4), torch.eye(2).to_sparse()
    before = dict(vars(module))
    with preserve_state(module):
        module.fixed = None
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[name] is value for name, value in before.items())


def test_entries_of_nested_containers_are_restored() -> None:
    module: Any = nn.Module()
    module.outputs = {"train": [1.0], "counts": {"steps": 0}}
    module.outputs["itself"] = module.outputs
    train = module.outputs["train"]
    with preserve_state(module):
        module.outputs["train"].append(2.0)
        module.outputs["counts"]["steps"] += 1
    assert module.outputs["train"] is train
    assert train == [1.0]
    assert module.outputs["counts"] == {"steps": 0}
