"""What an ascent sends to other processes: less, at other times, and with the same result.

Starting processes costs more than what they do, so each number of ranks starts once and runs everything it is for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from ssam_scale import Fresh, SparseSAM
from ssam_scale.perturbation import Savings
from ssam_scale.perturbation.reference import length_of, masked_by, reference_gradient, reference_step
from ssam_scale.sharding import World, bucketed_all_reduce
from ssam_scale.sharding.place import place
from tests.support.masks import whole_mask
from tests.support.networks import batches, part
from tests.support.ranks import run_ranks
from tests.support.training import BATCH, RHO, STEPS, TOLERANCE, Case, check, largest_difference, train

pytestmark = pytest.mark.slow

UNPACKED, GATHERED = Savings(pack=False), Savings(keep_gathered=True)
APART = Fresh(scope="shard_group")


class Sent(TorchDispatchMode):
    """Bytes of the whole tensors that processes reduce, gather or broadcast together while it is entered, by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("c10d::"):
            kind = next((k for k in ("gather", "scatter", "reduce", "broadcast") if k in name), name)
            tensors = args[1] if kind == "scatter" else args[0]
            for t in [tensors] if isinstance(tensors, Tensor) else tensors:
                self.bytes[kind] += t.numel() * t.element_size()
        return func(*args, **(kwargs or {}))


def traffic(world: World, case: Case, backend: Any) -> list[dict[str, int]]:
    """Bytes sent in the ascent and the perturbing of a second step, in the descent's forward, and in the rest."""
    model = case.make_model()
    blocks = [stage.block for stage in model.stages]
    placed, base = place(
        model,
        blocks,
        backend,
        world,
        lambda: case.make_optimizer(model),
        batch_size=BATCH // world.size,
        max_grad_norm=case.clip,
    )
    opt = case.make_sam(placed, base)
    own = part(batches(1, BATCH)[0], world.rank, world.size)
    if hasattr(opt.mask, "selected"):
        opt.refresh(case.loss_fn, own)
    opt.step(case.loss_fn, own)
    marks: list[Counter[str]] = []
    mode = Sent()

    def loss_fn(forward: Any, batch: Any) -> Tensor:
        marks.append(mode.bytes.copy())
        loss = case.loss_fn(forward, batch)
        marks.append(mode.bytes.copy())
        return loss

    with mode:
        opt.step(loss_fn, own)
    return [dict(each) for each in (marks[2], marks[3] - marks[2], mode.bytes - marks[3])]


