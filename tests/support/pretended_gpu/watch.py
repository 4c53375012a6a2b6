"""What a GPU would have done: launches by phase of the step, and accesses of two streams that nothing orders."""

from __future__ import annotations

import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import GridExecutor

from .cuda import TIMELINE, freed_addresses, waits_of_operators
from .graphs import CUDAGraph

# Operators that launch nothing: they make views, or ask for memory.
_FREE = {
    *("alias", "as_strided", "chunk", "detach", "diagonal", "expand", "flatten", "narrow", "permute", "real", "select"),
    *("slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unflatten", "unfold", "unsqueeze"),
    *("view", "view_as", "_unsafe_view", "_reshape_alias", "lift_fresh", "set_", "resize_", "record_stream"),
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "is_pinned", "_local_scalar_dense"),
}
# Tensors that one launch of a foreach operator takes, by the number of lists; and its blocks of 65,536 elements
# (ATen/native/cuda/MultiTensorApply.cuh).
_FOREACH_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
_FOREACH_BLOCKS, _FOREACH_BLOCK = 320, 65_536
_JOINED = 128  # tensors that one launch joins (ATen/native/cuda/Shape.cu)


def launches_of(operator: str, arguments: Any) -> int:
    """How many kernels an operator of CUDA's launches, at least.

    Args:
        operator: its name, without `aten::`.
        arguments: what it is called with.
    """
    if operator in _FREE:
        return 0
    lists = [a for a in arguments if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor)]
    if operator in ("cat", "stack") and lists:
        return -(-len(lists[0]) // _JOINED)
    if not operator.startswith(("_foreach_", "_fused_")) or not lists:
        return 1
    unlike = any(len({t.dtype for t in one}) > 1 for one in lists) or any(
        t.stride() != first.stride() for one in lists[1:] for first, t in zip(lists[0], one, strict=True)
    )
    if unlike:  # one after the other
        return len(lists[0])
    depth = min(max(len(lists) + (not operator.endswith("_")), 1), 5)
    blocks = sum(-(-t.numel() // _FOREACH_BLOCK) for t in lists[0])
    return max(-(-len(lists[0]) // _FOREACH_TENSORS[depth]), -(-blocks // _FOREACH_BLOCKS))


_PYTHON = Path(traceback.__file__).parent


class Watch(TorchDispatchMode):
    """Counts what runs inside on the device. Backwards run in the calling thread, so that all of it is seen.

    Attributes:
        launches: kernels by phase, then by operator.
        races: accesses to memory that another stream wrote or read, with nothing that makes them wait.
        host_waits: waits of the host for the device, by what was called and where.

    Args:
        races: whether to look for them, which takes time.
    """

    def __init__(self, *, races: bool = False) -> None:
        super().__init__()
        self._looks_for_races = races
        self.launches: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.races: list[str] = []
        self.host_waits: Counter[tuple[str, str]] = Counter()
        self._phase, self._interpreting = "else", False
        self._accesses: defaultdict[int, dict[_Access, tuple[int, str]]] = defaultdict(
            dict
        )  # by address of the storage

    @contextmanager
    def phases(self, name: str) -> Iterator[None]:
        """For `SparseSAM(phases=...)`."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def total(self, phase: str) -> int:
        """Kernels of a phase."""
        return sum(self.launches[phase].values())

    def __enter__(self) -> Any:
        TIMELINE.place = place
        TIMELINE.waits = self.host_waits
        self._inside = ExitStack()
        self._inside.enter_context(torch.autograd.set_multithreading_enabled(False))
        self._inside.enter_context(patch.object(GridExecutor, "__call__", self._counting(GridExecutor.__call__)))
        self._inside.enter_context(patch.object(CUDAGraph, "replay", self._counting_graphs(CUDAGraph.replay)))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._inside.close()

    def _counting(self, interpret: Callable[..., None]) -> Callable[..., None]:
        """A launch of Triton's, whose interpreter copies what it is given to the host and back."""

        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches[self._phase][args[0].fn.__name__] += 1
            before, self._interpreting = self._interpreting, True
            try:
                interpret(*args, **kwargs)
            finally:
                self._interpreting = before

        return launch

    def _counting_graphs(self, replay: Callable[[CUDAGraph], None]) -> Callable[[CUDAGraph], None]:
        def launch(graph: CUDAGraph) -> None:
            self.launches[self._phase]["graph"] += 1
            replay(graph)

        return launch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._interpreting:
            return func(*args, **(kwargs or {}))
        waited = waits_of_operators()
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if waits_of_operators() > waited:
            self.host_waits[name, place()] += 1
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)]
        devices = {t.device for t in tensors if t.device.type == "cuda"}
        if devices and (launched := launches_of(name, args)):
            self.launches[self._phase][name] += launched
            if self._looks_for_races:
                self._access(func, name, args, result)
        return result

    def _access(self, func: Any, name: str, args: Any, result: Any) -> None:
        """Note what an operator reads and writes, and compare it with what other streams did there."""
        stream = torch.cuda.current_stream().stream_id
        number = TIMELINE.launch(stream)
        for address in freed_addresses():
            self._accesses.pop(address, None)
        accesses = {id(t): (t, True) for t in tree_leaves(result) if isinstance(t, Tensor)}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value):
                if isinstance(t, Tensor):
                    accesses[id(t)] = t, writes
        for t, writes in accesses.values():
            t = t._local_tensor if isinstance(t, DTensor) else t
            if t.device.type == "cuda" and t.numel():
                here = self._accesses[t.untyped_storage().data_ptr()]
                start, end = _span(t)
                for other, (at, by) in here.items():
                    apart = other.end <= start or end <= other.start
                    if apart or other.stream == stream or not (writes or other.writes):
                        continue
                    if not TIMELINE.ordered((other.stream, at), stream):
                        did = "wrote" if other.writes else "read"
                        self.races.append(
                            f"{name} does not wait for {by}, which {did} the same on another stream: {place()}"
                        )
                here[_Access(start, end, stream, writes)] = number, name


class _Access(NamedTuple):
    start: int
    end: int
    stream: int
    writes: bool


def place() -> str:
    """The innermost line that is neither torch's, nor DeepSpeed's, nor Python's own."""
    for frame, line in traceback.walk_stack(None):
        path = Path(frame.f_code.co_filename)
        if "pretended_gpu" not in path.parts and "site-packages" not in path.parts and not path.is_relative_to(_PYTHON):
            return f"{'/'.join(path.parts[-2:])}:{line}"
    return "?"


def _span(t: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's memory, from its first element to behind its last one."""
    start = t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return start, start + (last + 1) * t.element_size()
