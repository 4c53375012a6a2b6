"""What a mask perturbs, spelled out."""

from __future__ import annotations

import torch
from torch import Tensor

from ssam_scale.perturbation import SparseSAM


def whole_mask(opt: SparseSAM) -> dict[str, Tensor]:
    """Booleans for every weight that the next step's plan names, shaped like its parameter. Collective."""
    named, sharding, weights = opt.parameters.by_name, opt.sharding, opt.plan.weights
    shards = sharding.shards([named[name] for name in weights])
    return {
        name: sharding.gather(
            named[name],
            torch.ones_like(s.weight, dtype=torch.bool) if part is None else part.booleans().view(s.weight.shape),
        )
        for (name, part), s in zip(weights.items(), shards, strict=True)
    }
