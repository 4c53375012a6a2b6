"""How the tests are shared among workers (`pytest -n auto`, pytest-xdist)."""

from __future__ import annotations

from typing import Any

import pytest

AUTO = 3
"""Workers of `-n auto`: two for two cores, each with ranks of its own that stay, and one for what waits (`WAITING`)."""

APART = {
    f"tests/{file}.py"
    for file in (
        "launch/test_quickstart",
        "sharding/test_equivalence",
        "sharding/test_failures",
        "sharding/test_zero",
        "tracking/test_shutdown",
        "train/test_runs",
    )
}
"""Files whose tests may go to different workers: they are long, and no fixture of theirs serves several of them."""


TOGETHER = "tests/gpu_simulated/"
"""A folder that goes to one worker: its modules share processes."""

WAITING = {
    f"tests/{file}.py"
    for file in (
        "launch/test_slurm",
        "tracking/test_browser",
        "tracking/test_closing",
        "tracking/test_faults",
        "tracking/test_shutdown",
        "train/test_late_ranks",
        "train/test_launcher",
    )
}
"""Files whose tests mostly wait (for time limits, servers, a browser): the last worker's, beside those that compute."""


def longest_first(items: list[pytest.Item]) -> None:
    """Files with slow tests first; last of these the ones that can be shared out, so that no long one is left over."""
    files_of_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in files_of_slow, _file(item.nodeid) in APART))


def scheduling(config: pytest.Config, log: Any) -> Any:
    """A file goes to one worker, so that its fixtures are made once; tests of `APART` go wherever a worker is free.

    The last of three workers takes what waits, and ends with it; the others take that only when all else is done.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = _file(nodeid)
            if file.startswith(TOGETHER):
                return TOGETHER
            return nodeid if file in APART else file

        def _is_for_waiting(self, node: Any) -> bool:
            return len(self.nodes) >= AUTO and node.gateway.id == f"gw{AUTO - 1}"  # in whatever order they start

        def _next_for(self, node: Any) -> str | None:
            waiting = [scope for scope in self.workqueue if _file(scope) in WAITING]
            if self._is_for_waiting(node):
                return next(iter(waiting), None)
            return next((scope for scope in self.workqueue if scope not in waiting), next(iter(waiting), None))

        def _assign_work_unit(self, node: Any) -> None:
            if (scope := self._next_for(node)) is not None:
                self.workqueue.move_to_end(scope, last=False)
            super()._assign_work_unit(node)

        def _reschedule(self, node: Any) -> None:
            if self.workqueue and self._next_for(node) is None and not node.shutting_down:
                node.shutdown()
            else:
                super()._reschedule(node)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
