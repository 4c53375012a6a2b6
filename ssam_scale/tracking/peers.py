"""Why the job ended, told from any rank to the one that tracks.

A failure on rank 1 reaches rank 0 as a broken connection or as the launcher's SIGTERM. So that the run is marked by the
cause and not by its echo, the first rank to fail leaves a note in the process group's store.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any

_KEY = "ssam_scale/tracking/outcome"

# A store whose host is gone may block for its own timeout of minutes; nobody waits that long for a note.
_PATIENCE_S = 2.0


def leave_note(status: str, line: str) -> None:
    """Record `status` and its reason, unless another rank already has. Never raises; does nothing on one process."""

    def write(store: Any) -> None:
        store.compare_set(_KEY, "", json.dumps({"status": status, "line": f"rank {_rank()}: {line}"}))

    _with_store(write)


def read_note() -> tuple[str, str] | None:
    """Status and reason that another rank left, or None. Never raises."""
    found: list[tuple[str, str]] = []

    def read(store: Any) -> None:
        if store.check([_KEY]):
            note = json.loads(store.get(_KEY))
            found.append((str(note["status"]), str(note["line"])))

    _with_store(read)
    return found[0] if found else None


def _with_store(action: Any) -> None:
    # Never import torch for this: where it is not loaded there is no process group.
    dist = sys.modules.get("torch.distributed")
    if dist is None or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return

    def attempt() -> None:
        # Any error means that the store is gone with its process; there is then nobody to tell.
        try:
            action(dist.distributed_c10d._get_default_store())
        except Exception:
            return

    thread = threading.Thread(target=attempt, name="peers", daemon=True)
    thread.start()
    thread.join(_PATIENCE_S)


def _rank() -> int:
    dist = sys.modules["torch.distributed"]
    return int(dist.get_rank())
