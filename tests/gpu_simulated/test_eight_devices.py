"""`join_world` on a machine with eight pretended GPUs: each process has its own, and one too many is told so."""

from __future__ import annotations

import pytest
import torch

from ssam_scale.errors import UserError
from ssam_scale.sharding import join_world
from tests.support.processes import free_port

DEVICES = 8


def of_eight(patch: pytest.MonkeyPatch, local_rank: int) -> None:
    """A process that torchrun has started, by itself."""
    started = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(local_rank), "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**started, "MASTER_PORT": str(free_port())}.items():
        patch.setenv(name, value)


@pytest.mark.parametrize("local_rank", [0, 7])
def test_a_process_computes_on_its_own_gpu(local_rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    of_eight(monkeypatch, local_rank)
    with join_world() as world:
        assert world.device == torch.device("cuda", local_rank)
        assert torch.cuda.current_device() == local_rank
        assert torch.ones(1, device="cuda").device == world.device


def test_one_process_more_than_gpus_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    of_eight(monkeypatch, 8)
    with pytest.raises(UserError, match=r"\b8\b"), join_world():
        pass


def test_one_process_by_itself_takes_the_first_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with join_world() as world:
        assert (world.size, world.device) == (1, torch.device("cuda", 0))
