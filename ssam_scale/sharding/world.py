"""This process among those that torchrun, deepspeed or Slurm started: its rank and its device."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ssam_scale.errors import RankLostError, UserError
from ssam_scale.torch_compat import all_gather_single, keep_flight_records

from .device import DeviceChoice, choose_device, use_device
from .process_group import ProcessGroup, leave_process_group
from .whereabouts import Whereabouts, naming_the_lost

T = TypeVar("T")

# A rank that waits longer for another one ends the job instead of hanging it.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """Rank, world size and device of this process; by default alone on the CPU.

    Attributes:
        rank: of this process in the default process group.
        size: number of processes.
        device: where this process computes.
        timeout: how long a collective waits for another process, in every process group.
        whereabouts: what this process tells the others of where it is.
        records: the folder for PyTorch's flight recorder, which is looked at after a failure; None: it is not kept.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    timeout: timedelta = TIMEOUT
    whereabouts: Whereabouts = field(default_factory=Whereabouts, compare=False, repr=False)
    records: Path | None = None

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints, tracks and writes."""
        return self.rank == 0

    @property
    def first_of_node(self) -> bool:
        """Whether this process is the first on its machine."""
        return not self.launched or os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    def launched(self) -> bool:
        """Whether a launcher started this process, and perhaps others: it has joined a process group."""
        return dist.is_available() and dist.is_initialized()

    @property
    def group(self) -> ProcessGroup:
        """All processes."""
        return ProcessGroup(dist.group.WORLD if self.launched else None)

    @property
    def nodes(self) -> int:
        """How many machines the processes are on, as torchrun, deepspeed or Slurm says."""
        said = (os.environ.get(name) for name in ("GROUP_WORLD_SIZE", "CROSS_SIZE", "SLURM_NNODES"))
        return next((int(count) for count in said if count), 1) if self.launched else 1

    def devices(self) -> str:
        """What all processes compute on, such as `4 × NVIDIA A100-SXM4-40GB (cuda)` or `CPU`. Collective."""
        if self.device.type == "cpu":
            return "CPU"
        name = torch.get_device_module(self.device).get_device_name(self.device)
        here = torch.get_device_module(self.device).device_count()
        if not self.launched and here > 1:
            return f"1 of {here} × {name} ({self.device.type})"
        names = self.each_says(name)
        return f"{', '.join(f'{names.count(n)} × {n}' for n in dict.fromkeys(names))} ({self.device.type})"

    def hosts(self) -> list[str]:
        """The machine of each process, by rank. Collective."""
        return self.each_says(socket.gethostname())

    def first_says(self, value: T) -> T:
        """What the first process gives. Collective."""
        return self.each_says(value)[0]

    def each_says(self, value: T) -> list[T]:
        """What each process gives, by rank. Collective."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def gather(self, numbers: Sequence[float]) -> list[list[float]]:
        """As many numbers of each process, by rank: an all-gather in float64."""
        if self.size == 1:
            return [list(numbers)]
        own = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        return self.gather_tensor(own).tolist()

    def gather_tensor(self, own: Tensor) -> Tensor:
        """The tensors of all processes, of shape (n,) each, as one of shape (processes, n): an all-gather."""
        if self.size == 1:
            return own[None]
        every = own.new_empty(self.size * len(own))
        all_gather_single(every, own)
        return every.view(self.size, -1)

    def naming_the_lost(self) -> AbstractContextManager[None]:
        """Within, a collective that fails because of another process raises a `RankLostError` that names it."""
        return naming_the_lost(self.whereabouts, self.size, self.records)

    def smallest(self, value: int) -> int:
        """The smallest `value` of all processes: an all-reduce."""
        if self.size == 1:
            return value
        smallest = torch.tensor(value, device=self.device)
        dist.all_reduce(smallest, op=dist.ReduceOp.MIN)
        return int(smallest)

    def sum(self, value: Tensor) -> Tensor:
        """`value` summed over all processes, in place: an all-reduce."""
        if self.size > 1:
            dist.all_reduce(value)
        return value


# How many processes were started: of torch's launchers, of Slurm, of Open MPI, of MPICH and Intel MPI, of MVAPICH, of
# Flux, of LSF's jsrun, of Horovod; and for those that say no number, which one this is: of PMIx, of Cray's aprun and
# PALS.
_SIZES = (
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "FLUX_JOB_SIZE",
    "JSM_NAMESPACE_SIZE",
    "HOROVOD_SIZE",
)
_RANKS = ("PMIX_RANK", "ALPS_APP_PE", "PALS_RANKID")
_USE = "start them with torchrun or deepspeed (slurm/imagenet_ssam.sh does)"


