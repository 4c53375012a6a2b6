"""The perturbation: from the ascent gradient to ε, from w to w + ε, and back to w."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.masks import Backup, Plan, Subset, masked_add_, masked_scatter_, masked_select, masked_squares
from ssam_scale.sharding import Sharding, WrittenWeights
from ssam_scale.torch_compat import foreach_clone

from .arithmetic import adaptive_scales, at_least_fp32, picked, squares, zero_unless_
from .directions import Direction, Source
from .directions.fresh import FreshGradient
from .mask_state import MaskState
from .parameters import TrainedParameters
from .phases import Phases
from .resolved_step import ResolvedStep

_TINY = 1e-7  # of the papers' code: keeps a vanishing gradient from dividing by zero


_Vectors = Callable[[Sequence[str]], list[Tensor]]


class _Side:
    """What this process perturbs: its shards of the weights."""

    def __init__(self, sharding: Sharding, mask: MaskState) -> None:
        self._sharding, self._mask = sharding, mask

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """What is written to."""
        return [shard.weight for shard in self._sharding.shards(parameters)]

    def masters(self, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """What that is rounded from, if it is."""
        return self._sharding.masters(parameters)

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Their gradients after the ascent."""
        return self._sharding.gradients(parameters)

    def parts(self, plan: Plan) -> list[Subset | None]:
        """Which elements of them a plan perturbs; None: all."""
        return list(plan.weights.values())

    def sum(self, squares: Tensor) -> Tensor:
        """What is a sum over this process's elements, over all elements. Collective."""
        return self._sharding.shard_group.all_reduce(squares)

    def of_shards(self, plan: Plan, parameters: Sequence[nn.Parameter], epsilon: list[Tensor]) -> list[Tensor]:
        """The ε of this process's shards."""
        return epsilon


