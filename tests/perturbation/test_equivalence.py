"""N ranks on any backend, with any mask, equal the slow reference on the concatenated batch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from ssam_scale.masks import Dense, Depth, Mask, Scored
from ssam_scale.perturbation import SparseSAM
from ssam_scale.perturbation.reference import reference_step
from ssam_scale.sharding import World, place
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks

STEPS, BATCH, RHO, CLIP = 5, 12, 0.1, 5.0
# fp32: the same arithmetic in another order of summation; measured differences are up to 3e-7.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Case:
    family: str
    mask: str
    norm: str = "masked"
    accumulation: int = 1
    optimizer: str = "sgd"
    clip: float = CLIP
    groups: int = 1

    def make_mask(self) -> Mask:
        return {
            "dense": Dense(),
            "element": Scored("element", 0.5),
            "tensor": Scored("tensor", 0.7),
            "fixed cut": Depth((0.5, 0.5)),
            "moving cut": Depth((0.0, 1.0), seed=3),
        }[self.mask]

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            # A large eps: AdamW divides by the root of its second moment, which turns a float error of a vanishing
            # gradient into one of the step's size.
            return torch.optim.AdamW(self.param_groups(model, 1e-3), eps=1e-3)
        return torch.optim.SGD(self.param_groups(model, 0.05), momentum=0.9, weight_decay=1e-3)

    def param_groups(self, model: torch.nn.Module, lr: float) -> list[dict[str, Any]]:
        parameters = list(model.parameters())
        return [{"params": parameters[i :: self.groups], "lr": lr / (i + 1)} for i in range(self.groups)]


CASES = [
    *(Case(f, m) for f, m in itertools.product(("resnet", "vit"), ("dense", "element", "tensor", "moving cut"))),
    Case("vit", "fixed cut", accumulation=2),
    Case("vit", "dense", norm="dense", accumulation=2),
    Case("resnet", "element", norm="dense"),
    Case("vit", "tensor", norm="dense", optimizer="adamw"),
    Case("vit", "moving cut", optimizer="adamw"),
    Case("vit", "moving cut", clip=0.2, groups=2),
]


def whole_mask(opt: SparseSAM) -> dict[str, torch.Tensor]:
    """The plan of the next step spelled out for every weight."""
    named, sharding, weights = opt.pool.parameters, opt.sharding, opt.plan.weights
    shards = sharding.shards([named[name] for name in weights])
    return {
        name: sharding.gather(named[name], torch.ones_like(s.weight, dtype=torch.bool) if local is None else local)
        for (name, local), s in zip(weights.items(), shards, strict=True)
    }


def on(device: torch.device, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return batch[0].to(device), batch[1].to(device)


def train(world: World, backend: Any, cases: list[Case], **kwargs: Any) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        model = freeze_batchnorm(small_network(case.family))
        blocks = [stage.block for stage in model.stages]
        device = world.device
        distributed, base = place(
            model,
            blocks,
            backend,
            world,
            lambda model=model, case=case: case.make_optimizer(model),
            batch_size=BATCH // world.size // case.accumulation,
            accumulation=case.accumulation,
            max_grad_norm=case.clip,
            **kwargs,
        )
        opt = SparseSAM(
            distributed,
            base,
            rho=RHO,
            mask=case.make_mask(),
            norm=case.norm,
            max_grad_norm=case.clip,
        )
        data = batches(STEPS, BATCH)
        if isinstance(opt.mask, Scored):
            opt.refresh(loss_fn, on(device, part(batches(1, BATCH, seed=7)[0], world.rank, world.size)))
        losses, masks = [], []
        for batch in data:
            own = on(device, part(batch, world.rank, world.size))
            masks.append(whole_mask(opt))
            micro = [part(own, i, case.accumulation) for i in range(case.accumulation)]
            losses.append(world.sum(opt.step(loss_fn, *micro)) / world.size)
        parameters = opt.pool.parameters
        shards = opt.sharding.shards(list(parameters.values()))
        weights = {
            name: opt.sharding.gather(p, shard.weight)
            for (name, p), shard in zip(parameters.items(), shards, strict=True)
        }
        results.append({"weights": weights, "masks": masks, "losses": torch.stack(losses)})
    return results


def largest_difference(case: Case, result: dict[str, Any], tolerance: float = TOLERANCE) -> float:
    """Largest absolute difference of any weight from the reference's after five steps."""
    model = freeze_batchnorm(small_network(case.family)).model
    optimizer = case.make_optimizer(model)
    for batch, mask, loss in zip(batches(STEPS, BATCH), result["masks"], result["losses"], strict=True):
        expected = reference_step(
            model, optimizer, loss_fn, batch, rho=RHO, mask=mask, norm=case.norm, max_grad_norm=case.clip
        )
        assert loss.item() == pytest.approx(expected.item(), abs=tolerance)
    weights = dict(model.named_parameters())
    assert weights.keys() == result["weights"].keys()
    return max(float((result["weights"][n] - w).abs().max()) for n, w in weights.items())


@pytest.mark.parametrize(
    ("backend", "size"),
    [
        ("single", 1),
        ("ddp", 2),
        pytest.param("fsdp2", 2, marks=pytest.mark.slow),
        pytest.param("fsdp2", 3, marks=pytest.mark.slow),
        *(pytest.param(f"zero{stage}", 2, marks=pytest.mark.slow) for stage in range(4)),
    ],
)
def test_equals_the_reference_on_the_concatenated_batch(backend: str, size: int) -> None:
    ranks = [alone(train, "single", CASES)] if size == 1 else run_ranks(size, train, backend, CASES)
    for index, case in enumerate(CASES):
        difference = largest_difference(case, ranks[0][index])
        assert difference <= TOLERANCE, f"{case} differs by {difference:.1e}"
        for other in ranks[1:]:
            assert all(torch.equal(other[index]["weights"][n], w) for n, w in ranks[0][index]["weights"].items())


@pytest.mark.slow
def test_masks_do_not_depend_on_the_backend() -> None:
    scored = [case for case in CASES if case.mask in ("element", "tensor")][:2]
    expected = alone(train, "single", scored)
    for backend in ("ddp", "fsdp2"):
        for mine, other in zip(expected, run_ranks(2, train, backend, scored)[0], strict=True):
            first, second = mine["masks"][0], other["masks"][0]
            assert first.keys() == second.keys()
            assert all(torch.equal(first[name], second[name]) for name in first)
