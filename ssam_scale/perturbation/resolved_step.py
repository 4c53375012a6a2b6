"""Everything that one step will do, decided in one place: `resolve_step`.

The passes, the perturbation and the cost model read a `ResolvedStep` and decide nothing themselves, so that what is
predicted of a step cannot differ from what it does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, TypeAlias, get_args

from ssam_scale.checks import check_number, described
from ssam_scale.config.direction_sections import Choose
from ssam_scale.config.schema import Norm
from ssam_scale.masks import Plan, Rows, Subset

from .descent_samples import DescentSamples
from .directions import Ascending, Direction, Fresh, check_direction, scope_of
from .parameters import TrainedParameters
from .savings import Savings
from .schedules import RadiusSchedule, reuse_at
from .skip_gradients import skips_rows
from .step_report import StepKind

Gradients: TypeAlias = Literal["all", "planned", "perturbed"]


def fraction_of(direction: Direction) -> float:
    """Share of each micro-batch's samples that an ascent by it sees."""
    return direction.fraction if isinstance(direction, Ascending) else 1.0


@dataclass(frozen=True)
class StepOptions:
    """What a `SparseSAM` was asked for, as far as it decides what a step does; see there.

    Raises:
        ValueError: an option is out of its range.
    """

    norm: Norm = "masked"
    calibrate_every: int | None = 100
    direction: Direction = field(default_factory=Fresh)
    savings: Savings = field(default_factory=Savings)
    descent: DescentSamples | None = None
    loss_budget: float | None = None

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise ValueError(f"norm is {self.norm!r}; one of {', '.join(get_args(Norm))} is needed")
        if self.calibrate_every is not None:
            check_number("calibrate_every", self.calibrate_every, "at least 1, or None,", lambda n: n >= 1, whole=True)
        check_direction(self.direction)
        if self.norm not in self.direction.norms:
            raise ValueError(
                f"norm {self.norm!r} divides by a length that direction {type(self.direction).__name__}(…) never "
                f"knows; use {' or '.join(sorted(self.direction.norms, reverse=True))}"
            )
        if self.loss_budget is not None:
            check_number(
                "loss_budget", self.loss_budget, "a number above 0, or None,", lambda rise: 0.0 < rise < math.inf
            )
        if self.descent is not None and not isinstance(self.descent, DescentSamples):
            raise TypeError(f"descent is {described(self.descent)}; DescentSamples(…) is needed, or None")
        if not isinstance(self.savings, Savings):
            raise TypeError(f"savings is {described(self.savings)}; Savings(…) is needed, or None for the defaults")

    def measures_kappa(self, plan: Plan) -> bool:
        """Whether some steps compute the gradient of every parameter for κ = ‖m ⊙ g‖ / ‖g‖, though they need less.

        The calibrated norm has to; the masked norm does it where the ascent has most of that gradient anyway.
        """
        if "calibrated" not in self.direction.norms:  # ε is not along the gradient that κ would be of
            return False
        return self.norm == "calibrated" or (self.norm == "masked" and plan.perturbs_subsets)

    def is_dense(self, plan: Plan, step: int, calibrated: int) -> bool:
        """Whether the ascent of step number `step` computes the gradient of every parameter.

        Args:
            plan: what is perturbed.
            step: from 0.
            calibrated: the step of the last calibration; −1 when one is due.
        """
        if not self.measures_kappa(plan):
            return self.norm == "dense"
        if self.norm == "masked":
            return self.calibrate_every is not None and step % self.calibrate_every == 0
        if calibrated < 0 or self.calibrate_every is None:
            return calibrated < 0
        # The share changes fastest in the first steps: these are 0, 1, 2, 4, 8 and so on.
        return step - calibrated >= min(self.calibrate_every, max(calibrated, 1))


