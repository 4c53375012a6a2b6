"""How often a run has gone back to a checkpoint because a loss was not finite, and where to: kept beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssam_scale.sharding import World

NAME = ".rollbacks.json"


@dataclass(frozen=True)
class Rollbacks:
    """The rollbacks of a run, the earliest first.

    A file of its own: a run that is ended before its next checkpoint has gone back all the same, and goes on in the
    order that it went back for.

    Attributes:
        places: epochs done and images seen of the next one, where each has gone back to.
    """

    places: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, directory: Path, world: World) -> Rollbacks:
        """Those of the run whose checkpoints are in a folder, as the first process sees them. Collective."""
        try:
            found = json.loads((directory / NAME).read_text()) if world.first else []
            places = tuple((int(epoch), int(seen)) for epoch, seen in found)
        except (OSError, ValueError, TypeError):
            places = ()
        return cls(world.first_says(places))

    def and_to(self, epoch: int, seen: int) -> Rollbacks:
        """These, and one more."""
        return Rollbacks((*self.places, (epoch, seen)))

    def write(self, directory: Path) -> None:
        """Keep them."""
        (directory / NAME).write_text(json.dumps(self.places))

    @property
    def reshuffled(self) -> Mapping[int, Sequence[tuple[int, int]]]:
        """As `ImageLoader.reshuffle` takes them: the rest of an epoch has another order after each."""
        found: dict[int, list[tuple[int, int]]] = {}
        for number, (epoch, seen) in enumerate(self.places, start=1):
            found.setdefault(epoch, []).append((seen, number))
        return found


def forget_rollbacks(directory: Path) -> None:
    """Of an earlier run, whose checkpoints are gone."""
    (directory / NAME).unlink(missing_ok=True)
