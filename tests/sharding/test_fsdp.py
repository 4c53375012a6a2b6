"""FSDP2 as its users set it up: copies of the weights (HSDP), precisions, loss scaling, odd parameters, its traps.

Starting processes costs more than what they do, so each number of ranks starts once and runs everything it is for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from ssam_scale import Depth, Scored, SparseSAM
from ssam_scale.perturbation.reference import length_of, reference_step
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place, sharding_of
from tests.support.masks import whole_mask
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks
from tests.support.training import (
    BATCH,
    BF16_TOLERANCE,
    STEPS,
    TOLERANCE,
    Case,
    largest_difference,
    tolerance,
    train,
)

pytestmark = pytest.mark.slow

ELEMENT, MOVING_CUT = Case("vit", "element"), Case("vit", "moving cut")
COPIES = [
    ELEMENT,
    Case("resnet", "tensor", optimizer="adamw"),
    Case("vit", "moving cut", norm="calibrated", accumulation=2),
    Case("vit", "moving cut", precision=torch.bfloat16),
]


def sharded(world: World, case: Case, **options: Any) -> SparseSAM:
    """A case's optimizer on a model given to `fully_shard` by hand, every block and the root with these options."""
    model = case.make_model()
    mesh = dist.init_device_mesh("cpu", (world.size,))
    for module in (*(stage.block for stage in model.stages), model):
        fully_shard(module, mesh=mesh, **options)
    return case.make_sam(model, case.make_optimizer(model))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def whole(opt: SparseSAM, tensors: list[Tensor] | None = None) -> dict[str, Tensor]:
    """The weights, or what is spread like them, by name."""
    named, sharding = opt.parameters.by_name, opt.sharding
    if tensors is None:
        tensors = [shard.weight for shard in sharding.shards(list(named.values()))]
    return {n: sharding.gather(p, t).clone() for (n, p), t in zip(named.items(), tensors, strict=True)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def five_steps(world: World, case: Case, opt: SparseSAM, *, slices: bool = True) -> dict[str, Any]:
    """What `train` returns, of an optimizer that there is. Without `slices` every rank is given the whole batch."""
    index, of = (world.rank, world.size) if slices else (0, 1)
    if isinstance(opt.mask, Scored):
        opt.refresh(case.loss_fn, part(batches(1, BATCH, seed=7)[0], world.rank, world.size))
    losses, masks = [], []
    for batch in batches(STEPS, BATCH):
        masks.append(whole_mask(opt))
        losses.append(world.sum(opt.step(case.loss_fn, part(batch, index, of))) / world.size)
    state = gathered(opt.sharding.named_optimizer_state(opt.sharding.network.model, opt.base_optimizer))
    entries = {f"{n}|{entry}": v for n, own in state.get("state", {}).items() for entry, v in own.items()}
    return {
        "weights": whole(opt),
        "state": {name: v for name, v in entries.items() if v.ndim},  # on the first rank, and without the step count
        "masks": masks,
        "losses": torch.stack(losses),
    }


# --- HSDP and uneven shards, on four ranks


def hsdp(world: World) -> dict[str, Any]:
    layer, hybrid, plain = nn.Linear(2, 2), small_network("vit"), small_network("vit")
    with pytest.raises(ValueError, match="4 processes cannot hold 3 replicas; use a multiple of 3 processes"):
        place(layer, [], "fsdp2", world, lambda: sgd(layer), replicas=3)
    with pytest.raises(ValueError, match="2 replicas with backend ddp"):
        place(layer, [], "ddp", world, lambda: sgd(layer), replicas=2)

    sharding = sharding_of(place(hybrid, [], "fsdp2", world, lambda: sgd(hybrid), replicas=2)[0])
    assert (sharding.shard_group.size, sharding.shard_group.rank) == (2, world.rank % 2)
    assert sharding.data_parallel_group.all_gather_object(world.rank) == [0, 1, 2, 3]
    assert sharding.shard_group.all_reduce(torch.tensor(world.rank)).item() == {0: 1, 1: 5}[world.rank // 2]
    flat = sharding_of(place(plain, [], "fsdp2", world, lambda: sgd(plain))[0])
    sizes = [shard.weight.numel() for shard in flat.shards(list(flat.network.parameters()))]
    return {
        "sizes": sizes,
        "2 x 2": train(world, "fsdp2", COPIES, replicas=2),
        "4 x 1": train(world, "fsdp2", [MOVING_CUT], replicas=4),
        "flat": train(world, "fsdp2", [ELEMENT]),
        # Kept gathered by pairs of ranks between forward and backward.
        "by pairs": five_steps(world, ELEMENT, sharded(world, ELEMENT, reshard_after_forward=2)),
        "overflow": overflow(world, "fsdp2", replicas=2),
    }


@pytest.fixture(scope="module")
def four() -> Iterator[list[dict[str, Any]]]:
    return run_ranks(4, hsdp)


def test_two_copies_on_two_ranks_each_equal_the_reference(four: Any) -> None:
    for index, case in enumerate(COPIES):
        results = [rank["2 x 2"][index] for rank in four]
        difference = largest_difference(case, results[0])
        print(f"2 × 2, {case}: {difference:.1e}")
        assert difference <= tolerance(case), f"{case} differs by {difference:.1e}"
        for other in results[1:]:
            assert same(other["weights"], results[0]["weights"])
            assert all(same(a, b) for a, b in zip(other["masks"], results[0]["masks"], strict=True))
    assert largest_difference(MOVING_CUT, four[0]["4 x 1"][0]) <= TOLERANCE


def test_element_masks_are_those_of_one_process_whatever_the_shards(four: Any) -> None:
    # Of 4 ranks some have nothing of a tensor with fewer rows, and less than others of one with 10 rows.
    sizes = list(zip(*(rank["sizes"] for rank in four), strict=True))
    assert any(0 in of_ranks for of_ranks in sizes)
    assert any(0 < min(of_ranks) < max(of_ranks) for of_ranks in sizes)
    expected = alone(train, "single", [ELEMENT])[0]["masks"][0]
    assert same(expected, four[0]["flat"][0]["masks"][0])
    assert same(expected, four[0]["2 x 2"][COPIES.index(ELEMENT)]["masks"][0])
    assert largest_difference(ELEMENT, four[0]["flat"][0]) <= TOLERANCE


def test_weights_kept_gathered_by_some_of_the_ranks_are_not_computed_with_again(four: Any) -> None:
    assert largest_difference(ELEMENT, four[0]["by pairs"]) <= TOLERANCE


# --- Precisions


class Cast(Case):
    """A case of low precision whose model is cast by FSDP2's policy."""

    def loss_fn(self, forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(forward(batch[0]).float(), batch[1])


class CastByHand(Case):
    """The same for one process: weights and images are cast on their way into the model, so gradients on theirs out."""

    def loss_fn(self, forward: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        cast = {name: p.to(self.precision) for name, p in forward.named_parameters()}
        logits = torch.func.functional_call(forward, cast, (batch[0].to(self.precision),))
        return F.cross_entropy(logits.float(), batch[1])


def by_hand(case: Case) -> CastByHand:
    return CastByHand(**{field.name: getattr(case, field.name) for field in fields(case)})


CASTS = [
    (Cast("vit", "moving cut", precision=torch.bfloat16), torch.float32),
    (Cast("vit", "moving cut", precision=torch.bfloat16), torch.bfloat16),
    (Cast("vit", "element", precision=torch.bfloat16, optimizer="adamw"), torch.float32),
    (Cast("vit", "fixed cut", precision=torch.float16), torch.float32),
]


def policy(case: Case, reduce: torch.dtype) -> dict[str, Any]:
    return {"mp_policy": MixedPrecisionPolicy(param_dtype=case.precision, reduce_dtype=reduce)}


def policies(world: World) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every case on slices of the batches and on the whole ones."""
    return [
        (
            five_steps(world, case, sharded(world, case, **policy(case, reduce))),
            five_steps(world, case, sharded(world, case, **policy(case, reduce)), slices=False),
        )
        for case, reduce in CASTS
    ]


def perturbed_in_fp32(world: World) -> None:
    """Under a policy of bf16 the weights are moved and come back in fp32."""
    case = CASTS[0][0]
    opt = sharded(world, case, **policy(case, torch.bfloat16))
    case.loss_fn(opt.sharding.network, part(batches(1, BATCH)[0], world.rank, world.size)).backward()
    before, gradient = whole(opt), whole(opt, opt.sharding.gradients(list(opt.parameters.by_name.values())))
    chosen = {name: gradient[name] for name in opt.plan.weights}
    radius = opt.radii[0]
    with opt.perturbed():
        inside = whole(opt)
    for name, g in chosen.items():
        expected = before[name] + g * (radius / length_of(chosen)).float()
        torch.testing.assert_close(inside[name], expected, rtol=0, atol=2e-7)  # 24 bits of w, not 8
    assert same(before, whole(opt))


def mask_from_a_state(world: World) -> bool:
    """A mask that was loaded leaves whole blocks without a gradient in the very first forward."""
    case = Cast("vit", "tensor", precision=torch.bfloat16)
    first, second = (sharded(world, case, **policy(case, torch.float32)) for _ in range(2))
    batch = part(batches(1, BATCH)[0], world.rank, world.size)
    case.loss_fn(first.sharding.network, batch).backward()
    for opt in (first, second):
        last_block = {name: n for name, n in opt.parameters.layout.numels.items() if name.startswith("blocks.3.")}
        assert isinstance(opt.mask, Scored)
        opt.mask.restore(opt.parameters.layout, dict.fromkeys(last_block), list(last_block.values()), 0)
        opt.step(case.loss_fn, batch)
    return same(whole(first), whole(second))


def wholly_in_bf16(world: World, backend: Any) -> None:
    """A model without fp32 weights: ε is still computed in fp32, and added with one rounding."""
    model = freeze_batchnorm(small_network("vit")).bfloat16()
    module, base = place(model, [stage.block for stage in model.stages], backend, world, lambda: sgd(model))
    opt = SparseSAM(module, base, rho=1.0)
    images, labels = part(batches(1, BATCH)[0], world.rank, world.size)
    batch = (images.bfloat16(), labels)
    loss_fn(module, batch).backward()
    before, gradient = whole(opt), whole(opt, opt.sharding.gradients(list(opt.parameters.by_name.values())))
    assert {g.dtype for g in gradient.values()} == {torch.bfloat16}
    scale = 1.0 / (length_of(gradient) + 1e-7)
    with opt.perturbed():
        inside = whole(opt)
        loss_fn(module, batch).backward()
    assert same(before, whole(opt))
    for name, w in before.items():
        expected = (w.float() + gradient[name].float() * scale.float()).bfloat16()
        # The length is summed in another order, which may turn a tie of the rounding: one unit in the last place.
        assert int((inside[name].view(torch.int16).int() - expected.view(torch.int16).int()).abs().max()) <= 1
    moved = length_of({name: inside[name].double() - w.double() for name, w in before.items()})
    # Rounding to 8 bits moves a number by at most 2^-8 of it.
    assert abs(float(moved) - 1.0) <= 2.0**-8 * float(length_of(inside))
    opt.step()
    opt.zero_grad()
    opt.step(loss_fn, batch)
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in whole(opt).values())


def test_under_a_mixed_precision_policy_ranks_equal_one_process_that_casts_by_hand(pair: Any) -> None:
    for index, (case, reduce) in enumerate(CASTS):
        slices, same_batch = (largest_difference(by_hand(case), result) for result in pair[0]["policies"][index])
        print(f"{case}, reduced in {reduce}: {slices:.1e} on slices, {same_batch:.1e} on the same batch")
        bits = {torch.bfloat16: 8, torch.float16: 11}[case.precision]
        # Half a batch's gradient is rounded to so many bits and then added, a whole one's added and then rounded. The
        # cast of w + ε, whose ε is small beside w, passes on the difference with few bits left of it.
        assert slices <= 2.0 ** (3 - bits)
        # The arithmetic is the same, and mostly nothing differs. But ‖g‖ is summed in another order, and a kernel may
        # be; that may turn a tie of a cast, and five steps make of one as much as of the many above.
        assert same_batch <= 2.0 ** (3 - bits)
        for ours, theirs in zip(*(rank["policies"][index] for rank in pair), strict=True):
            assert same(ours["weights"], theirs["weights"])


def test_the_first_step_after_loading_a_mask_is_like_any_other(pair: Any) -> None:
    assert [rank["mask from a state"] for rank in pair] == [True, True]


def test_one_process_perturbs_a_model_wholly_in_bf16_in_fp32() -> None:
    alone(wholly_in_bf16, "single")


# --- Loss scaling


class Overflow:
    """The mean loss, times infinity in one of its calls on the ranks where it is armed."""

    def __init__(self, call: int, *, armed: bool) -> None:
        self.calls, self.call, self.armed = 0, call, armed

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        self.calls += 1
        return loss_fn(forward, batch) * (math.inf if self.armed and self.calls == self.call else 1.0)


def vit_on(world: World, backend: Any, replicas: int = 1, **options: Any) -> tuple[SparseSAM, nn.Module]:
    model = freeze_batchnorm(small_network("vit"))
    blocks = [stage.block for stage in model.stages]
    module, base = place(model, blocks, backend, world, lambda: sgd(model), replicas=replicas)
    return SparseSAM(module, base, **{"rho": 0.3, "max_grad_norm": 0.5} | options), module


def scaled_step(opt: SparseSAM, module: nn.Module, scaler: Any, loss: Any, batch: Any, spoil: Any = None) -> None:
    """One step by hand, as PyTorch's own examples of gradient scaling go; `spoil` sees the scaled descent gradient."""
    scaler.scale(loss(module, batch)).backward()
    with opt.perturbed():
        scaler.scale(loss(module, batch)).backward()
    if spoil is not None:
        spoil()
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


def overflow(world: World, backend: Any, replicas: int = 1) -> dict[str, Any]:
    """A gradient that overflows on rank 1 alone, in either pass and either form of the step."""
    first, second = (part(batch, world.rank, world.size) for batch in batches(2, BATCH))
    alone_bad = world.rank == 1
    results: dict[str, Any] = {}
    for form in ("batches", "by hand", "one shard"):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        opt, module = vit_on(world, backend, replicas, **({"scaler": scaler} if form == "batches" else {}))
        before = whole(opt)

        def spoil(opt: SparseSAM = opt) -> None:
            if alone_bad:
                opt.sharding.gradients(list(opt.parameters.by_name.values()))[-1].fill_(math.inf)

        if form == "batches":
            opt.step(Overflow(2, armed=alone_bad), first)
        elif form == "by hand":
            scaled_step(opt, module, scaler, Overflow(2, armed=alone_bad), first)
        elif backend == "fsdp2" and replicas == 1:  # elsewhere a gradient that was reduced is not one rank's own
            scaled_step(opt, module, scaler, loss_fn, first, spoil)
        else:
            continue
        skipped = same(before, whole(opt)) and not opt.state and opt.skipped == 0
        scale = scaler.get_scale()
        plain, _ = vit_on(world, backend, replicas)
        if form == "batches":
            opt.step(loss_fn, second)
        else:
            scaled_step(opt, module, scaler, loss_fn, second)
        plain.step(loss_fn, second)
        results[form] = {"skipped": skipped, "scale": scale, "weights": whole(opt), "plain": whole(plain)}

    for norm in ("masked", "dense", "calibrated"):
        opt, _ = vit_on(world, backend, replicas, norm=norm)
        base, _ = vit_on(world, backend, replicas, rho=0.0)
        opt.step(Overflow(1, armed=alone_bad), first)
        base.step(loss_fn, first)
        results[f"ascent, {norm}"] = {"skipped": opt.skipped, "weights": whole(opt), "plain": whole(base)}
    return results


def fp16_autocast(world: World) -> dict[str, Any]:
    case = Case("vit", "moving cut", precision=torch.float16)
    model = case.make_model()
    blocks = [stage.block for stage in model.stages]
    module, base = place(model, blocks, "fsdp2", world, lambda: case.make_optimizer(model))
    opt = case.make_sam(module, base)
    opt.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return five_steps(world, case, opt)


def check_overflow(ranks: list[dict[str, Any]]) -> None:
    for form, mine in ranks[0].items():
        for other in ranks:
            assert same(other[form]["weights"], mine["weights"])
            assert other[form]["skipped"] == 1, form  # True, or the count
        if form.startswith("ascent"):
            # The base optimizer's step, from the gradient of the same forward: bit for bit.
            assert same(mine["weights"], mine["plain"]), form
        else:
            assert {rank[form]["scale"] for rank in ranks} == {512.0}
            # Powers of two scale exactly, but not the 1e-7 that is added to a norm.
            for name, weight in mine["weights"].items():
                torch.testing.assert_close(weight, mine["plain"][name], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_what_overflows_on_one_rank_is_skipped_on_all(pair: Any, backend: str) -> None:
    check_overflow([rank["overflow"][backend] for rank in pair])


def test_what_overflows_on_one_rank_is_skipped_by_all_copies(four: Any) -> None:
    check_overflow([rank["overflow"] for rank in four])


def test_fp16_autocast_with_a_scaler_stays_near_the_reference(pair: Any) -> None:
    case = Case("vit", "moving cut", precision=torch.float16)
    difference = largest_difference(case, pair[0]["fp16 autocast"])
    print(f"fp16 autocast: {difference:.1e}")
    assert difference <= BF16_TOLERANCE / 8  # 11 bits instead of 8


# --- Odd parameters


class Odd(nn.Module):
    """A weight that is used twice, a frozen layer, and a branch that only some passes use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.branch = nn.Linear(6, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.branches = True

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.inner(self.frozen(self.embed(tokens)).tanh())
        return self.head(hidden + self.branch(hidden).tanh() if self.branches else hidden)

    def sgd(self) -> torch.optim.Optimizer:
        groups = [
            {"params": [self.embed.weight], "rho": 0.2},
            {"params": list(self.branch.parameters()), "rho": 0.1},
            {"params": [*self.inner.parameters(), *self.frozen.parameters()], "rho": 0.0},
        ]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)


# Whether the two passes use the branch, by step. DistributedDataParallel counts what was used in an ascent as used in
# the descent, and refuses one without it.
USED = {
    "ddp": [(True, True), (False, True), (False, False), (True, True)],
    "fsdp2": [(True, True), (True, False), (False, True), (False, False)],
}
TOKENS = torch.randint(10, (4, 24), generator=torch.Generator().manual_seed(5))


class Successor:
    """Learn the next number, with or without the branch."""

    def __init__(self, model: Odd, backend: str) -> None:
        self.model, self.uses = model, iter([use for step in USED[backend] for use in step])

    def __call__(self, forward: Any, tokens: Tensor) -> Tensor:
        self.model.branches = next(self.uses)
        return F.cross_entropy(forward(tokens), (tokens + 1) % 10)


def odd_parameters(world: World, backend: str) -> dict[str, Any]:
    model = Odd()
    if backend == "ddp":
        module: nn.Module = DistributedDataParallel(model, find_unused_parameters=True)
    else:
        module = fully_shard(model, mesh=dist.init_device_mesh("cpu", (world.size,)))
    opt = SparseSAM(module, model.sgd(), rho=9.0)
    masks, loss = [], Successor(model, backend)
    for tokens in TOKENS:
        masks.append(whole_mask(opt))
        opt.step(loss, part((tokens, tokens), world.rank, world.size)[0])
    return {"masks": masks, "weights": whole(opt)}


@pytest.mark.parametrize("backend", ["ddp", "fsdp2"])
def test_tied_frozen_unused_and_unperturbed_parameters(pair: Any, backend: str) -> None:
    model = Odd()
    optimizer, loss = model.sgd(), Successor(model, backend)
    rho = {"embed.weight": 0.2, "branch.weight": 0.1, "branch.bias": 0.1, "inner.weight": 0.0, "inner.bias": 0.0}
    result = pair[0]["odd parameters"][backend]
    assert result["masks"][0].keys() == {name for name, radius in rho.items() if radius}
    for tokens, mask in zip(TOKENS, result["masks"], strict=True):
        reference_step(model, optimizer, loss, tokens, rho=rho, mask=mask, norm="masked")
    for name, weight in result["weights"].items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=0, atol=TOLERANCE)
    assert same(result["weights"], pair[1]["odd parameters"][backend]["weights"])


# --- Traps: gathered weights that outlive a change of the shards


def keeps_gathered(world: World, trap: str) -> dict[str, Any]:
    opt = sharded(world, ELEMENT, **({"reshard_after_forward": False} if trap == "after forward" else {}))
    root = opt.sharding.network
    assert isinstance(root, FSDPModule)
    if trap == "after backward":
        root.set_reshard_after_backward(False)
    if trap == "evaluation":
        evaluated = torch.zeros(2, 3, 32, 32)
        step = opt.step

        def evaluate_and_step(*args: Any) -> Any:
            with torch.no_grad():
                root(evaluated)
            return step(*args)

        opt.step = evaluate_and_step  # type: ignore[method-assign]
    return five_steps(world, ELEMENT, opt)


TRAPS = ["evaluation", "after forward", "after backward"]


@pytest.mark.parametrize("trap", TRAPS)
def test_gathered_weights_are_not_computed_with_after_the_shards_have_changed(pair: Any, trap: str) -> None:
    difference = largest_difference(ELEMENT, pair[0]["traps"][trap])
    print(f"{trap}: {difference:.1e}")
    assert difference <= TOLERANCE


class Failing:
    """Raises in one micro-batch of one pass, in a block's forward or backward or in the loss."""

    def __init__(self, block: nn.Module, call: int, where: str) -> None:
        self.calls, self.call, self.where = 0, call, where
        self.hooks = [
            block.register_forward_pre_hook(lambda *_: self.check("forward")),
            block.register_full_backward_pre_hook(lambda *_: self.check("backward")),
        ]

    def check(self, where: str) -> None:
        if (self.calls, where) == (self.call, self.where):
            raise ArithmeticError

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        self.calls += 1
        self.check("loss")
        return loss_fn(forward, batch)


def after_a_failure(world: World) -> list[bool]:
    """Every rank raises, in the first or second micro-batch of the ascent (1, 2) or the descent (3, 4)."""
    first, second = (part(batch, world.rank, world.size) for batch in batches(2, BATCH))
    exact = []
    for call, where in [(2, "loss"), (2, "forward"), (2, "backward"), (3, "forward"), (4, "loss"), (4, "backward")]:
        opt, module = vit_on(world, "fsdp2", mask=Depth((0.5, 0.5)))
        other, other_module = vit_on(world, "fsdp2", mask=Depth((0.5, 0.5)))
        before = whole(opt)
        failing = Failing(opt.sharding.network.stages[-1].block, call, where)
        with pytest.raises(ArithmeticError):
            opt.step(failing, *(part(first, i, 2) for i in range(2)))
        for hook in failing.hooks:
            hook.remove()
        assert same(before, whole(opt))
        with torch.no_grad():
            assert torch.equal(module(first[0]), other_module(first[0]))
        for each in (opt, other):
            each.step(loss_fn, *(part(second, i, 2) for i in range(2)))
        exact.append(same(whole(opt), whole(other)))
    return exact


def test_after_a_step_that_raised_everything_is_as_if_it_had_not_been(pair: Any) -> None:
    assert all(all(rank["after a failure"]) for rank in pair)


# --- Two ranks


def everything(world: World) -> dict[str, Any]:
    perturbed_in_fp32(world)
    for backend in ("ddp", "fsdp2"):
        wholly_in_bf16(world, backend)
    return {
        "policies": policies(world),
        "mask from a state": mask_from_a_state(world),
        "overflow": {backend: overflow(world, backend) for backend in ("ddp", "fsdp2")},
        "fp16 autocast": fp16_autocast(world),
        "odd parameters": {backend: odd_parameters(world, backend) for backend in ("ddp", "fsdp2")},
        "traps": {trap: keeps_gathered(world, trap) for trap in TRAPS},
        "after a failure": after_a_failure(world),
    }


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return run_ranks(2, everything)
