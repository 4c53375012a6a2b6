"""From the ascent gradient to the perturbation ε: which norm, which radius, and what to do without a direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from ssam_scale.masks import Plan, compacted
from ssam_scale.sharding import Sharding

_TINY = 1e-7  # of the papers' code: keeps a vanishing gradient from dividing by zero
_ETA = 0.01  # of the ASAM paper: lets weights at zero be perturbed, too


def at_least_fp32(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`tensors`, those of less than 32 bits as float32 copies."""
    return [t.float() if t.element_size() < 4 else t for t in tensors]


def squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Σ x² of each tensor: float32 of shape (number of tensors,)."""
    if not tensors:
        return torch.zeros(0, device=device)
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=torch.float32)).square_()


def adaptive_scales(weights: Sequence[Tensor]) -> list[Tensor]:
    """T = |w| + η, the scale that makes sharpness independent of rescaling weights (ASAM, arXiv 2102.11600, eq. 3)."""
    if not weights:
        return []
    scales = at_least_fp32(torch._foreach_abs(list(weights)))
    torch._foreach_add_(scales, _ETA)
    return scales


def scale_to_radius_(gradients: Sequence[Tensor], radii: Sequence[float], reach: Tensor | float, norm: Tensor) -> None:
    """Gradients become ε = ρ · κ · g / (‖·‖ + 1e-7) in place (arXiv 2210.05177, equation 5, with m in g).

    Where the norm is not finite they become zeros: there is no direction to go.

    Args:
        gradients: m ⊙ g.
        radii: ρ of each gradient.
        reach: κ, the share of the radius to go, of shape ().
        norm: the norm divided by, of shape ().
    """
    if not gradients:
        return
    scale = reach / (norm + _TINY)
    for radius in set(radii):
        torch._foreach_mul_([g for g, r in zip(gradients, radii, strict=True) if r == radius], radius * scale)
    zero_unless_(gradients, norm.isfinite())


def zero_unless_(tensors: Sequence[Tensor], condition: Tensor) -> None:
    """Zeros in the place of everything in `tensors` (of 4 or 8 bytes an element) unless `condition`, of shape ().

    Decided without making the host wait for the device: zero is what the bit pattern of anything, not-a-number
    included, becomes when multiplied by 0.
    """
    if condition.is_cpu:
        if not condition:
            torch._foreach_zero_(list(tensors))
        return
    for size, integer in {4: torch.int32, 8: torch.int64}.items():
        if same := [t.view(integer) for t in tensors if t.element_size() == size]:
            torch._foreach_mul_(same, condition.to(integer))


Norm: TypeAlias = Literal["dense", "masked", "calibrated"]
Known: TypeAlias = Literal["all", "named", "perturbed"]
"""What there is a gradient of: all weights, all of the parameters in the plan, or only what it perturbs of them."""


class Ascent:
    """Makes ε, always in float32, and remembers what later steps need: the calibration and how many were skipped.

    `calibrated` keeps the radius of the dense norm without the dense gradient. Steps that have one (the first, the
    first after a refresh, every `calibrate_every`-th, and any in the form of a closure) go exactly the dense norm's way
    and note which share of ‖g‖² every parameter's masked gradient has. From then on κ² = ‖m ⊙ g‖² / ‖g‖² is the sum of
    these shares over what a step perturbs, so that one dense pass serves every cut of a moving cut.

    Args:
        sharding: where the weights live.
        parameters: all that are trained, by name.
        norm: what the gradient is divided by.
        adaptive: perturb weights in proportion to their magnitude (ASAM, arXiv 2102.11600).
        calibrate_every: steps between two looks at the whole gradient: the dense passes of the calibrated norm, and the
            passes by which κ of single weights and rows is known; None: only when it has to.

    Attributes:
        kappa: ‖m ⊙ g‖ / ‖g‖ of the last step where both were known, float32 of shape (); not a number before.
        skipped: number of steps without a perturbation because the gradient was not finite, int64 of shape ().
        shares: of ‖g‖² by parameter, float32; −1 before the first calibration.
        calibrated: the step of the last calibration, −1 when one is due.

    Raises:
        ValueError: the norm is none of these, or `calibrate_every` is not positive.
    """

    def __init__(
        self,
        sharding: Sharding,
        parameters: Mapping[str, nn.Parameter],
        norm: Norm,
        adaptive: bool,
        calibrate_every: int | None,
    ) -> None:
        if norm not in get_args(Norm):
            raise ValueError(f"norm is {norm!r}; one of {', '.join(get_args(Norm))} is needed")
        if calibrate_every is not None and calibrate_every < 1:
            raise ValueError(f"calibrate_every is {calibrate_every}; at least 1, or None, is needed")
        self.norm = norm
        self.adaptive = adaptive
        self._every = calibrate_every
        self._sharding = sharding
        self._parameters = parameters
        self._index = {name: i for i, name in enumerate(parameters)}
        self._placed: dict[tuple[str, ...], Tensor] = {}
        self._device = next(iter(parameters.values())).device if parameters else torch.device("cpu")
        self.skipped = torch.zeros((), dtype=torch.int64, device=self._device)
        self.kappa = torch.full((), math.nan, device=self._device)
        self.shares = torch.full((len(parameters),), -1.0, device=self._device)
        self.calibrated = -1

    def uncalibrate(self) -> None:
        """Calibrate in the next step: the mask is another one."""
        self.calibrated = -1
        self._placed.clear()

    def state(self) -> dict[str, Tensor]:
        """What `load_state` takes."""
        calibrated = torch.tensor(self.calibrated)
        return {"skipped": self.skipped.clone(), "calibrated": calibrated, "shares": self.shares.clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state` returned.

        Raises:
            ValueError: the state is of other parameters.
        """
        if state["shares"].shape != self.shares.shape:
            mine, theirs = len(self.shares), len(state["shares"])
            raise ValueError(f"the saved state is of {theirs} parameters, this optimizer has {mine}")
        self.skipped.copy_(state["skipped"])
        self.shares.copy_(state["shares"])
        self.calibrated = int(state["calibrated"])

    def needs_all(self, plan: Plan, step: int) -> bool:
        """Whether step number `step` needs the gradient of every parameter, perturbed or not.

        The masked norm does not, but for κ it looks at it now and then where the ascent has most of it anyway.
        """
        every = self._every
        if self.norm == "masked":
            return every is not None and step % every == 0 and plan.takes_parts
        if self.norm == "dense":
            return True
        return self.calibrated < 0 or (every is not None and step - self.calibrated >= every)

    def perturbation(self, plan: Plan, radii: Mapping[str, float], step: int, known: Known) -> list[Tensor]:
        """ε of each parameter in the plan, of the elements that it perturbs alone: float32, where there is a `Part` of
        shape (its count,), else shaped like the shard. Fp32 gradients are overwritten: ε takes their memory.

        Args:
            plan: what to perturb.
            radii: ρ by parameter.
            step: number of the step, from 0.
            known: what there is a gradient of.
        """
        chosen = [self._parameters[name] for name in plan.weights]
        parts = list(plan.weights.values())
        gradients = self._sharding.gradients(chosen)
        weights = [shard.weight for shard in self._sharding.shards(chosen)] if self.adaptive else []
        everything = self._all_squares(plan, gradients, weights) if self._sees_more(plan, known) else None
        epsilon = at_least_fp32(compacted(gradients, parts))
        del gradients
        scales = adaptive_scales([w if m is None else m.take(w) for w, m in zip(weights, parts, strict=False)])
        if scales:
            torch._foreach_mul_(epsilon, scales)
        masked = squares(epsilon, self._device)
        calibrates = known == "all" and self.norm == "calibrated"
        norm, reach = self._norm_and_reach(plan, masked, everything, step if calibrates else None)
        if scales:
            torch._foreach_mul_(epsilon, scales)
        scale_to_radius_(epsilon, [radii[name] for name in plan.weights], reach, norm)
        self.skipped += ~norm.isfinite()
        return epsilon

    def _sees_more(self, plan: Plan, known: Known) -> bool:
        """Whether there are gradients of all weights, and to look at those that are not perturbed, too.

        Where they are there anyway they cost one more look to know κ, also if the norm has no use for it.
        """
        if self.norm != "masked" or plan.weights.keys() != self._parameters.keys():
            return known == "all"
        return known != "perturbed" and plan.takes_parts

    def _all_squares(self, plan: Plan, chosen: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """‖g‖² of every parameter on this process; `chosen` and `weights` are of what the plan names."""
        names = [name for name in self._parameters if name not in plan.weights]
        others = [self._parameters[name] for name in names]
        gradients = [*chosen, *self._sharding.gradients(others)]
        if self.adaptive:
            weights = [*weights, *(shard.weight for shard in self._sharding.shards(others))]
            # One after the other, so that the products never exist together.
            each = [
                squares([g * adaptive_scales([w])[0]], self._device) for g, w in zip(gradients, weights, strict=True)
            ]
            of_each = torch.cat(each)
        else:
            of_each = squares(gradients, self._device)
        result = torch.empty_like(of_each)
        result[self._places([*plan.weights, *names])] = of_each
        return result

    def _norm_and_reach(
        self, plan: Plan, masked: Tensor, everything: Tensor | None, calibrates: int | None
    ) -> tuple[Tensor, Tensor | float]:
        """What to divide by, and how far to go; notes κ by the way.

        Args:
            plan: what to perturb.
            masked: ‖m ⊙ g‖² of each parameter in the plan, on this process.
            everything: ‖g‖² of every parameter on this process, if there is a gradient of all.
            calibrates: number of the step if this one calibrates.
        """
        sums = [masked.sum()[None]]
        if everything is not None:
            sums.append(everything.sum()[None])
            if calibrates is not None:
                shares = everything.clone()
                shares[self._places(plan.weights)] = masked
                sums.append(shares)
        both = self._sharding.sum_over_shards(torch.cat(sums))
        if everything is not None:
            self.kappa = (both[0] / both[1]).sqrt()
        if calibrates is not None:
            usable = both[1].isfinite() & (both[1] > 0)
            self.shares.copy_(torch.where(usable, both[2:] / both[1], self.shares))
            self.calibrated = calibrates
        if self.norm == "dense" or calibrates is not None:
            return both[1].sqrt(), 1.0
        reach = self._reach(plan)
        if everything is None and isinstance(reach, Tensor):
            self.kappa = reach
        return both[0].sqrt(), reach

    def _reach(self, plan: Plan) -> Tensor | float:
        if self.norm != "calibrated":
            return 1.0
        share = self.shares[self._places(plan.weights)].sum()
        # No calibration worked yet: go as far as the masked norm does.
        return torch.where(share < 0.0, torch.ones_like(share), share.abs().sqrt())

    def _places(self, names: Iterable[str]) -> Tensor:
        """Indices of parameters on the device; kept, because sending them makes the host wait for the device."""
        key = tuple(names)
        if key not in self._placed:
            self._placed[key] = torch.tensor([self._index[n] for n in key], dtype=torch.int64, device=self._device)
        return self._placed[key]
