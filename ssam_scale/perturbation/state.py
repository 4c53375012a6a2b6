"""What SparseSAM itself has to remember, as whole tensors that mean the same under every sharding."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.masks import Mask, Plan, Scored
from ssam_scale.sharding import Sharding


def whole_masks(sharding: Sharding, parameters: Mapping[str, nn.Parameter], mask: Mask) -> dict[str, Tensor]:
    """The choice of a mask that was made by scores: booleans by parameter. Collective.

    They are shaped like the parameter, or of shape () where a tensor is perturbed as a whole or not at all. Before the
    first refresh everything is False, so that there is a tensor to load into from the start.
    """
    if not isinstance(mask, Scored):
        return {}
    chosen = mask.selected.weights if mask.selected is not None else {}
    result = {}
    for (name, p), shard in zip(parameters.items(), sharding.shards(list(parameters.values())), strict=True):
        if mask.pattern == "element":
            local = chosen.get(name)
            nothing = torch.zeros_like(shard.weight, dtype=torch.bool)
            result[name] = sharding.gather(p, nothing if local is None else local)
        else:
            result[name] = torch.tensor(name in chosen)
    return result


def restore_masks(
    sharding: Sharding,
    parameters: Mapping[str, nn.Parameter],
    mask: Mask,
    saved: Mapping[str, Tensor],
    eligible: Container[str],
) -> None:
    """Take back what `whole_masks` returned, on any number of processes.

    Args:
        sharding: where the weights live.
        parameters: all that are trained, by name.
        mask: given its choice back.
        saved: the choice, by the names of `parameters`.
        eligible: names of those that a mask may choose from; what is not among them, and of which nothing is chosen, is
            left out of the plan, so that no ascent gradient is computed for it.

    Raises:
        ValueError: it is of another mask or of other parameters.
    """
    if not isinstance(mask, Scored):
        if saved:
            raise ValueError(f"the saved state has a mask chosen by scores, this optimizer a {type(mask).__name__}")
        return
    if saved.keys() != parameters.keys():
        odd = sorted(saved.keys() ^ parameters.keys())
        what = "has no mask" if not saved else f"has masks of other parameters: {odd[0]}"
        raise ValueError(f"the saved state {what}, this optimizer one of pattern {mask.pattern}")
    weights: dict[str, Tensor | None] = {}
    perturbed = 0
    for name, whole in saved.items():
        p = parameters[name]
        shape = sharding.whole_shape(p) if mask.pattern == "element" else torch.Size()
        if whole.shape != shape:
            raise ValueError(
                f"the saved mask of {name} has shape {tuple(whole.shape)}, pattern {mask.pattern} needs {tuple(shape)}"
            )
        if mask.pattern == "element":
            count = int(whole.sum())
            if count or name in eligible:
                weights[name] = sharding.scatter(p, whole).to(p.device)
                perturbed += count
        elif whole:
            weights[name] = None
            perturbed += sharding.whole_shape(p).numel()
    mask.restore(Plan(0, weights, perturbed) if perturbed else None)


# Numbered in what is saved: new ones go to the end.
_PATTERNS = ("not chosen by scores", "of pattern element", "of pattern tensor")


class SparseState:
    """`SparseSAM.sparse_state` as what `torch.distributed.checkpoint` calls a Stateful."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        """Tensors only, under the same keys at any time."""
        return {**self._optimizer.sparse_state(), "pattern": torch.tensor(self._pattern())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ValueError: the state is of another mask or of other parameters.
        """
        state = dict(state_dict)
        # What is loaded is what this optimizer has keys for: masks that it has none for would be dropped in silence.
        if (saved := int(state.pop("pattern"))) != self._pattern():
            mine = _PATTERNS[self._pattern()]
            raise ValueError(f"the saved state has a mask {_PATTERNS[saved]}, this optimizer one {mine}")
        self._optimizer.load_sparse_state(state)

    def _pattern(self) -> int:
        mask = self._optimizer.mask
        return _PATTERNS.index(f"of pattern {mask.pattern}") if isinstance(mask, Scored) else 0
