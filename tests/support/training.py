"""Training a small network for five steps on any ranks and backend, and the slow reference that it must equal."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from ssam_scale.masks import NM, Dense, Depth, DepthByCost, Dynamic, Mask, Named, Norms, Refreshed, Scored
from ssam_scale.perturbation import (
    DescentSamples,
    Direction,
    Fresh,
    Gate,
    RadiusSchedule,
    Rehearsed,
    Savings,
    SparseSAM,
)
from ssam_scale.perturbation.reference import length_of, masked_by, reference_gradient, reference_step
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place, released
from tests.support.directions import Vectors, descended, seen_by_ascent
from tests.support.masks import whole_mask
from tests.support.networks import batches, freeze_batchnorm, network_by_names, part, small_network

STEPS, BATCH, RHO, CLIP = 5, 24, 0.1, 5.0  # 24 divides over 4 ranks with 2 micro-batches each, and over 3
# fp32: the same arithmetic in another order of summation.
TOLERANCE = 1e-6
# bf16 keeps 8 bits, so that sums in another order differ by up to 2^-8 of their terms: one unit in the last place. The
# errors of a whole network are random and mostly cancel; the weights end within 8 such units of the way that they went.
BF16_TOLERANCE = 2.0**-5


def _changes(direction: Direction) -> str:
    """What of a direction is not as usual, in words."""
    usual = type(direction)()
    changed = [
        f"{v} of the batch" if n == "fraction" else str(v) for n, v in vars(direction).items() if v != getattr(usual, n)
    ]
    return " ".join([*([] if isinstance(direction, Fresh) else [type(direction).__name__]), *changed])


@dataclass(frozen=True)
class Case:
    """One way of training.

    `rho` is one for all groups, or one a group: parameters are dealt out to as many groups. `scaled`: losses are scaled
    as for float16.
    """

    family: str
    mask: str
    norm: str = "masked"
    accumulation: int = 1
    optimizer: str = "sgd"
    clip: float = CLIP
    rho: tuple[float, ...] = (RHO,)
    adaptive: bool = False
    schedule: RadiusSchedule | None = None
    precision: torch.dtype = torch.float32
    direction: Direction = field(default_factory=Fresh)
    savings: Savings = field(default_factory=Savings)
    scaled: bool = False
    gap: float = 0.0
    gate: Gate | None = None
    descent: DescentSamples | None = None
    loss_budget: float | None = None

    def __str__(self) -> str:
        """The case in words, e.g. "vit element, calibrated norm, radii 0.1 and 0.0": what is not as usual is named."""
        words = {
            f"{self.norm} norm": self.norm != "masked",
            f"{self.accumulation} micro-batches": self.accumulation > 1,
            self.optimizer: self.optimizer != "sgd",
            f"clipped at {self.clip}": self.clip != CLIP,
            f"radii {' and '.join(map(str, self.rho))}": self.rho != (RHO,),
            "adaptive": self.adaptive,
            type(self.schedule).__name__: self.schedule is not None,
            str(self.precision).removeprefix("torch."): self.precision != torch.float32,
            _changes(self.direction): self.direction != Fresh(),
            "savings " + " and ".join(n for n, v in vars(self.savings).items() if v != getattr(Savings(), n)): (
                self.savings != Savings()
            ),
            "scaled": self.scaled,
            f"gap {self.gap}": self.gap > 0.0,
            "gated": self.gate is not None,
            f"descent {' '.join(map(str, vars(self.descent).values())) if self.descent else ''}": (
                self.descent is not None
            ),
            f"loss budget {self.loss_budget}": self.loss_budget is not None,
        }
        return ", ".join([f"{self.family} {self.mask}", *(word for word, said in words.items() if said)])

    def make_mask(self) -> Mask:
        return {
            "dense": Dense(),
            "element": Scored("element", 0.5),
            "tensor": Scored("tensor", 0.7),
            "row": Scored("row", 0.6),
            "accumulated": Scored("element", 0.5, score="accumulated"),
            "block": Scored("block", 0.5, score="gradient"),
            "1:4": NM(1, 4, indivisible="unperturbed", score="weight"),
            "norm": Norms(),
            "named": Named(r"attn\.", "head"),
            "late": Named(r"blocks\.[23]\.attn", "head"),
            "dynamic": Dynamic(0.3, steps=10, grow="fisher"),
            "fixed cut": Depth((0.5, 0.5)),
            "moving cut": Depth((0.0, 1.0), seed=3),
            "cut by cost": DepthByCost(seconds=(4.0, 3.0, 2.0, 1.0), seed=3),
        }[self.mask]

    def make_model(self) -> torch.nn.Module:
        return freeze_batchnorm(network_by_names() if self.family == "by names" else small_network(self.family))

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        every, n = list(model.parameters()), len(self.rho)
        adamw = self.optimizer == "adamw"
        lr = 1e-3 if adamw else 0.05
        groups = [{"params": every[i::n], "lr": lr / (i + 1), "rho": rho} for i, rho in enumerate(self.rho)]
        # A large eps: AdamW divides by the root of its second moment, which turns a float error of a vanishing gradient
        # into one of the step's size.
        if adamw:
            return torch.optim.AdamW(groups, eps=1e-3)
        if self.optimizer != "sgd":
            from timm.optim import get_optimizer_class

            options = {"momentum": 0.9} if self.optimizer == "sgdp" else {}
            made: torch.optim.Optimizer = get_optimizer_class(self.optimizer)(groups, weight_decay=1e-3, **options)
            return made
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=1e-3)

    def make_sam(self, model: torch.nn.Module, base: torch.optim.Optimizer) -> SparseSAM:
        return SparseSAM(
            model,
            base,
            mask=self.make_mask(),
            norm=self.norm,
            adaptive=self.adaptive,
            calibrate_every=3,
            direction=self.direction,
            gap=self.gap,
            gate=self.gate,
            descent=self.descent,
            loss_budget=self.loss_budget,
            schedule=self.schedule,
            max_grad_norm=self.clip,
            savings=self.savings,
            scaler=torch.amp.GradScaler("cpu", init_scale=1024.0) if self.scaled else None,
        )

    def loss_fn(self, forward: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images, labels = batch
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            logits = forward(images)
        return F.cross_entropy(logits.float(), labels)


def on(device: torch.device, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0].to(device), batch[1].to(device)


def halved(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate that changes with each step."""
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


