"""What holds for every test: one thread, so that sums have one order and a loaded machine is no slower than it must be.

And what tests of schedulers are given: a network and the noise that it starts from.
"""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def net():
    """A smooth network that depends on the time, so that a wrong time is seen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Sequential(
            torch.nn.Conv2d(4, 16, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(16, 4, 3, padding=1)
        )

    def network(x, t):
        with torch.no_grad():
            return layers(x.float()) * torch.cos(torch.as_tensor(t).double() / 500).float()

    return network


@pytest.fixture(scope="session")
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
