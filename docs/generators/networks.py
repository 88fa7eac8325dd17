"""The networks of the guide's experiments: unhealthy ones, and each with one remedy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytorch_lightning as pl
import torch
from pytorch_lightning.core.optimizer import LightningOptimizer
from torch import Tensor, nn

from lightning_gradguard.cli.demo_task import CharacterRNN

Initializer = Callable[[Tensor], object]
#: Pixels of a digit, units of each hidden layer, and classes.
PIXELS, WIDTH, CLASSES = 64, 64, 10
relu_cell = partial(nn.RNN, nonlinearity="relu")


class Residual(nn.Module):
    """A layer that adds to its inputs."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor) -> Tensor:
        """Adds the output of the layer to its inputs."""
        changed: Tensor = self.layer(inputs)
        return inputs + changed


class DigitClassifier(pl.LightningModule):
    """A deep, plain network for the 8 by 8 digits of scikit-learn.

    Args:
        activation: After each hidden layer.
        initialize: Fills the weights of hidden layers; PyTorch's default if `None`.
        batch_norm: True if each activation is preceded by batch normalization.
        residual: True if hidden layers after the first add to their input.
        weight_decay: Of the optimizer (L2).
        max_norm: Largest norm of the weights into one unit, held by a projection after each step.
        depth: Hidden layers.
    """

    def __init__(
        self,
        activation: type[nn.Module] = nn.ReLU,
        initialize: Initializer | None = None,
        *,
        batch_norm: bool = False,
        residual: bool = False,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        depth: int = 12,
    ) -> None:
        super().__init__()
        hidden: list[nn.Module] = []
        for index in range(depth):
            linear = nn.Linear(WIDTH if index else PIXELS, WIDTH)
            if initialize is not None:
                initialize(linear.weight)
                nn.init.zeros_(linear.bias)
            normalization = [nn.BatchNorm1d(WIDTH)] if batch_norm else []
            layer = nn.Sequential(linear, *normalization, activation())
            hidden.append(Residual(layer) if residual and index else layer)
        self.hidden = nn.Sequential(*hidden)
        self.head = nn.Linear(WIDTH, CLASSES)
        self._weight_decay = weight_decay
        self._max_norm = max_norm

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes."""
        logits: Tensor = self.head(self.hidden(images))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, in nats."""
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9, weight_decay=self._weight_decay)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Hold the weights to their largest norm."""
        if self._max_norm is not None:
            for layer in self.hidden.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.data = torch.renorm(layer.weight.data, 2, 0, self._max_norm)


def pretrained(
    images: Tensor, target: Tensor, activation: type[nn.Module], lr: float, steps: int
) -> DigitClassifier:
    """The plain network, its hidden layers trained one after another, each under a head of its own.

    Args:
        images: Those to train on.
        target: Their classes.
        activation: After each hidden layer.
        lr: Learning rate of SGD.
        steps: Steps for each layer.
    """
    module = DigitClassifier(activation)
    inputs = images
    for layer in module.hidden:
        head = nn.Linear(WIDTH, CLASSES)
        optimizer = torch.optim.SGD([*layer.parameters(), *head.parameters()], lr=lr, momentum=0.9)
        for _ in range(steps):
            rows = torch.randint(len(inputs), (64,))
            loss = nn.functional.cross_entropy(head(layer(inputs[rows])), target[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        inputs = layer(inputs).detach()
    return module


class CharacterModel(CharacterRNN):
    """The demo's recurrent network, with one thing changed.

    Args:
        n_characters: Size of the alphabet.
        cell: Makes the recurrent layer.
        gain: Of the orthogonal recurrent weight; the cell's own initialization if `None`.
        lr: Learning rate of SGD.
        weight_decay: Of the optimizer (L2).
        max_norm: Largest norm of the recurrent weights into one unit, held by a projection after each step.
        chunk: Characters after which backpropagation through time is cut off; never if `None`.
    """

    def __init__(
        self,
        n_characters: int,
        cell: Callable[..., nn.RNNBase] = relu_cell,
        *,
        gain: float | None = 1.1,
        lr: float = 0.5,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        chunk: int | None = None,
    ) -> None:
        super().__init__(n_characters, lr=lr)
        width = self.rnn.hidden_size
        self.rnn = cell(width, width, batch_first=True)  # type: ignore[assignment]
        if gain is not None:
            nn.init.orthogonal_(self.rnn.all_weights[0][1], gain=gain)
        self.automatic_optimization = chunk is None
        self._weight_decay = weight_decay
        self._max_norm = max_norm
        self._chunk = chunk

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy of the next character; a step for each chunk where the text is cut."""
        if self._chunk is None:
            return super().training_step(batch, batch_idx)
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        state, losses = None, []
        for start in range(0, batch[0].shape[1], self._chunk):
            text, target = (part[:, start : start + self._chunk] for part in batch)
            states, state = self.rnn(self.embedding(text), state)
            state = state.detach()
            loss = nn.functional.cross_entropy(self.head(states).transpose(1, 2), target)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self._lr, weight_decay=self._weight_decay)

    def on_train_batch_end(self, outputs: object, batch: object, batch_idx: int) -> None:
        """Hold the recurrent weights to their largest norm."""
        if self._max_norm is not None:
            weight = self.rnn.all_weights[0][1]
            weight.data = torch.renorm(weight.data, 2, 0, self._max_norm)
