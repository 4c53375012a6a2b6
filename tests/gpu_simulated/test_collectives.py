"""One of eight pretended processes: FSDP2's collectives, counted, and streams, which wait for what others write."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

from ssam_scale import Depth, SparseSAM
from ssam_scale.masks import Dense, Mask, Named
from ssam_scale.perturbation import Savings
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place
from tests.support.networks import batches, loss_fn, small_network
from tests.support.pretended_gpu.watch import Watch
from tests.support.training import on

pytestmark = pytest.mark.slow

WORLD = "one of eight processes"
RANKS = 8
BLOCKS = 4
UNITS = BLOCKS + 1  # and what is around them
# Everything is gathered anew each time, by modules, with a little of it ahead.
GATHERS_ALL = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 200,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 2000,
    }
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """The first of eight processes, whose collectives return at once."""
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")  # DeepSpeed wants to know
        yield World(0, RANKS, torch.device("cuda", 0))
    dist.destroy_process_group()


def sam_on(world: World, backend: str, mask: Mask, precision: torch.dtype = torch.float32, **options: Any) -> SparseSAM:
    """The optimizer of a small ViT, whose forwards run under autocast to a precision."""
    model = small_network("vit").to(world.device)
    module, base = place(
        model,
        [stage.block for stage in model.stages],
        backend,
        world,
        lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        batch_size=8,
        deepspeed=GATHERS_ALL if backend == "zero3" else None,
        precision=precision,
    )
    return SparseSAM(module, base, rho=0.1, mask=mask, calibrate_every=None, **options)


def collectives(world: World, mask: Mask) -> dict[str, Counter[str]]:
    """By phase of a step under FSDP2, how often each collective is called."""
    watch = Watch()
    opt = sam_on(world, "fsdp2", mask, phases=watch.phases)
    [batch] = [on(world.device, batch) for batch in batches(1, 8)]
    opt.step(loss_fn, batch)
    with watch:
        opt.step(loss_fn, batch)
    assert not watch.host_waits
    return {
        phase: Counter(
            {name.removeprefix("c10d::").strip("_"): n for name, n in ops.items() if name.startswith("c10d::")}
        )
        for phase, ops in watch.launches.items()
    }


def test_dense_sam_gathers_and_reduces_every_unit_in_both_passes(world: World) -> None:
    calls = collectives(world, Dense())
    for which in ("ascent", "descent"):
        assert calls[f"{which} forward"]["allgather_base"] == UNITS
        # The root is still there when its backward begins.
        assert calls[f"{which} backward"]["allgather_base"] == UNITS - 1
        assert calls[f"{which} backward"]["reduce_scatter_base"] == UNITS
    assert calls["perturb"] == Counter({"allreduce": 1})  # of the squared norm


def test_an_ascent_behind_a_cut_gathers_and_reduces_the_suffix_alone(world: World) -> None:
    """Two blocks of four, and what is around them."""
    calls = collectives(world, Depth((0.5, 0.5)))
    assert calls["ascent backward"]["reduce_scatter_base"] == 3
    assert calls["ascent backward"]["allgather_base"] == 2
    # What is around the blocks is used before the prefix and behind the suffix, which are two passes to FSDP.
    assert calls["descent backward"]["reduce_scatter_base"] == UNITS + 1
    assert calls["perturb"] == Counter({"allreduce": 1})


def gathered_ahead(world: World, monkeypatch: pytest.MonkeyPatch, **savings: bool) -> list[bool]:
    """In the descent's backward behind a cut, of each block from the last to the first: whether its gather is under way
    before the backward of what the backward comes to before it has ended."""
    events: list[tuple[str, str]] = []
    phase = "else"

    @contextmanager
    def phases(name: str) -> Iterator[None]:
        nonlocal phase
        before, phase = phase, name
        yield
        phase = before

    gather, end = FSDPParamGroup.unshard, FSDPParamGroup.post_backward

    def noted_gather(group: Any, *args: Any) -> None:
        before = group._all_gather_result
        gather(group, *args)
        if group._all_gather_result is not before and phase == "descent backward":
            events.append(("gathers", group._module_fqn))

    def noted_end(group: Any, *args: Any) -> None:
        if phase == "descent backward" and ("ends", group._module_fqn) not in events:
            events.append(("ends", group._module_fqn))
        end(group, *args)

    opt = sam_on(world, "fsdp2", Depth((0.5, 0.5)), phases=phases, savings=Savings(**savings))
    [batch] = [on(world.device, batch) for batch in batches(1, 8)]
    opt.step(loss_fn, batch)
    with monkeypatch.context() as patch:
        patch.setattr(FSDPParamGroup, "unshard", noted_gather)
        patch.setattr(FSDPParamGroup, "post_backward", noted_end)
        opt.step(loss_fn, batch)
    last_to_first = [f"model.blocks.{index}" for index in reversed(range(BLOCKS))]
    assert [name for what, name in events if what == "gathers"] == last_to_first
    ends_before = [events.index(("ends", name)) for name in last_to_first[:-1]]
    return [
        events.index(("gathers", name)) < ends
        for name, ends in zip(last_to_first, [len(events), *ends_before], strict=True)
    ]


@pytest.mark.parametrize("shared", [True, False], ids=["shared prefix", "each pass its own"])
def test_a_descent_gathers_every_block_ahead_of_its_backward(
    shared: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a shared prefix too, whose forward came before the ascent's backward."""
    assert gathered_ahead(world, monkeypatch, share_prefix=shared, keep_gathered=False) == [True] * BLOCKS


@pytest.mark.parametrize(
    "mask",
    [Named(r"qkv\.weight"), Depth((0.5, 0.5)), Dense()],
    ids=["large tensors only", "cut", "dense"],
)
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_gathers_wait_for_the_perturbation(backend: str, mask: Mask, world: World) -> None:
    """What a stream of its own gathers is what the step has written before: w + ε, and then w."""
    opt = sam_on(world, backend, mask)
    [batch] = [on(world.device, batch) for batch in batches(1, 8)]
    opt.step(loss_fn, batch)
    with Watch(races=True) as watch:
        opt.step(loss_fn, batch)
        opt.step(loss_fn, batch)
    assert watch.races == []


def test_gathers_wait_for_weights_that_were_loaded(world: World) -> None:
    opt = sam_on(world, "zero3", Dense())
    [batch] = [on(world.device, batch) for batch in batches(1, 8)]
    opt.step(loss_fn, batch)
    network = opt.sharding.network.model
    weights = gathered(opt.sharding.named_model_state(network))
    with Watch(races=True) as watch:
        opt.sharding.load_named_model_state(network, weights)
        opt.step(loss_fn, batch)
    assert watch.races == []


def in_bf16(forward: Any, batch: Any) -> torch.Tensor:
    """The mean loss of a forward under autocast."""
    with torch.autocast("cuda", torch.bfloat16):
        logits = forward(batch[0])
    return torch.nn.functional.cross_entropy(logits.float(), batch[1])


@pytest.mark.parametrize("backend", ["fsdp2", "zero3"])
def test_what_is_cast_before_a_gather_is_what_was_written_before(backend: str, world: World) -> None:
    opt = sam_on(world, backend, Depth((0.5, 0.5)), torch.bfloat16)
    [batch] = [on(world.device, batch) for batch in batches(1, 8)]
    opt.step(in_bf16, batch)
    with Watch(races=True) as watch:
        opt.step(in_bf16, batch)
        opt.step(in_bf16, batch)
    assert watch.races == []
