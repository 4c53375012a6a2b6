"""The times that the cost model needs of the configured network: measured on this machine, or read from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.bench.measured import Measured, load_times, measure_activations, measure_times, this_machine
from ssam_scale.bench.networks import Batch
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.perturbation import StagedModel

from .setup import PRECISIONS, base_optimizer, soft_loss


class ConfiguredWork:
    """A pass as the configuration has it (`bench.parts.Work`)."""

    def __init__(self, config: Config, device: torch.device) -> None:
        self._device, self._precision = device, PRECISIONS[config.train.precision]
        self._loss = soft_loss(config, self._precision)

    def loss_fn(self, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """The configured loss, of labels that are not mixed."""
        return self._loss(forward, batch)

    def autocast(self) -> torch.autocast:
        """The configured precision."""
        return torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32)


def measured(
    config: Config, network: StagedModel, *, images: int, repeats: int, times: Path | None, save: Path | None
) -> Measured:
    """The times of the network's parts: measured here, or read.

    Args:
        config: of the run.
        network: nobody else's; its weights change.
        images: of the pass that is measured; at least 4.
        repeats: of which the median counts.
        times: a file to take them from instead.
        save: a file to write them to.

    Raises:
        UserError: the network does not take the configured images, or the file is of something else.
    """
    expected: dict[str, Any] = {
        "model": config.model.name,
        "resolution": config.data.resolution,
        "precision": config.train.precision,
        "weights": sum(p.numel() for p in network.parameters()),
        "stages": len(network.stages),
    }
    if times is not None:
        found = load_times(times)
        found.check(expected, times)
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, work, side = network.to(device), ConfiguredWork(config, device), config.data.resolution
        batch = (
            torch.randn(images, 3, side, side, device=device),
            torch.randint(config.model.num_classes, (images,), device=device),
        )
        try:
            activations = measure_activations(work, network, batch)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UserError(
                f"data.resolution: {config.model.name} cannot take {images} images of {side} px: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error
        del expected["stages"]
        step = measure_times(work, network, batch, base_optimizer(config, network.model), repeats)
        found = Measured(**expected, images=images, hardware=this_machine(), times=step, activations=activations)
    if save is not None:
        found.save(save)
    return found


def state_bytes_per_weight(config: Config) -> float:
    """What the configured base optimizer keeps after a step, on a small layer."""
    layer = nn.Linear(64, 64)
    optimizer = base_optimizer(config, layer)
    layer(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor) and t.ndim]
    return sum(t.nbytes for t in states) / sum(p.numel() for p in layer.parameters())
