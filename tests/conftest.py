"""What holds for every test."""

import torch

torch.set_num_threads(1)  # the tests run in several processes at once, which would fight for the cores