def placed(world: World, backend: Any, case: Case, **kwargs: Any) -> tuple[Any, torch.nn.Module, torch.optim.Optimizer]:
    """A case's model; the same on a backend; and its optimizer. `kwargs` are of `place`."""
    model: Any = case.make_model()
    distributed, base = place(
        model,
        [stage.block for stage in model.stages],
        backend,
        world,
        lambda: case.make_optimizer(model),
        batch_size=BATCH // world.size // case.accumulation,
        accumulation=case.accumulation,
        max_grad_norm=case.clip,
        **kwargs,
    )
    return model, distributed, base


def train(
    world: World, backend: Any, cases: list[Case], rehearsed: tuple[Rehearsed, ...] = (), **kwargs: Any
) -> list[dict[str, Any]]:
    """Five steps of each case on this rank: whole weights and optimizer state, and of each step the mask and the loss.

    Args:
        world: the processes.
        backend: to train on.
        cases: ways of training.
        rehearsed: before each step.
        kwargs: of `place`.
    """
    results = []
    for case in cases:
        model, distributed, base = placed(world, backend, case, **kwargs)
        with released(distributed):
            opt = case.make_sam(distributed, base)
            scheduler = halved(opt.base_optimizer) if case.schedule else None
            for _ in range(3 if isinstance(opt.mask, Dynamic) else isinstance(opt.mask, Refreshed)):
                seen = on(world.device, part(batches(1, BATCH, seed=7)[0], world.rank, world.size))
                opt.refresh(case.loss_fn, seen)
            losses, masks = [], []
            for batch in batches(STEPS, BATCH):
                own = on(world.device, part(batch, world.rank, world.size))
                masks.append(whole_mask(opt))
                micro = [part(own, i, case.accumulation) for i in range(case.accumulation)]
                if rehearsed:
                    with opt.rehearsal() as rehearse:
                        for what in rehearsed:
                            rehearse(what, case.loss_fn, *micro)
                losses.append(world.sum(opt.step(case.loss_fn, *micro)) / world.size)
                if scheduler is not None:
                    scheduler.step()
            named, sharding = opt.parameters.by_name, opt.sharding
            shards = sharding.shards(list(named.values()))
            weights = {n: sharding.gather(p, s.weight) for (n, p), s in zip(named.items(), shards, strict=True)}
            state = gathered(sharding.named_optimizer_state(model.model, opt.base_optimizer))
            entries = {f"{n}|{entry}": v for n, own in state.get("state", {}).items() for entry, v in own.items()}
            results.append(
                {
                    "weights": weights,
                    # Without the step count. Some backends give the whole state to the first rank only.
                    "state": {name: v for name, v in entries.items() if isinstance(v, torch.Tensor) and v.ndim},
                    "masks": masks,
                    "losses": torch.stack(losses),
                    "buffers": {name: buffer.clone() for name, buffer in model.named_buffers()},
                    "sparse": opt.sparse.state_dict(),
                    "kappa": opt.kappa,
                    "random": torch.get_rng_state(),
                }
            )
    return results


