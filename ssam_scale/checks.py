"""Arguments of Python callers: numbers that are numbers and in their range, and what is said of anything else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any


def check_number(name: str, value: Any, needed: str, valid: Callable[[Any], bool], *, whole: bool = False) -> None:
    """Refuse what is no number, or is out of its range.

    Args:
        name: of the argument.
        value: what was given.
        needed: what would work, in words.
        valid: whether a number is in the range; not-a-number never is.
        whole: whether only whole numbers will do.

    Raises:
        TypeError: it is no number, or no whole one.
        ValueError: it is out of its range.
    """
    is_number = isinstance(value, (int, float, Real)) and value is not True and value is not False
    if not is_number or (whole and not isinstance(value, Integral)):
        kind = "a whole number, " if is_number else ""
        raise TypeError(f"{name} is {described(value)}; {kind}{needed} is needed")
    if value != value or not valid(value):
        raise ValueError(f"{name} is {value}; {needed} is needed")


def check_switch(name: str, value: Any) -> None:
    """Refuse what is neither True nor False: a text counts as true, whatever it says.

    Raises:
        TypeError: it is another value.
    """
    if value is not True and value is not False:
        raise TypeError(f"{name} is {described(value)}; True or False is needed")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of a few words.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(choices)} is needed")


def matches_none(names: Sequence[str]) -> str:
    """What to say of an expression that matches the name of no parameter, of which there are these."""
    some = ", ".join(names[:3]) + (f", … {names[-1]}" if len(names) > 3 else "")
    return f"matches none of the {len(names)} parameters: {some}"


def described(value: Any) -> str:
    """What something is, in a few words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        kinds = sorted({type(item).__name__ for item in value})
        return f"a {type(value).__name__} of {', '.join(kinds) or 'nothing'}"
    shown = " ".join(repr(value).split())
    return f"{shown if len(shown) <= 40 else shown[:40] + '…'} ({type(value).__name__})"
