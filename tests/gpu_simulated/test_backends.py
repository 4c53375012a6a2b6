"""Every backend on one pretended GPU: it starts with the weights as the trainer has them, and its streams wait."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ssam_scale import Depth, SparseSAM
from ssam_scale.masks import Mask, Named, Scored
from ssam_scale.sharding import World, join_world
from ssam_scale.sharding.place import place
from tests.support.networks import batches, loss_fn, small_network
from tests.support.pretended_gpu.nccl import CALLS
from tests.support.pretended_gpu.watch import Watch
from tests.support.processes import free_port
from tests.support.training import BATCH, on

BACKENDS = ["single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
MASKS: dict[str, Mask | None] = {"dense": None, "moving cut": Depth(seed=3), "element": Scored("element", 0.5)}
# Batches of images in channels_last are summed in another order than in contiguous ones.
TOLERANCE = 1e-5
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
    """One process in a process group; one for all tests, because DeepSpeed keeps the groups that it has made."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
            patch.setitem(os.environ, name, value)
        with join_world() as world:
            yield world


def sam_on(
    world: World, backend: str, family: str, mask: Mask | None, deepspeed: dict[str, Any] | None = None
) -> SparseSAM:
    """The optimizer of a small network whose weights are in channels_last, as the trainer makes them on a GPU."""
    model = small_network(family).to(world.device).eval()  # without BatchNorm's statistics of the batch
    if world.device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    module, base = place(
        model,
        [stage.block for stage in model.stages],
        backend,
        world,
        lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        batch_size=BATCH,
        deepspeed=deepspeed,
    )
    return SparseSAM(module, base, rho=0.1, mask=mask)


def train(opt: SparseSAM, device: torch.device, steps: int = 3) -> dict[str, torch.Tensor]:
    """The weights after some steps."""
    for images, labels in (on(device, batch) for batch in batches(steps, BATCH)):
        batch = images.to(memory_format=torch.channels_last), labels
        if opt.refresh_is_due:
            opt.refresh(loss_fn, batch, samples=4)
        opt.step(loss_fn, batch)
    weights: dict[str, torch.Tensor] = opt.sharding.full_model_state_dict(opt.sharding.network.model)
    return weights


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", ["resnet", "convnext", "vit"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_trains_a_model_in_channels_last_as_one_cpu_does(
    backend: str, family: str, mask: str, world: World
) -> None:
    trained = train(sam_on(world, backend, family, MASKS[mask]), world.device)
    expected = train(sam_on(World(), "single", family, MASKS[mask]), torch.device("cpu"))
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(trained[name].cpu(), weight, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "mask",
    [Named(r"qkv\.weight"), Depth((0.5, 0.5)), None],
    ids=["large tensors only", "cut", "dense"],
)
@pytest.mark.parametrize("backend", ["fsdp2", "zero2", "zero3"])
def test_gathers_wait_for_the_perturbation(backend: str, mask: Mask | None, world: World) -> None:
    """What a stream of its own gathers is what the step has written before: w + ε, and then w."""
    deepspeed = GATHERS_ALL if backend == "zero3" else None
    opt = sam_on(world, backend, "vit", mask, deepspeed)
    [batch] = [on(world.device, batch) for batch in batches(1, BATCH)]
    opt.step(loss_fn, batch)
    with Watch(races=True) as watch:
        opt.step(loss_fn, batch)
        opt.step(loss_fn, batch)
    assert watch.races == []


def test_gathers_wait_for_weights_that_were_loaded(world: World) -> None:
    opt = sam_on(world, "zero3", "vit", None, GATHERS_ALL)
    [batch] = [on(world.device, batch) for batch in batches(1, BATCH)]
    opt.step(loss_fn, batch)
    network = opt.sharding.network.model
    weights = opt.sharding.full_model_state_dict(network)
    with Watch(races=True) as watch:
        opt.sharding.load_full_model_state_dict(network, weights)
        opt.step(loss_fn, batch)
    assert watch.races == []


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_host_never_waits(backend: str, mask: str, world: World) -> None:
    opt = sam_on(world, backend, "vit", MASKS[mask])
    train(opt, world.device, 1)
    [batch] = [on(world.device, batch) for batch in batches(1, BATCH)]
    opt.step(loss_fn, batch)
    with Watch() as watch:
        opt.step(loss_fn, batch)
    assert not watch.host_waits


@pytest.mark.parametrize("backend", ["zero0", "zero1", "zero2", "zero3"])
def test_the_host_waits_in_deepspeed_alone(backend: str, world: World) -> None:
    opt = sam_on(world, backend, "vit", MASKS["moving cut"])
    [batch] = [on(world.device, batch) for batch in batches(1, BATCH)]
    opt.step(loss_fn, batch)
    watch = Watch()
    opt._phases = opt._perturbation._phases = watch.phases
    with watch:
        opt.step(loss_fn, batch)
    assert not [place for _, place in watch.host_waits if "perturb" in place or "masks/" in place]


def test_an_ascent_behind_a_cut_gathers_and_reduces_the_suffix_alone(world: World) -> None:
    """Of FSDP2's five units (four blocks and the root) the ascent's backward needs two blocks and the root."""
    opt = sam_on(world, "fsdp2", "vit", Depth((0.5, 0.5)))
    [batch] = [on(world.device, batch) for batch in batches(1, BATCH)]
    opt.step(loss_fn, batch)
    before = CALLS.copy()
    opt.step(loss_fn, batch)
    calls = CALLS - before
    assert calls["reduce_scatter"] == 3 + 5
    assert calls["allgather"] <= 5 + 3 + 2 * 3 + 5


