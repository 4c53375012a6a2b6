"""What any process asks for, known to all of them at the same step boundary."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ssam_scale.sharding import World


class Asked(NamedTuple):
    """What is asked for.

    Attributes:
        save: a checkpoint.
        end: the end of the run, once it is saved; by a signal.
        fail: the end of the run, because a checkpoint could not be written.
    """

    save: bool = False
    end: bool = False
    fail: bool = False


class Agreement:
    """What any process asks for, without a wait for the device or for a message under way.

    A signal or a clock is seen by one process in its own time; acting on it is collective, so that all must come to it
    between the same two steps. Each call sends what this process asks for by an all-reduce of three bytes in the
    background, over gloo and the host's memory also where training is on GPUs, and returns what the call before has
    come to, which had a whole step to arrive. (A key in the store would have to be polled, and says what is asked for
    but not since which step all have seen it.) On one process the answer is to the call itself.

    Args:
        world: the processes. Collective.
    """

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo", timeout=world.timeout) if world.size > 1 else None
        self._sent: tuple[dist.Work, Tensor] | None = None

    def __call__(self, own: Asked) -> Asked:
        """What any process has asked for in the call before; on one process in this one. Collective."""
        if self._group is None:
            return own
        before = self._answer()
        self._send(own)
        return before

    def now(self, own: Asked) -> Asked:
        """What any process asks for in this call, or has in the one before; waits for all. Collective."""
        if self._group is None:
            return own
        before = self._answer()
        self._send(own)
        return Asked(*(one or other for one, other in zip(before, self._answer(), strict=True)))

    def close(self) -> None:
        """Let what is under way arrive. Collective."""
        self._answer()

    def _send(self, own: Asked) -> None:
        sent = torch.tensor(own, dtype=torch.uint8)
        work = dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._sent = work, sent

    def _answer(self) -> Asked:
        if self._sent is None:
            return Asked()
        work, answer = self._sent
        work.wait()
        self._sent = None
        return Asked(*map(bool, answer.tolist()))
