"""`torch.distributed.checkpoint` on SparseSAM: saved on two ranks, gone on with on any number of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from ssam_scale import SparseSAM
from ssam_scale.masks import Dynamic, Refreshed
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place
from tests.support.masks import whole_mask
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks
from tests.support.tiers import few
from tests.support.training import BATCH, CLIP, RHO, TOLERANCE, Case

pytestmark = [
    pytest.mark.slow,
    # One process without a process group is just what some of these tests are about.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
]

CASES = {
    "element": Case("vit", "element", rho=(RHO, 0.0)),
    "tensor": Case("vit", "tensor", optimizer="adamw"),
    "row": Case("vit", "row"),
    "dynamic": Case("vit", "dynamic"),
    "cut by cost": Case("vit", "cut by cost"),
    "accumulated": Case("vit", "accumulated"),
    # Calibrates in steps 0 and 3 of 5: saved after step 1, it has to remember when and how.
    "calibrated": Case("vit", "moving cut", norm="calibrated", rho=(RHO, RHO / 2)),
}
BEFORE, AFTER = 2, 3  # steps


def make(world: World, case: Case, seed: int) -> tuple[nn.Module, SparseSAM]:
    model = freeze_batchnorm(small_network(case.family, seed))
    backend = "single" if world.size == 1 else "fsdp2"
    blocks = [stage.block for stage in model.stages]
    module, base = place(model, blocks, backend, world, lambda: case.make_optimizer(model))
    return module, case.make_sam(module, base)


def steps(world: World, opt: SparseSAM, first: int, last: int) -> None:
    for step, batch in enumerate(batches(last, BATCH)[first:], first):
        own = part(batch, world.rank, world.size)
        if isinstance(opt.mask, Dynamic) and step == BEFORE:
            opt.refresh(loss_fn, own)
        opt.step(loss_fn, own)


def look(opt: SparseSAM) -> dict[str, Any]:
    """Everything that a checkpoint has to bring back, as whole tensors."""
    named, sharding = opt.parameters.by_name, opt.sharding
    state: dict[str, Tensor] = {}
    for name, p in named.items():
        state[name] = sharding.gather(p, sharding.shards([p])[0].weight).clone()
        for entry, value in opt.state[p].items():
            local = value.to_local() if hasattr(value, "to_local") else value
            state[f"{name}|{entry}"] = sharding.gather(p, local).clone() if value.ndim else value.clone()
    sparse = opt.sparse.state_dict()
    return {
        "state": state,
        "mask": whole_mask(opt),
        "numbers": {k: v for k, v in sparse.items() if isinstance(v, Tensor)},
    }


def load(module: nn.Module, opt: SparseSAM, path: Path) -> None:
    """As the documentation of torch.distributed.checkpoint has it."""
    model_state, optimizer_state = get_state_dict(module, opt)
    state = {"model": model_state, "optimizer": optimizer_state, "sparse": opt.sparse}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(module, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def save(world: World, folder: Path) -> dict[str, Any]:
    """Train, save, train on."""
    results = {}
    for name, case in CASES.items():
        module, opt = make(world, case, seed=0)
        if isinstance(opt.mask, Refreshed):
            opt.refresh(loss_fn, part(batches(1, BATCH, seed=7)[0], world.rank, world.size))
        steps(world, opt, 0, BEFORE)
        saved = look(opt)
        model_state, optimizer_state = get_state_dict(module, opt)
        dcp.save(
            {"model": model_state, "optimizer": optimizer_state, "sparse": opt.sparse}, checkpoint_id=folder / name
        )
        steps(world, opt, BEFORE, BEFORE + AFTER)
        results[name] = {"saved": saved, "end": look(opt)}
    return results


def resume(world: World, folder: Path) -> dict[str, Any]:
    """Load into an optimizer of another network that has neither stepped nor refreshed, and train on."""
    results = {}
    for name, case in CASES.items():
        module, opt = make(world, case, seed=1)
        load(module, opt, folder / name)
        loaded = look(opt)
        steps(world, opt, BEFORE, BEFORE + AFTER)
        results[name] = {"saved": loaded, "end": look(opt)}
    return results


def initialise(world: World) -> None:
    """What torch.distributed.checkpoint does to an optimizer without state: a step with gradients of zeros."""
    module, opt = make(world, Case("vit", "element", clip=CLIP), seed=0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    opt.param_groups[0]["lr"] = 0.5
    get_state_dict(module, opt)
    assert opt.param_groups[0]["lr"] == 0.5
    assert len(opt.state) == len(before)
    opt.step()
    assert (opt.steps, opt.skipped) == (0, 0)
    for name, p in module.named_parameters():
        assert torch.equal(before[name], p.detach()), name
        assert p.grad is None


def two_ranks(world: World, folder: Path) -> list[dict[str, Any]]:
    initialise(world)
    return [save(world, folder), resume(world, folder)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[list[dict[str, Any]]]:
    return run_ranks(2, two_ranks, folder)


def differing(mine: dict[str, Any], theirs: dict[str, Any], tolerance: float = 0.0) -> list[str]:
    assert mine["state"].keys() == theirs["state"].keys()
    assert mine["mask"].keys() == theirs["mask"].keys()
    wrong = [name for name, mask in mine["mask"].items() if not torch.equal(mask, theirs["mask"][name])]
    # The shares of the calibration are sums like any other.
    for each in ("state", "numbers"):
        for name, value in mine[each].items():
            apart = (value.double() - theirs[each][name].double()).abs().max()
            if not apart <= tolerance:
                wrong.append(f"{name} by {apart:.1e}")
    return wrong


def test_on_as_many_ranks_training_goes_on_bit_for_bit(two: Any) -> None:
    for uninterrupted, resumed in two:
        for name in CASES:
            for when in ("saved", "end"):
                assert not differing(resumed[name][when], uninterrupted[name][when])


@pytest.mark.parametrize("size", few([1, 3], 3))
def test_on_other_numbers_of_ranks_it_goes_on_with_the_same_masks_weights_and_momentum(
    two: Any, folder: Path, size: int
) -> None:
    uninterrupted = copy.deepcopy(two[0][0])
    for resumed in [alone(resume, folder)] if size == 1 else run_ranks(size, resume, folder):
        for name in CASES:
            assert not differing(resumed[name]["saved"], uninterrupted[name]["saved"])
            for measured in (resumed, uninterrupted):
                # One process has the gradient of all weights at hand, and measures it in steps in which shards do not.
                measured[name]["end"]["numbers"].pop("kappa", None)
            assert not differing(resumed[name]["end"], uninterrupted[name]["end"], TOLERANCE)


def test_the_state_of_another_mask_is_refused(two: Any, folder: Path) -> None:
    _, dense = make(World(), Case("vit", "dense"), seed=0)
    with pytest.raises(ValueError, match="has a mask of single weights, this optimizer one not chosen by scores"):
        dcp.load({"sparse": dense.sparse}, checkpoint_id=folder / "element")
    # What has other keys or shapes, torch.distributed.checkpoint itself refuses, and names.
    _, tensor = make(World(), Case("vit", "tensor"), seed=0)
    with pytest.raises(dcp.CheckpointException, match=r"Size mismatch .* for sparse\.mask\."):
        dcp.load({"sparse": tensor.sparse}, checkpoint_id=folder / "element")
    with pytest.raises(dcp.CheckpointException, match=r"Missing key .* sparse\.mask\."):
        dcp.load({"sparse": tensor.sparse}, checkpoint_id=folder / "calibrated")


def test_one_process_initialises_an_optimizer_without_a_step() -> None:
    alone(initialise)