def _check_variables() -> None:
    """Refuse what a launcher, or a person, has set by halves.

    Raises:
        UserError: processes do not know of each other, or a variable is no number in its range.
    """
    if "RANK" not in os.environ:
        alone = {**dict.fromkeys(_SIZES, ("", "1")), **dict.fromkeys(_RANKS, ("", "0"))}
        for variable, harmless in alone.items():
            if (said := os.environ.get(variable, "").strip()) not in harmless:
                raise UserError(f"{variable} is {said} but RANK is not set, so each process would train alone; {_USE}")
        return
    for variable in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        if not (said := os.environ.get(variable, "0").strip()).isdecimal():
            raise UserError(f"{variable} is {said!r}, and a whole number is needed; {_USE}")
    rank, size = int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "0"))
    if 0 < size <= rank:
        raise UserError(f"RANK is {rank} and WORLD_SIZE {size}, of which ranks are 0 to {size - 1}; {_USE}")


def _check_meeting() -> None:
    """Refuse a rank that does not know where the others are.

    Raises:
        UserError: it does not.
    """
    needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [variable for variable in needed if not os.environ.get(variable, "").strip()]:
        raise UserError(
            f"RANK is set and {', '.join(missing)} not, by which processes find each other; {_USE}, or unset RANK"
        )


def _no_meeting(rank: int, error: Exception) -> str:
    """Why processes did not find each other."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    if "EADDRINUSE" in str(error):
        return (
            f"MASTER_PORT {place} is taken, by another training on this machine perhaps; give this one its own: "
            "deepspeed --master_port PORT, or torchrun --standalone"
        )
    reason = str(error).strip().splitlines()[0]
    return f"rank {rank} did not reach the others at {place} (MASTER_ADDR, MASTER_PORT): {reason}"


_HOST = "ssam_scale/host/{}"  # of a rank, in the launcher's store: known also of one that comes to nothing more


def host_of(rank: int) -> str:
    """The machine of a process that has joined, of which nothing else need have come."""
    store, key = default_store(), _HOST.format(rank)
    return str(store.get(key).decode()) if store.check([key]) else "an unknown host"


def default_store() -> Any:
    """The store of the default process group, in which processes leave each other notes."""
    return dist.distributed_c10d._get_default_store()


@contextmanager
def join_world(
    timeout: timedelta = TIMEOUT, device: DeviceChoice = "auto", records: Path | None = None
) -> Iterator[World]:
    """Join the processes that torchrun or deepspeed started; alone without their environment variables.

    Uses NCCL on CUDA and gloo on the CPU.

    Args:
        timeout: a collective that waits longer for another process raises.
        device: as `choose_device` takes it.
        records: as of `World`.

    Raises:
        RankLostError: another process is gone, or has not come to a collective in time.
        UserError: processes were started without telling them of each other, or there is not the device that they need
            (see `choose_device`).
    """
    _check_variables()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    own = choose_device(device)
    use_device(own)
    if "RANK" not in os.environ:
        yield World(rank, size, own, timeout)
        return
    _check_meeting()
    if records is not None:
        keep_flight_records(records / "rank_")
    try:
        if own.type == "cuda":
            dist.init_process_group("nccl", timeout=timeout, device_id=own)
        else:
            dist.init_process_group("gloo", timeout=timeout)
    except dist.DistNetworkError as error:
        raise UserError(_no_meeting(rank, error)) from error
    default_store().set(_HOST.format(rank), socket.gethostname())
    store = default_store() if size > 1 else None
    # NCCL ends the process by itself, without an exception, when a collective has waited too long.
    whereabouts = Whereabouts(rank, size, store, 0.9 * timeout.total_seconds() if own.type == "cuda" else None)
    world = World(rank, size, own, timeout, whereabouts, records)
    failed, why = True, ""
    try:
        with world.naming_the_lost():
            yield world
        failed = False
    except BaseException as error:
        why = str(error) if isinstance(error, (UserError, RankLostError)) else f"{type(error).__name__}: {error}"
        raise
    finally:
        whereabouts.leave(" ".join(why.split())[:500])
        # Destroying an NCCL group waits for the collectives under way. After an exception the other processes may never
        # come to them, and NCCL's watchdog would end this process before it could say what went wrong.
        if not (failed and own.type == "cuda"):
            leave_process_group()
