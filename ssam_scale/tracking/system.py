"""What a machine does while a run trains on it, by MLflow's monitors of processor, memory, disk, network and GPUs."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from ssam_scale.tracking.store import one_line, open_store

_log = logging.getLogger(__name__)

EVERY_S = 10.0
PREFIX = "system/"
"""Of the metrics' names, by which MLflow's interface puts them on a page of their own."""


class SystemMonitor:
    """Records use of processor, memory, disk, network and GPUs every `EVERY_S` seconds while it is entered.

    MLflow's own `SystemMetricsMonitor` gives up for good when its server is away once.

    Args:
        log: records metrics at a step.
        began: when the run began, in seconds since 1970: steps are multiples of `EVERY_S` since then, also of a run
            that is resumed.
        node: the machine's name, a part of the metrics' names; None: there is only one.
    """

    def __init__(self, log: Callable[[Mapping[str, float], int], None], began: float, node: str | None = None) -> None:
        self._log, self._began = log, began
        self._prefix = PREFIX if node is None else f"{PREFIX}{node}/"
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="SystemMonitor", daemon=True)

    def __enter__(self) -> SystemMonitor:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(EVERY_S)

    def _watch(self) -> None:
        try:
            monitors = _monitors()
            while not self._end.wait(EVERY_S):
                found: dict[str, float] = {}
                for monitor in monitors:
                    monitor.collect_metrics()
                    found |= monitor.aggregate_metrics()
                    monitor.clear_metrics()
                step = int((time.time() - self._began) / EVERY_S)
                self._log({self._prefix + name: float(value) for name, value in found.items()}, step)
        except Exception as error:  # of whatever a driver or a container refuses; no training depends on it
            _log.warning("what the machine does is no longer recorded: %s: %s", type(error).__name__, error)


@contextmanager
def watched_for(uri: str, run_id: str, node: str) -> Iterator[None]:
    """Within the `with`, this machine is recorded in a run that a process on another one tracks.

    Where its store does not answer from here, a warning is all that comes of it.

    Args:
        uri: of the store.
        run_id: of the run.
        node: this machine's name.
    """
    try:
        client = open_store(uri, create=False)
        began = client.get_run(run_id).info.start_time / 1000.0
    except Exception as error:  # MLflow lets its stores' errors through, of every kind
        _log.warning("%s is not recorded: %s", node, one_line(error))
        yield
        return
    told = False

    def log(metrics: Mapping[str, float], step: int) -> None:
        nonlocal told
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        try:
            client.log_batch(run_id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])
        except Exception as error:
            if not told:
                _log.warning("%s is not recorded while the tracking store is away: %s", node, one_line(error))
            told = True

    with SystemMonitor(log, began, node):
        yield


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    try:
        monitors.append(GPUMonitor())
    except Exception as error:  # no GPU, no driver, or nvidia-ml-py is not installed
        _log.debug("GPUs are not watched: %s", error)
    return monitors
