"""SparseSAM: Sharpness-Aware Minimization that perturbs part of the weights, as a `torch.optim.Optimizer`."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import CodeType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from ssam_scale.checks import check_number, check_switch, described
from ssam_scale.masks import Dense, Mask, Plan, Refreshed, ScoreBased
from ssam_scale.sharding.optimizer_trial import check_steps
from ssam_scale.sharding.place import sharding_of
from ssam_scale.sharding.unsupported import check_alone, owner_of

from .accumulating import Accumulating
from .arguments import (
    check_batches,
    check_closure,
    check_loss_fn,
    check_mask,
    check_no_others,
    check_not_stepped_in_backward,
    check_scaler,
    check_scope,
    check_stages,
    check_together,
    module_of,
)
from .batchnorm import Statistics
from .by_hand import StaleGradients
from .descent_samples import DescentSamples
from .directions import Direction, Fresh, scope_of
from .gate import Gate, GateState
from .graphs import AscentGraphs
from .gsam import SurrogateGap
from .looksam import LookSAM
from .loss import LossFn
from .mask_state import MaskState, SparseState
from .optimizer_wrapper import OptimizerWrapper, has_unscaled, living_scalers, refused
from .parameters import Fingerprint, TrainedParameters, check_radius, trained_parameters
from .passes import Passes
from .perturb import Perturbation
from .phases import Phases, no_phases
from .resolved_step import Norm, ResolvedStep, StepOptions, fraction_of, resolve_step
from .rng import FirstForward, RandomState
from .row_draws import RowDraws
from .savings import Savings
from .schedules import ConstantRadius, RadiusSchedule, check_schedule, ever_reuses, reuse_at
from .step_report import Rehearsed, StepReport


class SparseSAM(OptimizerWrapper):
    """Perturb the masked weights towards higher loss, take the gradient there, step the base optimizer from w.

        opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, mask=Depth())
        loss = opt.step(lambda forward, batch: F.cross_entropy(forward(batch[0]), batch[1]), batch)

    The loss function is given a `forward` to call in the place of the model, once for each pass, and returns the mean
    loss without calling backward; further batches are micro-batches whose gradients accumulate. That form is the one
    that skips what a mask leaves alone. A plain closure in torch's style (no argument, calls backward itself) works
    too and pays for two full passes; so does doing it by hand:

        loss_at_w.backward()
        with opt.perturbed():
            loss_at_the_perturbed_weights().backward()
        opt.step()
        opt.zero_grad()

    In all forms both passes draw the same random numbers (torch's, Python's and NumPy's), and BatchNorm's running
    statistics, as all that forwards write to buffers, are updated once. `step` without any of them is the base
    optimizer's alone, and warns once where there is a radius.

    Layers may be frozen and unfrozen, and parameter groups changed, between steps. What replaces weights (a new layer,
    `fully_shard`, `DistributedDataParallel`) belongs before the optimizer is built; a step says so where it was not.

    The perturbation is ε = ρ · (m ⊙ g) / ‖g‖ (`norm="dense"`, SSAM, arXiv 2210.05177) or ρ · (m ⊙ g) / ‖m ⊙ g‖
    (`norm="masked"`, all that a sparse ascent can know) or ρ · κ · (m ⊙ g) / ‖m ⊙ g‖ (`norm="calibrated"`: the dense
    norm's length, by a share κ = ‖m ⊙ g‖ / ‖g‖ measured now and then), g the gradient of the global batch, or what else
    `direction` says. It is computed in float32 (of float64 weights in float64); the weights come back by copy, also
    when the second pass raises. Where the ascent gradient is not finite there is no perturbation, and the step is the
    base optimizer's.

    `param_groups` and `state` are the base optimizer's, and every group has its own `rho`; a group whose rho is 0 is
    left alone. `steps` counts calls of `step` with a closure or batches and of `perturbed`, not of `step(None)`.

    Args:
        model: a module, `DistributedDataParallel`, an FSDP2 root or a DeepSpeed engine, each plain or around a
            `StagedModel` (which a mask with a cut needs); or parameters, for the closure form on one process.
        base_optimizer: an optimizer over parameters of `model`; these are the weights that can be perturbed. With a
            DeepSpeed engine, the one it was given or the one it returned.
        rho: radius ρ ≥ 0 of the groups that do not say their own; with 0 everywhere there is no ascent and each step
            is the base optimizer's.
        mask: which weights are perturbed; None: all of them.
        norm: what the gradient is divided by.
        adaptive: perturb weights in proportion to their magnitude (ASAM, arXiv 2102.11600).
        calibrate_every: steps between two dense ascents of `norm="calibrated"`, which come more often at first (in
            steps 0, 1, 2, 4, 8 and so on), and of masks of single weights and rows between two looks at the whole
            gradient, for `kappa`; None: only after a refresh.
        gap: α of GSAM (arXiv 2203.08065): how much of the plain gradient's part that is orthogonal to the descent's is
            taken off it, so that the gap between the losses at w + ε and at w narrows; 0: SAM.
        gate: lets a step perturb only where its plain gradient is unusually long (AE-SAM, arXiv 2304.14647); the others
            go by that, and cost one pass. The host waits for the device once a step then.
        direction: where the direction of ε comes from; None: `Fresh()`, the gradient at w of the global batch. `Fresh`
            takes a part of it, or that of each worker or micro-batch (m-sharpness); `Friendly` and `VaSSO` take a mean
            of earlier ones off or in; `Momentum` and `Previous` need no ascent pass.
        descent: which samples of each micro-batch the descent goes by, which costs that share of one (ESAM, K-SAM);
            None: all.
        loss_budget: σ of LE-SAM (arXiv 2605.10183): ε is shortened to min(ρ, σ / ‖m ⊙ g‖), so that the loss rises along
            it by σ at most, to first order; rho is the largest radius then, and the schedule's factor is on both.
            None: ε is as long as rho says.
        schedule: factor on ρ over time; 0 makes a step the base optimizer's (`Interval`, `Window`).
        savings: which savings are made; None: `Savings()`, all that cost nothing.
        max_grad_norm: the descent gradient is clipped to this norm. A DeepSpeed engine clips to its own
            `gradient_clipping`; None accepts that.
        scaler: scales the losses given with batches, for float16, and skips steps whose descent gradient is not finite;
            a closure scales its loss itself. `step` unscales, steps and updates it: a `scaler.update()` after it has
            nothing to go by, and fails. By hand a scaler is used as with any optimizer (`scaler.step(opt)`,
            `scaler.update()`), and not given here. A DeepSpeed engine has its own.
        skip_nonfinite: leave a step out, on all processes alike, whose loss or descent gradient is not finite (with a
            scaler, whose loss is not: overflows of scaled gradients are the scaler's). Weights, the base optimizer's
            state, buffers and all that is remembered between steps are then what they were, bit for bit. Each step
            waits for the device once for it, and copies the buffers before. Of steps with batches or a closure.
        phases: measures the parts of the step.

    Raises:
        TypeError: an argument is of another kind.
        ValueError: an argument is out of its range, the optimizer has parameters that are not the model's, the mask
            needs a model in stages, the model's sharding is not supported, or the optimizer would step what it hands it
            to another place than whole tensors.
    """

    def __init__(
        self,
        model: nn.Module | Iterable[nn.Parameter],
        base_optimizer: torch.optim.Optimizer,
        *,
        rho: float = 0.05,
        mask: Mask | None = None,
        norm: Norm = "masked",
        adaptive: bool = False,
        calibrate_every: int | None = 100,
        gap: float = 0.0,
        gate: Gate | None = None,
        direction: Direction | None = None,
        descent: DescentSamples | None = None,
        loss_budget: float | None = None,
        schedule: RadiusSchedule | None = None,
        savings: Savings | None = None,
        max_grad_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
        skip_nonfinite: bool = False,
        phases: Phases = no_phases,
        **others: NoReturn,
    ) -> None:
        check_no_others(others, base_optimizer)
        check_radius("rho", rho)
        check_switch("adaptive", adaptive)
        check_switch("skip_nonfinite", skip_nonfinite)
        if mask is not None:
            check_mask(mask)
        if schedule is not None:
            check_schedule(schedule)
        if scaler is not None:
            check_scaler(scaler)
        if not callable(phases):
            raise TypeError(f"phases is {described(phases)}; a function that returns a context is needed: phases(name)")
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm, "a norm above 0, or None,", lambda norm: norm > 0.0)
        climbs: Direction = direction if direction is not None else Fresh()
        self.options = StepOptions(
            norm, calibrate_every, climbs, savings if savings is not None else Savings(), descent, loss_budget
        )
        check_together(self.options, mask, adaptive, gap, gate, reuses=schedule is not None and ever_reuses(schedule))
        self._gate = None if gate is None else GateState(gate)
        self._model = module_of(model)
        self.sharding, self._owner = sharding_of(self._model), owner_of(self._model)
        check_stages(self.sharding.network, mask if mask is not None else Dense())
        check_scope(scope_of(climbs), self.sharding)
        base_optimizer, groups = self.sharding.unwrap_optimizer(base_optimizer, max_grad_norm)
        if scaler is not None and not self.sharding.supports_grad_scaler:
            raise ValueError("a DeepSpeed engine scales losses itself: leave scaler at None")
        climbs.check(base_optimizer)
        super().__init__(base_optimizer, rho=rho)
        dimensions = [{len(self.sharding.full_shape(p)) for p in group} for group in groups]
        check_steps(base_optimizer, self.sharding.hands, self.sharding.data_parallel_group, dimensions)
        self.mask: Mask = mask if mask is not None else Dense()
        self.max_grad_norm, self.scaler, self._alpha = max_grad_norm, scaler, gap
        self._skips_nonfinite, self._finite = skip_nonfinite, True
        self.steps = 0
        self.report: StepReport | None = None
        self._statistics, self._stale = Statistics(self.sharding.network), StaleGradients()
        self._schedule = schedule if schedule is not None else ConstantRadius()
        self._phases, self._adaptive = phases, adaptive
        self._by_hand: ResolvedStep | None = None  # what `perturbed` has done for the step that follows it
        self._unscaled_after = 0  # so many forwards
        self._checked: CodeType | None = None  # of a loss function
        self._of_samples: set[tuple[int, torch.Size]] = set()
        self._scalers: list[weakref.ref[torch.amp.GradScaler]] | None = None  # None: not looked for
        self._running = False  # a step, in which parameters are frozen for a while
        self._warned = self._told = self._placed = self._cleared = False
        self._rebuild()
        self._first_forward = FirstForward(self._parameters.device)
        hook = self.sharding.network.register_forward_pre_hook(self._first_forward)
        weakref.finalize(self, hook.remove)

    def _rebuild(self) -> None:
        """Set up all that depends on the parameter groups."""
        groups = self.sharding.unwrap_optimizer(self.base_optimizer, self.max_grad_norm)[1]
        self._parameters = trained_parameters(self.sharding, groups)
        if self.sharding.leaves_grad:  # a DeepSpeed engine has hooks of its own
            check_not_stepped_in_backward(self._parameters.by_name)
        self.mask.check(self._parameters.eligible(self.param_groups))
        self._mask = MaskState(
            self.sharding,
            self._parameters.by_name,
            self._parameters.layout,
            self.mask,
            getattr(self, "_mask", None),
            self.options.savings.pack,
        )
        self._perturbation = Perturbation(
            self.sharding,
            self._parameters,
            self._mask,
            self.base_optimizer,
            self._adaptive,
            self._phases,
            self.options.direction,
            self._loss_scale,
            getattr(self, "_perturbation", None),
        )
        self._perturbation.defers = self._skips_nonfinite
        self._looksam = LookSAM(self.sharding, self._parameters.by_name) if ever_reuses(self._schedule) else None
        self._gap = SurrogateGap(self.sharding, self._parameters.by_name, self._alpha) if self._alpha else None
        self._graphs = AscentGraphs(self.sharding.ascent_module)
        self._draws = RowDraws(self.sharding.network, self._parameters.device, self.sharding.data_parallel_group)
        self._known = Fingerprint(self.sharding.network, self.param_groups)

    def _loss_scale(self) -> Tensor | float:
        """What the losses of a step are multiplied by."""
        if self.scaler is None or not self.scaler.is_enabled():
            return self.sharding.loss_scale()
        scale: Tensor | None = self.scaler._scale
        return 1.0 if scale is None else scale

    def _follow(self) -> None:
        """Take notice of parameters that were frozen, unfrozen, replaced or regrouped since the last step.

        Raises:
            ValueError: the optimizer's are not the model's any more.
        """
        if self._running or self._known.fits(self.param_groups):
            return
        self.sharding.reshard()  # after an evaluation FSDP2's root shows gathered weights as its parameters
        if self._known.fits(self.param_groups):
            return
        if (owner := owner_of(self._model)) is not self._owner:
            self._check_unused(owner.title if owner is not None else "one process")
            self.__dict__.pop("_mask", None)  # which is of the weights as they were
            self.sharding, self._owner = sharding_of(self._model), owner
            self._statistics = Statistics(self.sharding.network)
        trained = set(map(id, self._parameters.by_name.values()))
        others = {id(p) for p, _ in self._parameters.foreign}
        self.complete_groups()
        self._rebuild()
        lost = [p for p, _ in self._parameters.foreign if id(p) not in trained | others]
        if lost:
            names = {id(p): name for name, p in self.sharding.network.named_parameters()}
            warnings.warn(
                f"{len(lost)} parameters that require gradients now (the first: {names[id(lost[0])]}) are in no "
                "parameter group of the optimizer, which does not train them; opt.add_param_group gives it some",
                stacklevel=3,
            )

    def _check_unused(self, backend: str) -> None:
        """Refuse a model that was placed on another backend once something is remembered of its weights as they were.

        Raises:
            ValueError: there is; says in which order it works.
        """
        chosen = isinstance(self.mask, ScoreBased) and self.mask.selected is not None
        if chosen or self.steps:
            what = "the mask was chosen" if chosen else "steps were taken"
            raise ValueError(
                f"the model was placed on {backend} after {what}, by its weights as they were: do that "
                "first (with accelerate: prepare(model, base_optimizer)), and build SparseSAM from what comes of it"
            )

    @property
    def parameters(self) -> TrainedParameters:
        """What is trained, as the model and the parameter groups are now."""
        self._follow()
        return self._parameters

    @property
    def plan(self) -> Plan:
        """What the next step perturbs."""
        self._follow()
        return self.mask.plan(self._parameters.eligible(self.param_groups), self.steps)

    @property
    def radii(self) -> list[float]:
        """ρ of the next step, by parameter group.

        Raises:
            TypeError: the rho of a group, or what the schedule says, is no number.
            ValueError: it is one, but no radius.
        """
        radii = []
        for group in self.param_groups:
            check_radius("the rho of a parameter group", group["rho"])
            factor: Any = self._schedule(self.steps, group)
            factor = factor.item() if isinstance(factor, Tensor) else factor  # of a learning rate that is one
            check_number(
                f"the schedule's factor in step {self.steps}", factor, "at least 0", lambda f: 0.0 <= f < math.inf
            )
            radii.append(group["rho"] * factor)
        return radii

    @property
    def density(self) -> float:
        """The share of the weights that the next step perturbs; 0 where there is no radius."""
        return self._share(self.plan) if any(self.radii) else 0.0

    def _share(self, plan: Plan) -> float:
        """Of the trained weights, which there may be none of while all are frozen."""
        return plan.perturbed / max(self._parameters.layout.total, 1)

    @property
    def backup_bytes(self) -> int:
        """Memory for the backup of perturbed weights that is held between steps, which it is on a CPU only."""
        return self._perturbation.backup.nbytes

    @property
    def skipped(self) -> int:
        """How many steps had no perturbation because the ascent gradient was not finite. Waits for the device."""
        return int(self._perturbation.skipped)

    def resolve(
        self,
        micro_batches: int = 1,
        *,
        plan: Plan | None = None,
        dense: bool | None = None,
        by_hand: bool = False,
        options: StepOptions | None = None,
        radii: Sequence[float] | None = None,
    ) -> ResolvedStep:
        """What the next step will do: what the passes, the perturbation and the cost model go by.

        Args:
            micro_batches: whose gradients accumulate.
            plan: another one than the next step's.
            dense: whether the ascent computes the gradient of every parameter; None: as the next step does.
            by_hand: for the forms in which the caller runs both passes: a closure, and `perturbed`. With a gate every
                step's first pass is like theirs.
            options: others than this optimizer's.
            radii: ρ by parameter group; None: the next step's.
        """
        options = self.options if options is None else options
        radii = self.radii if radii is None else radii
        if plan is None:
            plan = self.plan if any(radii) and self._perturbation.source.ready else Plan.nothing()
        if dense is None:
            dense = options.is_dense(plan, self.steps, self._perturbation.calibrated)
        return resolve_step(
            plan,
            options,
            self._parameters,
            radii={name: radii[self._parameters.group_of[name]] for name in plan.weights},
            step=self.steps,
            alpha=reuse_at(self._schedule, self.steps) if self._looksam is not None else 0.0,
            budget=self._budget(options.loss_budget, radii),
            micro_batches=micro_batches,
            dense=dense,
            packs=self.sharding.packs_gradients,
            apart=scope_of(options.direction) != "global"
            and self.sharding.weights_replicated
            and self.sharding.data_parallel_group.size > 1,
            whole=self.sharding.reduces_whole and options.direction.whole and self._mask.knows_full(plan),
            by_hand=by_hand or self._gate is not None,
            keeps=self._looksam is not None or self._gap is not None,
            graphs=self._parameters.device.type == "cuda"
            and self.sharding.leaves_grad
            and self.sharding.weights_replicated
            and not self._parameters.compiled,
            refreshed=isinstance(self.mask, Refreshed) and self.mask.every is not None,
        )

    def _budget(self, sigma: float | None, radii: Sequence[float]) -> float | None:
        """LE-SAM's σ of a step with these radii: the schedule's factor is on it, too."""
        largest = max((group["rho"] for group in self.param_groups), default=0.0)
        return None if sigma is None or not largest else sigma * max(radii) / largest

    @torch.no_grad()
    def step(self, closure: Callable[..., Any] | None = None, *batches: Any) -> Any:
        """One step; `report` says afterwards what it did.

        Args:
            closure: with batches, `loss_fn(forward, batch) -> mean loss`; without, a function that computes the loss
                and calls backward; None steps the base optimizer with the gradients that are there.
            batches: the micro-batches of this process, of equal size.

        Returns:
            The loss at w (over what this process's ascent saw, detached; without an ascent pass, where the descent
            was), or what the closure returned there.
        """
        loss = None
        if self._running:
            raise RuntimeError(_WITHIN.format("step"))
        self._check_placed()
        self._follow()
        if closure is not None:
            torch.clear_autocast_cache()  # a forward without gradients may have left copies that none flow through
        scaler = None if closure is None else self.scaler
        restore = self._snapshot() if closure is not None and self._skips_nonfinite else None
        if closure is None:
            resolved = self._end_by_hand()
        else:
            with self._busy(), self._first_forward.asleep():
                if batches:
                    closure = self._checked_loss_fn(closure)
                    check_batches(batches)
                    resolved = self.resolve(len(batches))
                    loss = self._run_passes(resolved, closure, batches)
                else:
                    check_closure(closure)
                    resolved = self.resolve(by_hand=True)
                    loss = self._run_closure(resolved, closure)
        if resolved.ascends and self._gate is not None and not self._gate.opened:
            resolved = ResolvedStep.without_ascent(self.steps)
        left_out = restore is not None and not self._stays_finite(loss)
        if left_out:
            assert restore is not None
            restore()
            self.zero_grad()
            self._first_forward.forget()
            self.steps += 1
        else:
            with self._phases("optimizer"):
                self._step_base(resolved, closure, scaler)
        self.report = StepReport(
            loss.detach() if isinstance(loss, Tensor) else None,
            resolved.kind,
            resolved.plan,
            resolved.radius,
            self.kappa,
            self._perturbation.skips if resolved.perturbs else self._perturbation.never,
            self._share(resolved.plan),
            left_out,
        )
        return loss

    def _step_base(self, resolved: ResolvedStep, closure: Any, scaler: torch.amp.GradScaler | None) -> None:
        """The base optimizer's step by the descent's gradients, and what looks back on them."""
        self._mask.accumulate(self.sharding.loss_scale() if scaler is None else self._loss_scale())
        if self._looksam is not None and resolved.kind == "reused":
            self._looksam.add(resolved.alpha)
        if self._perturbation.source.looks_back and self._descended(closure):
            following = self.steps + (closure is not None)
            layout = self._parameters.eligible(self.param_groups)
            self._perturbation.source.after_descent(self.mask.plan(layout, following))
        self.sharding.step(self.base_optimizer, self.max_grad_norm, scaler)
        # An autocast around the loop remembers low-precision copies of the weights as they were before the step.
        torch.clear_autocast_cache()
        self._first_forward.forget()
        self.unscaled = False
        if closure is not None:
            self.zero_grad()
            self.steps += 1

    def _snapshot(self) -> Callable[[], None]:
        """What puts buffers, and all that a step's passes change of what is remembered, back to what they are now."""
        self._finite = True
        parts = [self._buffers_as_they_are(), self._perturbation.snapshot()]
        if self._gate is not None:
            parts.append(self._gate.snapshot())

        def restore() -> None:
            for part in parts:
                part()

        return restore

    def _buffers_as_they_are(self) -> Callable[[], None]:
        """What puts the network's buffers back to what they are now."""
        modules = self.sharding.network.modules()
        buffers = [(m, name, b) for m in modules for name, b in m._buffers.items() if b is not None]
        before = [buffer.clone() for _, _, buffer in buffers]

        def restore() -> None:
            with torch.no_grad():
                for (module, name, buffer), value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
                    module._buffers[name] = buffer

        return restore

    def _stays_finite(self, loss: Any = None) -> bool:
        """Whether the step goes by a finite loss and gradient, on all processes. Collective; waits for the device."""
        if self._finite:
            odd = torch.zeros((), device=self._parameters.device)
            if isinstance(loss, Tensor):
                odd = odd + (~loss.detach().isfinite()).to(odd)
            if self.scaler is None or not self.scaler.is_enabled():
                odd = odd + (~self._perturbation.gradient_squares().isfinite()).to(odd)
            self._finite = not float(self.sharding.data_parallel_group.all_reduce(odd))
        self._perturbation.learn(whether=self._finite)
        return self._finite

    def _descended(self, closure: Any) -> bool:
        """Whether the step is by a gradient of training, and something known to be perturbed in the next one.

        torch.distributed.checkpoint initialises optimizer state by a step of zeros, with a learning rate of 0.
        """
        if isinstance(self.mask, ScoreBased) and self.mask.selected is None:
            return False
        return closure is not None or any(group.get("lr", 1.0) for group in self.param_groups)

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self._running = True
        try:
            with refused(self.base_optimizer, _WITHIN.format("base_optimizer.step")):
                yield
        finally:
            self._running = False

    def _checked_loss_fn(self, loss_fn: Any) -> LossFn:
        """The loss function, watched while it is called if it is neither the last one that was checked nor made by the
        same code, as a lambda in a loop is."""
        code = None if hasattr(loss_fn, "__wrapped__") else getattr(loss_fn, "__code__", None)
        if code is not None and code is self._checked:
            return loss_fn
        check_loss_fn(loss_fn, self._model)
        self._checked = code
        return self._not_scaling(loss_fn) if code is not None or not self.steps else loss_fn

    def _not_scaling(self, loss_fn: LossFn) -> LossFn:
        def watched(forward: Any, batch: Any) -> Tensor:
            with self._noting_scalers() as scaled:
                loss = loss_fn(forward, batch)
            if scaled:
                raise RuntimeError(
                    "the loss function scales its loss by a GradScaler; let it return the loss itself, which SparseSAM "
                    "scales: SparseSAM(…, scaler=scaler)"
                )
            return loss

        return watched

    def _check_placed(self) -> None:
        """Once, before the first step: nobody has wrapped the model since."""
        if not self._placed:
            self._placed = True
            check_alone(self._model, self.sharding.data_parallel_group)

    def _end_by_hand(self) -> ResolvedStep:
        """What the gradients that are there for a step of the base optimizer come of."""
        resolved, self._by_hand = self._by_hand, None
        if resolved is not None:
            if self._lacks_gradients():
                raise RuntimeError(
                    "there is nothing to step by: no backward was called inside of `with opt.perturbed()`, or "
                    "gradients were cleared after it"
                )
            return resolved
        # torch.distributed.checkpoint initialises optimizer state by a step with a learning rate of 0.
        if not self._warned and any(self.radii) and any(group.get("lr", 1.0) for group in self.param_groups):
            self._warned = True
            # Past this method, `step`, and torch's two decorators of it.
            warnings.warn(
                "opt.step() with nothing to run is a step of the base optimizer, without SAM: call opt.step(loss_fn, "
                "batch) or opt.step(closure), or run the second pass in `with opt.perturbed():` before it",
                stacklevel=5,
            )
        return ResolvedStep.without_ascent(self.steps)

    def passes(
        self,
        resolved: ResolvedStep,
        loss_fn: LossFn,
        batches: Sequence[Any],
        scaler: torch.amp.GradScaler | None,
        phases: Phases,
        part: tuple[int, int] = (0, 1),
    ) -> Passes:
        """The two passes of a step, or of one part of its micro-batches, which leave their reduced gradients."""
        return Passes(
            self.sharding,
            self._parameters,
            self._mask,
            resolved,
            loss_fn,
            batches,
            scaler,
            phases,
            self._statistics,
            self._of_samples,
            self._graphs,
            self._draws,
            part,
        )

    def _run_passes(self, resolved: ResolvedStep, loss_fn: LossFn, batches: tuple[Any, ...]) -> Tensor:
        self.zero_grad()  # what an exception in an earlier step left behind
        with torch.enable_grad():
            return self._both_passes(resolved, loss_fn, batches, self.scaler, self._phases)

    def _both_passes(
        self,
        resolved: ResolvedStep,
        loss_fn: LossFn,
        batches: Sequence[Any],
        scaler: torch.amp.GradScaler | None,
        phases: Phases,
        rehearsed: bool = False,
    ) -> Tensor:
        """Ascent, perturbation, descent, restoring; leaves the descent's gradients. Returns the mean loss at first."""
        keep = resolved.keeps and not rehearsed
        if self._gate is not None and resolved.ascends:
            passes = self.passes(resolved, loss_fn, batches, scaler, phases)
            # Another optimizer's weights have the gradient of one pass, that at w + ε if there is one.
            foreign = [(p, None if p.grad is None else p.grad.clone()) for p, _ in self._parameters.foreign]
            loss_at_w = passes.plain()
            if rehearsed or self._opens():
                for p, gradient in foreign:
                    p.grad = gradient
                with self._perturbation.applied(resolved, keep=keep, phases=phases) as epsilon:
                    passes.descend()
                if not rehearsed:
                    self._look_back(resolved, epsilon)
            return loss_at_w
        if not resolved.by_micro_batch:
            passes = self.passes(resolved, loss_fn, batches, scaler, phases)
            loss = passes.ascend() if resolved.ascends else None
            if not resolved.perturbs:
                return passes.descend()
            if loss is not None:
                self._check_reached(resolved)
            with self._perturbation.applied(resolved, keep=keep, phases=phases) as epsilon:
                loss_there = passes.descend()
            if not rehearsed:
                self._look_back(resolved, epsilon)
            return loss if loss is not None else loss_there
        losses, accumulating = [], Accumulating(self.sharding, self._parameters.by_name)
        if resolved.budget is not None:  # each part climbs by its share of the gradient, which is shorter
            resolved = replace(resolved, budget=resolved.budget / len(batches))
        for number, batch in enumerate(batches):
            accumulating.set_aside(self.base_optimizer)
            passes = self.passes(resolved, loss_fn, [batch], scaler, phases, (number, len(batches)))
            losses.append(passes.ascend())
            self._check_reached(resolved)
            with self._perturbation.applied(resolved, phases=phases):
                accumulating.put_back()
                passes.descend()
        accumulating.add()
        return torch.stack(losses).sum()

    def _opens(self) -> bool:
        """Whether the gate lets this step perturb, by the gradients at w. Collective, and waits for the device."""
        assert self._gate is not None
        squared = float(self._perturbation.gradient_squares())
        scale = self.sharding.loss_scale() if self.scaler is None else self.scaler.get_scale()
        return self._gate.opens(squared / scale**2, self.steps)

    def _look_back(self, resolved: ResolvedStep, epsilon: list[Tensor]) -> None:
        """What is done with the gradients at w and at w + ε together; overwrites ε."""
        if self._skips_nonfinite and (self._looksam is not None or self._gap is not None) and not self._stays_finite():
            return
        if self._looksam is not None:
            again = [e.clone() for e in epsilon] if self._gap is not None else epsilon
            self._looksam.update(resolved, again)
        if self._gap is not None:
            self._gap.narrow(resolved, epsilon, self._perturbation.length)

    def _run_closure(self, resolved: ResolvedStep, closure: Callable[[], Any]) -> Any:
        self._check_scope_by_hand("opt.step(closure)")
        with torch.enable_grad():
            accumulated = [(p, p.grad) for p in self._parameters.by_name.values() if p.grad is not None]
            accumulated = [(p, g) for p, g in accumulated if resolved.perturbs and g.any()]
            versions = [g._version for _, g in accumulated]

            def untouched() -> bool:
                return all(p.grad is g for p, g in accumulated) and versions == [g._version for _, g in accumulated]

            foreign = [(p, p.grad) for p, _ in self._parameters.foreign] if resolved.ascends else []
            for p, _ in foreign:
                p.grad = None
            self._cleared = False
            random = RandomState.now(self._parameters.device)
            if resolved.perturbs and not resolved.ascends:
                with self._perturbation.applied(resolved):
                    loss = self._called(closure)
                if not self._cleared:
                    self._check_none_accumulated(accumulated)
                return loss
            loss = self._called(closure)
            if not resolved.ascends:
                return loss
            if self._gate is not None and not self._lacks_gradients() and not self._opens():
                for p, g in foreign:
                    if g is not None:
                        p.grad = g if p.grad is None else p.grad + g
                return loss
            if self._lacks_gradients() or (accumulated and untouched()):
                self.zero_grad()
                raise RuntimeError(
                    "the closure called no backward, as that of a LightningOptimizer that is stepped without one: "
                    "call opt.step(loss_fn, batch), in Lightning of self.optimizers(use_pl_optimizer=False), or let "
                    "the closure compute the loss and call backward, and nothing before it"
                )
            if not self._cleared and any(p.grad is g for p, g in accumulated):
                self._check_none_accumulated(accumulated)
            for p, g in foreign:  # of the ascent, another optimizer's weights have nothing
                p.grad = g
            with (
                self._perturbation.applied(resolved, keep=resolved.keeps) as epsilon,
                self._statistics.frozen(),
            ):
                random.restore()
                closure()
        self._look_back(resolved, epsilon)
        return loss

    def _called(self, closure: Callable[[], Any]) -> Any:
        """What a closure returns that has called backward on it, scaled as it should be."""
        with self._noting_scalers() as scaled:
            loss = closure()
        others = [each for scaler, *pair in scaled if scaler is not self.scaler for each in pair]
        if isinstance(loss, Tensor) and any(loss is each for each in others):
            self.zero_grad()
            raise RuntimeError(
                "the closure scales its loss by a GradScaler that SparseSAM was not given, so that it would step "
                "by scaled gradients: SparseSAM(…, scaler=scaler)"
            )
        if self.scaler is not None and self.scaler.is_enabled() and self.scaler._scale is None:
            raise RuntimeError("the closure called backward on a loss that the scaler has not scaled: scale it")
        if loss is not None and self._lacks_gradients():
            raise RuntimeError(
                "the closure returned a loss and left no gradient: it has to call backward on it, for each pass "
                "anew; a function that only returns the loss goes with a batch, opt.step(loss_fn, batch)"
            )
        return loss

    def _check_none_accumulated(self, accumulated: Sequence[Any]) -> None:
        """Refuse gradients from before a closure, of batches that its second call does not see."""
        if accumulated:
            self.zero_grad()
            raise RuntimeError(
                "the closure added to gradients that were there before: the ascent would be by all of these "
                "batches, and the descent by the closure's alone; drop a backward before opt.step(closure), which "
                "runs the closure for its passes, or give all batches at once, opt.step(loss_fn, *batches), or "
                "let the closure run all of them, or clear gradients"
            )

    @contextmanager
    def _noting_scalers(self) -> Iterator[list[tuple[Any, Any, Any]]]:
        """Of what scalers are given inside: the scaler, what it was given, and what it has made of that."""
        known = self._living()
        seen: list[tuple[Any, Any, Any]] = []

        def noted(scaler: Any, scale: Callable[[Any], Any], outputs: Any) -> Any:
            seen.append((scaler, outputs, result := scale(outputs)))
            return result

        for scaler in known:
            scaler.scale = partial(noted, scaler, scaler.scale)  # type: ignore[method-assign]
        try:
            yield seen
        finally:
            for scaler in known:
                del scaler.scale

    def _check_scope_by_hand(self, form: str) -> None:
        """Refuse passes of the caller's, whose gradients are reduced, where the ascent is by a part of the batch."""
        scope, fraction = scope_of(self.options.direction), fraction_of(self.options.direction)
        if self.options.descent is not None:
            raise RuntimeError(
                f"{form} runs the caller's passes, which see what the caller gives them, and descent is "
                f"{self.options.descent}: call opt.step(loss_fn, batch)"
            )
        if fraction < 1.0:
            raise RuntimeError(
                f"{form} runs the caller's passes, whose ascent sees what the caller gives it, and the direction's "
                f"fraction is {fraction}: call opt.step(loss_fn, batch)"
            )
        if scope == "micro_batch" or (scope != "global" and self.sharding.data_parallel_group.size > 1):
            raise RuntimeError(
                f"{form} runs passes whose gradients are averaged over all processes, and direction scope {scope!r} is "
                "by a part of their batch: call opt.step(loss_fn, batch)"
            )

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """The weights are w + ε inside and w again afterwards, bit for bit, whatever happens inside.

        The ascent gradient is taken from `.grad`, which is empty inside at first and holds the descent gradient at the
        end. On DDP and FSDP2 it must have been reduced, as a synchronised backward leaves it. A gradient that a
        `GradScaler` has scaled will do: the length of ε does not depend on it. Random numbers are drawn as from the
        first forward of the step on, in code that is not compiled. Micro-batches are all run before it, and then all
        run inside.

        Raises:
            RuntimeError: there is no gradient to go along, or one that the step before has left; or it is entered
                inside of another or of a step.
        """
        if self._running:
            raise RuntimeError("`with opt.perturbed()` was entered inside of another, or of a step: leave that first")
        if self.unscaled and self._first_forward.total == self._unscaled_after:
            self.zero_grad()
            raise RuntimeError(
                "scaler.unscale_(opt) was called before `with opt.perturbed()`, so that the scaler would take the "
                "gradients of the second pass for unscaled; call it after the block"
            )
        if self._gate is not None:
            raise RuntimeError(
                "a gate decides after the first pass whether there is a second one, which `with opt.perturbed()` "
                "always runs: call opt.step(loss_fn, batch) or opt.step(closure)"
            )
        self._check_scope_by_hand("`with opt.perturbed()`")
        direction = self.options.direction
        if (
            direction.ascends
            and (direction.remembers or self.options.loss_budget is not None)
            and any(s.is_enabled() and s._scale is not None for s in self._living())
        ):
            what = "remembers gradients" if direction.remembers else "with a loss_budget goes by gradients"
            raise RuntimeError(
                f"direction {direction} {what}, which a scaler multiplies by another factor in another step, and `with "
                "opt.perturbed()` knows no scaler: call opt.step(loss_fn, batch) with SparseSAM(…, scaler=scaler)"
            )
        self._check_scaled()
        self._check_placed()
        self._follow()
        resolved = self.resolve(by_hand=True)
        self._check_ascent(resolved)
        random, forwards = self._first_forward.state, self._first_forward.forwards
        self._first_forward.forget()
        for p, _ in self._parameters.foreign:
            p.grad = None
        only_pass = not self.options.direction.ascends and not forwards
        with self._busy(), nullcontext() if only_pass else self._statistics.frozen():
            if resolved.perturbs:
                with self._perturbation.applied(resolved, keep=resolved.keeps) as epsilon:
                    if random is not None:
                        random.restore()
                    yield
                if self._gap is not None and (self.unscaled or self._unscaled_elsewhere()):
                    self.zero_grad()
                    raise RuntimeError(
                        "gap compares the gradients of both passes, and a scaler has unscaled those of the second in "
                        "`with opt.perturbed()`: call scaler.unscale_(opt) after the block"
                    )
                self._look_back(resolved, epsilon)
            else:
                self.zero_grad()
                if random is not None:
                    random.restore()
                yield
        self._check_descent(forwards)
        self._first_forward.forget()
        self._stale.watch(self._parameters.by_name.values())
        self._by_hand = resolved
        self.steps += 1

    def note_unscaled(self, scaler: torch.amp.GradScaler) -> None:
        """Those of a step that the scaler skips afterwards are never stepped, and of no later step's forwards."""
        super().note_unscaled(scaler)
        self._unscaled_after = self._first_forward.total

    def _check_scaled(self) -> None:
        """Refuse to go along gradients that a scaler has unscaled for the base optimizer, which nothing tells."""
        if self._unscaled_elsewhere():
            self.zero_grad()
            raise RuntimeError(
                "scaler.unscale_ was called for the base optimizer before `with opt.perturbed()`, so that the scaler "
                "would take the gradients of the second pass for unscaled; call scaler.unscale_(opt) after the block, "
                "and scaler.step(opt)"
            )

    def _living(self) -> list[torch.amp.GradScaler]:
        """Every scaler that there is."""
        if self._scalers is None:
            self._scalers = living_scalers()
        return [scaler for scaler in (reference() for reference in self._scalers) if scaler is not None]

    def _unscaled_elsewhere(self) -> bool:
        """Whether a scaler has unscaled gradients for the base optimizer, which nothing tells."""
        return any(has_unscaled(scaler, self.base_optimizer) for scaler in self._living())

    def _check_reached(self, resolved: ResolvedStep) -> None:
        """Refuse an ascent that has left no gradient of what it is to perturb."""
        every = self._parameters.by_name
        if self.sharding.leaves_grad and all(every[name].grad is None for name in resolved.plan.weights):
            raise RuntimeError(
                "the ascent has left no gradient of any perturbed weight: the loss does not depend on one, or a hook "
                "of the backward has dropped them, as one does that steps an optimizer in the backward"
            )

    def _lacks_gradients(self) -> bool:
        every = self._parameters.by_name.values()
        return self.sharding.leaves_grad and bool(every) and all(p.grad is None for p in every)

    def _check_ascent(self, resolved: ResolvedStep) -> None:
        """Refuse to perturb along what is no gradient of this step."""
        if not resolved.ascends:
            return
        if self._lacks_gradients():
            raise RuntimeError(
                "there is no gradient to perturb along: call backward on the loss before `with opt.perturbed()`, after "
                "gradients were cleared"
            )
        if self._stale.found:
            self.zero_grad()
            raise RuntimeError(
                "the gradients are those that the second pass of the step before has left, or were added to them: "
                "clear them after opt.step(), and with several micro-batches run all of their first passes and then "
                "all of their second ones in one `with opt.perturbed()`"
            )

    def _check_descent(self, forwards: int) -> None:
        """Tell of a block that saw less than what was before it."""
        if 0 < self._first_forward.forwards < forwards and not self._told:
            self._told = True
            warnings.warn(
                f"the model ran {forwards} times before `with opt.perturbed()` and {self._first_forward.forwards} "
                "inside of it: the weights are stepped by the batches inside alone; run the same ones in both",
                stacklevel=4,
            )

    @contextmanager
    def rehearsal(self) -> Iterator[Callable[..., None]]:
        """Passes of other steps than the next one, to see what they cost; nothing of training changes.

            with opt.rehearsal() as rehearse:
                with timed(device) as dense:
                    rehearse("dense", loss_fn, batch)

        What is yielded takes what to rehearse (`Rehearsed`), the loss function and the micro-batches as `step` does,
        and runs all of a step between its batches and the step of the base optimizer: passes, perturbing, restoring,
        and dropping the gradients. Afterwards weights, buffers, random state, calibration and counts are what they
        were, bit for bit; gradients are dropped, and so must not be accumulating. Collective, if `step` is.
        """
        self._check_placed()
        self._follow()
        random = RandomState.now(self._parameters.device)
        restore = self._buffers_as_they_are()
        try:
            with self._busy(), self._perturbation.forgetting(), torch.no_grad():
                yield self._rehearse
        finally:
            restore()
            self.zero_grad()
            torch.clear_autocast_cache()
            random.restore()

    def _rehearse(self, what: Rehearsed, loss_fn: LossFn, *batches: Any) -> None:
        resolved = self._rehearsed(what, len(batches))
        torch.clear_autocast_cache()
        with torch.enable_grad():
            self._both_passes(resolved, loss_fn, batches, self.scaler, no_phases, rehearsed=True)
        self.zero_grad()

    def _rehearsed(self, what: Rehearsed, micro_batches: int) -> ResolvedStep:
        """What such a step does; with an ascent also where the schedule has none in the next step."""
        if what == "base":
            return ResolvedStep.without_ascent(self.steps)
        radii, layout = [group["rho"] for group in self.param_groups], self._parameters.eligible(self.param_groups)
        if not any(radii):  # dense SAM has one all the same, whose length is no matter of time
            if what == "own":
                return ResolvedStep.without_ascent(self.steps)
            radii = [_REHEARSED_RADIUS] * len(radii)
        if what == "own":
            plan, dense = self.mask.plan(layout, self.steps), self.options.norm == "dense"
            return self.resolve(micro_batches, plan=plan, dense=dense, radii=radii)
        plan, options = Dense().plan(layout, self.steps), StepOptions(calibrate_every=None)
        return self.resolve(micro_batches, plan=plan, dense=False, options=options, radii=radii)

    def rescale_steps(self, steps: int) -> None:
        """Go on as if `steps` steps had been done, after a resume with steps of another size.

        Schedules, cuts and refreshes go by the number of the step, so that a run that is resumed with twice the batch
        would be twice as far as it is. What is remembered by its step, the last refresh and calibration, moves along.

        Args:
            steps: epochs done, in steps of the size that they have from now on.

        Raises:
            ValueError: `steps` is negative.
        """
        if steps < 0:
            raise ValueError(f"steps is {steps}; at least 0 is needed")

        def moved(step: int) -> int:
            return step if step < 0 else step * steps // max(self.steps, 1)

        if isinstance(self.mask, Refreshed):
            self.mask.chosen_at = moved(self.mask.chosen_at)
        self._perturbation.calibrated = moved(self._perturbation.calibrated)
        self.steps = steps

    @property
    def kappa(self) -> Tensor:
        """‖m ⊙ g‖ / ‖g‖ of the last step that knew both, float32 of shape (); not a number before."""
        return self._perturbation.kappa

    @property
    def refresh_is_due(self) -> bool:
        """Whether the mask is to be chosen anew before the next step: see `every` of such masks."""
        return isinstance(self.mask, Refreshed) and self.mask.is_due(self.steps)

    @torch.no_grad()
    def refresh(self, loss_fn: LossFn | None = None, *batches: Any, samples: int | None = None) -> None:
        """Refresh the mask: compute its scores and select the weights by them. Collective.

        Args:
            loss_fn: mean loss of a batch, given the forward to use; called with batches of one sample.
            batches: this process's samples: tensors, or nested containers of tensors, whose first dimension counts
                samples; the same number of them on every process.
            samples: how many are used of all processes' together, in their order; None: all.

        Raises:
            TypeError: the mask is not chosen by scores.
            FloatingPointError: a score is not finite; the mask stays what it was.
            ValueError: there are fewer samples than are to be used, or the mask selects nothing; it stays what it was.
        """
        self._follow()
        if loss_fn is not None:
            check_loss_fn(loss_fn, self._model)
        if isinstance(self.mask, Refreshed) and self.mask.wanted():
            self._perturbation.backup.release()  # scores take memory, too
        scale = 1024.0 if self.scaler is not None else 1.0  # the choice does not depend on a common factor
        layout = self._parameters.eligible(self.param_groups)
        self._mask.refresh(layout, self.base_optimizer, loss_fn, batches, samples, self.steps, scale)
        self._perturbation.uncalibrate()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the base optimizer's parameters, also where a backend keeps its own."""
        self._cleared = True
        self.unscaled = False
        self._first_forward.cleared()
        self._stale.forget()
        self.sharding.clear_gradients(self.base_optimizer)

    def __setattr__(self, name: str, value: Any) -> None:
        """Options are fixed, and would be set without an effect.

        Raises:
            AttributeError: `name` is an option's; says how it is changed.
        """
        if name in _OPTIONS or (name in {"mask", "base_optimizer"} and "_mask" in self.__dict__):
            how = "build a SparseSAM anew, and load opt.state_dict() into it"
            if name == "rho":
                how = 'set it in the parameter groups: for group in opt.param_groups: group["rho"] = …'
            raise AttributeError(f"{name} of a SparseSAM cannot be set: {how}")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        """What is not found in any other way.

        Raises:
            AttributeError: says what is in the place of another SAM's methods.
        """
        if name in {"first_step", "second_step"}:
            raise AttributeError(
                f"a SparseSAM has no {name}: run the second pass in `with opt.perturbed():` in the place of "
                "first_step, and call opt.step() after it in that of second_step"
            )
        return super().__getattribute__(name)  # once more, for its own error

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters of the model to the base optimizer and to the weights that can be perturbed."""
        super().add_param_group(param_group)
        if hasattr(self, "_perturbation"):
            try:
                self._rebuild()
            except (TypeError, ValueError):
                self.base_optimizer.param_groups.pop()
                self._rebuild()
                raise

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """A copy would train the original's weights, or none.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "a SparseSAM cannot be copied or pickled, because it is of one model: build one for the copy, and load "
            "opt.state_dict() into it"
        )

    def state_dict(self) -> dict[str, Any]:
        """The base optimizer's state, and that of `sparse` as `sparse_sam`. Collective where weights are sharded.

        Raises:
            RuntimeError: DeepSpeed's stages 1 to 3 keep the base optimizer's state; says what to call instead.
        """
        return {**self.sharding.optimizer_state_dict(self.base_optimizer), "sparse_sam": self.sparse.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, on any number of processes.

        What `torch.distributed.checkpoint` hands over has no `sparse_sam`: save and load `opt.sparse` beside it.
        """
        own = dict(state_dict)
        sparse = own.pop("sparse_sam", None)
        self.sharding.load_optimizer_state_dict(self.base_optimizer, own)
        self.complete_groups()
        torch.clear_autocast_cache()  # the weights may have been loaded as well
        if sparse is not None:
            self.sparse.load_state_dict(sparse)

    @property
    def sparse(self) -> SparseState:
        """What SparseSAM itself must remember, with `state_dict` and `load_state_dict` of its own.

        For `torch.distributed.checkpoint.save({..., "sparse": opt.sparse})`, and for DeepSpeed's `client_state`. Beside
        `steps` (int64, shape ()): see `MaskState.state_dict`, `Perturbation.state_dict` and `LookSAM.state_dict`.
        """

        def parts() -> list[Stateful]:
            every = (self._mask, self._perturbation, self._looksam, self._gate)
            return [part for part in every if part is not None]

        return SparseState(self, parts)


_WITHIN = (
    "{} was called where the weights are perturbed, and what it does to them would be undone: inside of "
    "`with opt.perturbed()`, or of a step; call it after the block"
)
_REHEARSED_RADIUS = 0.05
_OPTIONS = {
    "rho",
    "norm",
    "adaptive",
    "calibrate_every",
    "direction",
    "schedule",
    "savings",
    "gap",
    "gate",
    "descent",
    "loss_budget",
}
