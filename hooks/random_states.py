"""Random states: drawing numbers that the training does not notice."""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomStates:
    """The random states a forward pass can draw from."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []

    def seed(self, value: int = 0) -> None:
        """Start from a fixed seed. Not torch.manual_seed, which also seeds a CUDA yet to start."""
        random.seed(value)
        np.random.seed(value)
        torch.default_generator.manual_seed(value)
        if self._cuda:
            torch.cuda.manual_seed_all(value)

    def restore(self) -> None:
        """Go back to the states at the start."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
