"""The largest micro-batch is found where a GPU's allocator says that there is no more."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch

from ssam_scale.config.load import load
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.perturbation import StagedModel
from ssam_scale.sharding import World
from ssam_scale.train.build import soft_loss
from ssam_scale.train.memory import explaining_out_of_memory, largest_micro_batch
from ssam_scale.train.optimizer import base_optimizer
from tests.support.configs import SMALL
from tests.support.networks import IMAGE, small_network

pytestmark = pytest.mark.slow

PART = 48


@contextmanager
def free_memory(size: int) -> Iterator[None]:
    """The GPU has so many bytes left: what earlier tests have left there counts as another process's."""
    allocated, limit = torch.cuda.memory_allocated, torch.cuda.set_per_process_memory_fraction
    _, total = torch.cuda.mem_get_info()
    others = allocated()
    changed = {
        "mem_get_info": lambda device=None: (size - (allocated() - others), total),
        "memory_reserved": lambda device=None: allocated() - others,
        "set_per_process_memory_fraction": lambda fraction, device=None: limit(fraction + others / total),
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, function in changed.items():
            patch.setattr(torch.cuda, name, function)
        yield


def configuration(tmp_path: Path, *overrides: str) -> Config:
    (tmp_path / "small.yaml").write_text(SMALL)
    batch = [f"data.batch_size={PART}", f"data.resolution={IMAGE}", "train.max_micro_batch=auto", *overrides]
    return load(tmp_path / "small.yaml", batch)


def search(config: Config, world: World, model: StagedModel, backend: str = "single") -> int:
    build = partial(base_optimizer, config)
    return largest_micro_batch(config, world, backend, model, build, soft_loss(config, torch.float32))


def peak_of_a_step(config: Config, world: World, images: int) -> int:
    """Bytes that a training has at most, beside what was there before it."""
    from ssam_scale import SparseSAM

    gc.collect()
    before = torch.cuda.memory_allocated()
    model = small_network("resnet").cuda().train()
    opt = SparseSAM(model, base_optimizer(config, model.model), rho=0.2)
    batch = torch.rand(images, 3, IMAGE, IMAGE).cuda(), torch.zeros(images, dtype=torch.int64).cuda()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        opt.step(soft_loss(config, torch.float32), *[batch] * (1 if images == PART else 2))
    return torch.cuda.max_memory_allocated() - before


def test_the_less_memory_there_is_the_fewer_images(world: World, tmp_path: Path) -> None:
    config, model, found = configuration(tmp_path), small_network("resnet"), []
    whole = peak_of_a_step(config, world, PART)
    for share in (3.0, 1.2, 0.8, 0.6, 0.4):
        with free_memory(int(share * whole)):
            found.append(search(config, world, model))
            gc.collect()
            fits = peak_of_a_step(config, world, found[-1])
            assert fits <= share * whole
    assert found[0] == PART
    assert found == sorted(found, reverse=True)
    assert len(set(found)) >= 3
    assert all(PART % images == 0 for images in found)


def test_nothing_is_left_of_it(world: World, tmp_path: Path) -> None:
    config, model = configuration(tmp_path), small_network("resnet", drop_path_rate=0.2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    draws = torch.get_rng_state()
    gc.collect()
    allocated = torch.cuda.memory_allocated()
    with free_memory(3 << 20):
        assert 0 < search(config, world, model) < PART
    assert torch.cuda.memory_allocated() == allocated
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert torch.equal(torch.get_rng_state(), draws)
    torch.empty(1 << 30, dtype=torch.uint8, device="cuda")  # the limit is gone


def test_what_a_backend_and_a_run_hold_beside_counts(world: World, tmp_path: Path) -> None:
    model = small_network("resnet")
    weights = 4 * sum(p.numel() for p in model.parameters())
    found = {}
    plain = configuration(tmp_path)
    for name, config, backend in [
        ("single", plain, "single"),
        ("averages", configuration(tmp_path, "train.ema_decay=0.9"), "single"),
        ("zero2", configuration(tmp_path, "sharding.backend=zero2"), "zero2"),
    ]:
        with free_memory(int(0.9 * peak_of_a_step(plain, world, PART) + 8 * weights)):
            try:
                found[name] = search(config, world, model, backend)
            except UserError as error:
                found[name] = str(error)  # type: ignore[assignment]
    assert isinstance(found["averages"], int)
    assert found["averages"] <= found["single"]
    assert "one device has no room for an image" in str(found["zero2"])  # a bucket of 2 GB


def test_what_runs_out_is_one_line(world: World, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught, explaining_out_of_memory(configuration(tmp_path)):
        torch.empty(1 << 60, dtype=torch.uint8, device="cuda")
    assert "CUDA out of memory. Tried to allocate" in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
