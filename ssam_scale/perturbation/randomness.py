"""The random numbers of a step: both passes draw the same.

Dropout and stochastic depth so drop the same in both, and the ascent climbs the very function whose gradient is taken
at the top, as in the SAM paper's own code, which gives both passes one key (arXiv 2010.01412). It also makes a step's
result independent of how much of a prefix is shared, and of the number of passes: a step draws as much as one pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """Where torch's generators of the CPU and of one other device stand."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None

    @staticmethod
    def now(device: torch.device) -> RandomState:
        """Of the CPU and of `device`. Does not wait for it: its generator's state is kept on the host."""
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return RandomState(device, torch.get_rng_state(), own)

    def restore(self) -> None:
        """Draw from here on what was drawn from there on."""
        torch.set_rng_state(self.cpu)
        if self.own is not None:
            torch.get_device_module(self.device).set_rng_state(self.own, self.device)
