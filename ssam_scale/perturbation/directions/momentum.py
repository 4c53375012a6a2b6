"""The base optimizer's momentum (MSAM, arXiv 2401.12033)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.config.direction_sections import MomentumDirection
from ssam_scale.masks import Plan
from ssam_scale.sharding import Sharding

from .interface import DIRECTIONS, Forgetful, Gradients

_ENTRIES = ("momentum_buffer", "exp_avg", "momentum")
"""What optimizers call the running sum or mean of their gradients: SGD; Adam, Lion and their kin; timm's SGDP."""


@dataclass(frozen=True)
class Momentum:
    """ε along −v, v the base optimizer's momentum: further along the way the weights are going. No ascent pass.

    ε = −ρ v / ‖v‖ (MSAM; the sign and the start as in its authors' code: while there is no momentum there is no
    perturbation). v is read where the optimizer keeps it, sharded as that is, and nothing else is kept. Its authors
    take a radius some 15 times SAM's: 3 for ResNets, 10 for a ViT after its warm-up.
    """

    ascends = False
    whole = False
    norms = frozenset({"dense", "masked"})
    remembers = False

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer, or a parameter group of it, that keeps no momentum.

        Raises:
            ValueError: it is such.
        """
        momentum_entry(optimizer)

    def source(
        self, sharding: Sharding, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> MomentumBuffer:
        """See `Direction`."""
        return MomentumBuffer(sharding, parameters, optimizer)


def momentum_entry(optimizer: torch.optim.Optimizer) -> str:
    """What `optimizer` calls its momentum in its state: seen in a step of a small one of its kind.

    Raises:
        ValueError: it has none, in some parameter group.
    """
    name, entries = type(optimizer).__name__, set()
    for group in optimizer.param_groups:
        entry = next((e for e in _ENTRIES if e in _state_after_a_step(optimizer, group)), None)
        if entry is None:
            how = f" with momentum {group['momentum']}" if "momentum" in group else ""
            raise ValueError(
                f"direction Momentum() is the base optimizer's momentum, and {name}{how} keeps none: use SGD with a "
                "momentum, or an optimizer of Adam's family"
            )
        entries.add(entry)
    return entries.pop()


def _state_after_a_step(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> set[str]:
    weight = nn.Parameter(torch.ones(2, 2))
    own = {key: value for key, value in group.items() if key != "params"}
    takes = inspect.signature(type(optimizer)).parameters
    try:
        with torch.enable_grad():
            small = type(optimizer)([{"params": [weight], **own}], **{k: v for k, v in own.items() if k in takes})
        weight.grad = torch.ones_like(weight)
        small.step()
    except Exception:  # one that works on a GPU alone, or looks at the model: what its groups say
        if "betas" in group:
            return {"exp_avg"}
        return {"momentum_buffer"} if group.get("momentum") else set()
    return {key for key, value in small.state[weight].items() if isinstance(value, Tensor) and value.ndim}


class MomentumBuffer(Forgetful):
    """v, against which ε goes."""

    sign = -1.0

    def __init__(
        self, sharding: Sharding, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self._sharding, self._parameters, self._optimizer = sharding, parameters, optimizer
        self._entry = momentum_entry(optimizer)

    @property
    def ready(self) -> bool:
        """After the optimizer's first step."""
        return any(state.get(self._entry) is not None for state in self._optimizer.state.values())

    def vectors(self, plan: Plan, gradients: Gradients, scale: Tensor | float = 1.0) -> list[Tensor]:
        """Of the perturbed parameters, whole shards."""
        return self.others(list(plan.weights), gradients)

    def others(self, names: Sequence[str], gradients: Gradients) -> list[Tensor]:
        """Of any; zeros where the optimizer has not stepped."""
        chosen = [self._parameters[name] for name in names]
        found = self._sharding.optimizer_entries(self._optimizer, chosen, self._entry)
        shards = self._sharding.shards(chosen)
        return [
            torch.zeros_like(shard.weight) if v is None else v.reshape(shard.weight.shape)
            for v, shard in zip(found, shards, strict=True)
        ]


@DIRECTIONS.register("momentum", "the base optimizer's momentum; no ascent pass (MSAM)", "arXiv 2401.12033")
def build(section: MomentumDirection) -> Momentum:
    """The direction of the section `perturbation.direction`."""
    return Momentum()
