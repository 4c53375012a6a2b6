"""A loss term by outputs of earlier weights is what the paper's equations say, on every backend and number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssam_scale.methods import Reference, trajectory_loss
from ssam_scale.perturbation import DescentSamples
from tests.support.ranks import alone, run_ranks
from tests.support.trajectories import EPOCHS, Term, train, written_out

# float32 in another order of summation; and an output that lies between two of float16 may be rounded to the other one,
# which moves a weight by about as much.
TOLERANCE = 2e-6

WAYS = {
    "saf": Term("saf"),
    "mesa": Term("mesa"),
    "saf, 2 micro-batches": Term("saf", accumulation=2),
    "mesa, sam": Term("mesa", rho=0.1),
    "saf, sam": Term("saf", rho=0.1),
    "saf, sam by a quarter": Term("saf", rho=0.1, fraction=0.25),
    "mesa, sam by a quarter": Term("mesa", rho=0.1, fraction=0.25),
    "mesa, sam, 2 micro-batches": Term("mesa", rho=0.1, accumulation=2),
    "mesa, resnet, 2 micro-batches": Term("mesa", family="resnet", accumulation=2),
}
QUICK = ["saf", "mesa, sam"]
ON_RANKS = ["saf", "mesa", "saf, sam", "mesa, sam, 2 micro-batches"]


def apart(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in WAYS])
def test_training_is_that_of_the_equations(name: str, tmp_path: Path) -> None:
    way = WAYS[name]
    assert apart(alone(train, "single", way, str(tmp_path)), written_out(way)) < TOLERANCE


def test_the_term_makes_a_difference(tmp_path: Path) -> None:
    saf, mesa = (written_out(Term(kind)) for kind in ("saf", "mesa"))
    assert apart(saf, mesa) > 100 * TOLERANCE
    assert apart(alone(train, "single", Term("saf"), str(tmp_path), 1), saf) > 100 * TOLERANCE


def _on_ranks(world: Any, cases: list[tuple[str, str]], folder: str) -> list[dict[str, Tensor]]:
    return [train(world, backend, WAYS[name], f"{folder}/{number}") for number, (backend, name) in enumerate(cases)]


@pytest.mark.slow
def test_two_ranks_train_as_one_on_every_backend(tmp_path: Path) -> None:
    cases = [(backend, name) for backend in ("ddp", "fsdp2", "zero1", "zero2", "zero3") for name in ON_RANKS]
    expected = {name: written_out(WAYS[name]) for name in ON_RANKS}
    for found in run_ranks(2, _on_ranks, cases, str(tmp_path)):
        far = {case: apart(weights, expected[case[1]]) for case, weights in zip(cases, found, strict=True)}
        assert {case: distance for case, distance in far.items() if distance > TOLERANCE} == {}


CHOOSING = {
    "an ascent by the highest losses": Term("saf", rho=0.1, fraction=0.5, choose="highest_loss"),
    "a descent by the sharpest": Term("saf", rho=0.1, descent=DescentSamples(0.5)),
    "a descent by the highest losses": Term("saf", rho=0.1, descent=DescentSamples(0.5, "highest_loss")),
    "a descent by random ones": Term("saf", rho=0.1, descent=DescentSamples(0.5, "random")),
    "all of it by parts, MESA": Term("mesa", rho=0.1, fraction=0.5, descent=DescentSamples(0.5, "random")),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CHOOSING])
def test_where_samples_are_chosen_what_they_are_held_against_goes_along(name: str, tmp_path: Path) -> None:
    """Also by torch.vmap over what the model put out, of which nothing is remembered."""
    way = CHOOSING[name]
    found = alone(train, "single", way, str(tmp_path / "found"))
    again = alone(train, "single", way, str(tmp_path / "again"))
    assert apart(found, again) == 0.0
    assert all(bool(weight.isfinite().all()) for weight in found.values())
    without = alone(train, "single", way, str(tmp_path / "without"), EPOCHS, 1e-9)
    assert apart(found, without) > 100 * TOLERANCE


def test_a_step_whose_outputs_nobody_has_shown_is_refused(tmp_path: Path) -> None:
    way = Term("saf", rho=0.1, fraction=0.5, descent=DescentSamples(0.5, "random"))
    with pytest.raises(RuntimeError, match=r"SAF has not seen the outputs of a whole micro-batch of this step"):
        alone(train, "single", way, str(tmp_path))


def test_nothing_is_added_where_nothing_is_known() -> None:
    generator = torch.Generator().manual_seed(0)
    now, then = (torch.randn(3, 5, generator=generator) for _ in range(2))
    known = torch.tensor([1.0, 0.0, 1.0])
    of_all = trajectory_loss(now, Reference(then), 2.0)
    each = [trajectory_loss(now[i : i + 1], Reference(then[i : i + 1]), 2.0) for i in range(3)]
    assert float(of_all) == pytest.approx(float(sum(each)) / 3)
    assert float(trajectory_loss(now, Reference(then, known), 2.0)) == pytest.approx(float(each[0] + each[2]) / 3)
    assert float(trajectory_loss(now, Reference(None), 2.0)) == 0.0
    assert float(trajectory_loss(now, Reference(now), 2.0)) == 0.0


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_the_gradient_is_temperature_times_the_difference_of_the_softmaxes(temperature: float) -> None:
    """d/dz τ² KL(p ‖ q) = τ (q - p): the term's gradient keeps its size whatever τ is."""
    generator = torch.Generator().manual_seed(0)
    now, then = (torch.randn(4, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    now.requires_grad_()
    trajectory_loss(now, Reference(then), temperature).backward()
    expected = temperature * (torch.softmax(now / temperature, -1) - torch.softmax(then / temperature, -1)) / 4
    assert now.grad is not None
    torch.testing.assert_close(now.grad, expected.detach(), rtol=0, atol=1e-6)  # the loss is computed in float32
