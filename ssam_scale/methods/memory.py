"""A memory of outputs: the logits of each image by epoch, on a disk that all processes see.

    <folder>/epoch_0005/
        step_00000000_of_2/0.logits     float16 [rows, classes], in the order in which process 0 has seen its images
        step_00000000_of_2/0.indices    int64 [rows], which images these are
        step_00000000_of_2/1.logits     those of process 1
        step_00000100_of_1/0.logits     and from step 100 on, from where one process has gone on with the epoch

Each process appends to files of its own, and reads from everybody's once the epoch has ended, because another epoch's
order gives an image to another process. So two machines never write to one file, nor read what is being written, which
network file systems do not promise to get right; and nothing is sent from process to process. What is read is mapped,
and in memory only as far as the system has room.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ssam_scale.errors import UserError
from ssam_scale.folders import existing
from ssam_scale.sharding import World

LOGIT = np.dtype("<f2")
"""How a logit is kept: float16, of which logits need the digits and not the range that bfloat16 would have."""

_INDEX = np.dtype("<i8")
_Segment = tuple[int, int]  # the step of the epoch that it begins with, and how many processes wrote it


def bytes_per_image(classes: int, epochs: int = 1) -> int:
    """What the outputs of one image take on disk, in so many epochs; its index counts as well."""
    return (classes * LOGIT.itemsize + _INDEX.itemsize) * epochs


class OutputMemory:
    """Logits by image and epoch, written by all processes and read by all.

    Args:
        folder: where they lie.
        classes: logits of an image.
        world: the processes.
        elsewhere: folders to look in for what is not in `folder`.
    """

    def __init__(self, folder: Path, classes: int, world: World, elsewhere: Sequence[Path] = ()) -> None:
        self._folder, self._classes, self._world = folder, classes, world
        self._elsewhere = [path for path in elsewhere if path.absolute() != folder.absolute()]
        self._segments: dict[int, list[_Segment]] = {}  # by epoch: of what is known, and what is written now
        self._writing: tuple[int, _Segment] | None = None
        self._files: tuple[Any, Any] | None = None
        self._seen = np.zeros(0, np.bool_)
        self._read: tuple[NDArray[np.int64], NDArray[np.int64], list[NDArray[np.float16]]] | None = None

    def begin(self, epoch: int, step: int = 0) -> None:
        """From here on `append` is of `epoch`, of which `step` steps are done. Nothing is written yet."""
        self._end()
        segment = step, self._world.size
        # What was written before from this step on is written again.
        kept = [(first, size) for first, size in self._segments.get(epoch, []) if first < step]
        self._segments[epoch] = [*kept, segment]
        self._writing = epoch, segment
        self._seen = np.zeros(0, np.bool_)

    def append(self, indices: NDArray[np.int64], logits: NDArray[np.float16]) -> None:
        """Remember this process's outputs.

        Args:
            indices: of the images, [N].
            logits: theirs, [N, classes].

        Raises:
            UserError: an image comes a second time in this epoch; or they cannot be written.
        """
        assert self._writing is not None
        epoch, segment = self._writing
        if len(indices) and (top := int(indices.max())) >= len(self._seen):
            self._seen = np.concatenate([self._seen, np.zeros(2 * top + 1024 - len(self._seen), np.bool_)])
        first = np.unique(indices)
        if len(first) < len(indices) or self._seen[indices].any():
            values, counts = np.unique(indices, return_counts=True)
            twice = [*values[counts > 1], *indices[self._seen[indices]]]
            raise UserError(_TWICE.format(index=int(twice[0]), epoch=epoch))
        self._seen[first] = True
        try:
            logits_file, indices_file = self._opened(epoch, segment)
            logits_file.write(np.ascontiguousarray(logits, LOGIT).tobytes())
            indices_file.write(np.ascontiguousarray(indices, _INDEX).tobytes())
        except OSError as error:
            raise self._unwritten(error) from error

    def _opened(self, epoch: int, segment: _Segment) -> tuple[Any, Any]:
        """The files of what is being written."""
        if self._files is None:
            paths = self._paths(self._folder, epoch, segment, self._world.rank)
            paths[0].parent.mkdir(parents=True, exist_ok=True)
            self._files = paths[0].open("wb"), paths[1].open("wb")
        return self._files

    def flush(self) -> None:
        """What was appended is on the disk afterwards.

        Raises:
            UserError: it cannot be written.
        """
        try:
            for file in self._opened(*self._writing) if self._writing is not None else ():
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unwritten(error) from error

    def complete(self) -> None:
        """Ends the epoch that is being written, on all processes. Collective.

        Raises:
            UserError: an image has come twice, on two processes; or a process's outputs are not seen by the others.
        """
        assert self._writing is not None
        epoch, _ = self._writing
        self.flush()
        self._end()
        self._world.smallest(0)  # all have closed theirs
        for segment in self._segments[epoch]:
            parts = [self._indices(epoch, segment, rank) for rank in range(segment[1])]
            values, counts = np.unique(np.concatenate(parts), return_counts=True)
            if (counts > 1).any():
                raise UserError(_TWICE.format(index=int(values[counts > 1][0]), epoch=epoch))

    def _end(self) -> None:
        for file in self._files or ():
            file.close()
        self._files = self._writing = None

    def open(self, epoch: int) -> None:
        """From here on `read` is of `epoch`.

        Raises:
            UserError: nothing of it is known, or it is not all there.
        """
        self._read = None
        if epoch not in self._segments:
            raise UserError(
                f"outputs of epoch {epoch} are not known: they are remembered from the first epoch on that is needed, "
                "by a run that was begun with this memory"
            )
        indices: list[NDArray[np.int64]] = []
        where: list[NDArray[np.int64]] = []  # file and row
        files: list[NDArray[np.float16]] = []
        for segment in self._segments[epoch]:
            for rank in range(segment[1]):
                own = self._indices(epoch, segment, rank)
                if not len(own):
                    continue
                path = self._paths(self._folder_of(epoch, segment, rank), epoch, segment, rank)[0]
                rows = np.arange(len(own), dtype=np.int64)
                where.append(rows + (len(files) << 40))
                files.append(np.memmap(path, LOGIT, "r", shape=(len(own), self._classes)))
                indices.append(own)
        # Of an image that was written again the last one counts.
        nothing = np.zeros(0, np.int64)
        values, first = np.unique(np.concatenate([nothing, *indices])[::-1], return_index=True)
        self._read = values, np.concatenate([nothing, *where])[::-1][first], files

    def read(self, indices: NDArray[np.int64]) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
        """What was appended in the opened epoch: logits [N, classes], and whether there are any, [N]; zeros without."""
        assert self._read is not None
        values, places, files = self._read
        result = np.zeros((len(indices), self._classes), np.float16)
        if not len(values):
            return result, np.zeros(len(indices), np.bool_)
        slots = np.searchsorted(values, indices).clip(max=len(values) - 1)
        known = values[slots] == indices
        found = places[slots]
        of_file, rows = found >> 40, found & ((1 << 40) - 1)
        for number in np.unique(of_file[known]):
            mine = known & (of_file == number)
            result[mine] = files[number][rows[mine]]
        return result, known

    def forget(self, last: int, keep: set[int]) -> None:
        """Delete the epochs up to `last` but those in `keep`, in this run's own folder; the first process does.

        Later ones are those of a run that has been further, whose checkpoints may be gone on with.
        """
        self._segments = {epoch: parts for epoch, parts in self._segments.items() if epoch > last or epoch in keep}
        if not self._world.first:
            return
        for path in self._folder.glob("epoch_*"):
            number = path.name.removeprefix("epoch_")
            if number.isdecimal() and int(number) <= last and int(number) not in keep:
                shutil.rmtree(path, ignore_errors=True)

    def state_dict(self, first: int) -> dict[str, Any]:
        """From epoch `first` on, `epochs`: by epoch, the parts it was written in; `folders`: where they may lie."""
        folders = [str(path.absolute()) for path in (self._folder, *self._elsewhere)]
        parts = {str(e): [list(s) for s in segments] for e, segments in self._segments.items() if e >= first}
        return {"epochs": parts, "folders": folders}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned.

        Raises:
            ValueError: what was written is not there any more; nothing has changed then.
        """
        before = self._segments, self._elsewhere
        known = {path.absolute() for path in (self._folder, *self._elsewhere)}
        self._elsewhere = [*self._elsewhere, *(p for p in map(Path, state_dict["folders"]) if p not in known)]
        self._segments = {
            int(epoch): [(int(first), int(size)) for first, size in segments]
            for epoch, segments in state_dict["epochs"].items()
        }
        try:
            for epoch, segments in self._segments.items():
                for segment in segments:
                    for rank in range(segment[1]):
                        self._indices(epoch, segment, rank)
        except UserError as error:
            self._segments, self._elsewhere = before
            raise ValueError(str(error)) from error

    def _indices(self, epoch: int, segment: _Segment, rank: int) -> NDArray[np.int64]:
        """Of the images whose logits are there as well: a process that was ended may have left half a row."""
        logits, indices = self._paths(self._folder_of(epoch, segment, rank), epoch, segment, rank)
        rows = logits.stat().st_size // (self._classes * LOGIT.itemsize)
        return np.fromfile(indices, _INDEX)[:rows].astype(np.int64)

    def _folder_of(self, epoch: int, segment: _Segment, rank: int) -> Path:
        for folder in (self._folder, *self._elsewhere):
            if all(path.is_file() for path in self._paths(folder, epoch, segment, rank)):
                return folder
        looked = " nor ".join(str(path) for path in (self._folder, *self._elsewhere))
        raise UserError(
            f"outputs of epoch {epoch} that process {rank} wrote are not in {looked}, which all processes need on one "
            "file system, and as long as there are checkpoints to go back to"
        )

    @staticmethod
    def _paths(folder: Path, epoch: int, segment: _Segment, rank: int) -> tuple[Path, Path]:
        """Of the logits and of the indices."""
        inside = folder / _name(epoch) / f"step_{segment[0]:08d}_of_{segment[1]}"
        return inside / f"{rank}.logits", inside / f"{rank}.indices"

    def _unwritten(self, error: OSError) -> UserError:
        return UserError(f"outputs cannot be written to {self._folder}: {error.strerror or error}")


