"""The ways of training that every backend is held to, by name."""

from __future__ import annotations

import itertools
from dataclasses import fields

import torch

from ssam_scale import (
    CosineRadius,
    DescentSamples,
    Fresh,
    Friendly,
    Gate,
    Interval,
    LRRadius,
    Momentum,
    Previous,
    VaSSO,
    Window,
)
from tests.support.training import RHO, STEPS, Case

_CASES = [
    *(Case(f, m) for f, m in itertools.product(("resnet", "vit"), ("dense", "element", "tensor", "moving cut"))),
    Case("vit", "fixed cut", accumulation=2),
    Case("vit", "dense", norm="dense", accumulation=2),
    Case("resnet", "element", norm="dense"),
    Case("vit", "tensor", norm="dense", optimizer="adamw"),
    Case("vit", "moving cut", optimizer="adamw"),
    Case("vit", "moving cut", clip=0.2, rho=(RHO, RHO / 2)),
    Case("vit", "element", rho=(RHO, 0.0), schedule=CosineRadius(STEPS)),
    Case("vit", "moving cut", norm="calibrated", accumulation=2),
    Case("vit", "element", norm="calibrated", rho=(RHO, 0.0, 2 * RHO)),
    Case("vit", "tensor", norm="calibrated", adaptive=True, optimizer="adamw"),
    Case("resnet", "dense", adaptive=True, schedule=LRRadius(0.5)),
    Case("resnet", "moving cut", direction=Fresh(0.5)),
    Case("convnext", "moving cut", direction=Fresh(0.3), accumulation=2, optimizer="adamw"),
    Case("vit", "dense", direction=Fresh(0.25), schedule=Interval(2, Window(2))),
    Case("vit", "moving cut", gate=Gate(STEPS, delta=0.5, first=0.5), accumulation=2),
    Case("resnet", "element", gate=Gate(STEPS, delta=0.5, first=0.5), norm="dense", gap=0.3),
    Case("vit", "element", gap=0.6, rho=(RHO, RHO / 2), accumulation=2),
    Case("vit", "element", direction=Fresh(0.5, "random"), accumulation=2),
    Case("vit", "moving cut", direction=Fresh(0.25, "highest_loss")),
    Case("resnet", "tensor", descent=DescentSamples(0.5), accumulation=2),
    Case("vit", "moving cut", descent=DescentSamples(0.4), direction=Friendly()),
    Case("vit", "dense", descent=DescentSamples(0.5, "highest_loss"), direction=Fresh(0.5, "highest_loss")),
    Case("vit", "fixed cut", descent=DescentSamples(0.25, "highest_loss"), adaptive=True, optimizer="adamw"),
    Case("resnet", "moving cut", descent=DescentSamples(0.75, "random"), direction=Fresh(0.5, "random")),
    Case("vit", "element", loss_budget=0.05, rho=(RHO, RHO / 2), schedule=CosineRadius(STEPS)),
    Case("vit", "moving cut", loss_budget=0.01, direction=Fresh(0.5), accumulation=2),
    Case("vit", "element", direction=Momentum()),
    Case("vit", "moving cut", direction=Momentum(), optimizer="adamw"),
    Case("resnet", "dense", direction=Momentum(), norm="dense", rho=(RHO, RHO / 2)),
    Case("vit", "tensor", direction=Previous(), accumulation=2),
    Case("vit", "moving cut", direction=Friendly()),
    Case("resnet", "element", direction=Friendly(0.5, sigma=0.5, lmbda=0.6), adaptive=True),
    Case("vit", "row", direction=VaSSO(theta=0.4), optimizer="adamw"),
    Case("convnext", "fixed cut"),
    Case("by names", "fixed cut"),
    Case("by names", "moving cut", accumulation=2),
    Case("by names", "element"),
    Case("vit", "moving cut", precision=torch.bfloat16, accumulation=2),
    Case("resnet", "row", norm="dense", accumulation=2),
    Case("vit", "row", adaptive=True, rho=(RHO, 0.0)),
    Case("resnet", "1:4", optimizer="adamw"),
    Case("vit", "1:4", norm="calibrated"),
    Case("vit", "dynamic", accumulation=2),
    Case("vit", "block"),
    Case("resnet", "norm"),
    Case("vit", "named", norm="calibrated"),
    Case("vit", "late", optimizer="adamw"),
    Case("resnet", "row"),
    # Not the ResNet: without the statistics of the batch it is so badly conditioned that 0.2% more rho, far less than
    # bf16 rounds, takes the weights 20% off their way.
    Case("vit", "element", precision=torch.bfloat16, optimizer="adamw"),
    Case("vit", "cut by cost"),
]
CASES = {str(case): case for case in _CASES}
"""Every mask, norm, optimizer, schedule and precision; each option with several others."""


def options_of(case: Case) -> set[tuple[str, str]]:
    """What a case says, as pairs of a field and its value."""
    return {(field.name, repr(getattr(case, field.name))) for field in fields(case)}


def each_option_once() -> list[str]:
    """Names of a few cases among which each mask, norm, optimizer, … of all cases comes at least once.

    Run on a backend, they cover every pair of that backend and an option.
    """
    wanted = set().union(*map(options_of, CASES.values()))
    chosen: list[str] = []
    while wanted:
        chosen.append(max(CASES, key=lambda name: len(options_of(CASES[name]) & wanted)))
        wanted -= options_of(CASES[chosen[-1]])
    for name in list(chosen):  # what later ones have made superfluous
        others = set().union(*(options_of(CASES[other]) for other in chosen if other != name))
        if options_of(CASES[name]) <= others:
            chosen.remove(name)
    return chosen
