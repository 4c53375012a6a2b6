"""New processes on this machine, joined in a process group for one measurement."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ssam_scale.cores import usable_cores
from ssam_scale.ended import signal_words
from ssam_scale.errors import UserError
from ssam_scale.sharding import leave_process_group
from ssam_scale.sharding.device import choose_device, use_device

_TIMEOUT = timedelta(minutes=60)
_MISTAKE = "mistake"  # the file in which a process leaves what a person can mend


def bench_device() -> torch.device:
    """Where this machine is measured: on its first GPU, or on the CPU.

    Raises:
        UserError: there seems to be a GPU that torch cannot use.
    """
    device = choose_device(ask_for_cpu="CUDA_VISIBLE_DEVICES= before the command")
    use_device(device)
    return device


def _entry(rank: int, function: Callable[..., Any], size: int, cuda: bool, folder: str, args: tuple[Any, ...]) -> None:
    os.dup2(2, 1)  # DeepSpeed logs to stdout, which is for the rows
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    use_device(device)
    # NCCL refuses two processes on one GPU; gloo takes them.
    backend = "nccl" if cuda and size <= torch.cuda.device_count() else "gloo"
    torch.set_num_threads(max(1, usable_cores() // size))
    # DeepSpeed looks for them, as a launcher sets them, although the processes are joined already.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_SIZE": str(size)}
    if size > 1:
        store = dist.FileStore(f"{folder}/store", size)  # no port that another program may take in the meantime
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        result = function(rank, size, device, *args)
    except UserError as error:
        Path(folder, _MISTAKE).write_text(str(error))
        sys.exit(2)
    if rank == 0:
        Path(folder, "result.json").write_text(json.dumps(result))
    if size > 1:
        leave_process_group()


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """For what a process inherits that is started inside: importing DeepSpeed logs to stdout, which is for the rows."""
    kept = os.dup(1)
    try:
        os.dup2(2, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def on_ranks(size: int, function: Callable[..., Any], *args: Any, imported: Sequence[str] = ()) -> Any:
    """What `function(rank, size, device, *args)` returns on the first of `size` new processes.

    They share this machine's cores, and its GPUs if there are any; more than one are joined in a process group.

    Args:
        size: number of processes.
        function: importable; its result can be written as JSON.
        args: what else it is given; can be pickled.
        imported: modules that are imported once for all processes of this and later calls, where there is no GPU: the
            processes are forks then. What is measured must not depend on it, as memory does.

    Raises:
        UserError: `function` raised one; a process was killed, as one is that asks for more memory than there is; or as
            `bench_device`.
    """
    cuda = bench_device().type == "cuda"
    # Where CUDA was looked for, as importing DeepSpeed does, a fork can not use it.
    forks = bool(imported) and not torch.cuda.is_available()
    if forks:
        mp.get_context("forkserver").set_forkserver_preload(list(imported))
        with _stdout_to_stderr():
            forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        try:
            start = "forkserver" if forks else "spawn"
            mp.start_processes(_entry, (function, size, cuda, folder, args), nprocs=size, start_method=start)
        except mp.ProcessExitedException as error:
            if (said := Path(folder, _MISTAKE)).exists():
                raise UserError(said.read_text()) from None
            if error.signal_name is None:
                raise
            number = signal.Signals[error.signal_name]
            memory = "; does this machine have the memory for so many?" if number == signal.SIGKILL else ""
            raise UserError(
                f"process {error.error_index} of {size} was killed by {signal_words(number)}{memory}"
            ) from None
        return json.loads(Path(folder, "result.json").read_text())
