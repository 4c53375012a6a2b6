"""bf16 where weights are sharded: what autocast would cast is cast before it is gathered, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale import Depth, SparseSAM
from ssam_scale.costs.simulate import fake_world
from ssam_scale.models.ema import EMA
from ssam_scale.sharding import World
from ssam_scale.sharding.low_precision import cast_parameters
from ssam_scale.sharding.place import place
from ssam_scale.train.checkpoint import ModelState, OptimizerState
from tests.support.networks import batches, freeze_batchnorm, part, small_network, tied_network
from tests.support.ranks import run_ranks
from tests.support.training import BATCH, Case, largest_difference, tolerance, train

BF16 = torch.bfloat16


# --- Which weights

KEPT = {
    "vit": {"cls_token", "pos_embed", "norm", "ls1.gamma", "qkv.bias"},
    "resnet": {"bn1", "bn2", "downsample.1"},
    "convnext": {"norm", "gamma", "downsample.0", "stem.1"},
}


@pytest.mark.parametrize("family", KEPT)
def test_weights_of_linear_layers_and_convolutions_are_cast_and_no_others(family: str) -> None:
    model = small_network(family, **({"init_values": 0.1} if family == "vit" else {})).model
    cast = {id(p) for p in cast_parameters(model, BF16)}
    kept = {name for name, p in model.named_parameters() if id(p) not in cast}
    for name, p in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        assert (id(p) in cast) == (isinstance(owner, (nn.Linear, nn.Conv2d)) and name.endswith("weight")), name
    assert all(any(part in name for name in kept) for part in KEPT[family])
    # All that has many elements.
    share = sum(p.numel() for name, p in model.named_parameters() if name in kept) / sum(
        p.numel() for p in model.parameters()
    )
    assert share < 0.07


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_without_bf16_nothing_is_cast(precision: torch.dtype) -> None:
    assert cast_parameters(small_network("vit"), precision) == []


class Standardized(nn.Conv2d):
    """Computes with its weight before it convolves."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def test_what_is_used_otherwise_as_well_is_not_cast() -> None:
    embedding = nn.Embedding(4, 3)
    head = nn.Linear(3, 4)
    head.weight = embedding.weight
    network = nn.Sequential(embedding, head, Standardized(3, 3, 1), nn.Linear(3, 3).bfloat16())
    assert cast_parameters(network, BF16) == []
    tied = tied_network().model
    assert any(p is tied.last.weight for p in cast_parameters(tied, BF16))  # by two linear layers


# --- One of eight ranks, alone


def saved_by_a_forward(module: nn.Module, images: Tensor) -> int:
    """Bytes that a forward under autocast keeps for its backward."""
    saved: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", BF16):
        logits = module(images)
    # By address: the objects that `untyped_storage` returns are gone at once, and their ids are given to the next ones.
    bytes = sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in saved)}.values())
    logits.float().sum().backward()
    return bytes


def test_no_copy_of_what_is_gathered_in_bf16_is_alive_outside_of_its_layer() -> None:
    """Where autocast casts what was gathered in float32, the backward of every layer keeps the cast copy."""
    saved = []
    with fake_world(8) as world:
        for precision in (torch.float32, BF16):
            opt, module = vit_on(world, "fsdp2", precision=precision)
            saved.append(saved_by_a_forward(module, batches(1, 4)[0][0]))
            with opt.perturbed():
                for group in opt.sharding._param_groups():
                    assert group.is_sharded
                    outputs = [output for one in group.fsdp_params for output in one.all_gather_outputs]
                    assert all(output.untyped_storage().size() == 0 for output in outputs)
                    assert {output.dtype for output in outputs} == {torch.float32, precision}
            del opt, module, group, outputs
        layers = [m for m in small_network("vit").model.blocks.modules() if isinstance(m, nn.Linear)]
    copies = sum(BF16.itemsize * layer.weight.numel() for layer in layers)
    assert saved[0] - saved[1] == pytest.approx(copies, rel=0.01)


# --- On two ranks

CASES = [
    Case("vit", "moving cut", precision=BF16),
    Case("vit", "element", precision=BF16, optimizer="adamw"),
    Case("resnet", "tensor", precision=BF16, accumulation=2, norm="calibrated"),
]
# Of the oracle, which is not given the batch in two halves: autocast itself is as far from it, with the same bits.
FAR = 2.0**-4


def equal(world: World, backend: Any, cases: list[Case], **options: Any) -> list[Any]:
    """Each case trained under autocast alone, and with weights gathered in bf16."""
    return list(
        zip(
            train(world, backend, cases, **options),
            train(world, backend, cases, precision=BF16, **options),
            strict=True,
        )
    )


