"""A mask on a sharded model: scoring the weights, where the selection lies on this rank, saving it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from ssam_scale.masks import (
    BitMask,
    DepthByCost,
    Layout,
    Mask,
    Plan,
    Refreshed,
    Rows,
    ScoreBased,
    Subset,
    pack,
    popcount,
    unpack,
)
from ssam_scale.sharding import Sharding
from ssam_scale.sharding.chunks import gathered, whole

from .loss import LossFn
from .scores import AccumulatedFisher, ScoreRequest, compute_scores


class MaskState:
    """Computes the scores of a sharded model, refreshes its mask by them, knows the mask of full parameters, saves it.

    Args:
        sharding: where the weights live.
        parameters: all that are trained, by name.
        layout: of the same.
        mask: any; one that is not chosen by scores has nothing to refresh and nothing to remember.
        before: the MaskState of before parameters were added, whose accumulated scores are carried over.
        pack: whether other processes are sent no more than what is perturbed.
    """

    def __init__(
        self,
        sharding: Sharding,
        parameters: Mapping[str, nn.Parameter],
        layout: Layout,
        mask: Mask,
        before: MaskState | None = None,
        pack: bool = True,
    ) -> None:
        self._sharding = sharding
        self._parameters = parameters
        self._layout = layout
        self._mask = mask
        # Whether a process keeps the mask of full parameters beside that of its shards: a bit for every weight.
        self._needs_full = sharding.shard_group.size > 1 and (
            sharding.weights_replicated or (sharding.packs_gradients and pack)
        )
        self._full: Mapping[str, Subset | None] | None = None
        self.accumulated = None
        if isinstance(mask, ScoreBased) and "accumulated" in mask.kinds:
            self.accumulated = AccumulatedFisher(sharding, list(parameters.values()))
            if before is not None and before.accumulated is not None:
                known = dict(zip(before._parameters, before.accumulated.scores, strict=True))
                for name, score in zip(parameters, self.accumulated.scores, strict=True):
                    if name in known:
                        score.copy_(known[name])
        if isinstance(mask, ScoreBased):
            self._gather_masks(mask)

    def accumulate(self, scale: Tensor | float) -> None:
        """Average in the squared descent gradients, if the mask is chosen by accumulated scores.

        Args:
            scale: what they are still scaled by; a tensor of it makes the host wait for nothing.
        """
        if self.accumulated is not None:
            self.accumulated.update(self._sharding.gradients(list(self._parameters.values())), 1.0 / scale)

    def resident(self, plan: Plan) -> list[Subset | None]:
        """Which elements of `ShardedWeights.resident` a plan perturbs, by parameter; None: all of them."""
        if not self._sharding.weights_replicated:
            return list(plan.weights.values())
        return self.full_subsets(plan, plan.weights)

    def knows_full(self, plan: Plan) -> bool:
        """Whether this rank knows which elements of the full parameters a plan perturbs, and not only of its shards."""
        known = self._full is not None or plan.full is not None
        return known or self._sharding.shard_group.size == 1 or not plan.perturbs_subsets

    def full_subsets(self, plan: Plan, subsets: Mapping[str, Subset | None]) -> list[Subset | None]:
        """Subsets of the full parameters, of which `subsets` are this rank's shards; None where only these are known.

        Args:
            plan: what a step perturbs.
            subsets: the plan's `weights`; or of other parameters None: all of it, which stays None.
        """
        if not self.knows_full(plan):
            return [None] * len(subsets)
        known = plan.full if plan.full is not None else subsets if self._full is None else self._full
        return [None if subset is None else known[name] for name, subset in subsets.items()]

    def refresh(
        self,
        layout: Layout,
        optimizer: torch.optim.Optimizer,
        loss_fn: LossFn | None,
        batches: Iterable[Any],
        samples: int | None,
        step: int,
        scale: float,
    ) -> None:
        """Compute the mask anew; see `SparseSAM.refresh`."""
        mask = self._mask
        if not isinstance(mask, Refreshed):
            raise TypeError(f"a {type(mask).__name__} mask is not chosen by scores: there is nothing to refresh")
        accumulated = [] if self.accumulated is None else self.accumulated.scores
        request = ScoreRequest(
            mask.wanted(),
            self._sharding,
            optimizer,
            {name: self._parameters[name] for name in layout.shapes},
            mask.seed * 2**32 + step,
            dict(zip(self._parameters, accumulated, strict=False)),
            loss_fn,
            batches,
            samples,
            scale,
        )
        scores = compute_scores(request)
        if mask.draws_zeros(layout, scores, self._sharding.shard_group, step):
            numbers = compute_scores(replace(request, wanted=("random",)))["random"]
            [(kind, given)] = scores.items()
            scores = {kind: {n: torch.where(s == 0.0, numbers[n].sub_(1.0), s) for n, s in given.items()}}
        mask.refresh(layout, scores, self._sharding.shard_group, step)
        self._gather_masks(mask)

    def _gather_masks(self, mask: Refreshed) -> None:
        """Gather the mask of full parameters, where more than shards changes on this rank, or is sent. Collective."""
        self._full = None
        if isinstance(mask, ScoreBased) and mask.selected is not None and self._needs_full:
            self._full = {name: self._gather_subset(name, subset) for name, subset in mask.selected.weights.items()}

    def _gather_subset(self, name: str, subset: Subset | None) -> Subset | None:
        """The subset of the full parameter, of which every rank has that of its shard. Collective."""
        p = self._parameters[name]
        numel = self._sharding.full_shape(p).numel()
        if isinstance(subset, Rows):
            return Rows(subset.keep, subset.size, 0, numel, subset.device)
        if isinstance(subset, BitMask):
            [shard] = self._sharding.shards([p])
            return BitMask(pack(self._sharding.gather(p, subset.booleans().view(shard.weight.shape))), numel)
        return subset

    def state_dict(self) -> dict[str, Any]:
        """Tensors that mean the same under every sharding, under the same names at any time. Collective.

        `kept_as`, the kind of mask, by its place in `_KEPT`; `chosen_at`; `mask`, by parameter: `BitMask.packed` of the
        full parameter, or a flag for each row, or one; and `accumulated`, by parameter: float32, full; both empty where
        the mask has none. And of a mask drawn by cost alone, `DepthByCost.state_dict`.
        """
        mask = self._mask
        chosen_at = mask.chosen_at if isinstance(mask, Refreshed) else -1
        result: dict[str, Any] = {
            "kept_as": torch.tensor(self._kept_as()),
            "chosen_at": torch.tensor(chosen_at),
            "mask": {},
            "accumulated": {},
        }
        if isinstance(mask, DepthByCost):
            result |= mask.state_dict()
        if isinstance(mask, ScoreBased):
            weights = mask.selected.weights if mask.selected is not None else {}
            for name, p in self._parameters.items():
                # Before the first choice everything is False, so that there is a tensor to load into from the start.
                device = p.device if mask.kept_as == "bits" else None
                plain = torch.full(self._flags_shape(name), name in weights, device=device)
                subset = self._gather_subset(name, weights.get(name))
                if mask.kept_as == "bits":
                    result["mask"][name] = subset.packed if isinstance(subset, BitMask) else pack(plain)
                else:
                    result["mask"][name] = subset.keep.clone() if isinstance(subset, Rows) else plain
        if self.accumulated is not None:
            full = self.accumulated.state_dict()["scores"]
            result["accumulated"] = dict(zip(self._parameters, full, strict=True))
        return result

    def _kept_as(self) -> int:
        return list(_KEPT).index(self._mask.kept_as if isinstance(self._mask, Refreshed) else None)

    def _flags_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the flags that say what is perturbed of a parameter."""
        shape = self._sharding.full_shape(self._parameters[name])
        assert isinstance(self._mask, ScoreBased)
        if self._mask.kept_as == "bits":
            return (shape.numel(),)
        return (shape[0] if shape else 1,) if self._mask.kept_as == "rows" else ()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, on any number of processes. Collective.

        Raises:
            ValueError: the state is of another mask or of other parameters; nothing was loaded then.
        """
        mask, saved, accumulated = self._mask, state_dict["mask"], state_dict["accumulated"]
        self._check(state_dict)
        if isinstance(mask, DepthByCost):
            mask.load_state_dict(state_dict)
        if not isinstance(mask, ScoreBased):
            return
        if self.accumulated is not None:
            self.accumulated.load_state_dict({"scores": [accumulated[name] for name in self._parameters]})
        subsets: dict[str, Subset | None] = {}
        counts: list[int] = []
        for name in self._parameters:  # in the order of a choice, in which norms are summed up
            if count := self._count(name, saved[name]):
                subsets[name] = self._local_subset(name, saved[name])
                counts.append(count)
        mask.restore(self._layout, subsets, counts, int(state_dict["chosen_at"]))
        self._gather_masks(mask)

    def _check(self, state: Mapping[str, Any]) -> None:
        """Raise a ValueError unless `state` is of such a mask on these parameters."""
        mask, saved = self._mask, state["mask"]
        if isinstance(mask, DepthByCost) and not saved:
            return  # which checks for itself
        if saved and not isinstance(mask, ScoreBased):
            raise ValueError(f"the saved state has a mask chosen by scores, this optimizer a {type(mask).__name__}")
        if "fisher_mass" in state:
            raise ValueError(f"the saved state has a moving cut drawn by cost, this optimizer a {type(mask).__name__}")
        if isinstance(mask, ScoreBased):
            if saved.keys() != self._parameters.keys():
                odd = sorted(saved.keys() ^ self._parameters.keys())
                what = "has no mask" if not saved else f"has masks of other parameters: {odd[0]}"
                raise ValueError(f"the saved state {what}, this optimizer has {mask}")
            for name, flags in saved.items():
                needed = self._flags_shape(name)
                if mask.kept_as == "bits":
                    needed = (-(-needed[0] // 8),)
                if tuple(flags.shape) != needed or (flags.dtype == torch.uint8) != (mask.kept_as == "bits"):
                    raise ValueError(f"the saved mask of {name} has shape {tuple(flags.shape)}, {mask} needs {needed}")
            if (self.accumulated is not None) != bool(state["accumulated"]):
                has, mine = ("has", "none") if state["accumulated"] else ("has no", "some")
                raise ValueError(f"the saved state {has} accumulated scores, {mask} needs {mine}")
        # `torch.distributed.checkpoint` reads what this optimizer has keys for, and drops masks that it has none for.
        if (kept_as := int(state["kept_as"])) != self._kept_as():
            theirs, mine = (list(_KEPT.values())[kind] for kind in (kept_as, self._kept_as()))
            raise ValueError(f"the saved state has a mask {theirs}, this optimizer one {mine}")

    def _count(self, name: str, flags: Tensor) -> int:
        """Perturbed weights of a parameter by its saved flags."""
        if flags.dtype == torch.uint8:
            return popcount(flags)
        kept: int = int(flags.sum())
        return kept * (self._sharding.full_shape(self._parameters[name]).numel() // max(flags.numel(), 1))

    def _local_subset(self, name: str, flags: Tensor) -> Subset | None:
        """The subset of this rank's shard by the saved flags of the full parameter."""
        p = self._parameters[name]
        shape = self._sharding.full_shape(p)
        [shard] = self._sharding.shards([p])
        if not flags.ndim:
            return None
        if flags.dtype == torch.bool:
            size = shape.numel() // flags.numel()
            return Rows(flags.cpu(), size, shard.start, shard.weight.numel(), p.device)
        full = unpack(flags.to(p.device))[: shape.numel()].view(shape)
        return BitMask(pack(self._sharding.scatter(p, full)), shard.weight.numel())


