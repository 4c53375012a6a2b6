"""What the configured plan would cost on a large network by arithmetic alone, which needs no GPU to be said."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from ssam_scale.config.knobs import Knobs
from ssam_scale.config.schema import Config
from ssam_scale.config.study import LoadedStudy
from ssam_scale.costs.compute import (
    StageTimes,
    StepShape,
    StepTimes,
    base_seconds,
    predicted_ascent_seconds,
    predicted_over_base,
)
from ssam_scale.costs.workload import weights_of
from ssam_scale.errors import UserError
from ssam_scale.perturbation import StagedModel

from .optimizer import base_optimizer
from .predict_cost import ascents_of, configured_sam, phases, plans_of, reference_seconds, staged_model, times_of

# FLOPs of a stage are in proportion to the images; BatchNorm takes two at least.
_IMAGES = 2
_SIDE = 224


class ArithmeticCost:
    """The FLOPs of a plan's mean step over the base optimizer's, on one network.

    Perturbing, choosing masks and launching kernels take no FLOPs here; a GPU takes its time for them, most of all
    beside a small ascent.

    Args:
        config: with the network and the side of its images; what it says of the perturbation does not matter.

    Raises:
        UserError: timm cannot build it, or it does not take such images.
    """

    def __init__(self, config: Config) -> None:
        self._network = staged_model(config)
        side = config.data.resolution
        self._flops = stage_flops(self._network, torch.empty(_IMAGES, 3, side, side, device="meta"))

    def over_base(self, config: Config) -> float:
        """Of the plan in a configuration of this network.

        Raises:
            UserError: its mask does not go with the network.
        """
        base, extra = 0.0, reference_seconds(config, self._flops)
        for share, steps in phases(config, self._network):
            flops = times_of(self._flops, weights_of(self._network), len(self._network.stages))
            base += share * base_seconds(flops)
            if config.perturbation is None:
                continue
            with torch.random.fork_rng(devices=[]):
                opt = configured_sam(config, self._network, base_optimizer(config, self._network.model))
                ascents = ascents_of(config, self._network, opt, plans_of(config, opt), 1, steps)
            extra += share * sum(ascent.share * predicted_ascent_seconds(flops, ascent.shape) for ascent in ascents)
        return 1.0 + extra / base


def predictor(loaded: LoadedStudy, networks: Mapping[str, str]) -> Callable[[str, Knobs], dict[str, float | None]]:
    """A function that says what a method of a study would cost on large networks, at 224 px; None where it cannot be.

    Args:
        loaded: the study.
        networks: timm's names, by the names in the result.
    """
    sized = {
        name: {"model": {"name": timm}, "data.resolution": _SIDE, "data.eval_resolution": _SIDE}
        for name, timm in networks.items()
    }
    costs: dict[str, ArithmeticCost] = {}

    def predict(method: str, knobs: Knobs) -> dict[str, float | None]:
        found: dict[str, float | None] = {}
        for name, own in sized.items():
            if name not in costs:
                costs[name] = ArithmeticCost(loaded.config(own=own))
            try:
                found[name] = costs[name].over_base(loaded.config(method, knobs, own))
            except UserError:  # a mask of groups that this network cannot make, or of names that it has not
                found[name] = None
        return found

    return predict


def stage_rows(network: StagedModel, side: int) -> list[dict[str, Any]]:
    """Of each stage, its share of a network, and what a cut before it would share and perturb.

    Keys: `stage`, `block` (its class), `weights` and `flops` (of a forward of one image), their shares
    `weights_share` and `compute_share`; and of a cut that begins here `cut`, as a mask of the pattern depth takes it,
    `perturbed_weights` and `perturbed_compute`, the shares from this stage to the end, `shared_compute`, that of the
    stages before it, and `step_over_base`, the FLOPs of a step with this cut over the base optimizer's.

    Args:
        network: in stages.
        side: of the images, pixels.

    Raises:
        UserError: it does not take such images.
    """
    try:
        times = stage_flops(network, torch.empty(_IMAGES, 3, side, side, device="meta"))
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{type(network.model).__name__} cannot take images of {side} px: {reason}") from error
    count = len(network.stages)
    weights, owners = [0] * count, network.stages_of_parameters()
    for name, parameter in network.model.named_parameters():
        weights[owners[name][0]] += parameter.numel()
    flops = [stage.forward / _IMAGES for stage in times.stages]
    rows = []
    for i, stage in enumerate(network.stages):
        shape = StepShape(i, (0.0,) * i + (1.0,) * (count - i), sum(weights[i:]))
        rows.append(
            {
                "stage": stage.name,
                "block": type(stage.block).__name__,
                "cut": i / count,
                "weights": weights[i],
                "flops": flops[i],
                "weights_share": weights[i] / sum(weights),
                "compute_share": flops[i] / sum(flops),
                "perturbed_weights": sum(weights[i:]) / sum(weights),
                "perturbed_compute": sum(flops[i:]) / sum(flops),
                "shared_compute": sum(flops[:i]) / sum(flops),
                "step_over_base": predicted_over_base(times, [shape]),
            }
        )
    return rows


def stage_flops(network: StagedModel, images: Tensor) -> StepTimes:
    """FLOPs of each stage, in the place of seconds; nothing is computed.

    Args:
        network: in stages.
        images: on the device `meta`.
    """
    shapes = copy.deepcopy(network).to("meta")
    stages, hidden = [], images
    for index in range(len(shapes.stages)):
        forward, backward, after = _flops(shapes, index, hidden, weights=True, inputs=True)
        _, no_weights, _ = _flops(shapes, index, hidden, weights=False, inputs=True)
        _, no_input, _ = _flops(shapes, index, hidden, weights=True, inputs=False)
        stages.append(StageTimes(forward, backward, no_weights, no_input))
        hidden = after
    return StepTimes.proportional(tuple(stages))


def _of_convolution_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *arguments: Any, **out: Any
) -> int:
    """FLOPs of a convolution's backward by shapes: each of both gradients takes as many as the forward.

    torch (2.13) counts the weight's as if there were no groups: those of a depthwise convolution its number of channels
    too many times.
    """
    *_, transposed, _output_padding, _groups, wanted = arguments
    return sum(wanted[:2]) * conv_flop_count(list(x), list(weight), list(gradient), transposed)


_MAPPING = {torch.ops.aten.convolution_backward: _of_convolution_backward}


def _flops(
    network: StagedModel, stage: int, images: Tensor, *, weights: bool, inputs: bool
) -> tuple[float, float, Tensor]:
    """Of a stage's forward and backward, and what it puts out.

    Args:
        network: on the device `meta`.
        stage: its number.
        images: what goes in.
        weights: whether the gradients of its weights are computed.
        inputs: whether that of its input is.
    """
    for p in network.parameters():
        p.requires_grad_(weights)
    x = images.detach().requires_grad_(inputs)
    with FlopCounterMode(display=False) as forward:
        out: Tensor = network(x, start=stage, stop=stage + 1)
    with FlopCounterMode(display=False, custom_mapping=_MAPPING) as backward:
        if out.requires_grad:
            out.backward(torch.empty_like(out))
    return float(forward.get_total_flops()), float(backward.get_total_flops()), out
