"""A checkpoint that several processes write: the first one learns from each what it has written, and then names it."""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from ssam_scale.sharding import World
from ssam_scale.sharding.world import default_store


@dataclass(frozen=True)
class Written:
    """What one process has written of a checkpoint.

    Attributes:
        files: as `state.json` describes them.
        failure: why it is not complete; empty if it is.
        not_finite: whether that is because a weight is not finite, and not the disk's fault.
    """

    files: dict[str, Any] = field(default_factory=dict)
    failure: str = ""
    not_finite: bool = False


class Together:
    """What the processes tell the first one about a checkpoint, in the launcher's store.

    No collective: each tells it from a thread of its own, while training goes on.

    Args:
        world: the processes.
        name: of this checkpoint, in this attempt; the same on all.
    """

    def __init__(self, world: World, name: str) -> None:
        self._world, self._name, self._store = world, name, default_store()

    @staticmethod
    def attempt() -> str:
        """A name that no other attempt has."""
        return secrets.token_hex(8)

    def tell(self, written: Written) -> None:
        """Tell the first process. Does not wait."""
        self._store.set(self._key(self._world.rank), json.dumps(asdict(written)))

    def hear(self) -> list[Written]:
        """What each process has told, by rank; waits for it as long as for a collective. On the first process.

        A process that says nothing in this time has failed.
        """
        deadline = time.monotonic() + self._world.timeout.total_seconds()
        heard = []
        for rank in range(self._world.size):
            key = self._key(rank)
            while not (told := self._store.check([key])) and time.monotonic() < deadline:
                time.sleep(0.02)
            if told:
                heard.append(Written(**json.loads(self._store.get(key))))
                self._store.delete_key(key)
            else:
                heard.append(Written(failure=f"rank {rank} has not written its part in {self._world.timeout}"))
        return heard

    def _key(self, rank: int) -> str:
        return f"ssam_scale/checkpoint/{self._name}/{rank}"
