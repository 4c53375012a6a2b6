"""The cost model counts the work of the resolved step: held to the FLOPs that torch counts in a real ascent."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale import Dense, Depth, Fresh, Named, Savings, Scored, SparseSAM, Stage, StagedModel
from ssam_scale.costs.compute import PassTimes, StageTimes, StepTimes, ascent_backward, ascent_forward, pass_seconds
from ssam_scale.costs.workload import shape_of, trained_shares, weights_of
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
    return StepTimes.proportional(tuple(stages))


class Launches(TorchDispatchMode):
    """How many operators have run: on a GPU, about what a pass of few images takes time for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view and func is not torch.ops.aten.detach.default
        return func(*args, **kwargs or {})


def launches_of(run: Callable[[], object]) -> int:
    with Launches() as launches:
        run()
    return launches.count


def stage_launches(model: StagedModel, images: int) -> tuple[StageTimes, ...]:
    """The operators of each stage by itself, in the place of its seconds; the loss's are the last one's."""
    stages, last = [], len(model.stages) - 1
    for index in range(last + 1):
        found = {}
        for what in ("both", "no weights", "no input"):
            x, labels = batch(images)
            x.requires_grad_(what != "no input")
            for p in model.parameters():
                p.requires_grad_(what != "no weights")
            out: list[Tensor] = []

            def run(x: Tensor, index: int = index) -> Tensor:
                hidden: Tensor = model(x, start=index, stop=index + 1)
                return hidden

            def forward(x: Tensor = x, labels: Tensor = labels, index: int = index, out: list[Tensor] = out) -> None:
                out.append(loss_fn(run, (x, labels)) if index == last else run(x, index))

            launched = launches_of(forward)
            upstream = torch.ones_like(out[0])
            found[what] = launches_of(lambda out=out, upstream=upstream: out[0].backward(upstream))
            model.zero_grad()
        stages.append(StageTimes(launched, found["both"], found["no weights"], found["no input"]))
    model.requires_grad_(True)
    return tuple(stages)


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


FROZEN = {
    "first half": r"blocks\.[01]\.",
    "the second": r"blocks\.1\.",
    "the last": r"blocks\.3\.",
    "the convolutions in groups": "grouped",
}


@pytest.mark.parametrize("mask", ["dense", "half of the rows", "some tensors", "last half"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_predicted_flops_are_those_of_both_passes_with_frozen_weights(frozen: str, mask: str) -> None:
    model = network("resnext")
    flops = stage_flops(model)
    for name, p in model.named_parameters():
        p.requires_grad_(re.search(FROZEN[frozen], name) is None)
    weights, depth = weights_of(model), len(model.stages)
    flops = replace(flops, trained=trained_shares(weights, depth))
    assert math.isclose(pass_seconds(flops), flops_of(lambda: loss_fn(model, batch()).backward()), rel_tol=1e-9)
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = SparseSAM(model, torch.optim.SGD(trained, lr=0.1), mask=MASKS[mask]())
    if opt.refresh_is_due:
        opt.refresh()
    resolved = opt.resolve()
    shape = shape_of(resolved, weights, depth)
    step = pass_seconds(flops) + ascent_forward(flops, shape) + ascent_backward(flops, shape)
    assert math.isclose(step, flops_of(lambda: opt.step(loss_fn, batch())), rel_tol=1e-9)


@pytest.mark.parametrize("mask", ["dense", "last half"])
def test_predicted_launches_of_a_small_ascent_are_those_that_it_makes(mask: str) -> None:
    """An ascent on an eighth of the batch launches what one on all of it does; in proportion it were an eighth."""
    model = network("resnext")
    passes = tuple(PassTimes(images, stage_launches(model, images)) for images in (2, 16))
    times = StepTimes(passes, 0.0, 0.0, images=16)
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=MASKS[mask](), direction=Fresh(1 / 8))
    resolved = opt.resolve()

    def ascend() -> None:
        with torch.enable_grad():
            opt.passes(resolved, loss_fn, [batch(16)], None, no_phases).ascend()

    shape = shape_of(resolved, weights_of(model), len(model.stages))
    made = launches_of(ascend) - sum(stage.forward for stage in times.stages[: resolved.forward_from])
    predicted, in_proportion = (
        ascent_forward(each, shape) + ascent_backward(each, shape)
        for each in (times, StepTimes.proportional(times.stages))
    )
    print(f"{mask}: predicted {predicted / made:.2f} of the launches made, in proportion {in_proportion / made:.2f}")
    # Beside the stages there are the few that begin the backward and return the loss.
    assert made - 5 <= predicted <= made
    assert in_proportion / made < 0.13
