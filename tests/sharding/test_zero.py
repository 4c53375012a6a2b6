"""What `SparseSAM` promises on a DeepSpeed engine, beyond the equivalence that all backends share."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ssam_scale import Depth, Scored, SparseSAM
from ssam_scale.errors import UnsupportedVersionError
from ssam_scale.masks import Dense, Mask
from ssam_scale.perturbation import Stage, StagedModel
from ssam_scale.perturbation.reference import length_of
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place, sharding_of
from tests.support.masks import whole_mask
from tests.support.networks import CLASSES, batches, freeze_batchnorm, part, small_network
from tests.support.networks import loss_fn as mean_loss
from tests.support.precision import fp16_supported
from tests.support.ranks import run_ranks
from tests.support.tiers import few
from tests.support.training import (
    BATCH,
    RHO,
    STEPS,
    TOLERANCE,
    Case,
    check,
    reference,
    train,
)

LR, MOMENTUM, CLIP = 0.05, 0.9, 0.2


@dataclass(frozen=True)
class Kind:
    """One way in which DeepSpeed keeps weights, gradients and optimizer state."""

    stage: int
    precision: torch.dtype = torch.float32
    more: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        words = [f"zero{self.stage}", str(self.precision).removeprefix("torch.")]
        return " ".join([*words, *("accumulates in float32" for name, _ in self.more if name == "data_types")])

    @property
    def config(self) -> dict[str, Any]:
        sections: dict[str, Any] = dict(self.more)
        if self.precision == torch.bfloat16:
            sections["bf16"] = {"enabled": True, **sections.get("bf16", {})}
        if self.precision == torch.float16:
            # A scale that these gradients do not overflow by themselves.
            sections["fp16"] = {"enabled": True, "initial_scale_power": 8}
        return sections


FP32 = [Kind(stage) for stage in range(4)]
BF16 = [
    *(Kind(stage, torch.bfloat16) for stage in range(4)),
    Kind(1, torch.bfloat16, (("bf16", {"immediate_grad_update": True}), ("data_types", {"grad_accum_dtype": "fp32"}))),
]
FP16 = [Kind(stage, torch.float16) for stage in (1, 2, 3)]  # stage 0 is refused
# Each stage once and each precision at least twice: what two of them have in common is the same code.
LOW = few(BF16 + FP16, BF16[4], FP16[1], BF16[3])
EACH = few(FP32 + BF16 + FP16, BF16[4], FP16[1], FP32[3])


def engine_of(
    world: World, kind: Kind, groups: int = 1, batch_size: int = 4, **kwargs: Any
) -> tuple[Any, torch.optim.Optimizer]:
    """A small ViT in a DeepSpeed engine, with SGD over as many parameter groups of different learning rates."""
    model = freeze_batchnorm(small_network("vit"))

    def sgd() -> torch.optim.Optimizer:
        every = list(model.parameters())
        split = [{"params": every[i::groups], "lr": LR / (i + 1)} for i in range(groups)]
        return torch.optim.SGD(split, lr=LR, momentum=MOMENTUM)

    config = kind.config | kwargs.pop("deepspeed", {})
    with fp16_supported():
        return place(model, [], f"zero{kind.stage}", world, sgd, batch_size=batch_size, deepspeed=config, **kwargs)  # type: ignore[arg-type]


def weights(engine: Any) -> list[Tensor]:
    """Whole weights, gathered from what the engine's forward reads."""
    sharding, parameters = sharding_of(engine), list(engine.module.parameters())
    shards = sharding.shards(parameters)
    return [sharding.gather(p, s.weight).clone() for p, s in zip(parameters, shards, strict=True)]


def full_state(opt: SparseSAM) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the model and of the base optimizer."""
    sharding, network = opt.sharding, opt.sharding.network
    return gathered(sharding.named_model_state(network)), gathered(
        sharding.named_optimizer_state(network, opt.base_optimizer)
    )


def loss_fn(forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy in float32 of a network in any precision."""
    return mean_loss(lambda images: forward(images).float(), batch)


