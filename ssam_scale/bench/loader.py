"""How fast photographs are read: by ours, FFCV's decoder, torchvision's `ImageFolder`, WebDataset and DALI, in turns.

Every reader has processes of its own, which live through all rounds and wait while another one reads.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import resource
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

from ssam_scale.data import write_beton
from ssam_scale.data.peers import (
    Epoch,
    Share,
    archives_for,
    dali,
    ffcvs,
    image_folder,
    installed,
    ours,
    pack,
    webdataset,
)
from ssam_scale.errors import UserError
from ssam_scale.tracking.environment import hardware_tags

OURS, FFCV, FOLDER, WEBDATASET, DALI = "ssam_scale", "FFCV", "ImageFolder", "WebDataset", "DALI"


@dataclass(frozen=True)
class Reader:
    """Something that reads images.

    Attributes:
        name: of it.
        stored: what it reads, in words.
        path: of the file or the folder.
        make: begins to read.
    """

    name: str
    stored: str
    path: Path
    make: Callable[[Path, Share], Epoch]


@dataclass(frozen=True)
class Reading:
    """An epoch of one process.

    Attributes:
        images: that were read.
        seconds: from when it was begun.
        first: seconds until the first batch.
        processor: seconds of processors, those of the reader's own processes included.
    """

    images: int
    seconds: float
    first: float
    processor: float


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        folder: one folder of photographs per class.
        proportions: shares of images that a .beton file has as JPEG, one file each; the others are raw.
        max_resolution: pixels of the longer side in .beton files; None: photographs have their own size.
        workers: threads, or processes, of each process that reads; one row each.
        processes: that share the images; one row each.
        resolution: side of the crops, pixels.
        batch: images of one.
        rounds: of which the median counts; in each, every reader has an epoch.
        cold: whether files are taken out of the system's memory before each epoch.
    """

    folder: Path
    proportions: Sequence[float]
    max_resolution: int | None
    workers: Sequence[int]
    processes: Sequence[int]
    resolution: int
    batch: int
    rounds: int
    cold: bool = False


def bench_loader(work: Workload) -> list[dict[str, Any]]:
    """Images a second, processors' time an image, the gap between epochs, start and memory of every reader.

    The first epoch of each reader, in which it compiles, does not count.

    Args:
        work: what is measured.

    Raises:
        UserError: the folder is none of images, or has fewer than a batch for each process.
    """
    with tempfile.TemporaryDirectory(prefix="loader-") as temporary:
        readers = [Reader(FOLDER, "files", work.folder, image_folder)]
        images = 0
        for proportion in work.proportions:
            path = Path(temporary) / f"{proportion}.beton"
            report = write_beton(
                work.folder, path, jpeg_proportion=proportion, max_resolution=work.max_resolution, progress=False
            )
            images = report.images
            stored = "JPEG" if proportion == 1.0 else f"{1.0 - proportion:.0%} raw"
            readers += [Reader(OURS, stored, path, ours), Reader(FFCV, stored, path, ffcvs)]
        if (most := max(work.processes) * work.batch) > images:
            raise UserError(f"{work.folder}: {images:,} photographs are fewer than a batch for each process, {most:,}")
        if installed("webdataset"):
            archives = Path(temporary) / "archives"
            pack(work.folder, archives, archives_for(images, max(work.processes) * max(work.workers)))
            readers.append(Reader(WEBDATASET, "tar archives", archives, webdataset))
        if installed("nvidia.dali"):
            readers.append(Reader(DALI, "files", work.folder, dali))
        rows: list[dict[str, Any]] = []
        for processes in work.processes:
            for workers in work.workers:
                rows += _in_turns(readers, workers, processes, work)
    return [{**row, "photographs": images, "hardware": hardware_tags()["hardware"]} for row in rows]


def _in_turns(readers: Sequence[Reader], workers: int, processes: int, work: Workload) -> list[dict[str, Any]]:
    rounds: list[list[list[Reading]]] = [[] for _ in readers]
    with ExitStack() as stack:
        running = [stack.enter_context(_started(reader, workers, processes, work)) for reader in readers]
        for number in range(1, work.rounds + 1):
            for state, readings in zip(running, rounds, strict=True):
                readings.append(state.epoch(number))
    walls = [[_wall(readings) for readings in each] for each in rounds]
    used = [[_processor(readings) for readings in each] for each in rounds]
    rows = []
    for reader, wall, processor, each, state in zip(readers, walls, used, rounds, running, strict=True):
        batches = [reading.images / work.batch for readings in each for reading in readings]
        gaps = [reading.first for readings in each for reading in readings]
        row = {
            "what": f"{reader.name}, {reader.stored}",
            "reader": reader.name,
            "stored": reader.stored,
            "workers": workers,
            "processes": processes,
            "images_per_second": 1.0 / statistics.median(wall),
            "processor_seconds": statistics.median(processor),
            "first_batch_seconds": statistics.median(gaps),
            "batch_seconds": statistics.median(wall) * work.batch * processes,
            "start_seconds": state.start_seconds,
            "memory": state.memory,
            "batches": statistics.median(batches),
            "rounds": work.rounds,
            "cold": work.cold,
        }
        for other, key in ((FFCV, "over_ffcv"), (FOLDER, "over_image_folder")):
            # Both of one round, so that a slow minute of the machine is everybody's.
            row[key] = next(
                (
                    statistics.median(theirs / own for own, theirs in zip(processor, of, strict=True))
                    for their, of in zip(readers, used, strict=True)
                    if their.name == other and their.stored in (reader.stored, "files") and their is not reader
                ),
                None,
            )
        rows.append(row)
    return rows


