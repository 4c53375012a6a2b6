"""Real processes joined by gloo: the harness of everything that must hold on N ranks.

The ranks are started once for each number of them and then serve one test after another, because starting processes,
joining them and what DeepSpeed does first takes longer than most of what they are for. After an exception, all ranks of
a number are ended, and the next test gets new ones. What a test changes in a rank must be as before when it ends:
`_reset` puts back what is cheap to, and `_left_changed` looks for patches of our own modules that a test has left.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import io
import json
import multiprocessing
import os
import pickle
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from ssam_scale.sharding import World, join_world
from tests.support.patches import functional_put_back
from tests.support.processes import free_port

# Importing takes longer than much of what the processes do. Ranks are forks of one process that has imported these; it
# has not looked for a GPU, and finds none (tests.support.gpus), so that it may be forked.
_PRELOAD = [
    "networkx",  # of torch's, which imports it late
    "pytest",
    "scipy.linalg",  # of numba's
    "torch._dynamo",
    "torch._inductor.compile_fx",  # of DeepSpeed's stage 3
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "ssam_scale.models.timm_model",  # and with it timm
    "ssam_scale.perturbation",
    "ssam_scale.sharding.zero.stage3",  # and with it DeepSpeed
]
# For whole trainings as well. FFCV compiles when it is imported.
_OF_WHOLE_RUNS = ["ssam_scale.data.ffcv_loader", "mlflow"]
# How long the other ranks may take to say what they think of one rank's failure.
_PATIENCE_S = 5.0


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(world, *args)` on each of `size` ranks; their results (tensors in plain containers), by rank.

    Args:
        size: how many processes.
        function: of a module, so that a rank can import it.
        args: can be pickled.

    Raises:
        RankError: on some rank it raised.
    """
    if size not in _POOLS:
        _POOLS[size] = _Pool(size)
    try:
        return _POOLS[size](function, args)
    except BaseException:
        _POOLS.pop(size).kill()
        raise


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """`function(world, *args)` in this process, without any process group."""
    return function(World(), *args)


def end_pools() -> None:
    """End all ranks."""
    while _POOLS:
        _POOLS.popitem()[1].close()


class RankError(Exception):
    """What happened on the ranks that failed."""


class _Pool:
    """So many ranks, which wait for something to do."""

    def __init__(self, size: int) -> None:
        context, port = _context(), free_port()
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        job = pickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(job)
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting: dict[Any, int] = {connection: rank for rank, connection in enumerate(self._connections)}
        while waiting and (ready := wait(list(waiting), _PATIENCE_S if failures else None)):
            for connection in ready:
                rank = waiting.pop(connection)
                try:
                    failed, said = connection.recv()
                except EOFError:
                    self._processes[rank].join(_PATIENCE_S)
                    failed, said = True, f"ended with exit code {self._processes[rank].exitcode}"
                if failed:
                    failures[rank] = said
                else:
                    results[rank] = torch.load(io.BytesIO(said))
        if failures:
            size = len(self._connections)
            raise RankError("\n".join(f"rank {rank} of {size}: {failures[rank]}" for rank in sorted(failures)))
        return [results[rank] for rank in range(len(results))]

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(_PATIENCE_S)
        self.kill()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


_POOLS: dict[int, _Pool] = {}


def start_fresh_rank(rank: int, size: int, port: int, log: Path, function: Callable[..., Any], *args: Any) -> Any:
    """A process of its own that calls `function(*args)`, for tests in which a rank ends: it joins nobody by itself.

    Returns:
        The `multiprocessing.Process`. What it says is in `log`. An exception ends it with exit code 1.
    """
    process = _context().Process(target=_logged, args=(rank, size, port, log, function, args), daemon=True)
    process.start()
    return process


