"""What `SparseSAM` promises on a DeepSpeed engine, beyond the equivalence that all backends share."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from ssam_scale import Depth, Scored, SparseSAM
from ssam_scale.masks import Mask
from ssam_scale.sharding import World, place, sharding_of
from tests.perturbation.test_equivalence import CASES, TOLERANCE, Case, largest_difference, train
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks

STAGES = range(4)


def engine_of(
    world: World, stage: int, family: str = "vit", groups: int = 1, **kwargs: Any
) -> tuple[Any, torch.optim.Optimizer]:
    model = freeze_batchnorm(small_network(family))

    def sgd() -> torch.optim.Optimizer:
        every = list(model.parameters())
        split = [{"params": every[i::groups], "lr": 0.05 / (i + 1)} for i in range(groups)]
        return torch.optim.SGD(split, lr=0.05, momentum=0.9)

    return place(model, [], f"zero{stage}", world, sgd, batch_size=4, **kwargs)  # type: ignore[arg-type]


def weights(engine: Any) -> list[torch.Tensor]:
    """Whole weights, gathered from what the engine's forward reads."""
    sharding, parameters = sharding_of(engine), list(engine.module.parameters())
    sharding.trained(engine.optimizer, None)
    shards = sharding.shards(parameters)
    return [sharding.gather(p, s.weight).clone() for p, s in zip(parameters, shards, strict=True)]


@torch.no_grad()
def logits(engine: Any) -> torch.Tensor:
    return engine(batches(1, 4, seed=9)[0][0])


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _one_case(world: World) -> dict[str, Any]:
    return train(world, "zero1", [CASES[3]])[0]


def test_stage_1_equals_the_reference() -> None:
    assert largest_difference(CASES[3], run_ranks(2, _one_case)[0]) <= TOLERANCE


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
    Case("vit", "tensor", accumulation=2),
    Case("vit", "element", norm="dense", accumulation=2, optimizer="adamw"),
    Case("vit", "dense", clip=0.2, groups=2),
]


def _settings(world: World) -> list[Any]:
    return [train(world, f"zero{stage}", PICKED, deepspeed={"zero_optimization": more}) for stage, more in SETTINGS]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_equals_the_reference_under_deepspeeds_own_settings(size: int) -> None:
    ranks = run_ranks(size, _settings)
    print()
    for index, (stage, more) in enumerate(SETTINGS):
        differences = [largest_difference(case, ranks[0][index][i]) for i, case in enumerate(PICKED)]
        print(f"zero{stage} × {size} {more}: {max(differences):.1e}")
        assert max(differences) <= TOLERANCE, (stage, more, differences)
        for other in ranks[1:]:
            for mine, theirs in zip(ranks[0][index], other[index], strict=True):
                assert all(torch.equal(theirs["weights"][n], w) for n, w in mine["weights"].items())


def _masks(world: World, cases: list[Case]) -> list[Any]:
    return [train(world, f"zero{stage}", cases) for stage in STAGES]


@pytest.mark.slow
def test_the_fisher_mask_is_that_of_one_process() -> None:
    cases = [case for case in CASES if case.mask in ("element", "tensor")][:4]
    expected = alone(train, "single", cases)
    for results in run_ranks(2, _masks, cases)[0]:
        for mine, other in zip(expected, results, strict=True):
            first, second = mine["masks"][0], other["masks"][0]
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)


class Fails:
    """A loss that raises in the n-th of its calls, before or after the forward."""

    def __init__(self, call: int, *, before: bool) -> None:
        self.left, self.before = call, before

    def __call__(self, forward: Any, batch: Any) -> torch.Tensor:
        self.left -= 1
        if self.left == 0 and self.before:
            raise ArithmeticError("before the forward")
        loss = loss_fn(forward, batch)
        if self.left == 0:
            raise ArithmeticError("after the forward")
        return loss


