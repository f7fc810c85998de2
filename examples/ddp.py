"""Train a whitened network in several processes that share statistics and inverses.

pip install whiten-layers
torchrun --nproc-per-node 2 examples/ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from whiten_layers import report, whiten


def main():
    """Run what the first line of this file says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    is_cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if is_cuda else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if is_cuda else torch.device("cpu")

    torch.manual_seed(0)  # the same network everywhere
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 8))
    teacher = torch.randn(64, 8, device=device) / 8
    scales = torch.logspace(0, -2, 64, device=device)
    model = DistributedDataParallel(whiten(network.to(device)))  # whiten first, then wrap
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    generator = torch.Generator(device).manual_seed(rank)  # other batches in each process
    for step in range(options.steps):
        inputs = torch.randn(128 // ranks, 64, device=device, generator=generator) * scales
        loss = F.mse_loss(model(inputs), (10 * inputs @ teacher).tanh())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}")
    if rank == 0:
        print(report(model.module))
        torch.save(model.module.state_dict(), "model.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
