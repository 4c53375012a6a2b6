"""Whether all processes are there, and every kind of collective comes back, before a run depends on it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from ssam_scale.errors import UserError

from .world import World, default_store, host_of

# After so long, whoever waits is told for whom; after so long, a collective of some bytes has no excuse. The first one
# over NCCL sets up its connections, which on hundreds of GPUs takes a good part of it.
_TELL_S, _GIVE_UP_S = 5.0, 60.0
_POLL_S = 0.02
_KEY = "ssam_scale/roll_call"
_LOOK = "look at these machines and the network between them (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"


def roll_call(world: World) -> str:
    """Bring all processes together and run one tiny collective of every kind that training uses. Collective.

    Each process notes in the launcher's store which of them it has come to, so that those that wait can name the ones
    that have not. A line tells of them on standard error after 5 s.

    Returns:
        What was run and how long it took, in words.

    Raises:
        UserError: a process has not come within the time of a collective, or a collective does not come back; names
            the processes and their machines.
    """
    began, roll = time.monotonic(), _Roll(world)
    roll.note("there")
    roll.wait_for_all("there", world.timeout)
    seconds = {}
    for name, begin in collectives(world).items():
        first = time.monotonic()
        roll.note(f"in {name}")
        roll.finish(name, begin)
        seconds[name] = time.monotonic() - first
    slowest = max(seconds, key=seconds.__getitem__)
    return (
        f"{', '.join(seconds)} among {world.size} processes in {time.monotonic() - began:.2f} s "
        f"({slowest} {seconds[slowest]:.2f} s)"
    )


def collectives(world: World) -> dict[str, Callable[[], dist.Work]]:
    """One tiny collective of every kind that a step, a mask or a checkpoint uses, by name: each begins it.

    Where training communicates between GPUs, also one between the hosts' memories, by which processes agree on saving.
    """
    size, device = world.size, world.device

    def numbers(count: int) -> torch.Tensor:
        return torch.ones(count, device=device)

    found: dict[str, Callable[[], Any]] = {
        "broadcast": lambda: dist.broadcast(numbers(1), 0, async_op=True),
        "all-reduce": lambda: dist.all_reduce(numbers(1), async_op=True),
        "all-gather": lambda: dist.all_gather([numbers(1) for _ in range(size)], numbers(1), async_op=True),
        "reduce-scatter": lambda: dist.reduce_scatter(numbers(1), [numbers(1) for _ in range(size)], async_op=True),
        "all-to-all": lambda: dist.all_to_all_single(numbers(size), numbers(size), async_op=True),
    }
    if device.type != "cpu":
        hosts = dist.new_group(backend="gloo", timeout=world.timeout)
        found["all-reduce of the hosts"] = lambda: dist.all_reduce(torch.ones(1), group=hosts, async_op=True)
    return found


class _Roll:
    """What each process has come to, in the launcher's store."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._store = default_store()
        # A process may train several times.
        self._turn = int(self._store.add(f"{_KEY}/turn/{world.rank}", 1))

    def note(self, where: str) -> None:
        """This process has come to it."""
        self._store.set(self._key(where, self._world.rank), "")

    def wait_for_all(self, where: str, limit: timedelta) -> None:
        """Until every process has come to it."""
        every = [self._key(where, rank) for rank in range(self._world.size)]
        self._until(lambda: self._store.check(every), where, limit.total_seconds(), "not there yet")

    def finish(self, name: str, begin: Callable[[], dist.Work]) -> None:
        """Until a collective has come back here; in a thread, since not every one says whether it has."""
        failed: list[Exception] = []

        def run() -> None:
            try:
                if self._world.device.type == "cuda":
                    torch.cuda.set_device(self._world.device)  # of this thread
                begin().wait()
                if self._world.device.type == "cuda":  # whose `wait` is for streams only
                    torch.cuda.synchronize(self._world.device)
            except Exception as error:  # of whatever a backend or the network raises
                failed.append(error)

        thread = threading.Thread(target=run, name="roll call", daemon=True)
        thread.start()
        self._until(lambda: not thread.is_alive(), f"in {name}", _GIVE_UP_S, f"not in the first {name}")
        if failed:
            reason = next(iter(str(failed[0]).strip().splitlines()), "") or type(failed[0]).__name__
            raise UserError(f"the first {name} among {self._world.size} processes fails: {reason}; {_LOOK}")

    def _until(self, done: Callable[[], bool], where: str, limit: float, what: str) -> None:
        began, told = time.monotonic(), False
        while not done():
            waited = time.monotonic() - began
            if waited > limit:
                raise UserError(
                    f"the first collectives have not come back for {waited:.0f} s: {self._names(where, what)}; {_LOOK}"
                )
            if waited > _TELL_S and not told:
                told = True
                print(
                    f"ssam-scale: rank {self._world.rank} has waited for {waited:.0f} s: {self._names(where, what)}",
                    file=sys.stderr,
                )
            time.sleep(_POLL_S)

    def _names(self, where: str, what: str) -> str:
        missing = self._missing(where)
        if not missing:
            return f"all {self._world.size} processes are there, and nothing comes through"
        return f"{', '.join(f'rank {rank} ({host_of(rank)})' for rank in missing)}: {what}"

    def _missing(self, where: str) -> list[int]:
        return [rank for rank in range(self._world.size) if not self._store.check([self._key(where, rank)])]

    def _key(self, where: str, rank: int) -> str:
        return f"{_KEY}/{self._turn}/{where}/{rank}"
