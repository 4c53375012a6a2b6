"""A cut drawn by cost, where the weights live: measured, the same on every process, saved and taken up again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ssam_scale import Depth, DepthByCost, Scored, SparseSAM, ascent_seconds
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks

DRAWS = 100
SECONDS = (8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0)


def sgd(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def make(world: World = World(), backend: Any = "single", **kwargs: Any) -> SparseSAM:  # noqa: B008  (immutable)
    model = freeze_batchnorm(small_network("resnet"))
    blocks = [stage.block for stage in model.stages]
    placed, base = place(model, blocks, backend, world, lambda: sgd(model), batch_size=8 // world.size)
    return SparseSAM(placed, base, rho=0.1, mask=DepthByCost(seed=3, **kwargs))


def cuts(opt: SparseSAM, steps: int = DRAWS) -> list[int]:
    layout = opt.parameters.layout
    return [opt.mask.plan(layout, step).cut for step in range(steps)]


def whole_weights(opt: SparseSAM) -> dict[str, torch.Tensor]:
    named, sharding = opt.parameters.by_name, opt.sharding
    shards = sharding.shards(list(named.values()))
    return {n: sharding.gather(p, s.weight).clone() for (n, p), s in zip(named.items(), shards, strict=True)}


def measure(world: World, backends: list[Any], state: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """On each backend: measure with clocks of its own, draw; then draw by given times, step, and go on from a state."""
    results = []
    for backend in backends:
        opt, batch = make(world, backend), part(batches(1, 8)[0], world.rank, world.size)
        before, random = whole_weights(opt), torch.get_rng_state()
        seconds = ascent_seconds(opt, loss_fn, batch, repeats=1)
        undone = all(torch.equal(before[n], w) for n, w in whole_weights(opt).items())
        opt.mask.seconds = seconds
        opt.refresh(loss_fn, batch)
        undone = undone and torch.equal(random, torch.get_rng_state())
        result = {"undone": undone, "own": cuts(opt), "seconds": seconds}
        opt.mask.seconds = SECONDS
        result |= {"masses": list(opt.mask.masses), "cuts": cuts(opt)}
        for _ in range(2):
            opt.step(loss_fn, batch)
        result["weights"] = whole_weights(opt)
        if state is not None:
            opt.sparse.load_state_dict(state)
            result |= {"resumed": cuts(opt), "steps": opt.steps}
        results.append(result)
    return results


@pytest.fixture(scope="module")
def saved() -> dict[str, Any]:
    """A state of one process with other masses and times than anything measured here, and what it draws."""
    opt = make(seconds=[t**3 for t in SECONDS])
    opt.refresh(loss_fn, batches(1, 8, seed=9)[0])
    opt.step(loss_fn, batches(1, 8)[0])
    return {"state": opt.sparse.state_dict(), "cuts": cuts(opt)}


@pytest.fixture(scope="module")
def one(saved: dict[str, Any]) -> dict[str, Any]:
    [result] = alone(measure, ["single"], saved["state"])
    return result


def test_the_fisher_mass_of_blocks_is_the_sum_of_squared_gradients_of_single_samples() -> None:
    opt, (images, labels) = make(seconds=SECONDS), batches(1, 8)[0]
    opt.refresh(loss_fn, (images, labels))
    model, expected = freeze_batchnorm(small_network("resnet")).eval(), [0.0] * 8
    for image, label in zip(images, labels, strict=True):
        named = dict(model.model.named_parameters())
        gradients = torch.autograd.grad(loss_fn(model, (image[None], label[None])), list(named.values()))
        for name, gradient in zip(named, gradients, strict=True):
            expected[opt.parameters.layout.stages[name]] += float(gradient.double().square().sum())
    # Squares are added up in float32 over samples there, and in float64 here.
    assert opt.mask.masses == pytest.approx(expected, rel=1e-5)


def test_measuring_leaves_no_trace_and_gives_a_positive_time_for_every_cut(one: dict[str, Any]) -> None:
    assert one["undone"]
    assert len(one["seconds"]) == 8
    assert min(one["seconds"]) > 0.0


def test_a_saved_state_draws_as_without_a_break(saved: dict[str, Any], one: dict[str, Any]) -> None:
    assert one["resumed"] == saved["cuts"] != one["cuts"]
    assert one["steps"] == 1


def test_states_of_other_masks_are_refused(saved: dict[str, Any]) -> None:
    model = small_network("resnet")
    for mask in (Depth(), Scored("element", 0.5)):
        opt = SparseSAM(model, sgd(model), mask=mask)
        with pytest.raises(ValueError, match=f"a moving cut drawn by cost, this optimizer a {type(mask).__name__}"):
            opt.sparse.load_state_dict(saved["state"])
    with pytest.raises(ValueError, match="has no fisher_mass, which a moving cut drawn by cost needs"):
        make().sparse.load_state_dict(SparseSAM(model, sgd(model), mask=Depth()).sparse.state_dict())


def test_without_a_refresh_or_times_a_step_says_what_to_call() -> None:
    opt = make()
    assert opt.refresh_is_due
    with pytest.raises(RuntimeError, match=r"set mask\.seconds = ascent_seconds"):
        opt.step(loss_fn, batches(1, 8)[0])
    with pytest.raises(ValueError, match="0 batches and 3 repeats"):
        ascent_seconds(opt, loss_fn)


@pytest.mark.slow
def test_every_process_of_every_backend_draws_what_one_process_draws(
    saved: dict[str, Any], one: dict[str, Any]
) -> None:
    backends = ["ddp", "fsdp2", "zero1", "zero3"]
    ranks = run_ranks(2, measure, backends, saved["state"])
    for backend, first, second in zip(backends, *ranks, strict=True):
        assert first["undone"], backend
        assert second["undone"], backend
        assert first["seconds"] == second["seconds"], backend
        assert first["own"] == second["own"], backend
        for each in (first, second):
            assert each["masses"] == one["masses"], backend  # bit for bit
            assert each["cuts"] == one["cuts"], backend
            assert (each["resumed"], each["steps"]) == (saved["cuts"], 1), backend
            # The same arithmetic in another order of summation.
            apart = [float((each["weights"][name] - w).abs().max()) for name, w in one["weights"].items()]
            assert max(apart) < 1e-6, backend
