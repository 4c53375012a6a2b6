"""The step on one GPU: every backend with one process and NCCL, in fp32 and low precision, compiled, and without waits.

    pytest -m gpu

The device is the world's everywhere, so that what is in here, but for what only CUDA has, also runs on a CPU.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ssam_scale import Depth, Fresh, Savings, Scored, SparseSAM
from ssam_scale.masks import Mask
from ssam_scale.models import staged
from ssam_scale.perturbation.reference import length_of
from ssam_scale.sharding import World, join_world
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place
from tests.support.cases import CASES
from tests.support.compiled import FORMS, Compiled, counting_graphs
from tests.support.masks import whole_mask
from tests.support.networks import batches, loss_fn, small_network
from tests.support.processes import free_port
from tests.support.training import (
    BATCH,
    STEPS,
    Case,
    largest_difference,
    on,
    placed,
    reference,
    train,
)

pytestmark = pytest.mark.gpu

BACKENDS = ["single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
MOVING_CUT = Case("vit", "moving cut")

# The oracle runs on the CPU. cuDNN and cuBLAS sum in other orders; with TF32 off that is about 1e-6 relative in each of
# five steps, and a little more where a ReLU's input is that near to zero.
CUDA_TOLERANCE = 1e-4
# Of the way that the weights went in five steps, against the oracle in fp32, in units of the last of the 8 (bf16) or 11
# (fp16) bits of a number. The rounding errors of a whole network are random and mostly cancel; on a CPU the ways end up
# to 6 units apart. Tensor cores round sums in another order, for which there is room.
LOW_PRECISION_TOLERANCE = {torch.bfloat16: 16 * 2.0**-8, torch.float16: 16 * 2.0**-11}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One process in a process group; one for all tests, because DeepSpeed keeps the groups that it has made."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**alone, "MASTER_PORT": str(free_port())}.items():
            patch.setitem(os.environ, name, value)
        with join_world() as world:
            yield world


@pytest.fixture(autouse=True)
def without_tf32() -> Iterator[None]:
    """In TF32 only 10 bits of a float32 are multiplied, which cuDNN's convolutions do by default."""
    libraries = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [library.allow_tf32 for library in libraries]
    for library in libraries:
        library.allow_tf32 = False
    yield
    for library, allowed in zip(libraries, before, strict=True):
        library.allow_tf32 = allowed


def on_cpu(result: Any) -> Any:
    """The same in CPU memory."""
    if isinstance(result, dict):
        return {name: on_cpu(value) for name, value in result.items()}
    if isinstance(result, list):
        return [on_cpu(value) for value in result]
    return result.cpu()


