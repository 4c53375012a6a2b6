"""What weights were before they were written to."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Backup:
    """Functions that undo what was written, and memory for what they write back.

    Nothing in it waits for another process.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []
        self._memory = torch.empty(0)

    @property
    def nbytes(self) -> int:
        """Memory that is held from one time to the next."""
        return self._memory.nbytes

    def memory(self, count: int) -> Tensor:
        """Float32 on the CPU, of shape (count,), to be written to before `keep` is told of it; valid until `restore_`.

        The same each time, because the system clears pages that it hands out, which takes longer than copying to them.
        """
        if self._undo:  # some of it may be in use
            return torch.empty(count)
        if self._memory.numel() < count:
            self._memory = torch.empty(0)
            self._memory = torch.empty(count)
        return self._memory[:count]

    def keep(self, undo: Callable[[], None]) -> None:
        """Take a function that undoes what is to be written, before it is; what never was, it may leave alone."""
        self._undo.append(undo)

    def restore_(self) -> None:
        """Undo everything, the latest first, and forget it."""
        while self._undo:
            self._undo.pop()()

    def release(self) -> None:
        """Give the memory back, when nothing has been written."""
        if not self._undo:
            self._memory = torch.empty(0)
