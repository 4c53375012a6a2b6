"""What any process asks for, known to all of them at the same step boundary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ssam_scale.sharding import World
from ssam_scale.sharding.world import TIMEOUT


class Agreement:
    """Flags of every process, joined by `or`, without a wait for the device or for a message under way.

    A signal or a clock is seen by one process in its own time; acting on it is collective, so that all must come to it
    between the same two steps. Each call sends this process's flags by an all-reduce of a few bytes in the background,
    over gloo and the host's memory also where training is on GPUs, and returns what the call before has come to: that
    had a whole step to arrive. (A key in the store would have to be polled, and says what is asked for but not since
    which step all have seen it.) On one process the answer is to the call itself.

    Args:
        world: the processes. Collective.
    """

    def __init__(self, world: World) -> None:
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if world.size > 1 else None
        self._sent: tuple[dist.Work, Tensor] | None = None

    def __call__(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags of the call before any process had set. Collective, with as many flags in each call."""
        if self._group is None:
            return flags
        before = self._answer() or (False,) * len(flags)
        self._send(flags)
        return before

    def now(self, *flags: bool) -> tuple[bool, ...]:
        """Which flags of this call, or of the one before, any process has set; waits for all. Collective."""
        if self._group is None:
            return flags
        before = self._answer() or (False,) * len(flags)
        self._send(flags)
        return tuple(one or other for one, other in zip(before, self._answer(), strict=True))

    def close(self) -> None:
        """Let what is under way arrive. Collective."""
        self._answer()

    def _send(self, flags: Sequence[bool]) -> None:
        sent = torch.tensor(flags, dtype=torch.uint8)
        work = dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._sent = work, sent

    def _answer(self) -> tuple[bool, ...]:
        if self._sent is None:
            return ()
        work, answer = self._sent
        work.wait()
        self._sent = None
        return tuple(map(bool, answer.tolist()))
