"""What `torch.cuda` lacks in a CPU build of torch, for the pretended device. Imported once, after `library.load`."""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch

from .timeline import Timeline

TIMELINE = Timeline()
"""What streams were made to wait for, and when the host waited."""


class Stream(torch.Stream):
    """A stream of the pretended device: operators run when they are called, and what should order them is noted."""

    def __new__(cls, device: Any = None, priority: int = 0, **options: Any) -> Stream:
        if "stream_id" in options:
            return super().__new__(cls, **options)
        return super().__new__(cls, device=_device(device))

    def wait_stream(self, stream: Any) -> None:
        """See `torch.cuda.Stream`."""
        TIMELINE.wait(self.stream_id, TIMELINE.record(stream.stream_id))

    def record_event(self, event: Any = None) -> Event:
        """See `torch.cuda.Stream`."""
        event = event if event is not None else Event()
        event.record(self)
        return event  # type: ignore[no-any-return]

    def wait_event(self, event: Any) -> None:
        """See `torch.cuda.Stream`."""
        TIMELINE.wait(self.stream_id, event.recorded)

    def synchronize(self) -> None:
        """See `torch.cuda.Stream`."""
        TIMELINE.host_waits("stream.synchronize", TIMELINE.record(self.stream_id))

    def query(self) -> bool:
        """See `torch.cuda.Stream`."""
        return True

    @property
    def cuda_stream(self) -> int:
        """See `torch.cuda.Stream`."""
        return int(self.stream_id)

    def __enter__(self) -> Stream:
        self._before = current_stream(self.device)
        set_stream(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        set_stream(self._before)


class Event:
    """An event of the pretended device."""

    def __init__(
        self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any
    ) -> None:
        self.recorded: Any = None
        self._seconds = 0.0  # of the host's clock, when it was recorded: operators run when they are launched

    def record(self, stream: Any = None) -> None:
        """See `torch.cuda.Event`."""
        self._seconds = time.perf_counter()
        self.recorded = TIMELINE.record((stream if stream is not None else current_stream()).stream_id)

    def wait(self, stream: Any = None) -> None:
        """See `torch.cuda.Event`."""
        TIMELINE.wait((stream if stream is not None else current_stream()).stream_id, self.recorded)

    def query(self) -> bool:
        """See `torch.cuda.Event`."""
        return True

    def synchronize(self) -> None:
        """See `torch.cuda.Event`."""
        TIMELINE.host_waits("event.synchronize", self.recorded)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1000.0 * (end._seconds - self._seconds)


_library: ctypes.CDLL
_devices = 1


def waits_of_operators() -> int:
    """How often the host has waited for values or copies since the process began."""
    return int(_library.host_waits_so_far())


def freed_addresses() -> list[int]:
    """Where device memory was freed since the last call."""
    out = (ctypes.c_void_p * 4096)()
    found: list[int] = []
    while count := _library.take_freed(out, 4096):
        found += [int(address) for address in out[:count] if address]
    return found


def _device(device: Any = None) -> torch.device:
    if device is None:
        return torch.device("cuda", _library.get_device())
    if isinstance(device, int):
        return torch.device("cuda", device)
    found = torch.device(device)
    return torch.device("cuda", _library.get_device()) if found.index is None else found


def current_stream(device: Any = None) -> Stream:
    """See `torch.cuda`."""
    index = _device(device).index
    return Stream(stream_id=_library.get_stream(index), device_index=index, device_type=1)


def set_stream(stream: Any) -> None:
    """See `torch.cuda`."""
    if stream is not None:
        _library.set_stream(stream.device_index, stream.stream_id)


@contextmanager
def _stream(stream: Any) -> Iterator[None]:
    if stream is None:
        yield
        return
    before = current_stream(stream.device)
    set_stream(stream)
    try:
        yield
    finally:
        set_stream(before)


def _synchronize(device: Any = None) -> None:
    TIMELINE.host_waits("torch.cuda.synchronize", TIMELINE.everything())


def _set_device(device: Any) -> None:
    index = _device(device).index
    if index >= _devices:
        raise RuntimeError("CUDA error: invalid device ordinal")
    if index >= 0:
        _library.set_device(index)


def _exchange(device: int) -> int:
    before = int(_library.get_device())
    if device >= 0:
        _set_device(device)
    return before


def _resize_storage(storage: Any, bytes: int) -> Any:
    """`UntypedStorage.resize_`, which a build without CUDA refuses."""
    if storage.device.type != "cuda":
        return _resize_on_host(storage, bytes)
    torch.ops.pretended.resize_storage(storage, bytes)
    return storage


def _clone_storage(storage: Any) -> Any:
    """`UntypedStorage.clone`, which a build without CUDA refuses."""
    if storage.device.type != "cuda":
        return _clone_on_host(storage)
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone().untyped_storage()


_resize_on_host, _clone_on_host = torch.UntypedStorage.resize_, torch.UntypedStorage.clone


def install(library: ctypes.CDLL, devices: int) -> None:
    """Put it all in place."""
    global _library, _devices
    _library, _devices = library, devices
    # What chooses its imports by whether torch was built with CUDA must have done so.
    for module in (
        "torch._dynamo",
        "torch._inductor",
        "torch.distributed.fsdp",
        "ssam_scale.models",
        "timm",
        "deepspeed",
    ):
        importlib.import_module(module)
    for name in ("memory_allocated", "max_memory_allocated", "host_waits_so_far"):
        getattr(library, name).restype = ctypes.c_long
    capability = (9, 0)
    properties = SimpleNamespace(
        name="Pretended GPU", major=9, minor=0, total_memory=80 << 30, multi_processor_count=1, warp_size=32
    )
    functions: dict[str, Callable[..., Any]] = {
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "is_available": lambda: devices > 0,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "device_count": lambda: devices,
        "current_device": lambda: int(library.get_device()),
        "set_device": _set_device,
        "_exchange_device": lambda device: _exchange(device),
        "_maybe_exchange_device": lambda device: _exchange(device),
        "synchronize": _synchronize,
        "current_stream": current_stream,
        "default_stream": lambda device=None: Stream(stream_id=0, device_index=_device(device).index, device_type=1),
        "set_stream": set_stream,
        "stream": _stream,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "is_bf16_supported": lambda including_emulation=True: True,
        "memory_allocated": lambda device=None: int(library.memory_allocated()),
        "max_memory_allocated": lambda device=None: int(library.max_memory_allocated()),
        "memory_reserved": lambda device=None: int(library.memory_allocated()),
        "max_memory_reserved": lambda device=None: int(library.max_memory_allocated()),
        "reset_peak_memory_stats": lambda device=None: library.reset_peak_memory_stats(),
        "mem_get_info": lambda device=None: (
            properties.total_memory - int(library.memory_allocated()),
            properties.total_memory,
        ),
        "set_per_process_memory_fraction": lambda fraction, device=None: library.set_memory_limit(
            ctypes.c_long(int(fraction * properties.total_memory))
        ),
        "memory_stats": lambda device=None: {},
        "empty_cache": lambda: None,
        "ipc_collect": lambda: None,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: False,
    }
    for name, function in functions.items():
        setattr(torch.cuda, name, function)
    torch.cuda.Stream = torch.cuda.streams.Stream = Stream  # type: ignore[misc,assignment]
    torch.cuda.Event = torch.cuda.streams.Event = Event  # type: ignore[misc,assignment]
    from .graphs import CUDAGraph

    for place in (torch.cuda, torch.cuda.graphs):
        place.CUDAGraph = CUDAGraph  # type: ignore[misc,assignment]
        place.graph_pool_handle = functions["graph_pool_handle"]  # type: ignore[assignment]
    torch.cuda._initialized = True
    torch.UntypedStorage.resize_ = _resize_storage  # type: ignore[method-assign]
    torch.UntypedStorage.clone = _clone_storage  # type: ignore[method-assign]
    nothing = SimpleNamespace(rangePushA=lambda message: 0, rangePop=lambda: 0, markA=lambda message: None)
    torch.cuda.nvtx._nvtx = nothing  # type: ignore[assignment]
    # Operators draw from the CPU's generator.
    torch.cuda.default_generators = (torch.default_generator,) * max(devices, 1)
    below: dict[str, Callable[..., Any]] = {
        "_cuda_getDevice": lambda: int(library.get_device()),
        "_cuda_setDevice": lambda device: _set_device(device),
        "_cuda_exchangeDevice": lambda device: _exchange(device),
        "_cuda_maybeExchangeDevice": lambda device: _exchange(device),
        "_cuda_getDeviceCount": lambda: devices,
        "_cuda_isInBadFork": lambda: False,
        "_host_emptyCache": lambda: None,
        "_cuda_set_sync_debug_mode": lambda mode: library.set_sync_debug_mode(mode),
        "_cuda_get_sync_debug_mode": lambda: int(library.get_sync_debug_mode()),
    }
    for name, function in below.items():
        setattr(torch._C, name, function)
