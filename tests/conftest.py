import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits():
    """Scikit-learn's 1797 handwritten digits as (x, y), shuffled."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    return torch.from_numpy(x[order] / 16).float(), torch.from_numpy(y[order])


@pytest.fixture(scope="session")
def trained(digits):
    """A 64-96-80-10 network trained on 1200 digits; never changed by a test."""
    x, y = digits
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 80), nn.ReLU(), nn.Linear(80, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(15):
        for chosen in torch.randperm(1200).split(64):
            loss = nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def calibration(digits):
    """300 training samples."""
    x, y = digits
    return x[:300], y[:300]