class _Whole(_Side):
    """All weights, on every process alike."""

    def weights(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return self._sharding.resident(parameters)

    def masters(self, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
        return None

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return self._sharding.resident_gradients(parameters)

    def parts(self, plan: Plan) -> list[Subset | None]:
        return self._mask.resident(plan)

    def sum(self, squares: Tensor) -> Tensor:
        return squares

    def of_shards(self, plan: Plan, parameters: Sequence[nn.Parameter], epsilon: list[Tensor]) -> list[Tensor]:
        result = []
        shards, local = self._sharding.shards(parameters), plan.weights.values()
        for e, shard, part, own in zip(epsilon, shards, self.parts(plan), local, strict=True):
            full = e
            if part is not None:
                full = e.new_zeros(shard.numel)
                part.put(full, e)
            mine = full.view(-1)[shard.start : shard.start + shard.weight.numel()]
            # Not a view, which would keep all of ε.
            result.append(mine.clone() if own is None else own.take(mine))
        return result


def _to_pick(vectors: Sequence[Tensor], parts: Sequence[Subset | None]) -> list[Subset | None]:
    """Of which elements of each to go by; None: of all, which where there is a subset may be its elements alone."""
    return [None if part is None or v.numel() == part.count else part for v, part in zip(vectors, parts, strict=True)]


@dataclass(frozen=True)
class Epsilon:
    """ε = α · ρ · g of each parameter in a plan, which is computed while it is added.

    Attributes:
        gradients: what is scaled; where there is a `Subset` of shape (its count,), or that of the shard, of which the
            subset's elements count.
        parts: of each, as in `Plan.weights`.
        radii: ρ of each.
        alpha: α = ±κ / (‖·‖ + 1e-7), of shape (): float32, or float64 where gradients are.
        exists: whether the norm is finite, bool of shape (); else ε is 0: there is no direction to go.
    """

    gradients: Sequence[Tensor]
    parts: Sequence[Subset | None]
    radii: Sequence[float]
    alpha: Tensor
    exists: Tensor

    def add_(self, weights: Sequence[Tensor], backup: Backup | None, masters: Sequence[Tensor] | None = None) -> None:
        """w ← w + ε, or master + ε where there are masters, rounded once to the weights' dtype; see `masked_add_`."""
        masked_add_(
            weights,
            self.parts,
            self.gradients,
            alpha=self.alpha,
            factors=self.radii,
            when=self.exists,
            backup=backup,
            sources=masters,
        )

    def computed(self) -> list[Tensor]:
        """ε itself: float32, where there is a `Subset` of shape (its count,), else shaped like the shard."""
        result = at_least_fp32(masked_select(self.gradients, _to_pick(self.gradients, self.parts)))
        if result:
            torch._foreach_mul_(result, self.alpha)
            torch._foreach_mul_(result, list(self.radii))
            zero_unless_(result, self.exists)
        return [e if part is None else e.reshape(-1) for e, part in zip(result, self.parts, strict=True)]


class Perturbation:
    """Computes ε from the ascent gradient, adds it to the weights, and restores them.

    ε is computed in float32, that of float64 weights in float64. The calibration and the number of skipped
    perturbations are kept from step to step.

    `calibrated` keeps the radius of the dense norm without the dense gradient. Steps that have one (the first, the
    first after a refresh, every `calibrate_every`-th, and any in the form of a closure) go exactly the dense norm's way
    and note which share of ‖g‖² every parameter's masked gradient has. From then on κ² = ‖m ⊙ g‖² / ‖g‖² is the sum of
    these shares over what a step perturbs, so that one dense pass serves every cut of a moving cut.

    Args:
        sharding: the backend.
        parameters: all that are trained.
        mask: the mask at work.
        optimizer: of the weights, whose gradients are dropped between the passes.
        adaptive: perturb weights in proportion to their magnitude (ASAM, arXiv 2102.11600).
        phases: times the parts.
        direction: of ε, which `source` computes.
        loss_scale: what the losses of an ascent were multiplied by.
        before: that of before parameters were added or frozen, whose memory and counts go on.

    Attributes:
        source: what ε goes along.
        backup: of the weights, empty between steps.
        kappa: ‖m ⊙ g‖ / ‖g‖ of the last step where both were known, float32 of shape (); not a number before.
        skips: whether the last perturbation was left out because the gradient was not finite, bool of shape ().
        length: by which the last gradient was divided for ε, of shape ().
        never: False, of the same kind: that of a step without a perturbation.
        skipped: how many were, int64 of shape ().
        shares: of ‖g‖² by parameter, float32; −1 before the first calibration.
        calibrated: the step of the last calibration, −1 when one is due.
        defers: whether a direction learns from a gradient when `learn` is called, and not at once.
    """

    def __init__(
        self,
        sharding: Sharding,
        parameters: TrainedParameters,
        mask: MaskState,
        optimizer: torch.optim.Optimizer,
        adaptive: bool,
        phases: Phases,
        direction: Direction,
        loss_scale: Callable[[], Tensor | float],
        before: Perturbation | None = None,
    ) -> None:
        self.adaptive = adaptive
        self._direction, self._loss_scale = direction, loss_scale
        self.source = direction.source(sharding, parameters.by_name, optimizer)
        if before is not None:
            self.source.take_over(before.source)
        self._forgets = False
        self._unlearnt: Tensor | None = None
        self.defers = False
        self.backup = Backup()
        self._sharding, self._mask, self._optimizer, self._phases = sharding, mask, optimizer, phases
        self._parameters = parameters.by_name
        self._index = {name: i for i, name in enumerate(self._parameters)}
        self._index_cache: dict[tuple[str, ...], Tensor] = {}
        self._device = parameters.device
        self.never = torch.zeros((), dtype=torch.bool, device=self._device)
        self.skips = self.never
        self.length = torch.full((), math.nan, device=self._device)
        self.skipped: Tensor = torch.zeros((), dtype=torch.int64, device=self._device)
        if before is not None:
            self.skipped = before.skipped
        self.kappa = torch.full((), math.nan, device=self._device)
        self.shares = torch.full((len(self._parameters),), -1.0, device=self._device)
        self.calibrated = -1

    @contextmanager
    def applied(
        self, resolved: ResolvedStep, *, keep: bool = False, phases: Phases | None = None
    ) -> Iterator[list[Tensor]]:
        """The weights are w + ε inside and w again afterwards, bit for bit, whatever happens inside.

        Args:
            resolved: what the step does.
            keep: whether to yield the ε of this process's shards, as `Epsilon.computed` returns it; otherwise nothing.
            phases: times the parts; None: what times those of a step.
        """
        phases = self._phases if phases is None else phases
        try:
            with phases("perturb"), torch.no_grad():
                kept = self._perturb(resolved, keep)
            yield kept
        finally:
            # Nothing in here waits for another process: this may be the only one that failed.
            with phases("perturb"), torch.no_grad():
                self.backup.restore_()
                self._sharding.reshard()  # an ascent may have left some for the descent
                torch.clear_autocast_cache()

    def _perturb(self, resolved: ResolvedStep, keep: bool) -> list[Tensor]:
        """Everything between the passes: the weights become w + ε, on every process. Collective."""
        sharding, plan, side = self._sharding, resolved.plan, self._side(resolved)
        perturbed = [self._parameters[name] for name in plan.weights]
        epsilon = self.epsilon(resolved)
        if not resolved.whole and sharding.weights_replicated and sharding.shard_group.size > 1:
            # Other processes write to some of what changes here.
            changing, changed = sharding.resident(perturbed), self._mask.resident(plan)
            self.backup.keep(partial(masked_scatter_, changing, changed, masked_select(changing, changed)))
            epsilon.add_(side.weights(perturbed), None, side.masters(perturbed))
        else:
            epsilon.add_(side.weights(perturbed), self.backup, side.masters(perturbed))
        # A copy, because gradients may lie where the next ones will.
        kept = side.of_shards(plan, perturbed, epsilon.computed()) if keep else []
        del epsilon
        sharding.clear_gradients(self._optimizer)
        if not resolved.whole:
            written = WrittenWeights(perturbed, list(plan.weights.values()), self._mask.resident(plan))
            sharding.publish(written if resolved.packed else None)
        # It remembers low-precision copies until its outermost context ends, which may be around the step.
        torch.clear_autocast_cache()
        return kept

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """What is perturbed inside counts for nothing: afterwards all attributes are what they were."""
        before = self.skips, self.skipped, self.kappa, self.shares, self.calibrated
        self.skipped, self.shares = self.skipped.clone(), self.shares.clone()
        self._forgets = True
        try:
            yield
        finally:
            self._forgets = False
            self.skips, self.skipped, self.kappa, self.shares, self.calibrated = before

    def learn(self, *, whether: bool) -> None:
        """Where it was deferred, let the direction learn from the last gradient, or forget it."""
        if self._unlearnt is not None:
            self.source.learn(self._unlearnt if whether else None)
            self._unlearnt = None

    def snapshot(self) -> Callable[[], None]:
        """What puts all attributes back to what they are now."""
        before = self.skips, self.skipped.clone(), self.kappa, self.shares.clone(), self.calibrated

        def restore() -> None:
            self.skips, self.skipped, self.kappa, self.shares, self.calibrated = before

        return restore

    def uncalibrate(self) -> None:
        """Calibrate in the next step: the mask is another one."""
        self.calibrated = -1
        self._index_cache.clear()

    def state_dict(self) -> dict[str, Any]:
        """`skipped`, int64 of shape (), and `kappa`, float32 of shape () (−1: not known); and the calibration.

        That is `calibrated`, the step of the last one (−1: due), and `shares`, float32 of shape (), by parameter. And
        what the direction remembers: see its source. Collective if it does.
        """
        shares = dict(zip(self._parameters, self.shares.clone().unbind(), strict=True))
        known = {"skipped": self.skipped.clone(), "kappa": torch.nan_to_num(self.kappa, nan=-1.0)}
        return {**known, "calibrated": torch.tensor(self.calibrated), "shares": shares, **self.source.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ValueError: the state is of other parameters; nothing was loaded then.
        """
        shares = state_dict["shares"]
        if odd := sorted(shares.keys() ^ self._parameters.keys()):
            raise ValueError(f"the saved state is of other parameters than this optimizer's: {odd[0]}")
        self.skipped.copy_(state_dict["skipped"])
        if "kappa" in state_dict:  # what was saved before it was says nothing of it
            kappa = state_dict["kappa"].to(self._device, torch.float32)
            self.kappa = torch.where(kappa < 0.0, math.nan, kappa)
        if shares:
            self.shares.copy_(torch.stack([shares[name] for name in self._parameters]))
        self.calibrated = int(state_dict["calibrated"])
        self.source.load_state_dict(state_dict)

    def epsilon(self, resolved: ResolvedStep) -> Epsilon:
        """ε of what this process perturbs of each parameter in the plan. Collective.

        An adaptive one takes the memory of fp32 gradients.
        """
        plan, side = resolved.plan, self._side(resolved)
        chosen = [self._parameters[name] for name in plan.weights]
        # Where another step is rehearsed than the optimizer's own, by its gradient.
        own = resolved.direction == self._direction
        source: Source = self.source if own else FreshGradient()

        def of_names(names: Sequence[str]) -> list[Tensor]:
            return side.gradients([self._parameters[name] for name in names])

        parts, gradients = side.parts(plan), source.vectors(plan, of_names, self._loss_scale())
        others = partial(source.others, gradients=of_names)
        if self.adaptive:
            weights = side.weights(chosen)
            everything = (
                self._all_scaled_squares(side, plan, gradients, weights, others) if resolved.measures_kappa else None
            )
            if not isinstance(source, FreshGradient):  # what the source keeps
                gradients = foreach_clone(gradients)
            gradients = at_least_fp32(picked(gradients, _to_pick(gradients, parts)))
            scales = adaptive_scales(picked(weights, parts))
            if gradients:
                torch._foreach_mul_(gradients, scales)
            masked = squares(gradients, self._device)
            if gradients:
                torch._foreach_mul_(gradients, scales)
        else:
            some = _to_pick(gradients, parts)
            masked, of_chosen = masked_squares(gradients, some, every=resolved.measures_kappa)
            everything = None if of_chosen is None else self._all_squares(plan, of_chosen, others)
        norm, kappa = self._norm_and_kappa(resolved, side, masked, everything)
        exists = norm < math.inf  # not so of not-a-number; `isfinite` takes four launches
        self.skips = ~exists
        self.skipped += self.skips
        if own and self.defers and not self._forgets:
            self._unlearnt = exists
        elif own:
            source.learn(None if self._forgets else exists)
        if resolved.budget is not None:
            # To first order the loss rises by ρ ‖m ⊙ g‖; the norm is that of the scaled losses' gradient.
            rises = resolved.radius * (norm + _TINY)
            kappa = kappa * (resolved.budget * self._loss_scale() / rises).clamp(max=1.0)
        self.length = (norm + _TINY) / kappa
        return Epsilon(gradients, parts, list(resolved.radii.values()), source.sign * kappa / (norm + _TINY), exists)

    @torch.no_grad()
    def gradient_squares(self) -> Tensor:
        """‖g‖² of all that is trained, of shape (), after a pass that was reduced as a descent's; the same on every
        process. Collective."""
        own = squares(self._sharding.gradients(list(self._parameters.values())), self._device).sum()
        of_all = self._sharding.shard_group.all_reduce(own)
        everyone = self._sharding.data_parallel_group
        # What copies have computed apart may differ in the last bit, by which they would part.
        return (
            everyone.all_reduce(of_all) / everyone.size if everyone.size > self._sharding.shard_group.size else of_all
        )

    def _side(self, resolved: ResolvedStep) -> _Side:
        return _Whole(self._sharding, self._mask) if resolved.whole else _Side(self._sharding, self._mask)

    def _all_squares(self, plan: Plan, of_chosen: Tensor, others: _Vectors) -> Tensor:
        """‖g‖² of every parameter on this process; `of_chosen` is that of what the plan names."""
        names = [name for name in self._parameters if name not in plan.weights]
        return self._in_order([*plan.weights, *names], torch.cat([of_chosen, squares(others(names), self._device)]))

    def _all_scaled_squares(
        self, side: _Side, plan: Plan, chosen: Sequence[Tensor], weights: Sequence[Tensor], vectors: _Vectors
    ) -> Tensor:
        """‖T g‖² of every parameter on this process; `chosen` and `weights` are of what the plan names."""
        names = [name for name in self._parameters if name not in plan.weights]
        others = [self._parameters[name] for name in names]
        gradients, weights = [*chosen, *vectors(names)], [*weights, *side.weights(others)]
        # One after the other, so that the products never exist together.
        each = [squares([g * adaptive_scales([w])[0]], self._device) for g, w in zip(gradients, weights, strict=True)]
        return self._in_order([*plan.weights, *names], torch.cat(each))

    def _in_order(self, names: Sequence[str], of_each: Tensor) -> Tensor:
        """Numbers of the parameters `names`, in the order of all parameters."""
        result = torch.empty_like(of_each)
        result[self._indices(names)] = of_each
        return result

    def _norm_and_kappa(
        self, resolved: ResolvedStep, side: _Side, masked: Tensor, everything: Tensor | None
    ) -> tuple[Tensor, Tensor | float]:
        """The norm that ε is divided by, and the factor on its radius; also updates κ and the calibration.

        Args:
            resolved: what the step does.
            side: what this process perturbs.
            masked: ‖m ⊙ g‖² of each parameter in the plan, on this process.
            everything: ‖g‖² of every parameter on this process, if κ is measured.
        """
        plan = resolved.plan
        sums = [masked.sum()[None]]
        if everything is not None:
            sums.append(everything.sum()[None])
            if resolved.calibrates:
                shares = everything.clone()
                shares[self._indices(plan.weights)] = masked
                sums.append(shares)
        both = side.sum(torch.cat(sums) if len(sums) > 1 else sums[0])
        if everything is not None:
            self.kappa = (both[0] / both[1]).sqrt().float()
        if resolved.calibrates:
            usable = both[1].isfinite() & (both[1] > 0)
            told = torch.cat([torch.where(usable, both[2:] / both[1], 0.0), usable[None].to(both)])
            if resolved.apart or resolved.within_shard_group:
                # Of other gradients on other processes: their mean is the same everywhere, and in a checkpoint.
                told = self._sharding.data_parallel_group.all_reduce(told)
            self.shares.copy_(torch.where(told[-1] > 0.0, told[:-1] / told[-1], self.shares))
            self.calibrated = resolved.step
        if resolved.norm == "dense" or resolved.calibrates:
            return both[1].sqrt(), 1.0
        if resolved.norm == "masked":
            return both[0].sqrt(), 1.0
        share = self.shares[self._indices(plan.weights)].sum()
        # Without a calibration that worked the radius is the masked norm's.
        kappa = torch.where(share < 0.0, torch.ones_like(share), share.abs().sqrt())
        if everything is None:
            self.kappa = kappa
        return both[0].sqrt(), kappa

    def _indices(self, names: Iterable[str]) -> Tensor:
        """Indices of parameters on the device; kept, because sending them makes the host wait for the device."""
        key = tuple(names)
        if key not in self._index_cache:
            self._index_cache[key] = torch.tensor([self._index[n] for n in key], dtype=torch.int64, device=self._device)
        return self._index_cache[key]
