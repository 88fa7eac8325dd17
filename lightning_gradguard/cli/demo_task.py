"""Task of the demo: real text, character by character, for a recurrent network whose gradients explode."""

from __future__ import annotations

import pydoc_data.topics

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

#: Characters in a sample, and samples in a batch.
LENGTH, BATCH_SIZE = 100, 32
#: Units of the network, and the gain of its recurrent weight.
WIDTH, GAIN = 128, 1.1


class Characters(pl.LightningDataModule):
    """Samples from the documentation of Python, drawn at random places of half a million characters."""

    def __init__(self, n_batches: int, seed: int = 0) -> None:
        super().__init__()
        text = "\n".join(pydoc_data.topics.topics[key] for key in sorted(pydoc_data.topics.topics))
        self.alphabet = sorted(set(text))
        index = {character: i for i, character in enumerate(self.alphabet)}
        codes = torch.tensor([index[character] for character in text])
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(codes) - LENGTH - 1, (n_batches * BATCH_SIZE,), generator=generator)
        windows = torch.stack([codes[start : start + LENGTH + 1] for start in starts.tolist()])
        self._samples = TensorDataset(windows[:, :-1], windows[:, 1:])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Batches of text, and of the same text one character later; each `(BATCH_SIZE, LENGTH)`."""
        return DataLoader(self._samples, batch_size=BATCH_SIZE)


class CharacterRNN(pl.LightningModule):
    """Predicts the next character with a ReLU recurrent network whose recurrent weight is too large.

    Above a gain of 1 of that weight the state, and its gradient, grow with time.
    """

    def __init__(self, n_characters: int, lr: float = 0.5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_characters, WIDTH)
        self.rnn = nn.RNN(WIDTH, WIDTH, nonlinearity="relu", batch_first=True)
        self.head = nn.Linear(WIDTH, n_characters)
        nn.init.orthogonal_(self.rnn.all_weights[0][1], gain=GAIN)
        self._lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Returns the cross-entropy of the next character, in nats."""
        text, target = batch
        states, _ = self.rnn(self.embedding(text))
        loss = nn.functional.cross_entropy(self.head(states).transpose(1, 2), target)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=self._lr)
