"""How the tests are shared among workers (`pytest -n auto`, pytest-xdist)."""

from __future__ import annotations

from typing import Any

import pytest

AUTO = 2
"""Workers of `-n auto`. Each has ranks of its own, which stay: three workers take 18 GiB and save next to no time."""

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


def longest_first(items: list[pytest.Item]) -> None:
    """Files with slow tests first; last of these the ones that can be shared out, so that no long one is left over."""
    files_of_slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in files_of_slow, _file(item.nodeid) in APART))


def scheduling(config: pytest.Config, log: Any) -> Any:
    """A file goes to one worker, so that its fixtures are made once; tests of `APART` go wherever a worker is free."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if _file(nodeid) in APART else _file(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
