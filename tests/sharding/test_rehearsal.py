"""Rehearsed steps leave no trace: a run with them is a run without, bit for bit, whatever the backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssam_scale import Fresh, Interval
from ssam_scale.perturbation import StagedModel
from tests.support.networks import small_network
from tests.support.ranks import alone, run_ranks
from tests.support.tiers import few
from tests.support.training import RHO, Case, train

EVERYTHING = ("dense", "own", "base", "own")


class Training(Case):
    """With BatchNorm that averages and blocks that are dropped, which draws random numbers."""

    def make_model(self) -> StagedModel:
        return small_network(self.family, drop_path_rate=0.3).train()


CASES = {
    str(case): case
    for case in (
        Training("resnet", "moving cut", direction=Fresh(0.5)),
        Training("vit", "element", norm="calibrated", accumulation=2),
        Training("resnet", "row", norm="dense", optimizer="adamw", rho=(RHO, 0.0)),
        Training("vit", "accumulated", schedule=Interval(2, reuse=0.5)),
        Training("vit", "cut by cost", norm="calibrated", scaled=True),
        Training("convnext", "dense", adaptive=True, precision=torch.bfloat16),
    )
}


def differing(first: Any, second: Any, name: str = "") -> list[str]:
    """Where two nested results differ."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return [found for key in first for found in differing(first[key], second[key], f"{name}/{key}")]
    if isinstance(first, list):
        assert len(first) == len(second)
        pairs = enumerate(zip(first, second, strict=True))
        return [found for i, (one, other) in pairs for found in differing(one, other, f"{name}/{i}")]
    same = torch.equal(first.nan_to_num(-1.0), second.nan_to_num(-1.0)) if first.is_floating_point() else None
    return [] if (torch.equal(first, second) if same is None else same) else [name]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_process_trains_as_without(name: str) -> None:
    case = CASES[name]
    [plain], [probed] = (alone(train, "single", [case], rehearsed) for rehearsed in ((), EVERYTHING))
    assert differing(plain, probed) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", *(f"zero{i}" for i in range(4))], "fsdp2", "zero3"))
@pytest.mark.parametrize("between", few([(0, 4), (1, 3)], (1, 3)))  # an engine has a scaler of its own
def test_two_ranks_train_as_without(backend: str, between: tuple[int, int]) -> None:
    cases = [*CASES.values()][slice(*between)]
    plain, probed = (run_ranks(2, train, backend, cases, rehearsed) for rehearsed in ((), EVERYTHING))
    assert differing(plain, probed) == []


def test_the_steps_that_are_rehearsed() -> None:
    """Whatever the schedule has in the next step."""
    case = Training("vit", "moving cut", norm="calibrated", direction=Fresh(0.5), schedule=Interval(4))
    model = case.make_model()
    opt = case.make_sam(model, case.make_optimizer(model))
    for _ in range(3):
        kinds = {what: opt._rehearsed(what, 1) for what in ("base", "dense", "own")}
        assert not kinds["base"].ascends
        assert kinds["dense"].plan.perturbed == opt.parameters.layout.total
        assert (kinds["dense"].fraction, kinds["dense"].cut, kinds["dense"].kind) == (1.0, 0, "dense")
        assert kinds["own"].plan.counts == opt.mask.plan(opt.parameters.layout, opt.steps).counts
        assert (kinds["own"].fraction, kinds["own"].cut) == (0.5, kinds["own"].plan.cut)
        assert not kinds["own"].calibrates
        opt.steps += 1