@dataclass(frozen=True)
class Expected:
    """Where the oracle is after five steps: weights, entries of the optimizer's state, and the loss of each step."""

    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    losses: list[float]


_EXPECTED: dict[tuple[str, int, str], Expected] = {}


def expected_of(case: Case, masks: list[Mapping[str, torch.Tensor]], ranks: int = 1) -> Expected:
    """Five steps of the oracle, made once for what many backends must equal."""
    parts = getattr(case.direction, "fraction", 1.0) < 1 or case.descent is not None
    pieces = ranks * case.accumulation if parts else 1
    digest = hashlib.sha256()
    for name, mask in (item for step in masks for item in sorted(step.items())):
        digest.update(name.encode() + mask.contiguous().view(torch.uint8).numpy().tobytes())
    key = repr(case), pieces, digest.hexdigest()
    if key not in _EXPECTED:
        losses: list[float] = []
        with torch.enable_grad():
            model, optimizer = reference(case, masks, losses, ranks)
        weights = {name: p.detach() for name, p in model.named_parameters()}
        names = {id(p): name for name, p in model.named_parameters()}
        state = {f"{names[id(p)]}|{e}": v for p, entries in optimizer.state.items() for e, v in entries.items()}
        # Without the step count.
        _EXPECTED[key] = Expected(weights, {n: v for n, v in state.items() if v is not None and v.ndim}, losses)
    return _EXPECTED[key]