@dataclass(frozen=True)
class ResolvedStep:
    """Everything that one step will do.

    Attributes:
        kind: see `StepKind`.
        step: its number, from 0.
        plan: what is perturbed; empty without an ascent.
        radii: ρ of each parameter in the plan.
        alpha: LookSAM's α of a step of kind `reused`; 0 in the others.
        direction: where the vector comes from that ε goes along.
        descent: which samples of each micro-batch the descent goes by; None: all.
        budget: by how much the loss may rise along ε, to first order, before that is shortened (LE-SAM); None: by any.
        cut: the first stage that the ascent keeps a graph of; those before it make the prefix.
        shares_prefix: whether the prefix runs once and serves both passes.
        may_share_prefix: whether it does in another step of this mask, so that the loss function has to suit that.
        computed: elements of the gradient that the ascent's backward computes, by parameter that it computes any of.
        elided: parameters that stages from the cut on use, of which the ascent computes no gradient.
        rows: weights of layers of which the ascent computes the gradient of these rows only.
        reduced: the gradients to all-reduce or reduce-scatter, by parameter, and which elements of each (None: all).
        norm: what the gradient is divided by.
        gradients: what is known of the gradient after the ascent: of every parameter (`all`), of every element of the
            parameters in the plan (`planned`), or of what is perturbed (`perturbed`).
        measures_kappa: whether κ is measured: where the gradient of every parameter is there anyway, it costs a norm.
        calibrates: whether the calibrated norm takes its κ from this step's gradient.
        packed: whether only what is perturbed is communicated: of gradients (`reduced`), and of the perturbed weights.
        kept: parameters that stay gathered from the ascent to the descent.
        apart: whether each process climbs by its own part of the batch: of its gradients nothing is reduced.
        whole: whether each process perturbs all weights by itself, though the optimizer steps shards of them, from
            gradients that the ascent leaves whole on every one: nothing is published.
        by_hand: whether the first pass is run as a base step's only one is, by the caller, or for a gate that may leave
            it at that: the backend reduces the gradient of everything by its own means.
        keeps: whether ε is kept until the descent's gradients are there.
        graphed: whether the ascent runs the network as CUDA graphs.
    """

    kind: StepKind
    step: int
    plan: Plan
    radii: Mapping[str, float]
    alpha: float = 0.0
    direction: Direction = field(default_factory=Fresh)
    descent: DescentSamples | None = None
    budget: float | None = None
    cut: int = 0
    shares_prefix: bool = False
    may_share_prefix: bool = False
    computed: Mapping[str, int] = field(default_factory=dict)
    elided: frozenset[str] = frozenset()
    rows: Mapping[str, Rows] = field(default_factory=dict)
    reduced: Mapping[str, Subset | None] = field(default_factory=dict)
    norm: Norm = "masked"
    gradients: Gradients = "planned"
    measures_kappa: bool = False
    calibrates: bool = False
    packed: bool = False
    kept: frozenset[str] = frozenset()
    apart: bool = False
    whole: bool = False
    by_hand: bool = False
    keeps: bool = False
    graphed: bool = False

    @classmethod
    def without_ascent(cls, step: int, alpha: float = 0.0) -> ResolvedStep:
        """A step of the base optimizer, or with an α one that reuses what the last ascent brought (LookSAM)."""
        return cls("reused" if alpha else "base", step, Plan.nothing(), {}, alpha)

    @property
    def perturbs(self) -> bool:
        """Whether weights are perturbed."""
        return bool(self.plan.weights)

    @property
    def ascends(self) -> bool:
        """Whether there is an ascent pass."""
        return self.perturbs and self.direction.ascends

    @property
    def fraction(self) -> float:
        """Share of each micro-batch's samples in the ascent."""
        return fraction_of(self.direction)

    @property
    def choose(self) -> Choose:
        """Which samples these are."""
        return self.direction.choose if isinstance(self.direction, Ascending) else "first"

    @property
    def within_shard_group(self) -> bool:
        """Whether each copy of sharded weights ascends by its own part of the batch (HSDP)."""
        return scope_of(self.direction) in ("shard_group", "micro_batch")

    @property
    def by_micro_batch(self) -> bool:
        """Whether each micro-batch climbs, descends and is put back by itself."""
        return self.ascends and scope_of(self.direction) == "micro_batch"

    @property
    def compares_losses(self) -> bool:
        """Whether the descent's samples are chosen by their losses at w."""
        return self.descent is not None and self.descent.choose != "random"

    @property
    def scores_samples(self) -> bool:
        """Whether a forward of all samples at w, without a graph, tells the loss of each.

        An ascent by all of them tells that itself.
        """
        return self.ascends and self.fraction < 1.0 and (self.choose == "highest_loss" or self.compares_losses)

    @property
    def scores_again(self) -> bool:
        """Whether one at w + ε does."""
        return self.descent is not None and self.descent.choose == "sharpest"

    @property
    def counted(self) -> Literal["ascent", "choice", "descent"]:
        """The forward whose batch BatchNorm's running statistics are of.

        The ascent's, at the weights that are evaluated, where it sees all samples; else the descent's, or where that
        does not see all either, that of the choice.
        """
        if self.ascends and self.fraction == 1.0:
            return "ascent"
        return "choice" if self.descent is not None and self.scores_samples else "descent"

    @property
    def forward_from(self) -> int:
        """The first stage that the ascent's forward runs by itself."""
        return self.cut if self.shares_prefix else 0

    @cached_property
    def radius(self) -> float:
        """The largest ρ."""
        return max(self.radii.values(), default=0.0)


