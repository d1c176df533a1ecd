import pytest
import torch


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8)
