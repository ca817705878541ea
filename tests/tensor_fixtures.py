"""Random numbers from seeds, and how far two tensors are apart."""

import torch


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def generators(*seeds):
    return [generator(seed) for seed in seeds]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def relative(a, b):
    """||a - b|| / ||b||."""
    return float((a.double() - b.double()).norm() / b.double().norm())
