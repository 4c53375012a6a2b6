"""Tables of what a configuration can name: each entry registers itself in its own file, and a command lists them."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """What is registered under one name.

    Attributes:
        name: as a configuration writes it.
        summary: what it is, in one line.
        paper: where it comes from; empty for what has no paper.
        value: a function or a class.
    """

    name: str
    summary: str
    paper: str
    value: T


class Registry(Mapping[str, Entry[T]]):
    """Entries by name, of a package whose modules register what they define.

    All modules of the package are imported when the registry is first looked at: a new file needs no mention anywhere.

    Args:
        package: absolute name.
    """

    def __init__(self, package: str) -> None:
        self._package = package
        self._entries: dict[str, Entry[T]] = {}
        self._complete = False

    def register(self, name: str, summary: str, paper: str = "") -> Callable[[T], T]:
        """A decorator that registers a function or a class under `name`.

        Args:
            name: as a configuration writes it.
            summary: what it is, in one line.
            paper: where it comes from.

        Raises:
            ValueError: the name is taken.
        """

        def decorate(value: T) -> T:
            if name in self._entries:
                raise ValueError(f"{name} is registered twice in {self._package}")
            self._entries[name] = Entry(name, summary, paper, value)
            return value

        return decorate

    def __getitem__(self, name: str) -> Entry[T]:
        return self._all()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def _all(self) -> dict[str, Entry[T]]:
        if not self._complete:
            package = importlib.import_module(self._package)
            for module in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
                importlib.import_module(f"{self._package}.{module}")
            self._complete = True
        return self._entries
