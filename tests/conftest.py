"""What holds for every test."""

import gc

import pytest
import torch

torch.set_num_threads(1)  # the tests run in several processes at once, which would fight for the cores


def pytest_collection_finish(session):
    """Let the collector pass over what the imports made, which stays: a tenth of the time of the tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Start each test from the same random numbers, whichever ran before it."""
    torch.manual_seed(0)