def resolve_step(
    plan: Plan,
    options: StepOptions,
    parameters: TrainedParameters,
    *,
    radii: Mapping[str, float],
    step: int = 0,
    alpha: float = 0.0,
    budget: float | None = None,
    micro_batches: int = 1,
    dense: bool = False,
    packs: bool = True,
    apart: bool = False,
    whole: bool = False,
    by_hand: bool = False,
    keeps: bool = False,
    graphs: bool = False,
    refreshed: bool = False,
) -> ResolvedStep:
    """Decide what a step does.

    Args:
        plan: what the mask perturbs.
        options: of the optimizer.
        parameters: what it trains.
        radii: ρ by parameter; without a positive one there is no ascent.
        step: number of the step, from 0.
        alpha: LookSAM's α, of a step without an ascent.
        budget: see `ResolvedStep`.
        micro_batches: whose gradients accumulate. The graphs of several prefixes would have to be kept to share them,
            which is the memory that accumulation saves: then the ascent runs each prefix again, without a graph, unless
            each micro-batch climbs and descends by itself.
        dense: whether the ascent computes the gradient of every parameter: `StepOptions.is_dense`.
        packs: whether the backend reduces no more of the gradients than it is asked for.
        apart: whether each process climbs by its own part of the batch, where each holds all weights.
        whole: whether the backend leaves whole gradients on every process, and each knows the mask of all weights.
        by_hand: whether the caller runs both passes (a closure, `perturbed`), or a gate decides after the first: the
            gradient of everything is there.
        keeps: whether ε is asked for after the descent.
        graphs: whether weights and their gradients lie whole on a GPU, and no code is compiled, so that CUDA graphs can
            be made of a pass.
        refreshed: whether the mask is chosen anew again and again. Compiled code is compiled for each set of gradients
            that it computes: of a stage in which anything is perturbed it then computes them all.
    """
    savings = options.savings
    may_share = savings.share_prefix and options.norm != "dense" and plan.may_cut and not by_hand
    if not any(radii.get(name, 0.0) for name in plan.weights):
        return ResolvedStep.without_ascent(step, alpha)
    direction, radii = options.direction, {name: radii[name] for name in plan.weights}
    if not direction.ascends:
        dense = options.norm == "dense"
        known: Gradients = "all" if dense else "planned"
        return ResolvedStep(
            "free",
            step,
            plan,
            radii,
            direction=direction,
            norm=options.norm,
            gradients=known,
            measures_kappa=dense,
            packed=savings.pack,
        )
    alone = micro_batches == 1 or scope_of(direction) == "micro_batch"
    cut = plan.cut if may_share and not dense else 0
    # A descent by some samples runs the prefix for these alone, which are known after the ascent.
    may_share &= alone and options.descent is None
    sparse = not dense and not by_hand
    elided: frozenset[str] = frozenset()
    rows: dict[str, Rows] = {}
    if sparse and savings.elide:
        # A tied weight that the prefix uses, too, keeps its gradient: the prefix's graph needs it in the descent.
        others = parameters.uses.keys() - plan.weights.keys()
        elided = frozenset(n for n in others if parameters.uses[n][0] >= cut)
        if refreshed and parameters.compiled:
            perturbed = {stage for name in plan.weights for stage in parameters.uses[name]}
            elided -= {n for n in elided & parameters.compiled if not perturbed.isdisjoint(parameters.uses[n])}
        if plan.perturbs_subsets:
            rows = {
                name: part
                for name, part in plan.weights.items()
                if isinstance(part, Rows) and name in parameters.layers and skips_rows(parameters.layers[name], part)
            }
    numels = parameters.layout.numels
    computed = {
        name: plan.counts[name] if name in rows else numels[name]
        for name, uses in parameters.uses.items()
        if uses[-1] >= cut and name not in elided
    }
    reduced: Mapping[str, Subset | None] = dict.fromkeys(parameters.layout.shapes)
    if apart:
        reduced = {}
    elif sparse:
        reduced = plan.weights if savings.pack else dict.fromkeys(plan.weights)
    gradients: Gradients = "all"
    if sparse:
        packed = savings.pack and packs and plan.perturbs_subsets and not apart
        gradients = "perturbed" if rows or packed else "planned"
    measures_kappa = gradients == "all"
    if options.norm == "masked" and plan.weights.keys() == numels.keys():
        measures_kappa = gradients != "perturbed" and plan.perturbs_subsets
    measures_kappa &= "calibrated" in direction.norms
    kind: StepKind = "dense"
    if dense and options.norm != "dense" and not by_hand:
        kind = "calibrating"
    elif computed != numels:
        kind = "sparse"
    return ResolvedStep(
        kind,
        step,
        plan,
        radii,
        direction=direction,
        descent=options.descent,
        budget=budget,
        cut=cut,
        shares_prefix=cut > 0 and may_share,
        may_share_prefix=may_share,
        computed=computed,
        elided=elided,
        rows=rows,
        reduced=reduced,
        norm=options.norm,
        gradients=gradients,
        measures_kappa=measures_kappa,
        calibrates=gradients == "all" and options.norm == "calibrated",
        packed=savings.pack,
        kept=frozenset(numels.keys() - plan.weights.keys()) if savings.keep_gathered else frozenset(),
        apart=apart,
        whole=whole and not by_hand,
        by_hand=by_hand,
        keeps=keeps,
        # Of several micro-batches the gradients add up, where a graph would overwrite them; and the ascent on the whole
        # batch is no small one.
        graphed=savings.graph_ascent and graphs and alone and sparse and not rows and fraction_of(direction) < 1.0,
    )


