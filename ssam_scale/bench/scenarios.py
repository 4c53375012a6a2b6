"""The scenarios that benchmarks compare: the base optimizer, dense SAM by us and by others, and our plans."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.config.direction_sections import Scope
from ssam_scale.costs.compute import StepShape
from ssam_scale.costs.profile import Batch
from ssam_scale.costs.workload import shape_of, weights_of
from ssam_scale.errors import UserError
from ssam_scale.masks import Dense, Depth, Mask, Norms, ScoreBased, Scored
from ssam_scale.masks.top_scores import Pattern
from ssam_scale.perturbation import (
    DescentSamples,
    Direction,
    Fresh,
    Friendly,
    Gate,
    Interval,
    Momentum,
    Phases,
    Previous,
    Savings,
    SparseSAM,
    StagedModel,
)
from ssam_scale.perturbation.directions import Ascending
from ssam_scale.perturbation.fused import fused_options
from ssam_scale.perturbation.phases import no_phases
from ssam_scale.perturbation.reference import first_samples

from .networks import Setting

_RHO, _LR, _MOMENTUM = 0.05, 1e-3, 0.9

# Draws of the moving cut in one round of all plans.
_DRAWS = 4

# Masks of which a plan without one saving is measured, too.
_ELIDED: tuple[Pattern, ...] = ("tensor", "block", "row")
_PACKED: tuple[Pattern, ...] = ("element", "row")
_KEPT: tuple[Pattern, ...] = ("tensor", "block")
_OPEN = Gate(1, first=-1e9, last=-1e9)  # in every step
_SCOPES: tuple[Scope, ...] = ("shard_group", "worker", "micro_batch")

Step = Callable[[], Any]


@dataclass(frozen=True)
class Scenario:
    """One way of taking a step: the base optimizer, another implementation of SAM, or one of our plans.

    Attributes:
        name: short and unique.
        mask: of our plans; None: not ours.
        direction: where the direction of ε comes from; None: a fresh gradient of the whole batch.
        gap: α of GSAM.
        gate: decides after the first pass whether there is an ascent.
        interval: steps from one ascent to the next.
        steps: how many are taken in turn before the next scenario's: a whole period, or several draws.
        has_cut: whether the blocks before a cut are left alone, for which there is a bound on the time.
        savings: which savings are made; None: those that cost nothing.
        descent: which samples the descent goes by; None: all.
    """

    name: str
    mask: Callable[[], Mask] | None
    direction: Direction | None = None
    gap: float = 0.0
    gate: Gate | None = None
    interval: int = 1
    steps: int = 1
    has_cut: bool = False
    savings: Savings | None = None
    descent: DescentSamples | None = None

    @property
    def fraction(self) -> float:
        """Share of the batch in the ascent pass; 0 without one."""
        if self.direction is None:
            return 1.0
        return self.direction.fraction if isinstance(self.direction, Ascending) else 0.0

    def target(self, suffix_share: float) -> float | None:
        """The highest time over the base step's that we want, where we want one."""
        if self.name == "sam":
            return 2.05
        return 1.10 * (1.0 + suffix_share * self.fraction) if self.has_cut else None


def _random(pattern: Pattern) -> Callable[[], Mask]:
    return partial(Scored, pattern, 0.5, score="random")


def _ours() -> list[Scenario]:
    cuts = [
        Scenario(f"cut {cut}{name}", partial(Depth, (cut, cut)), Fresh(fraction), has_cut=True)
        for cut in (0.25, 0.5, 0.75)
        for name, fraction in (("", 1.0), (", fraction 0.5", 0.5))
    ]
    masks = [
        Scenario("moving cut", Depth, steps=_DRAWS, has_cut=True),
        Scenario("tensor 50%", _random("tensor")),
        Scenario("block 50%", _random("block")),
        Scenario("row 50%", _random("row")),
        Scenario("norm", Norms),
        Scenario("element 50%", _random("element")),
    ]
    # What one saving contributes is what its plan costs without it.
    singly = [
        Scenario("cut 0.5, no shared prefix", partial(Depth, (0.5, 0.5)), savings=Savings(share_prefix=False)),
        *(Scenario(f"{p} 50%, not elided", _random(p), savings=Savings(elide=False)) for p in _ELIDED),
    ]
    directions = [
        Scenario("first 1/8", Dense, Fresh(0.125)),
        Scenario("momentum", Dense, Momentum()),
        Scenario("previous", Dense, Previous()),
        Scenario("friendly", Dense, Friendly()),
    ]
    highest = Fresh(0.5, "highest_loss"), DescentSamples(0.5, "highest_loss")
    selections = [
        Scenario("esam", partial(Scored, "tensor", 0.4, score="random"), descent=DescentSamples(0.5)),
        Scenario("k-sam", Dense, highest[0], descent=highest[1]),
    ]
    intervals = [Scenario(f"interval {k}", Dense, interval=k, steps=k) for k in (2, 5)]
    return [Scenario("sam", Dense), *cuts, *masks, *singly, *directions, *selections, *intervals]


