"""The base optimizer of a run: timm's factory, by the configuration."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn

from ssam_scale.checks import matches_none
from ssam_scale.config.schema import Config, ParameterGroup
from ssam_scale.errors import UserError
from ssam_scale.perturbation.arguments import check_optimizer
from ssam_scale.perturbation.directions import build_direction
from ssam_scale.perturbation.fused import fused_options
from ssam_scale.sharding import BACKENDS, World
from ssam_scale.sharding.optimizer_trial import check_steps

from .checkpoint import check_savable


def base_optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    """The configured base optimizer over a network's parameters.

    Raises:
        UserError: timm has no such optimizer, or does not take these arguments.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers

    section = config.optimizer
    if section.name.lower() not in list_optimizers():
        near = difflib.get_close_matches(section.name.lower(), list_optimizers(), n=3, cutoff=0.4)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"optimizer.name: timm knows no optimizer {section.name!r}{hint}")
    _refuse_dropped(config)
    groups = {"param_group_fn": partial(_parameter_groups, config)} if section.groups else {}
    try:
        optimizer = create_optimizer_v2(
            network,
            opt=section.name,
            lr=section.lr,
            weight_decay=section.weight_decay,
            momentum=section.momentum,
            filter_bias_and_bn=not section.decay_norm_and_bias,
            layer_decay=_layer_decay(config, network),
            **groups,
            **section.kwargs,
            **fused_options(
                get_optimizer_class(section.name.lower(), bind_defaults=False), network.parameters(), section.kwargs
            ),
        )
    except (TypeError, ValueError, AssertionError, ImportError, RuntimeError) as error:
        raise UserError(f"optimizer: timm could not build {section.name} with {section.kwargs}: {error}") from error
    try:
        check_optimizer(optimizer)
    except ValueError as error:
        raise UserError(f"optimizer.name {section.name}: {error}") from error
    return optimizer


def _parameter_groups(config: Config, network: nn.Module) -> list[dict[str, Any]]:
    """timm's groups of the parameters that are trained, with those of `optimizer.groups` in groups of their own."""
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    section = config.optimizer
    options: dict[str, Any] = {
        "weight_decay": section.weight_decay,
        "weight_decay_exclude_1d": not section.decay_norm_and_bias,
        "no_weight_decay_list": getattr(network, "no_weight_decay", lambda: ())(),
        **{key: section.kwargs[key] for key in _OF_GROUPS if key in section.kwargs},
    }
    if (layer_decay := _layer_decay(config, network)) is None:
        groups = param_groups_weight_decay(network, **options)
    else:
        groups = param_groups_layer_decay(network, layer_decay=layer_decay, **options)
    own = _own_groups(config, network)
    found: dict[tuple[int, int | None], dict[str, Any]] = {}
    for index, group in enumerate(groups):
        for p in group["params"]:
            which = own.get(id(p))
            key = (index, which)
            if key not in found:
                changed = {} if which is None else _options(config, section.groups[which], group)
                found[key] = {**group, **changed, "params": []}
            found[key]["params"].append(p)
    return list(found.values())


def _layer_decay(config: Config, network: nn.Module) -> float | None:
    """The configured one for timm's networks; a layer on which an optimizer is tried has no layers to tell apart."""
    return config.optimizer.layer_decay if hasattr(network, "pretrained_cfg") else None


_OF_GROUPS = ("fallback_list", "fallback_no_weight_decay")  # which timm's factory hands to what makes groups


def _own_groups(config: Config, network: nn.Module) -> dict[int, int]:
    """Which of `optimizer.groups` names a parameter, by the parameter's id; see `check_groups`."""
    parameters = dict(network.named_parameters())
    return {
        id(parameters[name]): number
        for number, section in enumerate(config.optimizer.groups)
        for name in section.of(parameters)
    }


def _options(config: Config, section: ParameterGroup, group: Mapping[str, Any]) -> dict[str, Any]:
    """What a section changes of a group's options."""
    options: dict[str, Any] = {"lr_scale": section.lr_scale * group.get("lr_scale", 1.0)}
    if section.weight_decay is not None:
        options["weight_decay"] = section.weight_decay
    if section.rho is not None and config.perturbation is not None:
        options["rho"] = section.rho
    return options


