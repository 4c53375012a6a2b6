"""What an error means for a run and for what is sent to its store."""

from __future__ import annotations

from ssam_scale.errors import UserError
from ssam_scale.tracking.signals import Terminated
from ssam_scale.tracking.store import one_line


def outcome(error: BaseException | None) -> tuple[str, str]:
    """MLflow's status of a run that ended with `error`, and why in one line."""
    if error is None or (isinstance(error, SystemExit) and not error.code):
        return "FINISHED", ""
    if isinstance(error, Terminated):
        return "KILLED", error.signal_name
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "SIGINT"
    if isinstance(error, UserError):
        return "FAILED", one_line(error)
    return "FAILED", f"{type(error).__name__}: {one_line(error)}"


def lasting(error: Exception) -> bool:
    """Whether sending again is useless: the request itself is refused, rather than the store being away."""
    status = getattr(error, "get_http_status_code", lambda: 503)()
    return 400 <= status < 500 and status not in (408, 429)
