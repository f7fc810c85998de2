"""What holds for every test."""

import pytest
import torch

torch.set_num_threads(1)  # the tests run in several processes at once, which would fight for the cores


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Start each test from the same random numbers, whichever ran before it."""
    torch.manual_seed(0)
