"""How large a checkpoint is, before anything is built."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ssam_scale.config.schema import Config
from ssam_scale.models import build_model

from .memory import FLOAT, averages_of
from .optimizer import base_optimizer


def checkpoint_bytes(weights: int, averages: int, state: float) -> float:
    """Bytes of a checkpoint, and of the copy that it is written from: weights, averages, the base optimizer's state.

    Args:
        weights: of the network.
        averages: of each of them that are kept.
        state: bytes of the base optimizer's state for each of them.
    """
    return weights * (FLOAT * (1 + averages) + state)


def expected_bytes(config: Config) -> int:
    """The same of the configured network, which is built without memory for its weights.

    Raises:
        UserError: timm has no such network or optimizer, or does not take these arguments.
    """
    state = state_bytes_per_weight(config)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        weights = sum(p.numel() for p in build_model(config).model.parameters())
    return int(checkpoint_bytes(weights, averages_of(config), state))


def state_bytes_per_weight(config: Config) -> float:
    """What the configured base optimizer keeps after a step, on a small layer."""
    layer = nn.Linear(64, 64)
    optimizer = base_optimizer(config, layer)
    layer(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    return sum(t.nbytes for t in states) / sum(p.numel() for p in layer.parameters())