def data_of(world: World, kind: Kind, steps: int, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """This rank's part of global batches of 8, images in the network's precision."""
    own = [part(batch, world.rank, world.size) for batch in batches(steps, 8, seed)]
    return [(images.to(kind.precision), labels) for images, labels in own]


@torch.no_grad()
def logits(engine: Any) -> Tensor:
    """What a forward says."""
    images = batches(1, 4, seed=9)[0][0]
    return engine(images.to(next(engine.parameters()).dtype))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def distance(a: list[Tensor], b: list[Tensor]) -> float:
    return float(length_of({str(i): x.double() - y.double() for i, (x, y) in enumerate(zip(a, b, strict=True))}))


# Small buckets make several reductions a pass; thresholds of 0 and 300 keep no parameter and some of them whole.
SETTINGS: list[tuple[int, dict[str, Any]]] = [
    (0, {}),
    (1, {"overlap_comm": True, "reduce_bucket_size": 3000, "contiguous_gradients": False}),
    (1, {"round_robin_gradients": True, "parameter_alignment": True}),
    (2, {"overlap_comm": True, "reduce_bucket_size": 3000}),
    (2, {"round_robin_gradients": True, "contiguous_gradients": False, "allgather_bucket_size": 2000}),
    (2, {"use_multi_rank_bucket_allreduce": False, "reduce_scatter": False}),
    (3, {"stage3_param_persistence_threshold": 0, "overlap_comm": False, "reduce_bucket_size": 3000}),
    (3, {"stage3_param_persistence_threshold": 300, "sub_group_size": 4000, "stage3_prefetch_bucket_size": 3000}),
    (3, {"stage3_param_persistence_threshold": 300, "reduce_scatter": False, "contiguous_gradients": False}),
]
PICKED = [
    Case("resnet", "moving cut"),
    Case("vit", "tensor", accumulation=2, rho=(RHO, RHO / 2)),
    Case("vit", "element", norm="dense", accumulation=2, optimizer="adamw"),
]


def check_setting(index: int, case: Case) -> None:
    stage, more = SETTINGS[index]
    size = 3  # which splits everything unevenly
    ranks = run_ranks(size, partial(train, deepspeed={"zero_optimization": more}), f"zero{stage}", [case])
    check([case], ranks, f"zero{stage}")


# Every stage meets every case: the settings of a stage follow each other.
@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=map(str, SETTINGS))
def test_equals_the_reference_under_deepspeeds_own_settings(index: int) -> None:
    check_setting(index, PICKED[index % len(PICKED)])


@pytest.mark.slow
def test_weights_outside_of_blocks_are_gathered_where_nothing_stays() -> None:
    [index] = [i for i, (_, more) in enumerate(SETTINGS) if more.get("stage3_param_persistence_threshold") == 0]
    check_setting(index, Case("by names", "moving cut"))


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", PICKED, ids=str)
@pytest.mark.parametrize("index", range(len(SETTINGS)), ids=map(str, SETTINGS))
def test_every_case_equals_the_reference_under_deepspeeds_own_settings(index: int, case: Case) -> None:
    check_setting(index, case)


# Settings that a configuration may hand on to DeepSpeed (config/deepspeed.py) and that must change nothing.
HANDED_ON: dict[str, Any] = {
    "comms_logger": {"enabled": True},
    "memory_breakdown": True,
    "steps_per_print": 1,
    "timers": {"throughput": {"enabled": False}},
    "dump_state": True,
    "disable_allgather": True,
    "disable_python_gc": True,
    "communication_data_type": "fp32",
    "checkpoint": {"tag_validation": "Ignore"},
    "data_types": {"grad_accum_dtype": "fp32"},
    "zero_optimization": {
        "elastic_checkpoint": True,
        "reduce_scatter": False,
        "allgather_partitions": False,
        "enable_sanity_checks": True,
        "load_from_fp32_weights": False,
    },
}
HANDED_ON_3: dict[str, Any] = {
    "use_all_reduce_for_fetch_params": True,
    "stage3_module_granularity_threshold": 100,
    "stage3_max_live_parameters": 1000,
    "stage3_max_reuse_distance": 0,
    "stage3_model_persistence_threshold": 1000,
    "sub_group_size": 4000,
    "memory_efficient_linear": False,
    "override_module_apply": False,
    "log_trace_cache_warnings": True,
    "pipeline_loading_checkpoint": True,
}


