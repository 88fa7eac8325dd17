"""Networks of the kinds that changes are applied to, each with a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def mlp(activation: Callable[[], nn.Module], depth: int = 4, width: int = 16) -> nn.Sequential:
    """Layers of equal width, each with its activation, and an output layer."""
    layers: list[nn.Module] = [nn.Linear(10, width), activation()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


class Convolutional(nn.Module):
    """One activation that two layers share, and a sigmoid on the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.activation = nn.Tanh()
        self.head = nn.Linear(8 * 64, 3)
        self.probability = nn.Sigmoid()

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.activation(self.second(self.activation(self.first(inputs))))
        output: Tensor = self.probability(self.head(hidden.flatten(1)))
        return output


class Loop(nn.Module):
    """A recurrence written by hand, with a function as its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(4, 16)
        self.state = nn.Linear(16, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        state = sequence.new_zeros(len(sequence), 16)
        for step in sequence.unbind(1):
            state = torch.tanh(self.inputs(step) + self.state(state))
        output: Tensor = self.head(state)
        return output


class Cell(nn.Module):
    """A cell that gets its input and its state."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs = nn.Linear(4, 16)
        self.state = nn.Linear(16, 16)

    def forward(self, step: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(self.inputs(step) + self.state(state))


class GatedCell(Cell):
    def forward(self, step: Tensor, state: Tensor) -> Tensor:
        keep = torch.sigmoid(self.inputs(step))
        return keep * state + (1 - keep) * super().forward(step, state)


class OfCells(nn.Module):
    """A recurrence of a cell of the user's."""

    def __init__(self, cell: Callable[[], nn.Module] = Cell) -> None:
        super().__init__()
        self.cell = cell()
        self.head = nn.Linear(16, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        state = sequence.new_zeros(len(sequence), 16)
        for step in sequence.unbind(1):
            state = self.cell(step, state)
        output: Tensor = self.head(state)
        return output


class Recurrent(nn.Module):
    def __init__(self, kind: Any = nn.RNN) -> None:
        super().__init__()
        self.rnn = kind(4, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        outputs, _ = self.rnn(sequence)
        output: Tensor = self.head(outputs[:, -1])
        return output


class Transformer(nn.Module):
    """An encoder whose activation is a function that it has as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, activation=torch.sigmoid, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, sequence: Tensor) -> Tensor:
        output: Tensor = self.head(self.encoder(self.embed(sequence)).mean(1))
        return output


class Block(nn.Module):
    """Two layers: one activation is an attribute, the other a function call."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.function = torch.tanh

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.sigmoid(self.second(self.function(self.first(inputs))))


class ResidualBlock(Block):
    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + super().forward(inputs)


class GatedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)
        self.gate = nn.Sequential(nn.Linear(16, 16), nn.Sigmoid())

    def forward(self, inputs: Tensor) -> Tensor:
        output: Tensor = torch.relu(self.body(inputs)) * self.gate(inputs)
        return output


class Nested(nn.Module):
    """Blocks of a kind in an `nn.ModuleList`."""

    def __init__(self, block: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(10, 16)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(inputs))
        for block in self.blocks:
            hidden = block(hidden)
        output: Tensor = self.head(hidden)
        return output


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Returns networks and batches, the same ones at each call."""
    torch.manual_seed(0)
    features, sequences, images = torch.randn(16, 10), torch.randn(16, 7, 4), torch.randn(16, 1, 8, 8)
    return {
        "mlp": (mlp(nn.Sigmoid), features),
        "convolutional": (Convolutional(), images),
        "loop": (Loop(), sequences),
        "recurrent": (Recurrent(), sequences),
        "lstm": (Recurrent(nn.LSTM), sequences),
        "transformer": (Transformer(), sequences),
        "blocks": (Nested(Block), features),
        "residual": (Nested(ResidualBlock), features),
        "gated": (Nested(GatedBlock), features),
    }