def overlap(world: World) -> tuple[int, int]:
    """Bytes that an ascent under DDP has sent when its backward comes to the first block, and in all."""
    case = Case("vit", "element")
    model = case.make_model()
    placed, base = place(model, [], "ddp", world, lambda: case.make_optimizer(model), batch_size=BATCH // world.size)
    opt = case.make_sam(placed, base)
    own = part(batches(1, BATCH)[0], world.rank, world.size)
    opt.refresh(case.loss_fn, own)
    sent: list[int] = []
    model.stages[0].block.register_full_backward_pre_hook(lambda *_: sent.append(mode.bytes["reduce"]))

    def loss_fn(forward: Any, batch: Any) -> Tensor:
        sent.append(mode.bytes["reduce"])
        return case.loss_fn(forward, batch)

    with Sent() as mode:
        opt.step(loss_fn, own)
    return sent[1], sent[2]


class TwoHeads(nn.Module):
    """A network of which a process may use one head or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.one, self.other = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        hidden = self.body(x).tanh()
        return self.one(hidden) + self.other(hidden) if both else self.one(hidden)


def of_two_heads(forward: Any, batch: Any) -> Tensor:
    x, y, both = batch
    return F.cross_entropy(forward(x, both), y)


def some_unused(world: World) -> float:
    """How far from the reference two processes end of which only the first uses the second head."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8, 8, generator=generator), torch.randint(3, (8,), generator=generator)
    every = [(x[:4], y[:4], True), (x[4:], y[4:], False)]
    model, slow = TwoHeads(), TwoHeads()
    opt = SparseSAM(
        DistributedDataParallel(model, find_unused_parameters=True), torch.optim.SGD(model.parameters(), 0.5), rho=0.5
    )
    sgd = torch.optim.SGD(slow.parameters(), 0.5)
    mask = {name: torch.ones_like(p) for name, p in slow.named_parameters()}
    for _ in range(3):
        opt.step(of_two_heads, every[world.rank])
        reference_step(
            slow,
            sgd,
            lambda forward, all_of_it: sum(of_two_heads(forward, one) for one in all_of_it) / 2,
            every,
            rho=0.5,
            mask=mask,
            norm="masked",
        )
    apart = [(a - b).detach().abs().max() for a, b in zip(model.parameters(), slow.parameters(), strict=True)]
    return float(torch.stack(apart).max())


def published(world: World, case: Case) -> float:
    """Bytes that one of two processes of ZeRO 1 sends to perturb by hand: half of what is gathered, all of what is
    broadcast. The engine has reduced then, and left each process its part."""
    model = case.make_model()
    placed, base = place(
        model, [], "zero1", world, lambda: case.make_optimizer(model), batch_size=1, max_grad_norm=case.clip
    )
    opt = case.make_sam(placed, base)
    own = part(batches(1, BATCH)[0], world.rank, world.size)
    if hasattr(opt.mask, "selected"):
        opt.refresh(case.loss_fn, own)
    opt.sharding.backward(case.loss_fn(placed, own))
    with Sent() as mode, opt.perturbed():
        pass
    return 0.5 * mode.bytes["gather"] + mode.bytes["broadcast"]


def whole_inside_and_back(world: World, case: Case) -> tuple[bool, bool]:
    """Whether perturbed weights are the same on every process of ZeRO 1, and bit for bit w again afterwards."""
    model = case.make_model()
    placed, base = place(
        model, [], "zero1", world, lambda: case.make_optimizer(model), batch_size=1, max_grad_norm=case.clip
    )
    opt = case.make_sam(placed, base)
    own = part(batches(1, BATCH)[0], world.rank, world.size)
    opt.refresh(case.loss_fn, own)
    mask = whole_mask(opt)
    opt.sharding.backward(case.loss_fn(placed, own))
    before = {n: p.detach().clone() for n, p in opt.parameters.by_name.items()}
    with opt.perturbed():
        inside = {n: p.detach().clone() for n, p in opt.parameters.by_name.items()}
        flat = torch.cat([w.reshape(-1) for w in inside.values()])
        same = all(torch.equal(other, flat) for other in opt.sharding.data_parallel_group.all_gather(flat))
        moved = {n: inside[n] != before[n] for n in mask}
        same &= all(bool((moved[n] <= m).all()) for n, m in mask.items()) and any(m.any() for m in moved.values())
        opt.sharding.backward(case.loss_fn(placed, own))
    return same, all(torch.equal(p.detach(), before[n]) for n, p in opt.parameters.by_name.items())


# --- Two ranks

DDP = [
    Case("vit", "dense"),
    Case("vit", "element", accumulation=2),
    Case("vit", "element", savings=UNPACKED),
    Case("resnet", "row", scaled=True),
    Case("vit", "moving cut", scaled=True),
]
ZERO1 = [Case("vit", "element"), Case("vit", "element", savings=UNPACKED), Case("resnet", "row", accumulation=2)]
FSDP2 = [
    Case("vit", "block", savings=GATHERED),
    Case("vit", "element"),
    Case("vit", "element", savings=UNPACKED),
    Case("vit", "moving cut", savings=GATHERED),
    Case("resnet", "moving cut", savings=Savings(keep_gathered=True, share_prefix=False, elide=False), accumulation=2),
]
WORK = {"ddp": DDP, "zero1": ZERO1, "fsdp2": FSDP2}
TRAFFIC = {
    "ddp": [Case("vit", "dense"), Case("vit", "element"), Case("vit", "element", savings=UNPACKED)],
    "zero1": [Case("vit", "dense"), Case("vit", "element"), Case("vit", "element", savings=UNPACKED)],
    # Without a cut, behind which nothing of the first blocks is gathered twice anyway.
    "fsdp2": [
        Case("vit", "block", savings=Savings(keep_gathered=True, share_prefix=False)),
        Case("vit", "block", savings=Savings(share_prefix=False)),
        Case("vit", "dense"),
        *FSDP2[1:3],
    ],
}


def two_ranks(world: World) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucketed_all_reduce, "_BUCKET_BYTES", 20_000)  # a dozen of them
        return {
            "trained": {backend: train(world, backend, cases) for backend, cases in WORK.items()},
            "traffic": {name: [traffic(world, case, name) for case in cases] for name, cases in TRAFFIC.items()},
            "overlap": overlap(world),
            "unused": some_unused(world),
            "published": [published(world, Case("vit", mask)) for mask in ("dense", "element", "tensor")],
            "back": whole_inside_and_back(world, ZERO1[0]),
        }


@pytest.fixture(scope="module")
def two() -> Iterator[list[dict[str, Any]]]:
    return run_ranks(2, two_ranks)


@pytest.mark.parametrize("backend", WORK)
def test_whatever_is_sent_the_weights_are_those_of_the_reference(two: Any, backend: str) -> None:
    check(WORK[backend], [rank["trained"][backend] for rank in two], backend)


def test_processes_that_use_different_parameters_average_all_of_them(two: Any) -> None:
    assert all(rank["unused"] <= TOLERANCE for rank in two)


def test_perturbed_weights_of_zero_are_the_same_everywhere_and_come_back_bit_for_bit(two: Any) -> None:
    assert [rank["back"] for rank in two] == [(True, True), (True, True)]