def _steps_with(world: World, stage: int, more: dict[str, Any], monitor: str) -> list[Tensor]:
    engine, base = engine_of(
        world, Kind(stage), deepspeed={**more, "csv_monitor": {"enabled": bool(monitor), "output_path": monitor}}
    )
    opt = SparseSAM(engine, base, rho=0.1, mask=Depth((0.0, 1.0), seed=3))
    for batch in data_of(world, Kind(stage), 3):
        opt.step(loss_fn, batch)
    return weights(engine)


@pytest.mark.slow
@pytest.mark.parametrize("stage", few(range(4), 3))
def test_what_is_handed_on_to_deepspeed_changes_nothing(stage: int, tmp_path: Path) -> None:
    plain = run_ranks(2, _steps_with, stage, {}, "")
    more = [HANDED_ON]
    if stage == 3:
        more += [{"zero_optimization": HANDED_ON_3 | {"stage3_allgather_sequential": True}}]
    for sections in more:
        for mine, others in zip(plain, run_ranks(2, _steps_with, stage, sections, str(tmp_path)), strict=True):
            # The same sums in another order.
            assert max(float((a - b).abs().max()) for a, b in zip(mine, others, strict=True)) <= 1e-7
    assert list(tmp_path.rglob("*.csv"))


class Odd(nn.Module):
    """What trips up sharding: tied weights, frozen ones, tensors of one weight, a branch that a pass leaves out."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.branch = nn.Linear(6, 6)
        self.gate = nn.Linear(6, 1)
        self.scale = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(6, CLASSES, bias=False)
        self.out.weight = self.embedding.weight
        self.skips = skips
        self.forwards = 0  # of training: a step has two

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += self.training
        hidden = self.embedding((images.flatten(1)[:, :8].abs() * 3).long() % CLASSES).mean(1)
        hidden = torch.tanh(self.frozen(hidden))
        if not self.skips or self.forwards % 2 == 0:
            hidden = hidden + torch.tanh(self.branch(hidden))
        return self.out(self.scale * torch.sigmoid(self.gate(hidden)) * hidden)


@dataclass(frozen=True)
class OddCase(Case):
    """`skips`: the ascent leaves the branch out."""

    skips: bool = False

    def make_model(self) -> Any:
        torch.manual_seed(0)
        odd = Odd(self.skips)
        return StagedModel(odd, [Stage("", odd, odd)])


ODD = [
    OddCase("odd", "dense", skips=True, rho=(RHO, 0.0)),
    OddCase("odd", "element", skips=True, norm="dense", optimizer="adamw"),
    OddCase("odd", "element", norm="calibrated", rho=(RHO, 2 * RHO)),
    OddCase("odd", "tensor", norm="calibrated", adaptive=True),
    OddCase("odd", "dense", adaptive=True, accumulation=2),
]


def _odd(world: World) -> list[dict[str, Any]]:
    """Of every case at every stage: whole weights and optimizer state after five steps, and the masks of the steps."""
    results = []
    for kind in FP32:
        for case in ODD:
            model = case.make_model()
            engine, base = place(
                model,
                [],
                f"zero{kind.stage}",  # type: ignore[arg-type]
                world,
                lambda model=model, case=case: case.make_optimizer(model),
                batch_size=BATCH // world.size // case.accumulation,
                accumulation=case.accumulation,
                max_grad_norm=case.clip,
            )
            opt = case.make_sam(engine, base)
            if isinstance(opt.mask, Scored):
                opt.refresh(case.loss_fn, part(batches(1, BATCH, seed=7)[0], world.rank, world.size))
            masks = []
            for batch in batches(STEPS, BATCH):
                masks.append(whole_mask(opt))
                own = part(batch, world.rank, world.size)
                opt.step(case.loss_fn, *(part(own, i, case.accumulation) for i in range(case.accumulation)))
            whole = gathered(opt.sharding.named_model_state(model.model))
            state = gathered(opt.sharding.named_optimizer_state(model.model, opt.base_optimizer))
            kept = {"weights": whole, "state": state["state"]} if world.first else {}
            results.append({"kind": str(kind), "masks": masks, "read": weights(engine), **kept})
    return results


@pytest.mark.slow
@pytest.mark.parametrize("size", few([1, 2, 4], 1, 4))
def test_tied_frozen_tiny_and_unused_parameters_and_groups_with_their_own_rho(size: int) -> None:
    ranks = run_ranks(size, _odd)
    for index, result in enumerate(ranks[0]):
        case = ODD[index % len(ODD)]
        model, optimizer = reference(case, result["masks"])
        apart = []
        for name, p in model.named_parameters():
            apart.append(float((result["weights"][name] - p).abs().max()))
            for entry, expected in optimizer.state.get(p, {}).items():
                if entry != "step" and expected is not None:
                    apart.append(float((result["state"][name][entry] - expected).abs().max()))
        print(f"{result['kind']} × {size}, {case}: {max(apart):.1e}")
        assert max(apart) <= TOLERANCE, (result["kind"], case)
        assert torch.equal(result["weights"]["out.weight"], result["weights"]["embedding.weight"])
        for other in ranks[1:]:
            assert same(other[index]["read"], result["read"])


class Fails:
    """A loss that raises in one of its calls: before, in or after the forward, or in the backward."""

    def __init__(self, block: nn.Module, call: int, where: str) -> None:
        self.left, self.where = call, where
        self.handles = [
            block.register_forward_pre_hook(lambda *_: self.fail("in the forward")),
            block.register_full_backward_pre_hook(lambda *_: self.fail("in the backward")),
        ]

    def fail(self, where: str) -> None:
        if self.left == 0 and self.where == where:
            self.left -= 1
            for handle in self.handles:
                handle.remove()
            raise ArithmeticError(where)

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        self.left -= 1
        self.fail("before the forward")
        loss = loss_fn(forward, batch)
        self.fail("after the forward")
        return loss


def _failures(world: World, kind: Kind, threshold: int = 0) -> list[str]:
    """What did not hold, for an exception anywhere in a step of two micro-batches or of one with a shared prefix."""
    wrong = []
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
    data = data_of(world, kind, 4)
    masks: list[tuple[Mask, int]] = [(Depth((0.5, 0.5)), 1), (Scored("element", 0.5), 2)]
    places = ("before the forward", "in the forward", "after the forward", "in the backward")
    for mask, micro in masks:
        (engine, base), (other, other_base) = (engine_of(world, kind, deepspeed=settings) for _ in range(2))
        opt = SparseSAM(engine, base, rho=0.5, mask=mask)
        undisturbed = SparseSAM(other, other_base, rho=0.5, mask=mask)
        if isinstance(mask, Scored):
            for o in (opt, undisturbed):  # each process knows the mask of all of its weights by a refresh of its own
                o.refresh(loss_fn, data[0])
        # In the ascent and in the descent; what breaks a backward comes last.
        for step, (where, call) in enumerate((w, c) for w in places for c in (1, 2 * micro)):
            what = f"threshold {threshold}, {mask.__class__.__name__}, {micro} micro-batches, call {call}, {where}"
            kept, seen = weights(engine), logits(engine)
            with pytest.raises(ArithmeticError, match=where):
                opt.step(Fails(engine.module.stages[-2].block, call, where), *data[:micro])
            if not same(kept, weights(engine)):
                wrong.append(f"{what}: weights")
            if not torch.equal(seen, logits(engine)):
                wrong.append(f"{what}: what the forward reads")
            batch = data[step % 4]
            micro_batches = [part(batch, i, micro) for i in range(micro)]
            if where == "in the backward" and kind.stage > 0:
                with pytest.raises(RuntimeError, match="load it into a new engine"):
                    opt.step(loss_fn, *micro_batches)
                break
            for o in (opt, undisturbed):
                o.steps = step
                o.step(loss_fn, *micro_batches)
            if not same(weights(engine), weights(other)):
                wrong.append(f"{what}: the next step")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "threshold"), [*((kind, 0) for kind in FP32[:3]), (Kind(3), 300)], ids=str)
def test_an_exception_anywhere_leaves_the_weights_at_w_and_the_next_step_undisturbed(
    kind: Kind, threshold: int
) -> None:
    assert run_ranks(2, _failures, kind, threshold) == [[], []]


def _by_hand(world: World, kind: Kind) -> list[str]:
    wrong = []
    (ours, base), (theirs, _), (batched, batched_base) = (engine_of(world, kind, groups=2) for _ in range(3))
    none = SparseSAM(ours, base, rho=0.0)
    for own in data_of(world, kind, 3):
        none.step(loss_fn, own)
        theirs.backward(loss_fn(theirs, own))
        theirs.step()
    if not same(weights(ours), weights(theirs)):
        wrong.append("rho 0")

    for group in ours.basic_optimizer.param_groups:
        group["rho"] = 0.3
    by_hand = SparseSAM(ours, ours.optimizer, norm="dense")
    closure = SparseSAM(theirs, theirs.optimizer, rho=0.3, norm="dense")
    batch_form = SparseSAM(batched, batched_base, rho=0.3, norm="dense")
    for group in batch_form.param_groups:
        group["rho"] = 0.0
    for own in data_of(world, kind, 3):
        batch_form.step(loss_fn, own)
    for group in batch_form.param_groups:
        group["rho"] = 0.3
    for own in data_of(world, kind, 3, seed=3):

        def backward(engine: Any, own: Any = own) -> Tensor:
            loss = loss_fn(engine, own)
            engine.backward(loss)
            return loss

        before = weights(ours)
        backward(ours)
        with by_hand.perturbed():
            length = distance(weights(ours), before)
            backward(ours)
        if abs(length - 0.3) > 1e-4:
            wrong.append(f"length {length}")
        if not same(before, weights(ours)):
            wrong.append("by hand, restored")
        by_hand.step()
        by_hand.zero_grad()
        closure.step(lambda engine=theirs, backward=backward: backward(engine))
        batch_form.step(loss_fn, own)
    if not same(weights(ours), weights(theirs)):
        wrong.append("by hand and by a closure")
    # Where the engine reduces it leaves each process a part, by which norms are summed; given batches, all is there.
    apart = distance(weights(ours), weights(batched))
    if apart > (TOLERANCE if kind.stage in (1, 2) else 0.0):
        wrong.append(f"three forms differ by {apart}")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", FP32, ids=str)
def test_rho_zero_is_the_engine_alone_and_the_three_forms_are_one_step(kind: Kind) -> None:
    assert run_ranks(2, _by_hand, kind) == [[], []]


def low_precision_reference(kind: Kind, masks: list[dict[str, Tensor]], accumulation: int) -> list[Tensor]:
    """Five steps of one process with float32 master weights: the masters, as they end."""
    network = freeze_batchnorm(small_network("vit")).to(kind.precision)
    named = dict(network.model.named_parameters())
    masters = {name: p.detach().float().clone().requires_grad_() for name, p in named.items()}
    optimizer = torch.optim.SGD(masters.values(), lr=LR, momentum=MOMENTUM)

    def gradients(batch: Any) -> dict[str, Tensor]:
        network.zero_grad()
        for micro in (part(batch, i, accumulation) for i in range(accumulation)):
            (loss_fn(network, micro) / accumulation).backward()
        return {name: p.grad.float() for name, p in named.items()}  # type: ignore[union-attr]

    for batch, mask in zip(data_of(World(), kind, STEPS), masks, strict=True):
        ascent = {name: g * mask[name] for name, g in gradients(batch).items() if name in mask}
        scale = 0.5 / length_of(ascent).float()
        with torch.no_grad():
            for name, g in ascent.items():
                named[name].copy_(masters[name] + scale * g)
        for name, g in gradients(batch).items():
            masters[name].grad = g
        nn.utils.clip_grad_norm_(masters.values(), CLIP)
        optimizer.step()
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(masters[name])
    return [m.detach() for m in masters.values()]


def _low_precision(world: World, kind: Kind) -> list[str]:
    wrong = []
    forms: list[tuple[Mask, int]] = [(Dense(), 1), (Depth((0.5, 0.5)), 1), (Scored("element", 0.5), 2)]
    for mask, accumulation in forms:
        what = f"{type(mask).__name__}, {accumulation} micro-batches"
        engine, base = engine_of(world, kind, 1, 4 // accumulation, accumulation=accumulation, max_grad_norm=CLIP)
        opt = SparseSAM(engine, base, rho=0.5, mask=mask)
        data = data_of(world, kind, STEPS)
        if isinstance(mask, Scored):
            opt.refresh(loss_fn, data[0])
        before = weights(engine)
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(loss_fn(engine, data[0]), scale_wrt_gas=False)
        with opt.perturbed():
            length = distance(weights(engine), before)
        # Each moved weight is rounded, at random: the length is kept far better than its parts.
        if not same(before, weights(engine)) or abs(length - 0.5) > 0.005:
            wrong.append(f"{what}: moved by {length}")
        opt.zero_grad()
        opt.steps = 0
        masks = []
        for batch in data:
            masks.append(whole_mask(opt))
            opt.step(loss_fn, *(part(batch, i, accumulation) for i in range(accumulation)))
        expected = low_precision_reference(kind, masks, accumulation)
        stepped = gathered(opt.sharding.named_model_state(engine.module.model))
        ended = [stepped[name] for name, _ in engine.module.model.named_parameters()]
        start = [p.detach().to(kind.precision) for p in small_network("vit").parameters()]
        error = distance(ended, expected) / distance(expected, start)
        # A number keeps 8 bits (bf16) or 11 (fp16), so a sum in another order differs by up to 2^-8 or 2^-11 of its
        # terms. Over a whole network such errors are random and mostly cancel; this is four times one of them.
        bits = -math.log2(torch.finfo(kind.precision).eps) + 1
        if world.first:
            print(f"{kind}, {what}: {error:.1e} of the way")
        if error > 4 * 2.0**-bits:
            wrong.append(f"{what}: {error:.1e} of the way")
        if not same([w.to(kind.precision) for w in ended], weights(engine)):
            wrong.append(f"{what}: the forward does not read the rounded masters")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOW, ids=str)
def test_low_precision_has_float32_masters_is_moved_by_rho_and_comes_back_bit_for_bit(kind: Kind) -> None:
    assert run_ranks(2, _low_precision, kind) == [[], []]


def _from_masters(world: World, kind: Kind) -> list[str]:
    wrong = []
    for mask in (Dense(), Depth((0.5, 0.5)), Scored("element", 0.5)):
        engine, base = engine_of(world, kind)
        opt = SparseSAM(engine, base, rho=0.005, mask=mask)
        data = data_of(world, kind, 2)
        if isinstance(mask, Scored):
            opt.refresh(loss_fn, data[0])
        opt.step(loss_fn, data[0])  # the masters are no bf16 numbers any more
        sharding, named, kept = opt.sharding, opt.parameters.by_name, whole_mask(opt)
        masters = {
            name: full.clone() for name, full in gathered(sharding.named_model_state(engine.module.model)).items()
        }
        engine.set_gradient_accumulation_boundary(True)
        engine.backward(loss_fn(engine, data[1]), scale_wrt_gas=False)
        gradients = sharding.gradients([named[name] for name in kept])
        chosen = {
            name: sharding.gather(named[name], g).float() * kept[name] for name, g in zip(kept, gradients, strict=True)
        }
        before, alpha = weights(engine), 0.005 / float(length_of(chosen))
        with opt.perturbed():
            inside = dict(zip(named, weights(engine), strict=True))
        expected = {
            name: (masters[name] + alpha * chosen[name]).to(w.dtype) if name in chosen else w
            for name, w in zip(named, before, strict=True)
        }
        # The length is a sum in another order, which may turn a tie of the rounding.
        apart = sum(int((inside[name] != w).sum()) for name, w in expected.items())
        if not same(before, weights(engine)) or apart > 1e-4 * sum(p.numel() for p in named.values()):
            wrong.append(f"{type(mask).__name__}: {apart} weights are not the rounded master + ε")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOW, ids=str)
def test_in_low_precision_epsilon_is_added_to_the_masters_and_rounded_once(kind: Kind) -> None:
    """Added to a weight of 8 bits most of a small one would be lost."""
    assert run_ranks(2, _from_masters, kind) == [[], []]


def _not_finite(world: World, kind: Kind) -> list[str]:
    """A gradient that is not finite, on rank 1 alone: at first in the ascent, then in the descent."""
    wrong = []
    (engine, base), (alone, _) = engine_of(world, kind), engine_of(world, kind)
    opt = SparseSAM(engine, base, rho=0.5)
    [own], calls = data_of(world, kind, 1), []

    def breaks(call: int) -> Callable[..., Tensor]:
        # In fp16 by what overflows, elsewhere by what is not finite from the start.
        factor = 1e6 if kind.precision == torch.float16 else math.inf

        def broken_loss(forward: Any, batch: Any) -> Tensor:
            calls.append(1)
            return loss_fn(forward, batch) * (factor if len(calls) == call and world.rank == 1 else 1.0)

        return broken_loss

    opt.step(breaks(1), own)
    alone.backward(loss_fn(alone, own))
    alone.step()
    if opt.skipped != 1 or not same(weights(engine), weights(alone)):
        wrong.append(f"ascent: skipped {opt.skipped}")
    if engine.optimizer is not engine.basic_optimizer:  # in fp32, stage 0 steps with what there is
        before = weights(engine)
        opt.step(breaks(4), own)
        if engine.skipped_steps != 1 or not same(before, weights(engine)):
            wrong.append(f"descent: skipped {engine.skipped_steps}")
        alone.skipped_steps = 1
    opt.step(loss_fn, own)
    if opt.skipped != 1 or engine.skipped_steps != alone.skipped_steps:
        wrong.append("the next step")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", EACH, ids=str)
def test_a_gradient_that_is_not_finite_on_one_rank_skips_on_all_of_them(kind: Kind) -> None:
    assert run_ranks(2, _not_finite, kind) == [[], []]


def _resumed(world: World, kind: Kind) -> list[str]:
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    data = data_of(world, kind, 5)

    def started() -> tuple[Any, SparseSAM]:
        engine, base = engine_of(world, kind, groups=2)
        return engine, SparseSAM(engine, base, rho=0.5, mask=Scored("element", 0.5), norm="calibrated")

    def ended(opt: SparseSAM) -> list[Tensor]:
        for batch in data[3:]:
            opt.step(loss_fn, batch)
        whole, state = full_state(opt)
        entries = [v for of_one in state.get("state", {}).values() for v in of_one.values() if isinstance(v, Tensor)]
        return [*whole.values(), *entries, *weights(opt.sharding.ascent_module)]

    engine, opt = started()
    for batch in data[:2]:
        opt.refresh(loss_fn, batch)
        opt.step(loss_fn, batch)
    opt.step(loss_fn, data[2])
    engine.save_checkpoint(folder[0], client_state=opt.sparse.state_dict())
    # A copy: the tensors may be the weights themselves.
    whole = [copy.deepcopy(full_state(opt))]
    dist.broadcast_object_list(whole)
    sparse = opt.sparse.state_dict()
    expected = ended(opt)

    wrong = []
    engine, opt = started()
    _, client_state = engine.load_checkpoint(folder[0])
    opt.sparse.load_state_dict(client_state)
    if not same(expected, ended(opt)):
        wrong.append("DeepSpeed's checkpoint")
    _, opt = started()
    opt.sharding.load_named_model_state(opt.sharding.network, whole[0][0])
    opt.sharding.load_named_optimizer_state(opt.sharding.network, opt.base_optimizer, whole[0][1])
    opt.sparse.load_state_dict(sparse)
    if not same(expected, ended(opt)):
        wrong.append("whole state")
    try:
        opt.state_dict()
        if engine.optimizer is not engine.basic_optimizer:
            wrong.append("state_dict says nothing")
    except RuntimeError as error:
        if engine.optimizer is engine.basic_optimizer or "engine.save_checkpoint" not in str(error):
            wrong.append(str(error))
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", EACH, ids=str)
def test_resuming_equals_never_having_stopped(kind: Kind) -> None:
    assert run_ranks(2, _resumed, kind) == [[], []]


def _misuse(world: World) -> list[str]:
    import deepspeed

    messages = []

    def said(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except (ValueError, RuntimeError, UnsupportedVersionError) as error:
            messages.append(str(error))
        else:
            messages.append("nothing")

    engine, base = engine_of(world, Kind(1), max_grad_norm=2.0)
    said(SparseSAM, engine, torch.optim.SGD(engine.module.parameters(), lr=0.1))
    said(SparseSAM, engine, base, max_grad_norm=1.0)
    said(SparseSAM, engine, base, max_grad_norm=2.0)
    said(SparseSAM, engine, base, scaler=torch.amp.GradScaler("cpu"))
    kept = engine.optimizer.averaged_gradients
    del engine.optimizer.averaged_gradients
    said(SparseSAM, engine, base)
    engine.optimizer.averaged_gradients = kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "__version__", "0.18.9")
        said(SparseSAM, engine, base)
    said(SparseSAM(engine, base).add_param_group, {"params": [nn.Parameter(torch.zeros(2))]})
    for kind, more in [
        (Kind(2), {"wall_clock_breakdown": True}),
        (Kind(2), {"managed_gradient_accumulation": False}),
        (Kind(0, torch.float16), {}),
        (Kind(1, torch.bfloat16), {"data_types": {"grad_accum_dtype": "fp32"}}),
    ]:
        said(SparseSAM, *engine_of(world, kind, deepspeed=more))
    said(engine_of, world, Kind(2), deepspeed={"gradient_clipping": 1.0, "zero_optimization": {"stage": 1}})
    said(engine_of, world, Kind(2), deepspeed={"optimizer": {"type": "Adam"}})
    said(engine_of, world, Kind(2), deepspeed={"zero_optimization": {"reduce_bucket_size": "many"}})
    return messages


@pytest.mark.slow
def test_misuse_is_an_error_at_construction() -> None:
    [said] = run_ranks(1, _misuse)
    for message, part_of_it in zip(
        said,
        [
            "not the one that the DeepSpeed engine was initialised with",
            "max_grad_norm is 1.0 but the DeepSpeed engine clips, with gradient_clipping 2.0",
            "nothing",
            "a DeepSpeed engine scales losses itself",
            "DeepSpeedZeroOptimizer lacks averaged_gradients",
            "DeepSpeed 0.18.9 is not supported: at least 0.19.8 and below 0.20.0 is needed",
            "only before deepspeed.initialize",
            "does not support wall_clock_breakdown",
            "does not support managed_gradient_accumulation: false",
            "does not support fp16 with ZeRO stage 0",
            "needs bf16.immediate_grad_update: true",
            "leave gradient_clipping, zero_optimization.stage out of DeepSpeed's configuration",
            "leave optimizer out of DeepSpeed's configuration",
            "DeepSpeed does not take its configuration: 1 validation error",
        ],
        strict=True,
    ):
        assert part_of_it in message


def _autocast(world: World) -> list[Any]:
    engine, base = engine_of(world, Kind(2))
    opt, enabled, seen = SparseSAM(engine, base, rho=0.1, mask=Depth((0.5, 0.5))), torch.is_autocast_enabled, []

    def autocast_loss(forward: Any, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            seen.append(forward(batch[0]))
        return torch.nn.functional.cross_entropy(seen[-1].float(), batch[1])

    with pytest.MonkeyPatch.context() as patch:
        # DeepSpeed asks without a device, which means CUDA, and then turns autocast of its own device off.
        patch.setattr(torch, "is_autocast_enabled", lambda *device: enabled(*device) if device else True)
        opt.step(autocast_loss, batches(1, 4)[0])
    return [str(output.dtype) for output in [*seen, logits(engine)]]


@pytest.mark.slow
def test_autocast_around_a_step_reaches_into_the_engine() -> None:
    assert run_ranks(1, _autocast) == [["torch.bfloat16", "torch.bfloat16", "torch.float32"]]


@pytest.mark.slow
def test_sharding_does_not_import_deepspeed() -> None:
    code = "import sys, ssam_scale, ssam_scale.sharding; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