def check_room(folder: Path, images: int, classes: int, epochs: int) -> None:
    """Whether the disk has room for the outputs of so many epochs.

    Raises:
        UserError: it has not; says how much is needed.
    """
    needed, free = images * bytes_per_image(classes, epochs), shutil.disk_usage(existing(folder)).free
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())  # of the run that goes on
    if needed > free + there:
        raise UserError(
            f"{folder} is to hold {_gigabytes(needed)} of outputs ({images:,} images × {classes:,} classes × "
            f"{LOGIT.itemsize} bytes × {epochs} epochs), and {_gigabytes(free)} are free there"
        )


def check_shared(folder: Path, world: World) -> None:
    """Whether all processes see what one writes to a folder. Collective.

    Raises:
        UserError: one does not.
    """
    if world.size == 1:
        return
    mark = None
    if world.first:
        with suppress(OSError):  # the folder of checkpoints has been looked at before
            mark = tempfile.mkdtemp(dir=existing(folder), prefix=".ssam_scale_")
    path = world.first_says(mark)
    seen = world.smallest(int(path is not None and Path(path).is_dir()))
    if mark is not None:
        Path(mark).rmdir()
    if not seen:
        raise UserError(
            f"{folder} is not seen by all processes, which read each other's outputs there: use a folder on a file "
            "system that all machines share"
        )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def _name(epoch: int) -> str:
    return f"epoch_{epoch:04d}"


_TWICE = (
    "image {index} comes twice in epoch {epoch}, and outputs are remembered by image and epoch: each image may come "
    "once (no sampling with replacement, no repeated augmentation, DistributedSampler with drop_last=True)"
)