def scenarios() -> list[Scenario]:
    """All of them on one process, the base optimizer first; pytorch_optimizer's where it is installed."""
    theirs = [Scenario("textbook", None)]
    if importlib.util.find_spec("pytorch_optimizer") is not None:
        theirs.append(Scenario("pytorch_optimizer", None))
    ours = _ours()
    return [Scenario("base", None), ours[0], *theirs, *ours[1:]]


def sharded_scenarios() -> list[Scenario]:
    """Those of several processes: where bytes depend on it, and with the savings that show there alone."""
    singly = [
        *(Scenario(f"{p} 50%, unpacked", _random(p), savings=Savings(pack=False)) for p in _PACKED),
        *(Scenario(f"{p} 50%, kept gathered", _random(p), savings=Savings(keep_gathered=True)) for p in _KEPT),
        *(Scenario(f"sam, scope {scope}", Dense, Fresh(scope=scope)) for scope in _SCOPES),
        Scenario("sam, gap", Dense, gap=0.3),
        Scenario("sam, open gate", Dense, gate=_OPEN),
        Scenario("element 50%, open gate", _random("element"), gate=_OPEN),
    ]
    ours = [each for each in _ours() if each.fraction in (0.0, 1.0) or each.descent is not None]
    return [Scenario("base", None), *ours, *singly]


def select_scenarios(
    names: Sequence[str] | None,
    among: Sequence[Scenario],
    always: Sequence[str] = ("base",),
    batch_size: int | None = None,
) -> list[Scenario]:
    """Those of these names, and some that others are compared to; None: all.

    Args:
        names: of scenarios.
        among: the scenarios that there are.
        always: names of those that are there in any case.
        batch_size: of which an ascent of a single image is left out, as BatchNorm needs two; None: whatever it is.

    Raises:
        UserError: there is none of such a name, or it would be left out.
    """
    single = {
        s.name for s in among if batch_size and 0.0 < s.fraction < 1.0 and first_samples(batch_size, s.fraction) < 2
    }
    if alone := single.intersection(names or ()):
        raise UserError(
            f"--batch-size {batch_size}: the ascent of plan {min(alone)!r} would see one image, and needs two"
        )
    among = [scenario for scenario in among if scenario.name not in single]
    known = {scenario.name: scenario for scenario in among}
    for name in names or ():
        if name not in known:
            raise UserError(f"--plans: there is no plan {name!r}; there are {', '.join(map(repr, known))}")
    return [
        scenario for scenario in known.values() if names is None or scenario.name in always or scenario.name in names
    ]


class Running:
    """A scenario on a copy of the network of its own, ready to step.

    Args:
        scenario: how to step.
        setting: on what.
        network: the setting's, and nobody else's.
        phases: measures the parts of a step of our plans.
    """

    def __init__(self, scenario: Scenario, setting: Setting, network: StagedModel, phases: Phases = no_phases) -> None:
        self.scenario = scenario
        self.network = network
        self.batch = setting.batch()
        self._weights = weights_of(network)
        self.opt: SparseSAM | None = None
        self.optimizer: torch.optim.Optimizer
        if scenario.mask is None:
            self.optimizer, self.step = _THEIRS[scenario.name](self.network, setting, self.batch)
        else:
            self.opt = sparse_sam(self.network, sgd(self.network), scenario, phases)
            self.optimizer = self.opt.base_optimizer
            self.step = partial(self.opt.step, setting.loss_fn, self.batch)

    def shape(self) -> StepShape:
        """What the next step is going to perturb."""
        depth = len(self.network.stages)
        if self.opt is None:
            perturbs = self.scenario.name != "base"
            return StepShape(0, (float(perturbs),) * depth, self.weights if perturbs else 0)
        return shape_of(self.opt.resolve(), self._weights, depth)

    @property
    def weights(self) -> int:
        """Number of the network's weights."""
        return sum(w.numel for w in self._weights.values())


