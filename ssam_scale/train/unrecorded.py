"""What is measured and not recorded yet, or different on each process: all that an epoch's middle adds to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.methods import Average
from ssam_scale.sharding import World

from .progress import Progress


class Unrecorded:
    """What hooks have summed up since their last record, so that a resumed run records what an uninterrupted one does.

    Args:
        world: the processes.

    Attributes:
        losses: of this process, of each step since the last record of losses: on its device, of shape ().
        densities: share of the weights that each of these steps perturbed.
        counts: perturbed weights of each parameter, summed over the steps since the last record of them.
        counted: how many steps these are.
        seconds: that the epoch has taken so far.
        left_out: steps of the run so far that were left out, because something was not finite.
        left_out_in_a_row: of them, those up to now without any other between.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.losses: list[Tensor] = []
        self.densities: list[float] = []
        self.counts: dict[str, int] = {}
        self.counted = 0
        self.seconds = 0.0
        self.left_out = self.left_out_in_a_row = 0

    def state_dict(self) -> dict[str, Any]:
        """The attributes, `losses` of all processes as a tensor of shape (processes, steps) if any. Collective."""
        every: Tensor | list[Any] = self._world.gather_tensor(torch.stack(self.losses)) if self.losses else []
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {"losses": every, **plain, "densities": list(self.densities), "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; on another number of processes each has the mean of all losses."""
        saved: Tensor | list[Any] = state_dict["losses"]
        self.losses = []
        if isinstance(saved, Tensor):
            own = saved[self._world.rank] if len(saved) == self._world.size else saved.mean(0)
            self.losses = list(own.to(self._world.device))
        self.densities, self.counts = list(state_dict["densities"]), dict(state_dict["counts"])
        for name in _PLAIN:
            setattr(self, name, state_dict.get(name, 0))  # what older checkpoints have not is none


_PLAIN = ("counted", "seconds", "left_out", "left_out_in_a_row")


class LocalBuffers:
    """Floating-point buffers that each process has its own of within an epoch: BatchNorm's running statistics.

    At the end of an epoch they are averaged over the processes (`AverageBatchNormStatistics`), and those of a
    checkpoint's model are everybody's.

    Args:
        network: whose buffers they are.
        averages: of its weights and buffers.
        world: the processes.
        progress: whether an epoch goes on.
    """

    def __init__(self, network: nn.Module, averages: Sequence[Average], world: World, progress: Progress) -> None:
        self._network, self._averages, self._world, self._progress = network, averages, world, progress

    def state_dict(self) -> dict[str, Any]:
        """`sizes` by name, and `values`, float64 of shape (processes, all of them). Nothing between epochs. Collective.

        Float64 holds every smaller dtype exactly.
        """
        own = self._own()
        if self._world.size == 1 or not self._progress.seen or not own:
            return {}
        flat = torch.cat([buffer.detach().flatten().double() for buffer in own.values()])
        return {
            "sizes": {name: buffer.numel() for name, buffer in own.items()},
            "values": self._world.gather_tensor(flat),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned; on another number of processes each has the mean.

        Raises:
            ValueError: it is of other buffers; nothing was loaded then.
        """
        if not state_dict:
            return
        own, saved = self._own(), state_dict["values"]
        if state_dict["sizes"] != {name: buffer.numel() for name, buffer in own.items()}:
            raise ValueError("the processes' buffers are of another network")
        flat = saved[self._world.rank] if len(saved) == self._world.size else saved.mean(0)
        for buffer, values in zip(own.values(), flat.split(list(state_dict["sizes"].values())), strict=True):
            buffer.copy_(values.view(buffer.shape))

    def _own(self) -> dict[str, Tensor]:
        """Those that are saved with a model, and their averages, by name."""
        named = {
            f"{prefix}.{name}" if prefix else name: buffer
            for prefix, module in self._network.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_floating_point() and name not in module._non_persistent_buffers_set
        }
        for number, average in enumerate(self._averages):
            named |= {f"{name} averaged {number}": buffer for name, buffer in average.buffers.items()}
        return named
