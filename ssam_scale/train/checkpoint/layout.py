"""Whether a checkpoint is saved whole by the first process, or sharded, by each process what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import psutil
from torch import Tensor

from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import Chunk

_SHARE = 0.5  # of the memory that is free: training goes on while the copy is written


def saved_sharded(
    wanted: Literal["auto", "whole", "sharded"], leaves: Mapping[str, Mapping[str, Tensor | Chunk]], world: World
) -> bool:
    """Whether each process saves its own chunks. Collective.

    Args:
        wanted: `auto`: where a copy of everything would take more than half of the memory that is free on the first
            process's host.
        leaves: all tensors of the checkpoint, by part and name.
        world: the processes.
    """
    every = [leaf for of_part in leaves.values() for leaf in of_part.values()]
    if not any(isinstance(leaf, Chunk) for leaf in every) or wanted == "whole":
        return False
    if wanted == "sharded":
        return True
    total = sum(leaf.bytes if isinstance(leaf, Chunk) else leaf.nbytes for leaf in every)
    return world.first_says(total > _SHARE * psutil.virtual_memory().available)
