"""FSDP2's reduce-scatter of whole gradients, of which only some elements are sent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from .needs import Elements


@dataclass(frozen=True)
class Slot:
    """The gradient of one parameter in what FSDP scatters.

    Attributes:
        numel: elements of the whole gradient.
        room: elements that each process is given of it, with padding.
        lengths: elements that each process is given of it, without.
        whole: which elements are sent; None: all of them.
        local: which elements of this process's share those are.
        counts: how many elements are sent to each process.
    """

    numel: int
    room: int
    lengths: Sequence[int]
    whole: Elements | None
    local: Elements | None
    counts: Sequence[int]


class PackedReduceScatter(ReduceScatter):
    """Sends what `slots` say, padded to the process that is sent most; elsewhere the result is zero.

    Where not all of the gradients are there (a pass did not use a parameter) it sends everything.

    Args:
        usual: what FSDP uses otherwise, which allocates as before.
        slots: in the order in which FSDP has them.
        rank: index of this process in the group.
    """

    def __init__(self, usual: Any, slots: Sequence[Slot], rank: int) -> None:
        self._usual, self._slots, self._rank = usual, slots, rank
        self._totals = [sum(counts) for counts in zip(*(slot.counts for slot in slots), strict=True)]
        self._starts = [0, *accumulate(slot.room for slot in slots)]

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As before."""
        result: Tensor = self._usual.allocate(size, dtype=dtype, device=device)
        return result

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """`input_tensor` is the gradients' shares for process 0, then those for process 1, and so on."""
        if input_tensor.numel() != self._starts[-1] * len(self._totals):
            return self._usual(output_tensor, input_tensor, group, op, async_op)
        output_tensor.zero_()
        width = max(self._totals)
        if not width:
            return None
        received = input_tensor.new_empty(width)
        dist.reduce_scatter_single(received, self._packed(input_tensor, width), op=op, group=group)
        taken = 0
        for slot, start in zip(self._slots, self._starts, strict=False):
            values = received[taken : taken + slot.counts[self._rank]]
            taken += len(values)
            share = output_tensor[start : start + slot.lengths[self._rank]]
            if slot.whole is None:
                share.copy_(values)
            elif slot.local is not None:
                slot.local.put(share, values)
        return None

    def _packed(self, gradients: Tensor, width: int) -> Tensor:
        shares = gradients.view(len(self._totals), -1)
        of_slots = []
        for slot, start in zip(self._slots, self._starts, strict=False):
            # Shares are consecutive rows, so that one after the other they are the gradient, and then padding.
            whole = shares[:, start : start + slot.room].reshape(-1)[: slot.numel]
            of_slots.append((whole if slot.whole is None else slot.whole.take(whole)).split(list(slot.counts)))
        padding = gradients.new_zeros(width)
        pieces: list[Tensor] = []
        for total, of_process in zip(self._totals, zip(*of_slots, strict=True), strict=True):
            pieces += [*of_process, padding[: width - total]]
        return torch.cat(pieces)
