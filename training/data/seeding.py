"""Seeding all generators from a tuple of numbers, so that draws depend on nothing else."""

from __future__ import annotations

import random

import numpy as np
import torch


def seed_all(*keys: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on all devices."""
    torch.manual_seed(seed_cpu(*keys))


def seed_cpu(*keys: int) -> int:
    """The same on the CPU, at a tenth of the time: it's done for each image. torch's seed."""
    seed = int(np.random.SeedSequence(keys).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    return seed
