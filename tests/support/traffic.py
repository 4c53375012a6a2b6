"""What a process sends, counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ssam_scale.sharding.collectives import Traffic


def sent_by(work: Callable[[], Any]) -> Traffic:
    """What this process sends while `work` runs."""
    with Traffic() as traffic:
        work()
    return traffic
