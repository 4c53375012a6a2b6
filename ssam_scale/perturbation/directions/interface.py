"""What a direction is: where the vector comes from that ε goes along.

A `Direction` is what a `SparseSAM` is given: data, the same in every process. `source` makes of it what works on one
model, and may remember something from step to step. Each file beside this one is a value of
`perturbation.direction.source`, under its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn

from ssam_scale.checks import check_choice, check_number, described
from ssam_scale.config.direction_sections import Choose
from ssam_scale.masks import Plan, masked_select
from ssam_scale.perturbation.arithmetic import at_least_fp32
from ssam_scale.registry import Registry
from ssam_scale.sharding import Sharding

Gradients = Callable[[Sequence[str]], list[Tensor]]
"""The ascent's gradients of the parameters that are named, shaped like what this process perturbs of them."""


@runtime_checkable
class Direction(Protocol):
    """Where the vector comes from that ε goes along."""

    @property
    def ascends(self) -> bool:
        """Whether it takes an ascent pass; else it is known before the step, which costs one of the base optimizer."""

    @property
    def whole(self) -> bool:
        """Whether each process can go along it with all weights, where an ascent leaves whole gradients on each.

        Else it is known of the weights alone that a process steps, and what these become has to be sent.
        """

    @property
    def norms(self) -> frozenset[str]:
        """By which it can be divided."""

    @property
    def remembers(self) -> bool:
        """Whether it keeps a number for each perturbed weight between steps."""

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Refuse a base optimizer that does not keep what the direction is made of.

        Raises:
            ValueError: it is such.
        """

    def source(
        self, sharding: Sharding, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Source:
        """The direction at work on a model.

        Args:
            sharding: where the weights live.
            parameters: all that are trained, by name.
            optimizer: the base optimizer.
        """


class Source(Protocol):
    """The vector that ε goes along, from step to step, of this process's shards.

    `vectors` is called before the weights are perturbed, `learn` once it is known whether they will be, and
    `after_descent` when the gradient at w + ε is there.

    Attributes:
        sign: −1 where ε goes against the vector, else 1.
        looks_back: whether `after_descent` is called.
    """

    sign: float
    looks_back: bool

    @property
    def ready(self) -> bool:
        """Whether there is a vector; without one a step is the base optimizer's. Known on the host."""

    def vectors(self, plan: Plan, gradients: Gradients, scale: Tensor | float) -> list[Tensor]:
        """Of each parameter in the plan: shaped like its shard, or where there is a `Subset` of shape (its count,).

        Not to be written to.

        Args:
            plan: what is perturbed.
            gradients: of the ascent.
            scale: what the losses were multiplied by, and so these gradients are: another factor in another step.
        """

    def others(self, names: Sequence[str], gradients: Gradients) -> list[Tensor]:
        """Of parameters that are not perturbed, shaped like their shards: for the dense norm."""

    def learn(self, exists: Tensor | None) -> None:
        """Remember what the last `vectors` has shown, if it was finite: a bool of shape (); None: do not."""

    def take_over(self, before: Any) -> None:
        """Go on with what another source of the same kind remembers, before parameters were added or frozen."""

    def after_descent(self, following: Plan) -> None:
        """Look at the gradient at w + ε, if anything is remembered of it for the step after, which has this plan."""

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, in whole tensors by name. Collective."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, on any number of processes."""


class Forgetful:
    """A `Source` that remembers nothing: what the others begin from."""

    sign = 1.0
    looks_back = False

    @property
    def ready(self) -> bool:
        """It is."""
        return True

    def others(self, names: Sequence[str], gradients: Gradients) -> list[Tensor]:
        """Not known.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError

    def learn(self, exists: Tensor | None) -> None:
        """Nothing."""

    def take_over(self, before: Any) -> None:
        """Nothing."""

    def after_descent(self, following: Plan) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Ascending:
    """A direction by an ascent pass over this step's batch, or a part of it.

    Attributes:
        fraction: share of each micro-batch's samples in the ascent, in (0, 1]; at least one sample.
        choose: which samples of a micro-batch these are: its `first`; `random` ones; or those of the `highest_loss`,
            which takes a forward of the whole micro-batch without a graph.

    Raises:
        TypeError, ValueError: something is of another kind or out of its range.
    """

    fraction: float = 1.0
    choose: Choose = "first"

    def __post_init__(self) -> None:
        check_number("fraction", self.fraction, "a share in (0, 1]", lambda share: 0.0 < share <= 1.0)
        check_choice("choose", self.choose, get_args(Choose))
        if self.choose != "first" and self.fraction == 1.0:
            raise ValueError(
                f"choose {self.choose!r} says which samples of a batch are seen, and with fraction 1.0 all are; give a "
                "fraction below 1"
            )

    @property
    def ascends(self) -> bool:
        """It does."""
        return True

    def check(self, optimizer: torch.optim.Optimizer) -> None:
        """Any will do."""


def unscaled(plan: Plan, gradients: Gradients, scale: Tensor | float) -> list[Tensor]:
    """The ascent's gradients of the perturbed weights, less the factor on the losses; may overwrite them.

    Args:
        plan: what the step perturbs.
        gradients: of the parameters that are named.
        scale: what the losses were multiplied by.

    Returns:
        One tensor of 1 dimension a parameter of the plan, float32 or float64.
    """
    fresh = at_least_fp32(masked_select(gradients(list(plan.weights)), list(plan.weights.values())))
    if fresh and not (isinstance(scale, float) and scale == 1.0):
        torch._foreach_div_(fresh, scale)
    return fresh


Build = Callable[[Any], Direction]

DIRECTIONS: Registry[Build] = Registry("ssam_scale.perturbation.directions")
"""By `perturbation.direction.source`: functions that build a direction from that section."""


def check_direction(direction: Any) -> None:
    """Refuse what is no direction.

    Raises:
        TypeError: it is none.
    """
    if isinstance(direction, type) or not isinstance(direction, Direction):
        raise TypeError(
            f"direction is {described(direction)}; an instance is needed of Fresh, Momentum, Previous, Friendly or "
            "VaSSO, such as Fresh(fraction=0.5)"
        )
