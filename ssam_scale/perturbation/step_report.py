"""What one optimizer step did: the record that hooks, timers and tracking read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from torch import Tensor

from ssam_scale.masks import Plan

StepKind: TypeAlias = Literal["base", "sparse", "dense", "calibrating", "reused", "free"]
"""| kind | the step |
|---|---|
| `base` | is the base optimizer's: no ascent pass |
| `sparse` | perturbs by an ascent pass that computes the gradient of what is perturbed and no more |
| `dense` | perturbs by an ascent pass that computes the gradient of every parameter, as its mask or norm asks |
| `calibrating` | the same, for once: its gradient tells κ |
| `free` | perturbs along what is known before it (momentum, the gradient before), and has no ascent pass |
| `reused` | has no ascent pass, and adds what the last one brought to its gradient (LookSAM) |
"""

Rehearsed: TypeAlias = Literal["base", "dense", "own"]
"""A step to compare with: the base optimizer's; dense SAM's, of all weights on the whole batch; one with an ascent as
the optimizer's own mask, norm, direction and savings make it, that calibrates nothing."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did. Nothing in it has made the host wait for the device, and reading a tensor does.

    Attributes:
        loss: at w, of this process's part of the ascent's batch, detached; what a closure returned; None: not known.
        kind: see `StepKind`.
        plan: what was perturbed; empty where nothing was.
        radius: the largest ρ of the parameter groups; 0 without an ascent.
        kappa: ‖m ⊙ g‖ / ‖g‖ of the last step that knew both, float32 of shape (); not a number before.
        skipped: whether the perturbation was left out because the ascent gradient was not finite, bool of shape ().
        density: share of the trained weights that was perturbed.
        left_out: whether the whole step was, on all processes alike, because its loss or gradient was not finite.
    """

    loss: Tensor | None
    kind: StepKind
    plan: Plan
    radius: float
    kappa: Tensor
    skipped: Tensor
    density: float
    left_out: bool = False
