"""A timm model from its configuration."""

import difflib
from collections.abc import Mapping

import timm
import torch
from timm.utils import distribute_bn
from torch import Tensor, nn

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.sharding import World

from .drop import give_layer_to_classifier
from .named_stages import named_stages
from .stages import StagedModel, staged


def build_model(config: Config) -> StagedModel:
    """The configured network, randomly initialised (seed first), on the CPU.

    Stages by the names of blocks are traced, and not held against the model, which takes passes (`check_stages`).

    Raises:
        UserError: timm knows no such model, or the model takes no such arguments, or has no such blocks.
    """
    name = config.model.name
    check_known(name, "model.name")
    section = config.model
    # Many families take no drop rates, so they are named only where they are wanted.
    rates = {"drop_rate": section.drop_rate, "drop_path_rate": section.drop_path_rate}
    arguments = {
        "num_classes": section.num_classes,
        **{key: rate for key, rate in rates.items() if rate},
        **section.kwargs,
    }
    try:
        model = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        hint = "; model.kwargs={} leaves out all that is said there" if section.kwargs else ""
        raise UserError(f"model: timm could not build {name} with {arguments}: {error}{hint}") from error
    if section.stages is None:
        return staged(model)
    give_layer_to_classifier(model)  # which `drop_by_row` does, and which a trace would not see
    try:
        return StagedModel(model, named_stages(model, section.stages, None))
    except UserError as error:
        raise UserError(f"model.stages: {error}") from error


def build_network(config: Config, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The configured network by itself, on the CPU; draws nothing of the process's random numbers.

    Args:
        config: says which.
        weights: and buffers, by name; None: they are random.

    Raises:
        UserError: as of `build_model`.
    """
    with torch.random.fork_rng(devices=[]):
        network = build_model(config).model
    if weights is not None:
        network.load_state_dict(weights)
    return network


def check_known(name: str, given_by: str) -> None:
    """A name that timm knows a model by.

    Args:
        name: of a model.
        given_by: the key or the option, in the words of the error.

    Raises:
        UserError: timm knows none; says the nearest.
    """
    if not timm.is_model(name):
        near = _nearest(name)
        hint = f"; nearest: {', '.join(near)}" if near else ""
        raise UserError(f"{given_by}: timm {timm.__version__} knows no model {name!r}{hint}")
    now = timm.models.get_deprecated_models().get(name)
    if now is not None:  # most of them name weights, as tags do now
        architecture, _, tag = now.partition(".")
        weights = f", or {now} with model.pretrained=true for its weights" if tag else ""
        raise UserError(f"{given_by}: {name} is timm's old name for {now}; write {architecture}{weights}")


def _nearest(name: str) -> list[str]:
    """What timm knows that begins like a name, the usual sizes first, or is spelt like it."""
    wanted, known = name.lower().replace("-", "_"), timm.list_models()
    begun = sorted((n for n in known if n.startswith(wanted)), key=lambda n: ("patch16_224" not in n, len(n), n))
    return begun[:3] or difflib.get_close_matches(wanted, known, n=3, cutoff=0.5)


def average_statistics(network: nn.Module, world: World) -> None:
    """Make BatchNorm's running statistics the mean of those of all processes, each of which saw its own images."""
    if world.size > 1:
        distribute_bn(network, world.size, reduce=True)
