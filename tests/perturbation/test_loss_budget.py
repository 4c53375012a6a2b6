"""LE-SAM's radius: as far as the loss rises by a budget, to first order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssam_scale import CosineRadius, Fresh, Friendly, Momentum, SparseSAM


class Plane(nn.Module):
    """Its loss is linear, so that the first order is all that there is."""

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.w, self.slope = nn.Parameter(torch.zeros(4)), slope

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * self.w.sum() * x.mean()


def rises(slope: float, budget: float | None, rho: float, step: int = 0, **options: Any) -> tuple[float, float]:
    """How far the loss is above that at w, at w + ε; and how long ε is."""
    model = Plane(slope)
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.0), rho=rho, loss_budget=budget, **options)
    opt.steps = step
    seen: list[tuple[float, float]] = []

    def loss(forward: Any, batch: Any) -> Tensor:
        value: Tensor = forward(batch)
        seen.append((float(value.detach()), float(model.w.detach().norm())))
        return value

    opt.step(loss, torch.ones(2, 3))
    (here, _), (there, length) = seen
    return there - here, length


@pytest.mark.parametrize("slope", [0.5, 1.0, 8.0])
def test_the_loss_rises_by_the_budget_whatever_the_slope(slope: float) -> None:
    assert rises(slope, 0.3, rho=100.0)[0] == pytest.approx(0.3, rel=1e-5)


def test_rho_is_the_longest_it_can_be() -> None:
    rise, length = rises(0.5, 0.3, rho=0.1)
    assert length == pytest.approx(0.1, rel=1e-5)
    assert rise == pytest.approx(0.1, rel=1e-5)  # 0.5 · 2 · 0.1: a slope of 0.5 along each of four weights


def test_without_a_budget_the_rise_is_what_the_slope_makes_of_it() -> None:
    assert rises(8.0, None, rho=0.1)[0] == pytest.approx(1.6, rel=1e-5)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_schedule_is_on_radius_and_budget(adaptive: bool) -> None:
    halfway = CosineRadius(10)  # half of it in step 5
    for rho in (100.0, 0.01):
        whole, half = (rises(2.0, 0.3, rho=rho, step=step, schedule=halfway, adaptive=adaptive)[0] for step in (0, 5))
        assert half == pytest.approx(whole / 2, rel=1e-4)


def test_a_scaled_loss_goes_as_far() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert rises(2.0, 0.3, rho=100.0, scaler=scaler) == pytest.approx(rises(2.0, 0.3, rho=100.0), rel=1e-5)


@pytest.mark.parametrize("parts", [1, 4])
def test_each_micro_batch_that_climbs_by_itself_rises_as_far(parts: int) -> None:
    model = Plane(2.0)
    direction = Fresh(scope="micro_batch")
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.0), rho=100.0, loss_budget=0.3, direction=direction)
    seen: list[float] = []

    def loss(forward: Any, batch: Any) -> Tensor:
        value: Tensor = forward(batch)
        seen.append(float(value.detach()))
        return value

    opt.step(loss, *[torch.ones(2, 3)] * parts)
    assert [there - here for here, there in zip(seen[::2], seen[1::2], strict=True)] == pytest.approx([0.3] * parts)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"loss_budget": 0.0}, ValueError, r"loss_budget is 0\.0; a number above 0, or None, is needed"),
        ({"loss_budget": float("nan")}, ValueError, "loss_budget is nan"),
        ({"loss_budget": "0.1"}, TypeError, "loss_budget is '0.1'"),
        ({"norm": "dense"}, ValueError, "with norm 'dense' use no loss_budget, or norm 'masked'"),
        ({"norm": "calibrated"}, ValueError, "with norm 'calibrated'"),
        ({"direction": Momentum()}, ValueError, r"which direction Momentum\(\) is not; use Fresh\(\)"),
        ({"direction": Friendly()}, ValueError, "rises along its own gradient"),
    ],
    ids=str,
)
def test_what_tells_of_no_rise_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    model = Plane(1.0)
    with pytest.raises(error, match=said):
        SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), **{"loss_budget": 0.1, **options})


def test_a_scaler_that_nothing_tells_of_is_refused_by_hand() -> None:
    model = Plane(1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_budget=0.1, direction=Fresh())
    scaler.scale(model(torch.ones(2, 3))).backward()
    said = "with a loss_budget goes by gradients, which a scaler multiplies"
    with pytest.raises(RuntimeError, match=said), opt.perturbed():
        pass
