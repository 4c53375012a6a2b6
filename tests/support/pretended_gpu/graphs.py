"""CUDA graphs of the pretended device: what is launched while one is captured is launched again when it is replayed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from .cuda import waits_of_operators


class _Recorded(TorchDispatchMode):
    """Notes each operator with what it was given and what came out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, waited = kwargs or {}, waits_of_operators()
        result = func(*args, **kwargs)
        if waits_of_operators() > waited:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.operators.append((func, args, kwargs, result))
        return result


class CUDAGraph:
    """A list of operators on the tensors that they were captured with, which stay where they are.

    As on a GPU nothing of Python's is replayed, inputs are read where they were and outputs written where they were.
    Unlike there, what is captured also runs, once.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorded, self._inside = _Recorded(), ExitStack()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        """See `torch.cuda.CUDAGraph`."""
        self._inside.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._inside.enter_context(self._recorded)

    def capture_end(self) -> None:
        """See `torch.cuda.CUDAGraph`."""
        self._inside.close()

    def replay(self) -> None:
        """See `torch.cuda.CUDAGraph`."""
        # What was captured lies below autograd and autocast.
        with _disable_current_modes(), torch.no_grad(), torch.autocast("cuda", enabled=False):
            for func, args, kwargs, before in self._recorded.operators:
                if func.is_view:
                    continue
                written = {id(t) for t in tree_leaves((args, kwargs))}
                for old, new in zip(tree_leaves(before), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and id(old) not in written:
                        old.copy_(new)

    def reset(self) -> None:
        """See `torch.cuda.CUDAGraph`."""
        self._recorded = _Recorded()

    def pool(self) -> tuple[int, int]:
        """See `torch.cuda.CUDAGraph`."""
        return 0, 1