def shards(opt: SparseSAM) -> list[Tensor]:
    """The weights of this process."""
    return [shard.weight for shard in opt.sharding.shards(list(opt.parameters.by_name.values()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_a_small_ascent_as_graphs_is_the_one_without(family: str, precision: torch.dtype, world: World) -> None:
    """cuDNN may choose other algorithms for what is captured; on the pretended GPU it is so bit for bit."""

    def loss(forward: Callable[[Tensor], Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
            return loss_fn(forward, batch)

    found = []
    for graph_ascent in (False, True):
        model = small_network(family).to(world.device)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        savings = Savings(graph_ascent=graph_ascent)
        opt = SparseSAM(model, sgd, rho=0.1, mask=Depth((0.5, 0.5)), direction=Fresh(0.25), savings=savings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one says what could not be captured
            for batch in batches(STEPS, BATCH):
                opt.step(loss, on(world.device, batch))
        found.append({name: p.detach().cpu() for name, p in model.named_parameters()})
    plain, graphed = found
    away = max(float((plain[name] - graphed[name]).abs().max()) for name in plain)
    assert away < (CUDA_TOLERANCE if precision == torch.float32 else LOW_PRECISION_TOLERANCE[precision])


class Stop(Exception):  # noqa: N818 - not an error
    """Ends a step between the perturbation and the descent."""


def check_that_weights_come_back(opt: SparseSAM, loss: Callable[..., Tensor], batch: Any) -> None:
    """In the descent the weights are others, and after it the same again bit for bit."""
    before, calls = [w.clone() for w in shards(opt)], []

    def stopping(forward: Any, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            assert not same(before, shards(opt))
            raise Stop
        return loss(forward, batch)

    with pytest.raises(Stop):
        opt.step(stopping, batch)
    assert same(before, shards(opt))


def check_low_precision(
    world: World,
    opt: SparseSAM,
    precision: torch.dtype,
    loss: Callable[..., Tensor],
    images_in: torch.dtype = torch.float32,
) -> None:
    """The weights come back in a step that fails, and in five more go nearly the way of the oracle in fp32.

    Args:
        world: where.
        opt: of `MOVING_CUT`.
        precision: what the network computes in.
        loss: mean loss of a batch.
        images_in: type of the images.
    """
    data = [(images.to(images_in), labels) for images, labels in (on(world.device, b) for b in batches(STEPS, BATCH))]
    check_that_weights_come_back(opt, loss, data[0])
    masks = []
    for batch in data:
        masks.append(on_cpu(whole_mask(opt)))
        opt.step(loss, batch)
    ended = gathered(opt.sharding.named_model_state(opt.sharding.network.model))  # float32 masters if there are
    oracle, _ = reference(MOVING_CUT, masks)
    start = dict(MOVING_CUT.make_model().model.named_parameters())
    way = {name: (w - start[name]).detach() for name, w in oracle.named_parameters()}
    apart = {name: ended[name].float() - start[name].detach() - way[name] for name in way}
    share = float(length_of(apart) / length_of(way))
    assert share <= LOW_PRECISION_TOLERANCE[precision], f"{share:.1e} of the way"
    assert opt.skipped == 0


def sam_on(world: World, backend: Any, deepspeed: Any = None) -> SparseSAM:
    """The optimizer of `MOVING_CUT`."""
    _, distributed, base = placed(world, backend, MOVING_CUT, deepspeed=deepspeed)
    return MOVING_CUT.make_sam(distributed, base)


@pytest.mark.parametrize("backend", BACKENDS)
def test_fp32_equals_the_reference(backend: str, world: World) -> None:
    # A third on each backend, which have all of them together; on CPUs each has all.
    cases = [case for case in CASES.values() if case.precision == torch.float32][BACKENDS.index(backend) % 3 :: 3]
    for case, result in zip(cases, train(world, backend, cases), strict=True):
        difference = largest_difference(case, on_cpu(result), check_losses=False)
        assert difference <= CUDA_TOLERANCE, f"{case} differs by {difference:.1e}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_bf16_autocast(backend: str, world: World) -> None:
    loss = replace(MOVING_CUT, precision=torch.bfloat16).loss_fn
    check_low_precision(world, sam_on(world, backend), torch.bfloat16, loss)


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2"])
def test_fp16_autocast_with_a_grad_scaler(backend: str, world: World) -> None:
    opt = sam_on(world, backend)
    opt.scaler = torch.amp.GradScaler(world.device.type, init_scale=1024.0)
    check_low_precision(world, opt, torch.float16, replace(MOVING_CUT, precision=torch.float16).loss_fn)
    assert opt.scaler.get_scale() == 1024.0  # no step was skipped


def in_low_precision(forward: Any, batch: Any) -> Tensor:
    """Mean cross-entropy in float32 of a network in any precision."""
    return loss_fn(lambda images: forward(images).float(), batch)


@pytest.mark.parametrize("backend", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_deepspeeds_own_low_precision(backend: str, precision: torch.dtype, world: World) -> None:
    # A scale that these gradients do not overflow by themselves.
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    section = fp16 if precision == torch.float16 else {"bf16": {"enabled": True}}
    check_low_precision(world, sam_on(world, backend, section), precision, in_low_precision, precision)


def test_fsdp2s_mixed_precision_policy(world: World) -> None:
    model = MOVING_CUT.make_model().to(world.device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (*(stage.block for stage in model.stages), model):
        fully_shard(module, mp_policy=policy)
    opt = MOVING_CUT.make_sam(model, MOVING_CUT.make_optimizer(model))
    check_low_precision(world, opt, torch.bfloat16, in_low_precision)


@pytest.mark.parametrize("backend", ["single", "ddp", "fsdp2"])
def test_compiled_blocks_with_a_moving_cut(backend: str, world: World) -> None:
    case = Compiled("vit", "moving cut")
    with counting_graphs() as graphs:
        [result] = train(world, backend, [case])
        # Wrappers may add a form of input of their own; a graph a step would be the thing to fear.
        assert graphs() <= FORMS[1] + 1
    assert largest_difference(case.plain(), on_cpu(result), check_losses=False) <= CUDA_TOLERANCE


def test_synchronised_batchnorm_in_training_mode_is_batchnorm_on_one_process(world: World) -> None:
    networks = []
    for convert in (nn.SyncBatchNorm.convert_sync_batchnorm, lambda module: module):
        # Converted before it is staged: the stages refer to the layers themselves.
        model = staged(convert(small_network("resnet").model)).train()
        blocks = [stage.block for stage in model.stages]
        placed, base = place(
            model, blocks, "ddp", world, lambda model=model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        )
        opt = SparseSAM(placed, base, rho=0.1, mask=Depth(seed=3))
        for batch in batches(STEPS, BATCH):
            opt.step(loss_fn, on(world.device, batch))
        networks.append(model.state_dict())
    synchronised, plain = networks
    assert synchronised.keys() == plain.keys()
    for name, expected in plain.items():
        torch.testing.assert_close(synchronised[name], expected, rtol=0, atol=CUDA_TOLERANCE)


@pytest.mark.parametrize(
    ("mask", "norm"),
    [(Depth(seed=3), "masked"), (Scored("element", 0.5), "masked"), (Scored("element", 0.5), "dense")],
    ids=["moving cut", "element", "element, dense norm"],
)
def test_a_step_never_waits_for_the_device(mask: Mask, norm: Any) -> None:
    model = small_network("vit").cuda()
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    opt = SparseSAM(model, base, rho=0.1, mask=mask, norm=norm, max_grad_norm=1.0)
    data = [on(torch.device("cuda"), batch) for batch in batches(3, BATCH)]
    if isinstance(mask, Scored):
        opt.refresh(loss_fn, data[0])
    opt.step(loss_fn, data[0])  # makes the momentum buffers, and loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in data[1:]:
            opt.step(loss_fn, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