def run_fresh_ranks(size: int, function: Callable[..., Any], *args: Any, timeout: float = 600) -> str:
    """`function(*args)` on `size` processes of their own, which must end with exit code 0; what they said."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        port, logs = free_port(), [Path(folder) / f"{rank}.log" for rank in range(size)]
        processes = []
        for rank, log in enumerate(logs):
            processes.append(start_fresh_rank(rank, size, port, log, function, *args))
            stack.callback(processes[-1].kill)
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        said = "".join(log.read_text() for log in logs)
        codes = [process.exitcode for process in processes]
        assert codes == [0] * size, f"exit codes {codes}:\n{said}"
        return said


def start_launcher(size: int, folder: Path, function: Callable[..., Any], *args: Any) -> Any:
    """A process that does what torchrun does: starts ranks, passes SIGTERM on, and ends all when one has failed.

    Args:
        size: how many ranks; 1: a process that was started without a launcher, as a person does it.
        folder: gets `pids` (JSON, of the ranks), `codes` (JSON, of those that have ended) and `<rank>.log`.
        function: what each rank calls.
        args: with these.

    Returns:
        The `multiprocessing.Process` of the launcher.
    """
    process = _context().Process(target=_launch, args=(size, free_port(), folder, function, args), daemon=True)
    process.start()
    return process


def _launch(size: int, port: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    ranks: dict[int, int] = {}

    def pass_on(number: int, frame: Any = None) -> None:
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    signal.signal(signal.SIGTERM, pass_on)
    for rank in range(size):
        if not (pid := os.fork()):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if size > 1:
                _tell_place(rank, size, port)
            return _alone_with(folder / f"{rank}.log", function, args)
        ranks[pid] = rank
    _put(folder / "pids", list(ranks))
    codes: dict[int, int] = {}
    while ranks:
        pid, status = os.wait()
        codes[ranks.pop(pid)] = code = os.waitstatus_to_exitcode(status)
        _put(folder / "codes", codes)
        if code:
            pass_on(signal.SIGTERM)


def _put(file: Path, value: Any) -> None:
    """Write a file so that who reads it finds all of it."""
    file.with_suffix(".new").write_text(json.dumps(value))
    file.with_suffix(".new").rename(file)


def _logged(rank: int, size: int, port: int, log: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _tell_place(rank, size, port)
    _alone_with(log, function, args)


def _alone_with(log: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    with log.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    gc.freeze()
    function(*args)


def preload_for_whole_runs() -> None:
    """Let ranks that are not started yet have imported what a training needs: worth it if there are several."""
    _PRELOAD.extend(name for name in _OF_WHOLE_RUNS if name not in _PRELOAD)


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _tell_place(rank: int, size: int, port: int) -> None:
    """What torchrun would tell a process of the others."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in place.items()}}


def _serve(rank: int, size: int, port: int, connection: Connection) -> None:
    """What a rank does: one job after another until nobody can send any more, or one fails."""
    _tell_place(rank, size, port)
    gc.freeze()  # what was imported: each collection would look through it for a third of a second
    try:
        with join_world() as world:
            while True:
                try:
                    job = connection.recv_bytes()
                except EOFError:
                    return
                function, args = pickle.loads(job)
                before = _constants()
                with _reset(), functional_put_back():
                    result = io.BytesIO()
                    torch.save(function(world, *args), result)
                # gloo may abort the process at exit while wrappers of a group are alive.
                gc.collect()
                gc.freeze()  # what the job imported
                if changed := _left_changed(before):
                    raise AssertionError(
                        f"{getattr(function, '__qualname__', function)} leaves {', '.join(changed)} changed"
                    )
                connection.send((False, result.getvalue()))
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send((True, traceback.format_exc()))
        # Without a word to the other ranks, which may wait in a collective, and end with this one's pool.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


@contextlib.contextmanager
def _reset() -> Iterator[None]:
    """The same start for every job: random numbers, threads, environment; nothing compiled."""
    environment, folder, dtype = dict(os.environ), Path.cwd(), torch.get_default_dtype()
    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_default_dtype(dtype)
    torch._dynamo.reset()


def _constants() -> Mapping[tuple[str, str], Any]:
    """What our modules and their classes hold, by place. Not what is None, which is to be filled in at first use."""
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ssam_scale":
            for key, value in list(vars(module).items()):
                found[name, key] = value
                if isinstance(value, type) and value.__module__ == name:
                    found |= {(f"{name}.{key}", attribute): own for attribute, own in vars(value).items()}
    # PyTorch wraps the `step` of an optimizer's class when the first one is made.
    return {place: inspect.unwrap(v) if callable(v) else v for place, v in found.items() if v is not None}


def _left_changed(before: Mapping[tuple[str, str], Any]) -> list[str]:
    now = _constants()
    changed = [place for place, value in before.items() if now.get(place) is not value]
    # Not the step of an optimizer's class, which torch wraps when it makes the first one.
    return [".".join(place) for place in changed if not getattr(now.get(place), "hooked", False)]