def _failures(world: World, stage: int, threshold: int) -> list[str]:
    """What did not hold, for an exception anywhere in a step of two micro-batches or of one with a shared prefix."""
    wrong = []
    settings = {"zero_optimization": {"stage3_param_persistence_threshold": threshold}}
    data = [part(batch, world.rank, world.size) for batch in batches(4, 8)]
    masks: list[tuple[Mask, int]] = [(Depth((0.5, 0.5)), 1), (Depth((0.5, 0.5)), 2), (Scored("element", 0.5), 2)]
    for mask, micro in masks:
        (engine, base), (other, other_base) = (engine_of(world, stage, deepspeed=settings) for _ in range(2))
        opt = SparseSAM(engine, base, rho=0.5, mask=mask)
        undisturbed = SparseSAM(other, other_base, rho=0.5, mask=mask)
        for step, (call, before) in enumerate((c, b) for c in range(1, 2 * micro + 1) for b in (True, False)):
            what = f"zero{stage}, {mask.__class__.__name__}, {micro} micro-batches, call {call}, before={before}"
            if isinstance(mask, Scored):
                opt.refresh(loss_fn, data[0])
            kept, seen = weights(engine), logits(engine)
            with pytest.raises(ArithmeticError):
                opt.step(Fails(call, before=before), *data[:micro])
            if not same(kept, weights(engine)):
                wrong.append(f"{what}: weights")
            if not torch.equal(seen, logits(engine)):
                wrong.append(f"{what}: what the forward reads")
            opt.zero_grad()
            batch = data[step % 4]
            for o in (opt, undisturbed):
                o.steps = step
                o.step(loss_fn, *(part(batch, i, micro) for i in range(micro)))
            if not same(weights(engine), weights(other)):
                wrong.append(f"{what}: the next step")
    return wrong


def _all_failures(world: World) -> list[str]:
    return [
        w for stage, threshold in ((0, 0), (1, 0), (2, 0), (3, 0), (3, 300)) for w in _failures(world, stage, threshold)
    ]


@pytest.mark.slow
def test_an_exception_anywhere_leaves_the_weights_at_w_and_the_next_step_undisturbed() -> None:
    assert run_ranks(2, _all_failures) == [[], []]


def _by_hand(world: World) -> list[str]:
    wrong = []
    for stage in STAGES:
        (ours, base), (theirs, _), (batched, batched_base) = (engine_of(world, stage, groups=2) for _ in range(3))
        none = SparseSAM(ours, base, rho=0.0)
        for batch in batches(3, 8):
            own = part(batch, world.rank, world.size)
            none.step(loss_fn, own)
            theirs.backward(loss_fn(theirs, own))
            theirs.step()
        if not same(weights(ours), weights(theirs)):
            wrong.append(f"zero{stage}: rho 0")

        by_hand = SparseSAM(ours, ours.optimizer, rho=0.3, norm="dense")
        closure = SparseSAM(theirs, theirs.optimizer, rho=0.3, norm="dense")
        batch_form = SparseSAM(batched, batched_base, rho=0.0)
        for batch in batches(3, 8):
            batch_form.step(loss_fn, part(batch, world.rank, world.size))
        batch_form.rho, batch_form.norm = 0.3, "dense"
        for batch in batches(3, 8, seed=3):
            own = part(batch, world.rank, world.size)

            def backward(engine: Any, own: Any = own) -> torch.Tensor:
                loss = loss_fn(engine, own)
                engine.backward(loss)
                return loss

            before = weights(ours)
            backward(ours)
            with by_hand.perturbed():
                moved = [a - b for a, b in zip(weights(ours), before, strict=True)]
                backward(ours)
            length = torch.stack([(m.double() ** 2).sum() for m in moved]).sum().sqrt()
            if abs(float(length) - 0.3) > 1e-4:
                wrong.append(f"zero{stage}: length {float(length)}")
            if not same(before, weights(ours)):
                wrong.append(f"zero{stage}: by hand, restored")
            by_hand.step()
            by_hand.zero_grad()
            closure.step(lambda engine=theirs, backward=backward: backward(engine))
            batch_form.step(loss_fn, own)
        if not same(weights(ours), weights(theirs)) or not same(weights(ours), weights(batched)):
            wrong.append(f"zero{stage}: three forms")
    return wrong


