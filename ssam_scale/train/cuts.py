"""The times that cuts are drawn by, measured where a run trains."""

from __future__ import annotations

from ssam_scale.config.schema import Config
from ssam_scale.masks import DepthByCost
from ssam_scale.perturbation import ascent_seconds
from ssam_scale.sharding import World

from .masks import EpochBatches
from .setup import Parts, soft_loss


def time_ascents(config: Config, world: World, parts: Parts, batches: EpochBatches) -> None:
    """Measure ascents for a mask that is drawn by cost and has no times yet. Collective.

    A resumed run has those of its checkpoint, so that its cuts are drawn as without a break.

    Args:
        config: of the run.
        world: the processes.
        parts: of the run.
        batches: of the epoch that begins; what one step takes is looked at, and stays where it is.
    """
    mask = parts.opt.mask
    if isinstance(mask, DepthByCost) and mask.seconds is None:
        coming = batches.ahead(config.data.batch_size // world.size)
        mask.seconds = ascent_seconds(parts.opt, soft_loss(config, parts.precision), *coming)
