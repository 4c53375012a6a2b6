"""A module that is placed gives back its memory, so that a process can place another one."""

from __future__ import annotations

import gc

import pytest
import torch

from ssam_scale.sharding import World, released
from tests.support.networks import batches, part
from tests.support.ranks import run_ranks
from tests.support.training import BATCH, Case, placed

CASE = Case("vit", "element")


def _left(world: World, backend: str) -> float:
    """The share of the bytes after a step that is still there, once nothing refers to what was trained."""
    model, distributed, base = placed(world, backend, CASE)
    opt = CASE.make_sam(distributed, base)
    with released(distributed):
        own = part(batches(1, BATCH)[0], world.rank, world.size)
        opt.refresh(CASE.loss_fn, own)
        opt.step(CASE.loss_fn, own)
        held = _held()
    del model, distributed, base, opt, own
    gc.collect()
    return _held() / held


def _held() -> int:
    """Bytes of the tensors of a module, its gradients and its optimizer: all that have a number with a fraction."""
    plain = (torch.Tensor, torch.nn.Parameter)  # others have no memory of their own
    tensors = [t for t in gc.get_objects() if type(t) in plain and t.is_floating_point()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"])
def test_nothing_keeps_it_alive(backend: str) -> None:
    """DeepSpeed's hooks did: a network, its optimizer and 2 GB of buffer, at each rollback."""
    assert max(run_ranks(2, _left, backend)) < 0.01
