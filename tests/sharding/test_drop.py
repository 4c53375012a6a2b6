"""What is dropped at random is the same on one process and on two, whatever is trained and wherever weights live."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from ssam_scale.models import drop_by_row
from ssam_scale.perturbation import StagedModel
from tests.support.networks import IMAGE, small_network
from tests.support.ranks import alone, run_ranks
from tests.support.tiers import few
from tests.support.training import TOLERANCE, Case, train


class Dropping(Case):
    """With all that a ViT drops at random, but in its attention."""

    def make_model(self) -> StagedModel:
        rates = {"drop_rate": 0.2, "pos_drop_rate": 0.1, "proj_drop_rate": 0.2, "drop_path_rate": 0.3}
        model = small_network("vit", patch_drop_rate=0.25, **rates).train()
        drop_by_row(model.model, 5, torch.zeros(1, 3, IMAGE, IMAGE))
        return model


CASES = [
    Dropping("vit", "dense", rho=(0.0,)),
    Dropping("vit", "dense"),
    Dropping("vit", "moving cut"),
]


@cache
def on_one() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """With all of the batch at once, and with two micro-batches."""
    whole, parts = (alone(train, "single", [replace(case, accumulation=count) for case in CASES]) for count in (1, 2))
    return whole, parts


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", *(f"zero{i}" for i in range(4))], "ddp", "fsdp2"))
def test_two_processes_train_as_one(backend: str) -> None:
    """With a micro-batch each as one with two of them, and as one with all of the batch."""
    whole, parts = on_one()
    on_two = run_ranks(2, train, backend, CASES)[0]
    for case, *found in zip(CASES, whole, parts, on_two, strict=True):
        first, *others = found
        for other in others:
            assert torch.allclose(other["losses"], first["losses"], rtol=0, atol=TOLERANCE), str(case)
            for name, weight in first["weights"].items():
                assert torch.allclose(other["weights"][name], weight, rtol=0, atol=TOLERANCE), f"{case} {name}"
    assert not torch.allclose(whole[1]["losses"], whole[0]["losses"], rtol=0, atol=1e-3)