def _wall(readings: Sequence[Reading]) -> float:
    """Seconds an image, of processes that began together."""
    return max(reading.seconds for reading in readings) / sum(reading.images for reading in readings)


def _processor(readings: Sequence[Reading]) -> float:
    return sum(reading.processor for reading in readings) / sum(reading.images for reading in readings)


class _Running:
    """The processes of a reader.

    Attributes:
        start_seconds: from the start of a process to its first batch.
        memory: bytes of the processes beyond what one has that has only imported torch, without the pages of files.
    """

    def __init__(self, connections: Sequence[Connection]) -> None:
        self._connections = connections
        ready = [_answer(connection) for connection in connections]
        self.start_seconds = max(each["start"] for each in ready)
        self.memory = sum(each["memory"] for each in ready)

    def epoch(self, number: int) -> list[Reading]:
        """All read their parts of an epoch at the same time."""
        for connection in self._connections:
            connection.send(number)
        return [_answer(connection) for connection in self._connections]


def _answer(connection: Connection) -> Any:
    try:
        answer = connection.recv()
    except EOFError:
        raise UserError("a process that reads has ended; has the machine the memory for so many?") from None
    if isinstance(answer, str):
        raise UserError(answer)
    return answer


@contextmanager
def _started(reader: Reader, workers: int, processes: int, work: Workload) -> Iterator[_Running]:
    context = mp.get_context("spawn")
    started, connections = [], []
    try:
        for rank in range(processes):
            share = Share(work.batch, work.resolution, workers, rank, processes)
            here, there = context.Pipe()
            # Not daemons, which may have no processes of their own.
            process = context.Process(target=_read, args=(there, reader, share, work.cold))
            process.start()
            there.close()
            started.append(process)
            connections.append(here)
        yield _Running(connections)
    finally:
        for connection in connections:
            connection.close()  # it ends
        for process in started:
            process.join()


def _read(connection: Connection, reader: Reader, share: Share, cold: bool) -> None:
    """What a process does: an epoch for each number that comes."""
    import torch

    torch.set_num_threads(1)
    before = _memory()
    try:
        epoch = reader.make(reader.path, share)
        with _peak() as peak:
            batches = epoch(0)
            next(batches)
            start = time.time() - psutil.Process().create_time()
            for _ in batches:
                pass
        connection.send({"start": start, "memory": max(peak) - before})
        while True:
            number = connection.recv()
            if cold:
                _forget(reader.path)
            connection.send(_reading(epoch, number))
    except EOFError:
        return
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        connection.send(f"{reader.name} cannot read {reader.path}: {type(error).__name__}: {reason}")


def _reading(epoch: Epoch, number: int) -> Reading:
    began, used = time.perf_counter(), _processor_seconds()
    batches = epoch(number)
    images = next(batches)
    first = time.perf_counter() - began
    images += sum(batches)
    return Reading(images, time.perf_counter() - began, first, _processor_seconds() - used)


def _processor_seconds() -> float:
    """Of this process and of its own, those that have ended included."""
    ended = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    alive = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(each.ru_utime + each.ru_stime for each in ended) + sum(each.user + each.system for each in alive)


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Looks at the memory ten times a second."""
    seen, done = [_memory()], threading.Event()

    def look() -> None:
        while not done.wait(0.1):
            seen.append(_memory())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def _memory() -> int:
    """Bytes of this process and its own that are no pages of files; what several share counts once."""
    total = 0
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except OSError:
            continue  # it has ended
        for line in text.splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += 1024 * int(line.split()[1])
    return total


def _forget(path: Path) -> None:
    """Take a file, or all of a folder, out of the system's page cache, in which what is mapped would stay."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(f" {path.resolve()}"):
            begin, end = (int(each, 16) for each in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), 4)  # MADV_DONTNEED
    for each in path.rglob("*") if path.is_dir() else [path]:
        if each.is_file():
            with each.open("rb") as file:
                os.fdatasync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
