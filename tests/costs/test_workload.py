"""The cost model counts the work of the resolved step: held to the FLOPs that torch counts in a real ascent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale import Dense, Depth, Named, Savings, Scored, SparseSAM, Stage, StagedModel
from ssam_scale.costs.compute import StageTimes, StepTimes, ascent_backward, ascent_forward
from ssam_scale.costs.workload import shape_of, weights_of
from ssam_scale.masks import Mask
from ssam_scale.perturbation import no_phases

WIDTH, SIDE, CLASSES = 8, 6, 4


class Grouped(nn.Module):
    """A block of a ResNeXt at one resolution, so that a weight's FLOPs are in proportion to its elements."""

    def __init__(self) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(WIDTH, 2 * WIDTH, 1, bias=False)
        self.grouped = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 3, padding=1, groups=2, bias=False)
        self.expand = nn.Conv2d(2 * WIDTH, WIDTH, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(torch.tanh(self.grouped(torch.tanh(self.reduce(x)))))


class Pixelwise(nn.Module):
    """A classifier of pixels, all of whose layers see as many of them; its last block may be tied to its first."""

    def __init__(self, block: Callable[[], nn.Module], tied: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(4))
        if tied:
            self.blocks[3].weight = self.blocks[0].weight

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def network(name: str) -> StagedModel:
    torch.manual_seed(0)
    tied = name == "tied"
    model = Pixelwise((lambda: nn.Conv2d(WIDTH, WIDTH, 1, bias=False)) if tied else Grouped, tied)
    return StagedModel(model, [Stage(f"blocks.{i}", block, block) for i, block in enumerate(model.blocks)])


def batch(samples: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(samples, WIDTH, SIDE, SIDE, generator=generator)
    return images, torch.randint(CLASSES, (samples, SIDE, SIDE), generator=generator)


def loss_fn(forward: Callable[[Tensor], Tensor], given: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(forward(given[0]), given[1])


def convolution_backward_flops(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *others: Any, **named: Any
) -> int:
    """Torch's own rule counts the gradient of a weight in groups as if there were one group."""
    computes = others[-1]
    return 2 * math.prod(gradient) * math.prod(weight[1:]) * (computes[0] + computes[1])


def flops_of(run: Callable[[], object]) -> int:
    own = {torch.ops.aten.convolution_backward: convolution_backward_flops}
    with FlopCounterMode(display=False, custom_mapping=own) as counter:
        run()
    return counter.get_total_flops()


def stage_flops(model: StagedModel) -> StepTimes:
    """The FLOPs of each stage by itself, in the place of its seconds."""
    stages = []
    for index in range(len(model.stages)):
        found = {}
        for what in ("both", "no weights", "no input"):
            x = batch()[0].requires_grad_(what != "no input")
            for p in model.parameters():
                p.requires_grad_(what != "no weights")
            out: list[Tensor] = []
            forward = flops_of(lambda x=x, index=index, out=out: out.append(model(x, start=index, stop=index + 1)))
            found[what] = flops_of(lambda out=out: out[0].sum().backward())
        stages.append(StageTimes(forward, found["both"], found["no weights"], found["no input"]))
    model.requires_grad_(True).zero_grad()
    return StepTimes(tuple(stages), 0.0, 0.0)


MASKS: dict[str, Callable[[], Mask]] = {
    "dense": Dense,
    "half of the rows": lambda: Scored("row", 0.5, score="weight", allocation="uniform"),
    "94% of the rows": lambda: Scored("row", 0.06, score="weight", allocation="uniform"),
    # The model takes a stage as a whole: of the first, what is perturbed is what the backward reaches last.
    "some tensors": lambda: Named(r"\.[13]\.(reduce\.)?weight"),
    "last half": lambda: Depth((0.5, 0.5)),
    "second block": lambda: Named(r"blocks\.1\."),
}
SAVINGS = {
    "all savings": Savings(),
    "not elided": Savings(elide=False),
    "prefix not shared": Savings(share_prefix=False),
}


@pytest.mark.parametrize("savings", SAVINGS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["resnext", "tied"])
def test_predicted_flops_are_those_of_the_ascent(name: str, mask: str, savings: str) -> None:
    model = network(name)
    flops = stage_flops(model)
    opt = SparseSAM(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        mask=MASKS[mask](),
        savings=SAVINGS[savings],
        calibrate_every=None,
    )
    if opt.refresh_is_due:
        opt.refresh()
    resolved = opt.resolve()

    def ascend() -> None:
        with torch.enable_grad():
            opt.passes(resolved, loss_fn, [batch()], None, no_phases).ascend()

    shape = shape_of(resolved, weights_of(model), len(model.stages))
    predicted = ascent_forward(flops, shape) + ascent_backward(flops, shape)
    prefix = sum(stage.forward for stage in flops.stages[: resolved.forward_from])  # runs within, for the descent
    assert math.isclose(predicted + prefix, flops_of(ascend), rel_tol=1e-9)