def check_groups(config: Config, network: nn.Module) -> None:
    """Refuse a section of `optimizer.groups` that no parameter is of, and two that share one.

    Raises:
        UserError: there are such.
    """
    names = [name for name, _ in network.named_parameters()]
    taken: dict[str, int] = {}
    for number, section in enumerate(config.optimizer.groups):
        key = f"optimizer.groups.{number}.parameters {section.parameters!r}"
        found = section.of(names)
        if not found:
            raise UserError(f"{key} {matches_none(names)}")
        if shared := [name for name in found if name in taken]:
            more = f" and {len(shared) - 1} more" if len(shared) > 1 else ""
            raise UserError(
                f"{key} matches {shared[0]}{more}, which optimizer.groups.{taken[shared[0]]}.parameters "
                f"{config.optimizer.groups[taken[shared[0]]].parameters!r} has; a parameter is of one group"
            )
        taken |= dict.fromkeys(found, number)


def check_direction(config: Config, base: torch.optim.Optimizer) -> None:
    """Refuse a direction that the base optimizer keeps nothing for.

    Raises:
        UserError: it is such.
    """
    if config.perturbation is None:
        return
    section = config.perturbation.direction
    try:
        build_direction(section).check(base)
    except ValueError as error:
        raise UserError(f"perturbation.direction.source {section.source}: {error}") from error


def check_handed(config: Config, world: World) -> None:
    """Refuse an optimizer that would step what the backend hands it to another place than whole tensors. Collective.

    Args:
        config: of the run. The backend that it names is meant, also where one process alone is to try it.
        world: the processes. One alone has no shards, and finds nothing to refuse on FSDP2.

    Raises:
        UserError: it is such a one.
    """
    backend = config.sharding.backend
    hands = "tensors" if backend == "auto" else BACKENDS[backend].value.hands
    if hands == "tensors":
        return
    # A parameter of every number of dimensions, which the factory puts into the groups that a network's would be in.
    kinds = nn.ModuleList([nn.Conv2d(2, 2, 2), nn.Linear(2, 2), nn.ParameterList([torch.zeros(1, 2, 2)])])
    optimizer = base_optimizer(config, kinds.to(world.device))
    dimensions = [{p.ndim for p in group["params"]} for group in optimizer.param_groups]
    try:
        check_steps(optimizer, hands, world.group, dimensions)
    except ValueError as error:
        raise UserError(f"optimizer.name {config.optimizer.name} on sharding.backend {backend}: {error}") from error


def check_saved(config: Config, world: World) -> None:
    """Refuse an optimizer that no run could be resumed with.

    Raises:
        UserError: it is such a one; says which are not.
    """
    from timm.optim import create_optimizer_v2, list_optimizers

    def problem(optimizer: torch.optim.Optimizer) -> str:
        if type(optimizer).__module__.startswith("torch."):
            return ""
        try:
            check_savable(optimizer)
        except Exception as error:  # whatever an optimizer of somebody else raises
            return str(error) or type(error).__name__
        return ""

    def probe() -> nn.Module:
        return nn.Linear(4, 4).to(world.device)

    if not (found := problem(base_optimizer(config, probe()))):
        return
    others = []
    for name in list_optimizers():
        with suppress(Exception):
            other = create_optimizer_v2(probe(), opt=name, lr=1e-3)
            check_optimizer(other)
            if not problem(other):
                others.append(name)
    raise UserError(f"optimizer.name {config.optimizer.name}: {found}; these can be saved: {', '.join(others)}")


def _refuse_dropped(config: Config) -> None:
    """Refuse what timm's factory would leave out without a word, and words where the optimizer asks for a truth value.

    Raises:
        UserError: the optimizer takes no such thing.
    """
    from timm.optim import get_optimizer_class, get_optimizer_info

    section, name = config.optimizer, config.optimizer.name.lower()
    info = get_optimizer_info(name)
    takes = signature(get_optimizer_class(name, bind_defaults=False)).parameters
    for argument, taken_ in {"eps": info.has_eps, "betas": info.has_betas}.items():
        if argument in section.kwargs and not taken_:
            known = ", ".join(key for key in takes if key not in ("params", "lr", "weight_decay", "momentum", "kwargs"))
            raise UserError(f"optimizer.kwargs.{argument}: {section.name} takes no {argument}; it takes {known}")
    # A configuration that is printed names every key: the default says nothing.
    if not info.has_momentum and section.momentum != type(section).model_fields["momentum"].default:
        betas = "; its first moment is by optimizer.kwargs.betas" if info.has_betas else ""
        raise UserError(f"optimizer.momentum {section.momentum}: {section.name} has no momentum{betas}")
    for argument, value in section.kwargs.items():
        switch = argument in ("foreach", "fused") or (argument in takes and isinstance(takes[argument].default, bool))
        if switch and value is not None and not isinstance(value, bool):
            raise UserError(f"optimizer.kwargs.{argument} {value!r}: true or false is needed")