@dataclass(frozen=True)
class StepShares:
    """How often each kind of step comes in a run, as shares of its steps.

    Attributes:
        sparse: with an ascent that computes what the plan needs, or perturbed without one.
        dense: with an ascent that computes the gradient of every parameter.
        reused: without an ascent, reusing the last one (LookSAM). The others are the base optimizer's.
    """

    sparse: float
    dense: float
    reused: float


def step_shares(
    schedule: RadiusSchedule, options: StepOptions, plan: Plan, steps: range, refresh_every: int | None = None
) -> StepShares:
    """How often each kind of step comes among some of a run, by the rules of the steps themselves.

    Args:
        schedule: of the radius.
        options: of the optimizer.
        plan: what a step perturbs; the same kind of plan in all.
        steps: of which; those before them tell when a calibration is due.
        refresh_every: steps between two refreshes of the mask, each of which makes a calibration due.
    """
    sparse = dense = reused = 0
    calibrated = -1
    group = {"rho": 1.0, "lr": 1.0, "initial_lr": 1.0}
    for step in range(steps.stop):
        counts = step in steps
        if refresh_every is not None and step % refresh_every == 0:
            calibrated = -1
        if schedule(step, group) <= 0.0:
            reused += counts and reuse_at(schedule, step) > 0.0
        elif options.direction.ascends and options.is_dense(plan, step, calibrated):
            dense, calibrated = dense + counts, step
        else:
            sparse += counts
    return StepShares(sparse / len(steps), dense / len(steps), reused / len(steps))
