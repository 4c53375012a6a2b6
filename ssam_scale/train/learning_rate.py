"""The learning rate of a run: timm's scheduler, and what it says now."""

from __future__ import annotations

from typing import Any

import torch

from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError

from .length import Length


def scheduler(config: Config, base: torch.optim.Optimizer, length: Length) -> Any:
    """timm's scheduler of the learning rate, updated before each step; what a group is scaled by is its `lr_scale`.

    Raises:
        UserError: timm does not take these arguments.
    """
    from timm.scheduler import create_scheduler_v2

    section = config.schedule
    try:
        scheduler, _ = create_scheduler_v2(
            base,
            sched=section.name,
            # With the prefix the decay begins where the warm-up ends, instead of jumping to where it would be by then.
            num_epochs=length.epochs - section.warmup_epochs,
            warmup_prefix=True,
            warmup_epochs=section.warmup_epochs,
            warmup_lr=section.warmup_lr,
            min_lr=section.min_lr,
            step_on_epochs=False,
            updates_per_epoch=length.steps_per_epoch,
            **section.kwargs,
        )
    except TypeError as error:
        raise UserError(f"schedule: timm could not build {section.name} with {section.kwargs}: {error}") from error
    return scheduler


def learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate that the schedule says now, which groups with an `lr_scale` take their share of."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) / float(group.get("lr_scale", 1.0))
