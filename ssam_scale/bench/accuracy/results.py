"""What has finished of a study, one line of JSON a run, whatever moment the command was killed at."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ssam_scale.errors import UserError

NAME = "results.jsonl"


class Results:
    """The lines of a study, by key.

    Args:
        folder: of the study; need not be there.

    Attributes:
        path: of the file.
        lines: what has finished; of a key that is there twice, the first.

    Raises:
        UserError: the file is of something else.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.lines: dict[str, dict[str, Any]] = {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        whole, _, _ = text.rpartition("\n")  # behind it, what a killed process had not written to its end
        for number, line in enumerate(whole.split("\n"), 1):
            if not line:
                continue
            try:
                found = json.loads(line)
                self.lines.setdefault(found["key"], found)
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}:{number}: not a line that `ssam-scale bench accuracy` has written; remove it, and "
                    "the run is done again"
                ) from None

    def append(self, line: Mapping[str, Any]) -> None:
        """Add a run that has finished; when this returns it is on the disk.

        Raises:
            UserError: the disk is full, or nothing can be written there.
        """
        try:
            self._drop_half_a_line()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror or error}") from error
        self.lines.setdefault(line["key"], dict(line))

    def _drop_half_a_line(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the `with`, no other process does runs of the same study; the system lets go of it at any end.

    Raises:
        UserError: one does already.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder}: another `ssam-scale bench accuracy` is at work there; --dry-run and --report can look "
                "at it, and --folder names another place"
            ) from None
        yield
