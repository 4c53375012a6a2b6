"""From the ascent gradient to the perturbation ε: which norm, which radius, and what to do without a direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from ssam_scale.masks import Plan
from ssam_scale.sharding import Sharding

from .arithmetic import adaptive_scales, at_least_fp32, mask_, scale_to_radius_, squares

Norm: TypeAlias = Literal["dense", "masked", "calibrated"]


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
        calibrate_every: steps between two dense passes of the calibrated norm; None: only when it has to.

    Attributes:
        skipped: number of steps without a perturbation because the gradient was not finite, int64 of shape ().
        shares: of ‖g‖² by parameter, float32; −1 before the first calibration.
        calibrated: the step of the last calibration, −1 when one is due.

    Raises:
        ValueError: `calibrate_every` is not positive.
    """

    def __init__(
        self,
        sharding: Sharding,
        parameters: Mapping[str, nn.Parameter],
        norm: Norm,
        adaptive: bool,
        calibrate_every: int | None,
    ) -> None:
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

    def needs_all(self, step: int) -> bool:
        """Whether step number `step` needs the gradient of every parameter, perturbed or not."""
        if self.norm != "calibrated":
            return self.norm == "dense"
        return self.calibrated < 0 or (self._every is not None and step - self.calibrated >= self._every)

    def perturbation(
        self, plan: Plan, radii: Mapping[str, float], step: int, *, dense: bool
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The local tensors to perturb, and ε for each. Fp32 gradients are overwritten.

        Args:
            plan: what to perturb.
            radii: ρ by parameter.
            step: number of the step, from 0.
            dense: whether there is a gradient of every parameter, or only of what is perturbed.
        """
        chosen = [self._parameters[name] for name in plan.weights]
        weights = [shard.weight for shard in self._sharding.shards(chosen)]
        gradients = at_least_fp32(self._sharding.gradients(chosen))
        scales = adaptive_scales(weights) if self.adaptive else []
        if scales:
            torch._foreach_mul_(gradients, scales)
        dense = dense and self.norm != "masked"
        everything = self._all_squares(plan, gradients) if dense else None
        mask_(gradients, list(plan.weights.values()))
        masked = squares(gradients, self._device)
        if everything is None:
            norm, reach = self._sharding.sum_over_shards(masked.sum()).sqrt(), self._reach(plan)
        else:
            norm, reach = self._norm_of_all(plan, everything, masked, step), torch.ones((), device=self._device)
        if scales:
            torch._foreach_mul_(gradients, scales)
        scale_to_radius_(gradients, [radii[name] for name in plan.weights], reach, norm)
        self.skipped += ~norm.isfinite()
        return weights, gradients

    def _all_squares(self, plan: Plan, chosen: Sequence[Tensor]) -> Tensor:
        """‖g‖² of every parameter on this process, `chosen` being the gradients of what the plan names."""
        others = [p for name, p in self._parameters.items() if name not in plan.weights]
        gradients = at_least_fp32(self._sharding.gradients(others))
        if self.adaptive and others:
            scales = adaptive_scales([shard.weight for shard in self._sharding.shards(others)])
            gradients = list(torch._foreach_mul(gradients, scales))
        result = torch.empty(len(self._parameters), device=self._device)
        result[self._places(n for n in self._parameters if n not in plan.weights)] = squares(gradients, self._device)
        result[self._places(plan.weights)] = squares(chosen, self._device)
        return result

    def _norm_of_all(self, plan: Plan, everything: Tensor, masked: Tensor, step: int) -> Tensor:
        """‖g‖; calibrates by the way."""
        if self.norm == "dense":
            return self._sharding.sum_over_shards(everything.sum()).sqrt()
        norm = everything.sum()
        everything[self._places(plan.weights)] = masked
        both = self._sharding.sum_over_shards(torch.cat((everything, norm[None])))
        shares, square = both[:-1], both[-1]
        self.shares.copy_(torch.where(square.isfinite() & (square > 0), shares / square, self.shares))
        self.calibrated = step
        return square.sqrt()

    def _reach(self, plan: Plan) -> Tensor:
        if self.norm != "calibrated":
            return torch.ones((), device=self._device)
        share = self.shares[self._places(plan.weights)].sum()
        # No calibration worked yet: go as far as the masked norm does.
        return torch.where(share < 0.0, torch.ones_like(share), share.abs().sqrt())

    def _places(self, names: Iterable[str]) -> Tensor:
        """Indices of parameters on the device; kept, because sending them makes the host wait for the device."""
        key = tuple(names)
        if key not in self._placed:
            self._placed[key] = torch.tensor([self._index[n] for n in key], dtype=torch.int64, device=self._device)
        return self._placed[key]
