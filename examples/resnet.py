"""Classify handwritten digits by a ResNet-20, by SGD with momentum: the plain network beside the whitened one.

pip install 'whiten-layers[bench]'
python examples/resnet.py
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from whiten_layers.models import resnet20, whitened_resnet20

from whiten_layers import report


def load():
    """Return scikit-learn's 1,797 digits as images of 8×8 pixels with mean 0 and deviation 1, and their labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images = ((images - images.mean()) / images.std()).expand(-1, 3, -1, -1).contiguous()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(digits.target)[order]


def train(model, data, steps, batch_size=64):
    """Train on four fifths of the images; return the mean loss of the last steps, the accuracy on the rest, seconds."""
    images, labels = data
    known = len(images) * 4 // 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    generator = torch.Generator().manual_seed(1)
    losses, start = [], time.perf_counter()
    for _ in range(steps):
        rows = torch.randint(known, (batch_size,), generator=generator)
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[known:]).argmax(1) == labels[known:]).float().mean().item()
    model.train()
    return sum(losses[-20:]) / len(losses[-20:]), accuracy, seconds


def main():
    """Run what the first line of this file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    data = load()
    for name, builder in (("plain", resnet20), ("whitened", whitened_resnet20)):
        torch.manual_seed(0)
        model = builder(num_classes=10)
        loss, accuracy, seconds = train(model, data, options.steps)
        print(f"{name:9} loss {loss:.4f}, accuracy {accuracy:.3f}, {seconds:.0f} s")
    print(report(model))
    torch.save(model.state_dict(), "resnet20.pt")  # with the state of whitening: training goes on from it


if __name__ == "__main__":
    main()
