"""Predict the characters of Python's own source by PyTorch's transformer, by AdamW: plain beside whitened.

pip install whiten-layers
python examples/transformer.py
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from whiten_layers import report, whiten

CONTEXT = 64


class Model(nn.Module):
    """Shape: codes of characters ``(N, L)`` -> logits of the next one ``(N, L, 128)``."""

    def __init__(self, width=64, heads=4, depth=2):
        super().__init__()
        self.characters, self.positions = nn.Embedding(128, width), nn.Embedding(CONTEXT, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 128)

    def forward(self, codes):
        mask = nn.Transformer.generate_square_subsequent_mask(codes.shape[1], device=codes.device)
        hidden = self.characters(codes) + self.positions.weight[: codes.shape[1]]
        return self.head(self.layers(hidden, mask=mask, is_causal=True))


def load():
    """Return the codes of the characters of three files, ``(N,)``."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in ("argparse", "ast", "typing"))
    return torch.tensor(list(text.encode("ascii", errors="ignore")))


def train(model, codes, steps, lr):
    """Return the mean loss of the last tenth of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(codes) - CONTEXT - 1, (16, 1), generator=generator)
        windows = codes[starts + torch.arange(CONTEXT + 1)]
        loss = F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return sum(losses[-(steps // 10 or 1) :]) / (steps // 10 or 1)


def main():
    """Run what the first line of this file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.01)
    options = parser.parse_args()
    codes = load()
    for name in ("plain", "eigenbasis", "whitened"):
        torch.manual_seed(0)
        model = Model()
        if name != "plain":
            whiten(model, "eigenbasis" if name == "eigenbasis" else None)  # the projections of attention, too
        print(f"{name:10} {train(model, codes, options.steps, options.lr):.3f}")
    print(report(model))


if __name__ == "__main__":
    main()
