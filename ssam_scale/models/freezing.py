"""Parameters of a network that are not trained, at first or at all."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssam_scale.checks import matches_none
from ssam_scale.config.parameter_sections import Freeze
from ssam_scale.errors import UserError


def freeze(network: nn.Module, sections: Sequence[Freeze], epoch: int) -> None:
    """Take the parameters out of training that are frozen in an epoch; the others are trained.

    Args:
        network: not distributed yet: what reduces or shards gradients looks at what needs them when it is built.
        sections: of the configuration, `model.freeze`.
        epoch: from 0.

    Raises:
        UserError: one matches no parameter, or nothing is left to train.
    """
    parameters = dict(network.named_parameters())
    frozen: set[str] = set()
    for number, section in enumerate(sections):
        names = section.of(parameters)
        if not names:
            raise UserError(f"model.freeze.{number}.parameters {section.parameters!r} {matches_none(list(parameters))}")
        if section.holds(epoch):
            frozen.update(names)
    if frozen == parameters.keys():
        raise UserError(f"model.freeze leaves nothing to train in epoch {epoch}, counted from 0")
    for name, p in parameters.items():
        p.requires_grad_(name not in frozen)


def unfreezes(sections: Sequence[Freeze], epoch: int) -> bool:
    """Whether an epoch, from 0, trains what the one before did not."""
    return any(section.until_epoch == epoch for section in sections)


def most_trained(sections: Sequence[Freeze]) -> int:
    """The first epoch, from 0, that trains all that any epoch trains."""
    return max((section.until_epoch or 0 for section in sections), default=0)


def train_mode(module: nn.Module) -> None:
    """`module.train()`, but for BatchNorm layers that are frozen: these keep their statistics (timm's `freeze`)."""
    module.train()
    for layer in module.modules():
        if isinstance(layer, _BatchNorm):
            own = list(layer.parameters(recurse=False))
            if own and not any(p.requires_grad for p in own):
                layer.eval()
