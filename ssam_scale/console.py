"""The console that people read on: tables, progress, and lines that may name any path."""

from __future__ import annotations

from rich.console import Console

# Where output goes to a file or a pipe there is no terminal to ask for its width.
_PIPE_COLUMNS = 160


def console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console on standard output that prints text as it is: a path may hold square brackets.

    Args:
        stderr: on standard error instead, for progress beside results that may go to a file.
        quiet: print nothing, on the processes that do not report.
    """
    made = Console(stderr=stderr, quiet=quiet, markup=False, highlight=False)
    if not made.is_terminal:
        made.width = _PIPE_COLUMNS
    return made