def vit_on(world: World, backend: Any, precision: torch.dtype = BF16, **options: Any) -> tuple[SparseSAM, nn.Module]:
    model = freeze_batchnorm(small_network("vit"))
    module, base = place(
        model,
        [stage.block for stage in model.stages],
        backend,
        world,
        lambda: torch.optim.AdamW(model.parameters(), lr=1e-2),
        batch_size=BATCH // world.size,
        precision=precision,
    )
    return SparseSAM(module, base, **{"rho": 0.1, "mask": Depth((0.5, 0.5))} | options), module


def seen_by_forwards(world: World, backend: Any) -> dict[str, Any]:
    """Of the last norm and of the layer behind it: the weights in the ascent's and in the descent's forward."""
    opt, _ = vit_on(world, backend, rho=0.02)
    seen: dict[str, list[Tensor]] = {"norm": [], "head": []}
    for name, each in seen.items():
        opt.sharding.network.model.get_submodule(name).register_forward_pre_hook(
            lambda layer, _, each=each: each.append(layer.weight.detach().clone())
        )
    own = part(batches(1, BATCH)[0], world.rank, world.size)
    opt.step(CASES[0].loss_fn, own)
    return seen


def gone_on(world: World, backend: Any) -> list[Any]:
    """Two steps after two others, and after what these left in a checkpoint; and what averages and forwards are."""
    results: list[Any] = []
    steps = [part(batch, world.rank, world.size) for batch in batches(4, BATCH)]
    first, module = vit_on(world, backend)
    network = first.sharding.network.model
    average = EMA(network, 0.5, first.sharding)
    for batch in steps[:2]:
        first.step(CASES[0].loss_fn, batch)
        average.update()
    states = [ModelState(network, first.sharding), OptimizerState(network, first)]
    saved: list[Any] = [copy.deepcopy([state.state_dict() for state in states])]
    dist.broadcast_object_list(saved, src=0)  # the first rank has the whole of it
    with torch.no_grad(), torch.autocast("cpu", BF16):
        own = module(steps[0][0])
        with average.swapped_in():
            averaged = module(steps[0][0])
    weights = average.state_dict()
    second, _ = vit_on(world, backend)
    second.sparse.load_state_dict(first.sparse.state_dict())
    network = second.sharding.network.model
    for state, what in zip(
        [ModelState(network, second.sharding), OptimizerState(network, second)], *saved, strict=True
    ):
        state.load_state_dict(what)
    for opt in (first, second):
        for batch in steps[2:]:
            opt.step(CASES[0].loss_fn, batch)
        named = opt.parameters.by_name
        shards = opt.sharding.shards(list(named.values()))
        assert {shard.weight.dtype for shard in shards} == {torch.float32}
        results.append(
            {n: opt.sharding.gather(p, s.weight).clone() for (n, p), s in zip(named.items(), shards, strict=True)}
        )
    return [*results, own, averaged, weights]


# Nothing is small enough to stay gathered.
NOTHING_STAYS = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}}


def everything(world: World) -> dict[str, Any]:
    return {
        "fsdp2": equal(world, "fsdp2", CASES),
        "hsdp": equal(world, "fsdp2", CASES[:1], replicas=2),
        "zero3": equal(world, "zero3", CASES, deepspeed=NOTHING_STAYS),
        "seen": seen_by_forwards(world, "fsdp2"),
        "gone on": gone_on(world, "fsdp2"),
    }


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return run_ranks(2, everything)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["fsdp2", "hsdp", "zero3"])
def test_the_weights_are_those_of_autocast_bit_for_bit(pair: Any, backend: str) -> None:
    """A cast is the same before a gather and behind it, and gradients are float32 before they are added."""
    for case, (autocast, cast) in zip(CASES, pair[0][backend], strict=False):
        assert torch.equal(autocast["losses"], cast["losses"]), case
        for what in ("weights", "state"):
            assert autocast[what].keys() == cast[what].keys()
            assert all(torch.equal(t, cast[what][name]) for name, t in autocast[what].items()), case
        difference = largest_difference(case, cast)
        print(f"{backend}, {case}: {difference:.1e} from the oracle")
        assert difference <= max(tolerance(case), FAR)


@pytest.mark.slow
def test_a_norm_is_computed_with_the_float32_that_it_was_perturbed_to(pair: Any) -> None:
    """In bf16 all of it would be 1 in both passes."""
    for rank in pair:
        (norm, moved), (head, moved_head) = rank["seen"]["norm"], rank["seen"]["head"]
        assert norm.dtype == torch.float32
        assert head.dtype == BF16
        assert torch.equal(norm, torch.ones_like(norm))
        assert int((moved != 1.0).sum()) > 0
        assert float((moved - 1.0).abs().max()) < 2.0**-8
        assert not torch.equal(head, moved_head)


@pytest.mark.slow
def test_checkpoints_and_averages_are_float32_and_go_on_bit_for_bit(pair: Any) -> None:
    went_on, resumed, own, averaged, weights = pair[0]["gone on"]
    assert all(torch.equal(t, resumed[name]) for name, t in went_on.items())
    assert {t.dtype for t in weights.values()} == {torch.float32}
    assert not torch.equal(own, averaged)