@pytest.mark.slow
def test_rho_zero_is_the_engine_alone_and_the_three_forms_are_one_step() -> None:
    assert run_ranks(2, _by_hand) == [[], []]


def _misuse(world: World) -> list[str]:
    import deepspeed

    messages = []

    def said(*args: Any, **kwargs: Any) -> None:
        try:
            SparseSAM(*args, **kwargs)
        except (ValueError, RuntimeError) as error:
            messages.append(str(error))
        else:
            messages.append("nothing")

    engine, base = engine_of(world, 1, max_grad_norm=2.0)
    said(engine, torch.optim.SGD(engine.module.parameters(), lr=0.1))
    said(engine, base, max_grad_norm=1.0)
    said(engine, base, max_grad_norm=2.0)
    kept = engine.optimizer.averaged_gradients
    del engine.optimizer.averaged_gradients
    said(engine, base)
    engine.optimizer.averaged_gradients = kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepspeed, "__version_minor__", 18)
        said(engine, base)
    opt = SparseSAM(engine, base)
    try:
        opt.add_param_group({"params": [torch.nn.Parameter(torch.zeros(2))]})
    except ValueError as error:
        messages.append(str(error))
    for more in ({"wall_clock_breakdown": True}, {"managed_gradient_accumulation": False}):
        said(*engine_of(world, 2, deepspeed=more))
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
            "DeepSpeedZeroOptimizer lacks averaged_gradients",
            "at least 0.19.8 and below 0.20.0 is needed",
            "only before deepspeed.initialize",
            "does not support wall_clock_breakdown",
            "does not support managed_gradient_accumulation: false",
        ],
        strict=True,
    ):
        assert part_of_it in message


def _bf16(world: World) -> list[str]:
    wrong = []
    data = [part((x.bfloat16(), y), world.rank, world.size) for x, y in batches(2, 8)]
    masks: list[Mask | None] = [None, Depth((0.5, 0.5)), Scored("element", 0.5)]
    for stage in (1, 2, 3):
        for mask in masks:
            engine, base = engine_of(world, stage, deepspeed={"bf16": {"enabled": True}})
            opt = SparseSAM(engine, base, rho=1.0, mask=mask)
            if isinstance(mask, Scored):
                opt.refresh(loss_fn, data[0])
            before = weights(engine)
            engine.backward(loss_fn(engine, data[0]))
            with opt.perturbed():
                moved = [a.double() - b.double() for a, b in zip(weights(engine), before, strict=True)]
            length = torch.stack([(m**2).sum() for m in moved]).sum().sqrt()
            # Each moved weight is rounded to 8 bits, at random: the length is kept far better than its parts.
            if not same(before, weights(engine)) or abs(float(length) - 1.0) > 0.01:
                wrong.append(f"zero{stage}, {type(mask).__name__}: moved by {float(length)}")
            opt.zero_grad()
            for batch in data:
                opt.step(loss_fn, batch)
            if same(before, weights(engine)) or not all(w.isfinite().all() for w in weights(engine)):
                wrong.append(f"zero{stage}, {type(mask).__name__}: no step")
    return wrong


@pytest.mark.slow
def test_bf16_weights_are_moved_by_rho_and_come_back_bit_for_bit() -> None:
    assert run_ranks(2, _bf16) == [[], []]


def _autocast(world: World) -> list[Any]:
    engine, base = engine_of(world, 2)
    opt, enabled, seen = SparseSAM(engine, base, rho=0.1, mask=Depth((0.5, 0.5))), torch.is_autocast_enabled, []

    def autocast_loss(forward: Any, batch: Any) -> torch.Tensor:
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


def test_sharding_does_not_import_deepspeed() -> None:
    code = "import sys, ssam_scale, ssam_scale.sharding; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
