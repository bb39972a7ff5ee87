"""Random states: drawing numbers that the training does not notice."""

from __future__ import annotations

import random

import numpy as np
import torch


class RandomStates:
    """The random states a forward pass can draw from, as they are now.

    To set the state of a CUDA generator, or to seed it, would also begin the dropout of cuDNN's
    recurrent layers anew, which cannot be read and given back. So until `restore` these generators
    use a copy of their state.
    """

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = np.random.get_state()
        self._cpu = torch.get_rng_state()
        self._cuda = []
        for generator in torch.cuda.default_generators if torch.cuda.is_initialized() else ():
            own, copied = generator.graphsafe_get_state(), generator.clone_state()
            generator.graphsafe_set_state(copied)
            self._cuda.append((generator, own, copied))

    def seed(self, value: int = 0) -> None:
        """Start from a fixed seed. Not torch.manual_seed, which also seeds a CUDA yet to start."""
        random.seed(value)
        np.random.seed(value)
        torch.default_generator.manual_seed(value)
        for _, _, copied in self._cuda:
            copied.manual_seed(value)

    def restore(self) -> None:
        """Go back to the states at the start."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._cpu)
        for generator, own, _ in self._cuda:
            generator.graphsafe_set_state(own)
