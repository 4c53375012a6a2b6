"""What a check has found, for a person: a verdict, what was looked at, and what would mend it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ssam_scale.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One line of a check.

    Attributes:
        verdict: ok; warn: a run goes on, and worse than it could; fail: no run would get through.
        what: was looked at, in a word or two.
        said: what was found.
        fix: what would mend it; empty where nothing has to be, or `said` says it.
    """

    verdict: Literal["ok", "warn", "fail"]
    what: str
    said: str
    fix: str = ""

    @property
    def line(self) -> str:
        """What was found and what would mend it."""
        return f"{self.said}; {self.fix}" if self.fix else self.said

    def __str__(self) -> str:
        """The whole line, as `ssam-scale doctor` prints it."""
        return f"{self.verdict:4}  {self.what}: {self.line}"


def checked(what: str, check: Callable[[], str]) -> Finding:
    """What a check says that all is well with, or the UserError that it raises as a failure.

    Args:
        what: is looked at.
        check: returns what was found.
    """
    try:
        return Finding("ok", what, check())
    except UserError as error:
        return Finding("fail", what, str(error))
