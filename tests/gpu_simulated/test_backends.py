"""Every backend on one pretended GPU: it starts with weights in channels_last, and trains as one CPU does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ssam_scale import Depth, SparseSAM
from ssam_scale.masks import Dense, Mask, Scored
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place
from tests.support.networks import batches, loss_fn, small_network
from tests.support.pretended_gpu.watch import Watch
from tests.support.training import BATCH, on

pytestmark = pytest.mark.slow

BACKENDS = ["single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
MASKS: dict[str, Callable[[], Mask]] = {
    "dense": Dense,
    "moving cut": lambda: Depth(seed=3),
    "element": lambda: Scored("element", 0.5),
}
OTHERS = [("resnet", "moving cut"), ("resnet", "element"), ("convnext", "element"), ("vit", "element")]
# Batches of images in channels_last are summed in another order than in contiguous ones.
TOLERANCE = 1e-5


def sam_on(world: World, backend: str, family: str, mask: Mask | None) -> SparseSAM:
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
    )
    return SparseSAM(module, base, rho=0.1, mask=mask)


def train(opt: SparseSAM, device: torch.device, steps: int = 3) -> dict[str, torch.Tensor]:
    """The weights after some steps."""
    for images, labels in (on(device, batch) for batch in batches(steps, BATCH)):
        batch = images.to(memory_format=torch.channels_last), labels
        if opt.refresh_is_due:
            opt.refresh(loss_fn, batch, samples=4)
        opt.step(loss_fn, batch)
    weights: dict[str, torch.Tensor] = gathered(opt.sharding.named_model_state(opt.sharding.network.model))
    return weights


@pytest.mark.parametrize(
    ("family", "mask"),
    [
        ("convnext", "moving cut"),
        ("vit", "dense"),
        *(pytest.param(family, mask, marks=pytest.mark.exhaustive) for family, mask in OTHERS),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_trains_a_model_in_channels_last_as_one_cpu_does(backend: str, family: str, mask: str, world: World) -> None:
    trains_as_one_cpu(backend, family, mask, world)


@pytest.mark.parametrize("backend", ["single", "fsdp2", "zero3"])
def test_so_it_does_within_tensors(backend: str, world: World) -> None:
    """Ten seconds each in Triton's interpreter; of the other backends `OTHERS` has it."""
    trains_as_one_cpu(backend, "resnet", "element", world)


def trains_as_one_cpu(backend: str, family: str, mask: str, world: World) -> None:
    """Whether the weights are the same."""
    trained = train(sam_on(world, backend, family, MASKS[mask]()), world.device)
    expected = train(sam_on(World(), "single", family, MASKS[mask]()), torch.device("cpu"))
    assert trained.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(trained[name].cpu(), weight, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2"])
@pytest.mark.parametrize("mask", MASKS)
def test_the_host_never_waits(backend: str, mask: str, world: World) -> None:
    opt = sam_on(world, backend, "vit", MASKS[mask]())
    train(opt, world.device, 1)
    [batch] = [on(world.device, batch) for batch in batches(1, BATCH)]
    opt.step(loss_fn, batch)
    with Watch() as watch:
        opt.step(loss_fn, batch)
    assert not watch.host_waits


@pytest.mark.parametrize("backend", ["zero0", "zero1", "zero2", "zero3"])
def test_the_host_waits_in_deepspeed_alone(backend: str, world: World) -> None:
    opt = sam_on(world, backend, "vit", MASKS["moving cut"]())
    [batch] = [on(world.device, batch) for batch in batches(1, BATCH)]
    for _ in range(3):  # DeepSpeed's own timers would begin then
        opt.step(loss_fn, batch)
    watch = Watch()
    opt._phases = opt._perturbation._phases = watch.phases
    with watch:
        opt.step(loss_fn, batch)
    ours = ("perturb.py", "subset.py", "mask_state.py", "resolved_step.py")
    assert not [place for _, place in watch.host_waits if place.split("/")[-1].startswith(ours)]
    assert not [place for what, place in watch.host_waits if what == "torch.cuda.synchronize"]