@pytest.mark.parametrize("backend", ["ddp", "zero1"])
def test_an_ascent_on_whole_weights_sends_of_an_element_mask_what_is_perturbed(two: Any, backend: str) -> None:
    cases = two[0]["traffic"][backend]
    dense, packed, unpacked = (case[0]["reduce"] for case in cases)
    print(f"{backend}, ascent: dense {dense}, element 50% {packed} and unpacked {unpacked} bytes")
    assert packed <= (0.5 + 0.01) * dense
    assert unpacked > 0.9 * dense
    assert all(case[0].keys() == {"reduce"} for case in cases)  # nobody has to be told of what others perturbed


def test_zero_publishes_what_is_perturbed_by_hand(two: Any) -> None:
    dense, element, tensor = two[0]["published"]
    print(f"zero1 by hand, publish: dense {dense}, element 50% {element}, tensors 30% {tensor} bytes")
    # Of tiny tensors one process has more than the other, and sends more, at most all of what is perturbed.
    assert 0 < element <= (0.5 + 0.1) * dense
    assert 0 < tensor <= 2 * (0.3 + 0.01) * dense


def test_fsdp_scatters_of_an_element_mask_what_is_perturbed_padded_to_the_process_that_has_most(two: Any) -> None:
    dense, packed, unpacked = (case[0]["scatter"] for case in two[0]["traffic"]["fsdp2"][2:])
    print(f"fsdp2, ascent's reduce-scatters: dense {dense}, element 50% {packed} and unpacked {unpacked} bytes")
    assert packed <= (0.5 + 0.1) * dense  # the tensors are tiny, and spread over the processes by rows
    assert unpacked > 0.9 * dense
    assert [case[2]["scatter"] for case in two[0]["traffic"]["fsdp2"][2:]] == [dense] * 3


def test_units_kept_gathered_are_not_gathered_in_the_descents_forward(two: Any) -> None:
    kept, freed, *_ = two[0]["traffic"]["fsdp2"]
    print(f"fsdp2, ascent, descent's forward, rest: kept gathered {kept}, freed {freed}")
    assert kept[1]["gather"] < freed[1]["gather"]
    assert kept[0]["gather"] <= freed[0]["gather"]
    assert kept[2]["gather"] == freed[2]["gather"]


def test_an_ascent_under_ddp_sends_while_its_backward_goes_on(two: Any) -> None:
    before, total = two[0]["overlap"]
    assert 0.5 * total < before < total


# --- Copies of sharded weights, on four ranks

COPIES = [
    Case("vit", "element", direction=APART),
    Case("resnet", "moving cut", savings=GATHERED, direction=APART, accumulation=2),
]


def each_copy_by_itself(case: Case, masks: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """Weights after five steps in which each of two copies ascends by its half of the batch; and how far apart the two
    ε were, as a share of ρ. The descent's gradient is the mean of those of both copies, each at its own w + ε."""
    model = case.make_model().model
    optimizer = case.make_optimizer(model)
    named = dict(model.named_parameters())
    apart = 0.0
    for batch, mask in zip(batches(STEPS, BATCH), masks, strict=True):
        before = {n: p.detach().clone() for n, p in named.items()}
        gradients, epsilons = [], []
        for copy in range(2):
            own = part(batch, copy, 2)
            direction = masked_by(reference_gradient(model, case.loss_fn, own)[1], mask)
            scale = (RHO / (length_of(direction) + 1e-7)).float()
            epsilons.append({n: scale * g for n, g in direction.items()})
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(before[n] + epsilons[-1][n])
            gradients.append(reference_gradient(model, case.loss_fn, own)[1])
            with torch.no_grad():
                for n, p in named.items():
                    p.copy_(before[n])
        apart = max(apart, float(length_of({n: epsilons[0][n] - epsilons[1][n] for n in named}) / RHO))
        for n, p in named.items():
            p.grad = (gradients[0][n] + gradients[1][n]) / 2
        torch.nn.utils.clip_grad_norm_(named.values(), case.clip)
        optimizer.step()
    return {n: p.detach() for n, p in named.items()}, apart


def four_ranks(world: World) -> list[dict[str, Any]]:
    return train(world, "fsdp2", COPIES, replicas=2)


def test_within_a_shard_group_each_copy_ascends_by_its_own_gradient_and_all_descend_together() -> None:
    ranks = run_ranks(4, four_ranks)
    for index, case in enumerate(COPIES):
        expected, apart = each_copy_by_itself(case, ranks[0][index]["masks"])
        assert apart > 0.1  # or there were nothing to see
        for rank in ranks:
            weights = rank[index]["weights"]
            worst = max(float((weights[n] - w).abs().max()) for n, w in expected.items())
            assert worst <= TOLERANCE, f"{case} differs by {worst:.1e}"
        # And it is not what one ascent of all does.
        assert largest_difference(case, ranks[0][index], check_losses=False) > 100 * TOLERANCE
