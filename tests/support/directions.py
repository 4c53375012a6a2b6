"""The directions of the papers, transcribed slowly from their equations: what the real ones must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale import DescentSamples, Friendly, Momentum, Previous, VaSSO
from ssam_scale.perturbation import Direction
from ssam_scale.perturbation.directions import Ascending
from ssam_scale.perturbation.reference import first_samples, reference_gradient
from ssam_scale.perturbation.rng import hashed, uniform_
from tests.support.networks import part


class Vectors:
    """What ε goes along in each step of one process, by parameter: None is the ascent's own gradient.

    Of single weights that a mask did not perturb before, nothing is remembered.
    """

    def __init__(self, direction: Direction, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.direction, self.optimizer = direction, optimizer
        self.named = dict(model.named_parameters())
        self.mean: dict[str, Tensor] = {}  # not a number where there is none yet
        self.before: dict[str, Tensor] = {}
        self._kept: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(self._note)

    def _note(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        self.before = {name: p.grad.clone() for name, p in self.named.items() if p.grad is not None}

    @property
    def known(self) -> bool:
        """Whether there is a vector before a step's ascent, or one needs none."""
        if isinstance(self.direction, Momentum):
            return any(self.optimizer.state.values())
        return bool(self.before) if isinstance(self.direction, Previous) else True

    def of(self, gradient: Mapping[str, Tensor] | None, mask: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The vector of a step with this ascent gradient, which is only remembered where the mask perturbs."""
        if isinstance(self.direction, Momentum):  # -v: MSAM, with v what SGD and Adam call it
            states = {name: self.optimizer.state[p] for name, p in self.named.items()}
            return {n: -s.get("momentum_buffer", s.get("exp_avg")) for n, s in states.items()}
        if isinstance(self.direction, Previous):  # the gradient at the last w + ε
            return dict(self.before)
        if not isinstance(self.direction, Friendly | VaSSO):
            return None
        assert gradient is not None
        result = {}
        for name, g in gradient.items():
            old = self.mean.get(name, torch.full_like(g, torch.nan))
            if isinstance(self.direction, Friendly):  # d = g - sigma m; m = lmbda m + (1 - lmbda) g
                result[name] = torch.where(old.isnan(), g, g - self.direction.sigma * old)
                share = 1.0 - self.direction.lmbda
            else:  # d = (1 - theta) d + theta g
                share = self.direction.theta
                result[name] = torch.where(old.isnan(), g, (1.0 - share) * old + share * g)
            new = torch.where(old.isnan(), g, (1.0 - share) * old + share * g)
            there = mask[name].bool() if name in mask else torch.zeros_like(g, dtype=torch.bool)
            self.mean[name] = torch.where(there, new, old)
        return result


def rows_of(direction: Direction, model: nn.Module, batch: Any, *, step: int, number: int, rank: int) -> Tensor:
    """Which samples of a micro-batch an ascent sees."""
    assert isinstance(direction, Ascending)
    size = len(batch[0])
    kept = first_samples(size, direction.fraction)
    if direction.fraction == 1.0 or direction.choose == "first":
        return torch.arange(kept)
    if direction.choose == "random":
        drawn = torch.empty(size)
        uniform_(drawn, 0, hashed(number, rank))
        return drawn.argsort(descending=True)[:kept]
    with torch.no_grad():
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none").argsort(descending=True)[:kept]


def seen_by_ascent(direction: Direction, model: nn.Module, batch: Any, ranks: int, accumulation: int, step: int) -> Any:
    """The samples that the ascents of all ranks see."""
    if not isinstance(direction, Ascending) or direction.fraction == 1.0:
        return batch
    pieces = ranks * accumulation
    found: list[list[Tensor]] = [[], []]
    for i in range(pieces):
        own = part(batch, i, pieces)
        rank, index = divmod(i, accumulation)
        rows = rows_of(direction, model, own, step=step, number=step * accumulation + index, rank=rank)
        for several, tensor in zip(found, own, strict=True):
            several.append(tensor[rows])
    return tuple(torch.cat(several) for several in found)


def descended(
    descent: DescentSamples | None, model: nn.Module, batch: Any, ranks: int, accumulation: int, step: int
) -> Callable[[], Any] | None:
    """A function that says, at w + ε, what the descents of all ranks see; to be made at w. None: all of it."""
    if descent is None:
        return None
    pieces = [part(batch, i, ranks * accumulation) for i in range(ranks * accumulation)]

    def losses() -> list[Tensor]:
        with torch.no_grad():
            return [F.cross_entropy(model(images), labels, reduction="none") for images, labels in pieces]

    at_w = losses()

    def chosen() -> Any:
        found: list[list[Tensor]] = [[], []]
        for i, (own, here, there) in enumerate(zip(pieces, at_w, losses(), strict=True)):
            score = {"highest_loss": here, "sharpest": there - here, "random": torch.empty(len(here))}[descent.choose]
            if descent.choose == "random":
                rank, index = divmod(i, accumulation)
                uniform_(score, 0, hashed(step * accumulation + index, rank))
            rows = score.argsort(descending=True)[: first_samples(len(score), descent.fraction)]
            for several, tensor in zip(found, own, strict=True):
                several.append(tensor[rows])
        return tuple(torch.cat(several) for several in found)

    return chosen


__all__ = ["Vectors", "descended", "reference_gradient", "seen_by_ascent"]