def sgd(network: StagedModel) -> torch.optim.Optimizer:
    """The base optimizer of every scenario."""
    return torch.optim.SGD(network.parameters(), **_options(network))


def _options(network: nn.Module) -> dict[str, Any]:
    return {"lr": _LR, "momentum": _MOMENTUM, **fused_options(torch.optim.SGD, network.parameters())}


def sgd_by_shape(network: StagedModel) -> torch.optim.Optimizer:
    """The same with two groups, matrices and the rest, as timm's factory makes them for weight decay of the former."""
    groups = [[p for p in network.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False)]
    return torch.optim.SGD([{"params": group} for group in groups if group], **_options(network))


def sparse_sam(
    model: nn.Module, base: torch.optim.Optimizer, scenario: Scenario, phases: Phases = no_phases
) -> SparseSAM:
    """The optimizer of one of our plans, or of the base optimizer alone (a radius of 0), on any backend.

    Args:
        model: as `SparseSAM` takes it.
        base: its base optimizer.
        scenario: `base`, or one with a mask.
        phases: measures the parts of a step.
    """
    mask = scenario.mask() if scenario.mask is not None else None
    rho = _RHO if mask is not None else 0.0
    schedule = Interval(scenario.interval) if scenario.interval > 1 else None
    opt = SparseSAM(
        model,
        base,
        rho=rho,
        mask=mask,
        direction=scenario.direction,
        gap=scenario.gap,
        gate=scenario.gate,
        schedule=schedule,
        savings=scenario.savings,
        descent=scenario.descent,
        phases=phases,
    )
    if isinstance(mask, ScoreBased):
        opt.refresh()  # at random, which needs no samples
    return opt


def _base(network: StagedModel, setting: Setting, batch: Batch) -> tuple[torch.optim.Optimizer, Step]:
    """SGD with momentum alone."""
    optimizer = sgd(network)

    def step() -> None:
        setting.loss_fn(network, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step


def _textbook(network: StagedModel, setting: Setting, batch: Batch) -> tuple[torch.optim.Optimizer, Step]:
    """Algorithm 1 of the SAM paper (arXiv 2010.01412) as tutorials have it: two full passes, loops over parameters."""
    optimizer = sgd(network)
    parameters = list(network.parameters())

    def step() -> None:
        setting.loss_fn(network, batch).backward()
        with torch.no_grad():
            norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
            old: list[Tensor] = []
            for p in parameters:
                assert p.grad is not None
                old.append(p.clone())
                p.add_(p.grad * (_RHO / (norm + 1e-12)))
        optimizer.zero_grad()
        setting.loss_fn(network, batch).backward()
        with torch.no_grad():
            for p, before in zip(parameters, old, strict=True):
                p.copy_(before)
        optimizer.step()
        optimizer.zero_grad()

    return optimizer, step


def _pytorch_optimizer(network: StagedModel, setting: Setting, batch: Batch) -> tuple[torch.optim.Optimizer, Step]:
    """The SAM of the package of that name, as its docstring shows."""
    sam = importlib.import_module("pytorch_optimizer").SAM
    optimizer = sam(network.parameters(), torch.optim.SGD, rho=_RHO, **_options(network))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = setting.loss_fn(network, batch)
        loss.backward()
        return loss

    def step() -> None:
        optimizer.zero_grad()
        closure()
        optimizer.step(closure)

    return optimizer, step


_THEIRS: dict[str, Callable[[StagedModel, Setting, Batch], tuple[torch.optim.Optimizer, Step]]] = {
    "base": _base,
    "textbook": _textbook,
    "pytorch_optimizer": _pytorch_optimizer,
}