# Numbered in what is saved: new ones go to the end.
_KEPT = {
    None: "not chosen by scores",
    "bits": "of single weights",
    "rows": "of rows",
    "whole": "of whole tensors",
    "cuts": "drawn by cost",
}


class SparseState:
    """What SparseSAM remembers beside the base optimizer's state, as a `torch.distributed.checkpoint` Stateful.

    Args:
        optimizer: whose steps are counted.
        parts: returns what else there is, each with its own keys of one flat dictionary; what may refuse a state first.
            Asked each time, because a new parameter group gives an optimizer new ones.
    """

    def __init__(self, optimizer: Any, parts: Callable[[], Sequence[Stateful]]) -> None:
        self._optimizer, self._parts = optimizer, parts

    def state_dict(self) -> dict[str, Any]:
        """Tensors that mean the same on any number of processes, under the same keys at any time. Collective."""
        return dict(gathered(self.sharded_state_dict()))

    def sharded_state_dict(self) -> dict[str, Any]:
        """What `state_dict` returns, before what is sharded of it is gathered. Collective."""
        state: dict[str, Any] = {"steps": torch.tensor(self._optimizer.steps)}
        for part in self._parts():
            state |= part.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, on any number of processes. Collective.

        Raises:
            ValueError: the state is of another mask or of other parameters.
        """
        state = whole(state_dict)
        for part in self._parts():
            part.load_state_dict(state)
        self._optimizer.steps = int(state["steps"])