def reference(
    case: Case, masks: list[Mapping[str, torch.Tensor]], losses: list[float] | None = None, ranks: int = 1
) -> Any:
    """The oracle's model and optimizer after five steps on the whole batches, given what each step perturbs.

    Args:
        case: what is trained.
        masks: of each step, booleans by parameter.
        losses: is given the loss of each step.
        ranks: how many share a batch.
    """
    model = case.make_model().model
    optimizer = case.make_optimizer(model)
    scheduler = halved(optimizer) if case.schedule else None
    vectors = Vectors(case.direction, model, optimizer)
    mean, variance = None, 0.0  # of the squared length of the gradient: AE-SAM
    for step, (batch, mask) in enumerate(zip(batches(STEPS, BATCH), masks, strict=True)):
        radii = [g["rho"] * (case.schedule(step, g) if case.schedule else 1.0) for g in optimizer.param_groups]
        names = {id(p): name for name, p in model.named_parameters()}
        rho = {names[id(p)]: r for g, r in zip(optimizer.param_groups, radii, strict=True) for p in g["params"]}
        if not vectors.known:
            rho = dict.fromkeys(rho, 0.0)
        if case.gate is not None and any(rho.values()):
            squared = float(length_of(reference_gradient(model, case.loss_fn, batch)[1])) ** 2
            delta = case.gate.delta
            mean = squared if mean is None else delta * mean + (1 - delta) * squared
            variance = delta * variance + (1 - delta) * (squared - mean) ** 2
            c = case.gate.first + (case.gate.last - case.gate.first) * step / case.gate.steps
            if squared < mean + c * variance**0.5:
                rho = dict.fromkeys(rho, 0.0)
        climbs = any(rho.values()) and case.direction.ascends
        seen = seen_by_ascent(case.direction, model, batch, ranks, case.accumulation, step) if climbs else batch
        chosen = descended(case.descent, model, batch, ranks, case.accumulation, step) if climbs else None
        along = None
        if case.loss_budget is not None and climbs:
            share = max(radii) / max(case.rho)  # the schedule's factor
            length = float(length_of(masked_by(reference_gradient(model, case.loss_fn, seen)[1], mask)))
            rho = {name: r * min(1.0, share * case.loss_budget / (max(radii) * length)) for name, r in rho.items()}
        if any(rho.values()):
            fresh = None
            if case.direction.remembers and climbs:
                seen_loss, fresh = reference_gradient(model, case.loss_fn, seen)
            along = vectors.of(fresh, mask)
        norm = case.norm
        if norm == "calibrated":
            norm = "masked"
            if step in (0, 1, 2, 4):  # `calibrate_every` is 3, and the first ones are closer
                norm = "dense"
                _, calibration = reference_gradient(model, case.loss_fn, batch, adaptive=case.adaptive)
            else:
                kappa = float(length_of(masked_by(calibration, mask)) / length_of(calibration))
                rho = {name: r * kappa for name, r in rho.items()}
        loss = reference_step(
            model,
            optimizer,
            case.loss_fn,
            batch,
            rho=rho,
            mask=mask,
            norm=norm,
            adaptive=case.adaptive,
            max_grad_norm=case.clip,
            ascent_batch=seen,
            along=along,
            gap=case.gap,
            descent_batch=chosen,
        )
        if along is not None and fresh is not None:  # the loss of the ascent, which this has not seen
            loss = seen_loss
        if losses is not None:
            losses.append(loss.item())
        if scheduler is not None:
            scheduler.step()
    return model, optimizer


@torch.no_grad()
def largest_difference(case: Case, result: dict[str, Any], check_losses: bool = True, ranks: int = 1) -> float:
    """From the oracle after five steps: in fp32 the largest of any weight or entry of the optimizer's state, in low
    precision the length of the weights' difference as a share of the length of the way that the oracle's went."""
    expected = expected_of(case, result["masks"], ranks)
    if check_losses:
        assert result["losses"].tolist() == pytest.approx(
            expected.losses, abs=1e-6 if case.precision.itemsize > 2 else 1e-2
        )
    weights, state = expected.weights, expected.state
    assert weights.keys() == result["weights"].keys()
    apart = {n: result["weights"][n] - w for n, w in weights.items()}
    if case.precision != torch.float32:
        start = dict(case.make_model().model.named_parameters())
        return float(length_of(apart) / length_of({n: w - start[n] for n, w in weights.items()}))
    assert state.keys() == result["state"].keys()
    apart |= {name: value - state[name] for name, value in result["state"].items()}
    return max(float(difference.abs().max()) for difference in apart.values())


def tolerance(case: Case) -> float:
    return TOLERANCE if case.precision == torch.float32 else BF16_TOLERANCE


def check(cases: list[Case], ranks: list[list[dict[str, Any]]], backend: str) -> None:
    """Each case, as `train` returned it on every rank, ends where the oracle does, with the same weights on each rank.

    Says the largest differences (`pytest -s`).
    """
    for case, first, *others in zip(cases, *ranks, strict=True):
        difference = largest_difference(case, first, ranks=len(ranks))
        print(f"{backend} × {len(ranks)}, {case}: differs by {difference:.1e}")
        assert difference <= tolerance(case), f"{backend} × {len(ranks)}, {case} differs by {difference:.1e}"
        for other in others:
            assert all(torch.equal(other["weights"][name], weight) for name, weight in first["weights"].items())
