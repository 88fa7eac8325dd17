"""A small GPT on the text of Python's own documentation, at a learning rate too large without the suite.

SGD at 0.3 trains with and without it, to the same loss; at 0.7 the bare run is NaN, and the guarded one
learns, later. The text differs between versions of Python: the guarded loss at 0.7 is 2.2 in 3.11.7, and
3.3 in 3.11.2. Run it as `python examples/language_model.py`.
"""

import pydoc_data.topics

import pytorch_lightning as pl
import torch
from jsonargparse import auto_cli
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradguard import default_callbacks

LENGTH = 64
TEXT = "\n".join(pydoc_data.topics.topics[topic] for topic in sorted(pydoc_data.topics.topics))
ALPHABET = sorted(set(TEXT))


class Block(nn.Module):
    """A pre-norm transformer block: causal self-attention, then an MLP, each with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        parts = self.query_key_value(self.attention_norm(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]


class GPT(pl.LightningModule):
    def __init__(self, lr: float, width: int = 64, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.lr = lr
        self.token_embedding, self.position_embedding = (
            nn.Embedding(len(ALPHABET), width),
            nn.Embedding(LENGTH, width),
        )
        blocks = [Block(width, heads) for _ in range(depth)]
        self.net = nn.Sequential(*blocks, nn.LayerNorm(width), nn.Linear(width, len(ALPHABET)))

    def training_step(self, windows: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(windows)
        self.log("train_loss", loss)
        return loss

    def loss(self, windows: Tensor) -> Tensor:
        """Cross-entropy of the next character, in nats."""
        text, following = windows[:, :-1], windows[:, 1:]
        logits = self.net(self.token_embedding(text) + self.position_embedding.weight)
        return nn.functional.cross_entropy(logits.transpose(1, 2), following)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def windows(codes: Tensor, n: int) -> Tensor:
    """Windows of the text from random positions, `(n, LENGTH + 1)`."""
    starts = torch.randint(len(codes) - LENGTH, (n, 1))
    return codes[starts + torch.arange(LENGTH + 1)]


def train(lr: float, callbacks: list[pl.Callback], max_steps: int) -> float:
    """Train on the first nine tenths of the text; returns the loss on the last one."""
    pl.seed_everything(0, verbose=False)
    index = {character: code for code, character in enumerate(ALPHABET)}
    codes = torch.tensor([index[character] for character in TEXT])
    cut = len(codes) * 9 // 10
    module = GPT(lr)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=callbacks,
        log_every_n_steps=10,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(windows(codes[:cut], 16 * max_steps), batch_size=16))  # type: ignore[arg-type]
    with torch.no_grad():
        return float(module.eval().loss(windows(codes[cut:], 128)))


def main(max_steps: int = 200) -> dict[float, tuple[float, float]]:
    losses = {}
    for lr in (0.3, 0.7):
        bare, guarded = train(lr, [], max_steps), train(lr, default_callbacks(), max_steps)
        print(f"SGD at {lr}: loss on unseen text {bare:.2f} bare, {guarded:.2f} guarded")
        losses[lr] = bare, guarded
    return losses


if __name__ == "__main__":
    auto_cli(main, description=__doc__)
