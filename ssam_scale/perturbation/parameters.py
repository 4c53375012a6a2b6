"""The parameters that an optimizer trains: their names, their stages, their parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ssam_scale.checks import check_number
from ssam_scale.masks import Layout
from ssam_scale.sharding import ShardedWeights
from ssam_scale.torch_compat import is_compiled

from .modules import every_module
from .skip_gradients import row_layers
from .staged_model import StagedModel


@dataclass(frozen=True)
class TrainedParameters:
    """All parameters that an optimizer trains.

    Attributes:
        by_name: `nn.Parameter`s by their name in the network, in the network's order.
        layout: their shapes and first stages.
        uses: the stages that use each, rising; several for a tied weight.
        group_of: index of the parameter group of each, by name.
        layers: the layers that can compute the gradient of some rows of their weight, by its name.
        foreign: parameters of the network that are trained and not by this optimizer, with the first stage that uses
            each.
        compiled: names of those that compiled code uses, of which it computes all rows.
    """

    by_name: dict[str, nn.Parameter]
    layout: Layout
    uses: dict[str, tuple[int, ...]]
    group_of: dict[str, int]
    layers: dict[str, nn.Module]
    foreign: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    compiled: frozenset[str] = frozenset()
    _eligible: dict[tuple[bool, ...], Layout] = field(default_factory=dict, repr=False)  # asked for in every step

    @property
    def device(self) -> torch.device:
        """Where the weights live; while all of these are frozen, where the others do."""
        every = (*self.by_name.values(), *(p for p, _ in self.foreign))
        return next((p.device for p in every), torch.device("cpu"))

    def eligible(self, groups: Sequence[Mapping[str, Any]]) -> Layout:
        """The weights that a mask may choose from: those of the groups that are not left alone.

        Raises:
            TypeError: the rho of a group is no number.
            ValueError: it is one, but no radius.
        """
        for group in groups:
            check_radius("the rho of a parameter group", group["rho"])
        allowed = tuple(group["rho"] > 0.0 for group in groups)
        if allowed not in self._eligible:
            names = {name for name, index in self.group_of.items() if allowed[index]}
            self._eligible[allowed] = self.layout.only(names)
        return self._eligible[allowed]


def check_radius(name: str, value: Any) -> None:
    """Refuse what is no radius.

    Raises:
        TypeError: it is no number.
        ValueError: it is below 0 or not finite.
    """
    check_number(name, value, "a radius of at least 0", lambda radius: 0.0 <= radius < math.inf)


def trained_parameters(sharding: ShardedWeights, groups: Sequence[Sequence[nn.Parameter]]) -> TrainedParameters:
    """The parameters in `groups`, as `ShardedPasses.unwrap_optimizer` returned them.

    Raises:
        ValueError: a parameter is not the model's, or a `StagedModel` was given to `torch.compile`.
    """
    module = sharding.network
    if is_compiled(module) and isinstance(getattr(module, "_orig_mod", None), StagedModel):
        raise ValueError(
            "torch.compile(staged) compiles a StagedModel anew for each cut: call staged.compile(), and give SparseSAM "
            "the StagedModel"
        )
    network = module.model if isinstance(module, StagedModel) else module
    group_of = {id(p): index for index, group in enumerate(groups) for p in group}
    parameters = {name: p for name, p in network.named_parameters() if id(p) in group_of}
    if len(parameters) < len(group_of):
        raise ValueError(
            f"{len(group_of) - len(parameters)} of the optimizer's parameters are not the model's: it was built over "
            "another model, or before weights of this one were replaced (by another layer, fully_shard or a copy); "
            "build the optimizer last"
        )
    # Some layers have a parameter of no elements where they have nothing to learn.
    parameters = {name: p for name, p in parameters.items() if math.prod(sharding.full_shape(p)) > 0}
    if isinstance(module, StagedModel):
        uses, depth = module.stages_of_parameters(), len(module.stages)
    else:
        uses, depth = {name: (0,) for name, _ in network.named_parameters()}, 1
    shards = sharding.shards(list(parameters.values()))
    contracted, norms = _roles(network)
    layout = Layout(
        {name: tuple(sharding.full_shape(p)) for name, p in parameters.items()},
        {name: uses[name][0] for name in parameters},
        depth,
        {name: shard.start for name, shard in zip(parameters, shards, strict=True)},
        frozenset(name for name, p in parameters.items() if id(p) in contracted),
        frozenset(name for name, p in parameters.items() if id(p) in norms),
    )
    layers, compiled = row_layers(network), compiled_parameters(module)
    return TrainedParameters(
        parameters,
        layout,
        {name: uses[name] for name in parameters},
        {name: group_of[id(p)] for name, p in parameters.items()},
        {name: layers[id(p)] for name, p in parameters.items() if id(p) in layers and id(p) not in compiled},
        [(p, uses[n][0]) for n, p in network.named_parameters() if p.requires_grad and id(p) not in group_of],
        frozenset(name for name, p in parameters.items() if id(p) in compiled),
    )


class Fingerprint:
    """Tells whether modules have been replaced, or parameters replaced, frozen, unfrozen or regrouped.

    Asked in every step, so it looks at the modules that it knows, in one pass and without names: where these have the
    children that they had, there are no others.

    Args:
        network: whose parameters, by identity and whether they are trained.
        groups: of the optimizer, by identity.
    """

    def __init__(self, network: nn.Module, groups: Sequence[Mapping[str, Any]]) -> None:
        self._attributes = [vars(module) for module in every_module(network)]
        self._known = self._now(groups)

    def fits(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether all is as it was, with these groups."""
        return self._now(groups) == self._known

    def _now(self, groups: Sequence[Mapping[str, Any]]) -> tuple[list[nn.Module | None], list[int], list[bool]]:
        children: list[nn.Module | None] = []
        own: list[nn.Parameter | None] = []
        for attributes in self._attributes:
            if of_module := attributes["_modules"]:
                children += of_module.values()
                children.append(None)  # so that it is seen where one module's end and the next one's begin
            if of_module := attributes["_parameters"]:
                own += of_module.values()
                own.append(None)
        trained = [p.requires_grad for p in own if p is not None]
        for group in groups:
            own += group["params"]
            own.append(None)
            trained.append("rho" in group)  # which one that is put in another's place lacks
        return children, list(map(id, own)), trained


def compiled_parameters(module: nn.Module) -> set[int]:
    """The parameters below modules that `nn.Module.compile` or `StagedModel.compile` was called on, by identity."""
    if isinstance(module, StagedModel) and module.is_compiled:
        return {id(p) for p in module.parameters()}
    below = (m for m in module.modules() if m._compiled_call_impl is not None)
    return {id(p) for m in below for p in m.parameters()}


def _roles(network: nn.Module) -> tuple[set[int], set[int]]:
    """The weights of linear layers and convolutions, and the parameters of normalization layers, by identity."""
    contracted: set[int] = set()
    norms: set[int] = set()
    for module in network.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            contracted.add(id(own.get("weight")))
        elif isinstance(module, nn.MultiheadAttention):
            contracted.add(id(own.get("in_proj_weight")))
        # Many models bring normalization layers of their own, which have nothing in common but the name.
        elif "norm" in type(module).__name__.lower():
            norms |= {id(p) for p in own.values()}
    return contracted, norms
