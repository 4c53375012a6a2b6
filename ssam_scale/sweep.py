"""Runs of a sweep, each in processes and a folder of its own, some at a time; what is done is not done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from ssam_scale.child import command, environment
from ssam_scale.config.knobs import flat
from ssam_scale.config.load import dump, load
from ssam_scale.config.sweep import LoadedSweep, SweepRun
from ssam_scale.cores import usable_cores
from ssam_scale.ended import signal_words
from ssam_scale.errors import UserError
from ssam_scale.folders import RESULT, write_whole
from ssam_scale.tracking.shutdown import SAVED

CONFIG, LOG = "config.yaml", "train.log"
"""In a run's folder: its configuration, and what it printed."""

# What a training ends with that was told to end: it has saved, or had not begun yet; torchrun's is not its own.
_TOLD = (SAVED, -signal.SIGTERM, 128 + signal.SIGTERM)
_EVERY_S = 0.2

State = Literal["done", "begun", "to do"]


@dataclass(frozen=True)
class Slot:
    """A part of this machine that does one run at a time.

    Attributes:
        gpus: as CUDA_VISIBLE_DEVICES names them; empty: the CPU.
        processes: of each run.
        threads: of each process; None: as it would have anyway.
    """

    gpus: tuple[str, ...]
    processes: int
    threads: int | None


def slots(at_once: int, processes: int, gpus: Sequence[str]) -> list[Slot]:
    """This machine in equal parts.

    Args:
        at_once: how many.
        processes: of each run.
        gpus: of this machine, as CUDA_VISIBLE_DEVICES names them.

    Raises:
        UserError: there are too few GPUs.
    """
    if gpus and at_once * processes > len(gpus):
        raise UserError(
            f"--at-once {at_once} with --processes {processes} needs {at_once * processes} GPUs; there are {len(gpus)}"
        )
    threads = None if at_once == 1 and processes == 1 else max(1, usable_cores() // (at_once * processes))
    shares = [tuple(gpus[place * processes : (place + 1) * processes]) for place in range(at_once)]
    return [Slot(share, processes, threads) for share in shares]


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [each for each in given.split(",") if each.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def state_of(sweep: LoadedSweep, run: SweepRun) -> State:
    """What has become of a run.

    Raises:
        UserError: its folder is that of another configuration.
    """
    folder = sweep.folder / run.name
    try:
        kept = {each.name for each in folder.iterdir() if not each.name.startswith(".")}
    except FileNotFoundError:
        return "to do"
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}; give --folder") from None
    if not kept - {CONFIG, LOG}:  # nothing was trained
        return "to do"
    if CONFIG not in kept:
        raise UserError(f"{folder}: is no run's folder, as it has no {CONFIG}; move it away, or give --folder")
    before, now = (flat(each.model_dump(mode="json")) for each in (load(folder / CONFIG), sweep.config(run)))
    for key in sorted((before.keys() | now.keys()) - {"checkpoint.directory"}):  # that is where it was found
        if before.get(key) != now.get(key):
            was, is_now = (json.dumps(each.get(key)) for each in (before, now))
            raise UserError(
                f"{folder}: has been trained with {key}={was}, which is {is_now} now; give the sweep's file another "
                "name, or --folder"
            )
    return "done" if RESULT in kept else "begun"


def result_of(sweep: LoadedSweep, run: SweepRun) -> dict[str, Any]:
    """What a complete run came to, as its result.json has it.

    Raises:
        UserError: that is none.
    """
    folder = sweep.folder / run.name
    try:
        found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        float(found["top1"])
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(f"{folder / RESULT}: is not a run's result; remove {folder}, and it is trained again") from None
    return found


def prepare(sweep: LoadedSweep, run: SweepRun) -> Path:
    """Write a run's configuration into its folder, whole or not at all; its path.

    Raises:
        UserError: it cannot be written.
    """
    folder = sweep.folder / run.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / CONFIG, lambda beside: beside.write_text(dump(sweep.config(run)), encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {error.strerror or error}") from None
    return folder / CONFIG


@dataclass
class _Going:
    run: SweepRun
    slot: Slot
    process: subprocess.Popen[bytes]
    began: float


@dataclass(frozen=True)
class Outcome:
    """What came of doing runs.

    Attributes:
        failed: of each run that failed, in a line, why.
        stopped: whether it was told to end before all were done.
    """

    failed: tuple[str, ...]
    stopped: bool


def do(sweep: LoadedSweep, left: Sequence[SweepRun], places: Sequence[Slot], say: Callable[[str], None]) -> Outcome:
    """Do runs, one in each place at a time, in their order. At SIGTERM or Ctrl-C those that go on save, and all ends.

    Args:
        sweep: that they are of.
        left: the runs.
        places: where.
        say: is told each result.
    """
    waiting, free, going = list(left), list(places), list[_Going]()
    took: list[float] = []
    failed: list[str] = []
    with _asked() as asked:
        while going or (waiting and not asked):
            while waiting and free and not asked:
                going.append(_begin(sweep, waiting.pop(0), free.pop(0)))
            time.sleep(_EVERY_S)
            for each in [each for each in going if each.process.poll() is not None]:
                going.remove(each)
                free.append(each.slot)
                seconds = time.monotonic() - each.began
                number = len(left) - len(waiting) - len(going)
                why = _failure(sweep, each)
                if why is None:
                    took.append(seconds)
                    came_to = f"top-1 {result_of(sweep, each.run)['top1']:.2f}% in {_duration(seconds)}"
                elif asked and each.process.returncode in _TOLD:
                    came_to = "told to end; goes on when this command is given again"
                else:
                    failed.append(f"{each.run.title}: {why}")
                    came_to = f"failed: {why}"
                rounds = -(-len(waiting) // len(places)) + bool(going)
                ahead = f"; about {_duration(fmean(took) * rounds)} left" if took and (waiting or going) else ""
                say(f"[{number}/{len(left)}] {each.run.title}: {came_to}{ahead}")
            for each in going if asked and asked[-1] else ():
                each.process.terminate()
            if asked:
                asked.append(0)
    return Outcome(tuple(failed), bool(asked))


def _begin(sweep: LoadedSweep, run: SweepRun, slot: Slot) -> _Going:
    config = prepare(sweep, run)
    visible = {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)} if slot.gpus else {}
    with (config.parent / LOG).open("ab") as log:
        process = subprocess.Popen(
            command(["train", "--config", str(config)], slot.processes, ended_by=signal.SIGTERM),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment(slot.threads) | visible,
            start_new_session=True,  # Ctrl-C is for this process, which tells them once
        )
    return _Going(run, slot, process, time.monotonic())


def _failure(sweep: LoadedSweep, ended: _Going) -> str | None:
    """Why a run has not come to a result; None: it has."""
    code, log = ended.process.returncode, sweep.folder / ended.run.name / LOG
    if code == 0 and (log.parent / RESULT).exists():
        return None
    if code == 0:  # it had been trained before, and is left as it is
        return f"it is complete, but has no {RESULT}; remove {log.parent}, and it is trained again ({log})"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 10_000))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "error: " in line] or lines or ["it said nothing"]
    how = signal_words(-code) if code < 0 else f"exit code {code}"
    return f"{how}: {told[-1].removeprefix('ssam-scale: ')[:300]} ({log})"


@contextmanager
def _asked() -> Iterator[list[int]]:
    """Signals that ask this process to end, as they come: the last one is 0 where runs have been told."""
    asked: list[int] = []
    before = {
        each: signal.signal(each, lambda number, _: asked.append(number)) for each in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
