"""Writing .beton files: whole or not at all, the same bytes for the same input, every image checked.

FFCV's own writer hangs when a worker dies, overwrites its target from the first byte on and fills it in whatever order
its processes finish. Decoding and compressing leave Python's lock, so threads serve as well here, and one place that
appends in order is enough for the disk. Several machines write shards, which `join` makes one file of.
"""

from __future__ import annotations

import errno
import os
import shutil
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
import PIL
from rich.progress import Progress

from ssam_scale import __version__
from ssam_scale.console import console
from ssam_scale.cores import usable_cores
from ssam_scale.data.beton import PAGE_SIZE, Pages, Sidecar, checksum, encoded_sums, inspect
from ssam_scale.data.encode import BadImageError, Encoded, Encoding, encode, stored_bytes
from ssam_scale.data.part import Part, Written, growing, part_of, sync_folder
from ssam_scale.data.progress import pace, progress_bar
from ssam_scale.data.shard import Shard, ShardNote
from ssam_scale.data.sources import ClassOrder, Sample, listing, open_source, printable, state_of
from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_replaceable

_CHUNK = 16
_LOOK_AT_DISK = 4096
_PREDICT_BY = 64  # images
_TELL = 10_000  # images, where there is no terminal for a bar
_PREDICT_ABOVE = 512  # images, below which the writing itself soon says what does not fit


@dataclass(frozen=True)
class Skipped:
    """An image that was left out, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class WriteReport:
    """What has been written."""

    path: Path
    images: int
    classes: list[str]
    bytes: int
    skipped: list[Skipped]
    turned: int
    """Images whose EXIF orientation was not applied."""
    emptied: list[str]
    """Classes of which every image was left out."""
    kinds: dict[str, int]
    """How many images were of each kind of file, most frequent first."""
    resumed: int = 0
    """Images that an earlier writer, which was interrupted, had written or left out."""


def write_beton(
    source: Path,
    out: Path,
    *,
    classes_of: Path | None = None,
    labels: Path | None = None,
    max_resolution: int | None = None,
    quality: int = 90,
    jpeg_proportion: float = 0.5,
    workers: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    upright: bool = False,
    class_order: ClassOrder = "text",
    shard: Shard | None = None,
    progress: bool = True,
) -> WriteReport:
    """Write labelled images as `out`, with `out`.json beside it; see `ssam_scale.data.sources` for where they may lie.

    Of a folder and of ImageNet's tars, labels number the classes in the order of their names, and images lie in the
    file by class, then by name, so that both give the same file; of shards and tables images keep their order.

    A writer that is interrupted, or killed, leaves `out`.part; called again in the same way, it goes on from there.

    Args:
        source: folder of class folders, tar, shards or parquet files.
        out: the file to write, replaced only once the new one is complete.
        classes_of: number the classes as another folder or .beton file does, such as the training images': this one
            may lack some of them, and must have no others.
        labels: of ImageNet's validation images, which their tar does not have: its devkit, or a text.
        max_resolution: shrink images whose longer side has more pixels.
        quality: JPEG quality of images that have to be compressed; unchanged JPEG files keep their own bytes.
        jpeg_proportion: share stored as JPEG, the rest as raw pixels, which read faster and take more disk.
        workers: threads; None for the cores this process may use.
        limit: write at most this many images, evenly from all classes.
        skip_bad: leave damaged images out and list them, instead of stopping at the first.
        seed: decides which images are stored raw.
        upright: turn and mirror images as their EXIF orientation says.
        class_order: of the names of class folders: as text, or naturally, 2 before 10.
        shard: write only this part of the images, which `join` takes.
        progress: show a bar with images/s and the remaining time on standard error.

    Raises:
        UserError: no such folder, no class folders, a class without images (but see `classes_of`) or of another name,
            a damaged image, a full disk.
    """
    check_out(out)
    found = open_source(
        source, limit=limit, classes_of=classes_of, class_order=class_order, labels=labels, progress=progress
    )
    if progress:
        for note in found.notes:
            console(stderr=True).print(f"{printable(source)}: {note}", soft_wrap=True)
    return write_samples(
        found.samples,
        found.classes,
        out,
        Encoding(max_resolution, quality, jpeg_proportion, seed, upright),
        source=found.recipe,
        workers=workers,
        skip_bad=skip_bad,
        shard=shard,
        root=found.root,
        progress=progress,
    )


def check_out(out: Path) -> None:
    """A file can be put there, and its sidecar beside it.

    Raises:
        UserError: something else is there.
    """
    for path in (out, Sidecar.path(out)):
        if (problem := why_not_replaceable(path)) is not None:
            raise UserError(f"{path}: {problem}")


def write_samples(
    samples: Sequence[Sample],
    classes: list[str],
    out: Path,
    encoding: Encoding,
    *,
    source: dict[str, Any],
    workers: int | None = None,
    skip_bad: bool = False,
    shard: Shard | None = None,
    root: Path | None = None,
    progress: bool = True,
) -> WriteReport:
    """Write labelled images, from files or from memory, as `out` and `out`.json.

    Args:
        samples: the images, all of them where a shard is written, too.
        classes: names of the labels.
        out: the file.
        encoding: how images are stored.
        source: what they are, for the sidecar.
        workers: threads; None for the cores this process may use.
        skip_bad: leave damaged images out and list them.
        shard: write only this part of the images.
        root: what the samples' names are below.
        progress: show a bar.

    Raises:
        UserError: nothing to write, a damaged image, or the folder of `out` cannot be written or is full.
    """
    if not samples:
        raise UserError(f"{out}: there are no images to write")
    check_out(out)
    span = range(len(samples)) if shard is None else shard.span(len(samples))
    made = recipe(encoding, source)
    images = listing(samples, root)
    identity = {
        "recipe": made,
        "classes": classes,
        "images": images,
        "span": [span.start, span.stop],
        "versions": [__version__, cv2.__version__, PIL.__version__],  # which compress and decode
    }
    workers = workers or usable_cores()
    tally = _Tally([samples[index] for index in span])
    need = 0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), progress_bar(progress) as bar, growing(out, identity) as part:
            warnings.filterwarnings("ignore", module="PIL")  # of large images, and of transparency, which is left out
            pages = Pages(part.file, len(span))
            begin = part.resume(pages, tally.samples, with_left_out=skip_bad)
            tally.add(part.seen)
            say = bar.console.print if progress else lambda *_, **__: None
            if begin:
                say(f"{printable(part.path)}: goes on after {begin:,} of {len(span):,} images", soft_wrap=True)
            elif len(span) > _PREDICT_ABOVE:
                need = predicted_bytes(tally.samples, encoding, workers)
                say(f"{printable(out)}: {len(span):,} images, about {need / 1e9:,.1f} GB", soft_wrap=True)
                check_room(out, need)
            task = bar.add_task(f"Writing {printable(out.name)}", total=len(span), completed=begin, unit="images")
            telling = max(_TELL, len(span) // 20)
            pending: list[Written] = []
            for number, (state, result) in enumerate(_encoded(samples, span[begin:], encoding, workers), begin):
                sample = tally.samples[number]
                if isinstance(result, Encoded):
                    if pages.append(result.mode, result.height, result.width, result.data, sample.label):
                        part.note(pending, number)
                        pending = []
                    image = Written(
                        number,
                        result.mode,
                        result.height,
                        result.width,
                        len(result.data),
                        pages.sums[-1],
                        result.kind,
                        result.turned,
                        state=state,
                    )
                elif skip_bad:
                    image = Written(number, reason=str(result), state=state)
                else:
                    # Whoever wanted the file may have no such option.
                    hint = "mend or remove it (`data write --skip-bad` leaves it out)"
                    raise UserError(f"{printable(sample.name)}: {result}; {hint}{_kept(part)}")
                pending.append(image)
                tally.add([image])
                written = number + 1
                need = pages.start + (pages.end - pages.start) * len(span) // written
                bar.update(task, completed=written)
                # Rather now than in an hour, but only where the estimate leaves no doubt.
                if written % _LOOK_AT_DISK == 0:
                    check_room(out, (need - pages.end) * 4 // 5)
                if written % telling == 0 and not bar.console.is_terminal:
                    say(
                        f"{printable(out.name)}: {written:,} of {len(span):,} images{pace(bar.tasks[task])}",
                        soft_wrap=True,
                    )
            if len(tally.left_out) == len(span):
                first = tally.left_out[0][0]
                raise UserError(f"{out}: none of the {len(span):,} images can be read, e.g. {first}")
            pages.finish()
            part.file.flush()
            if shard is not None:
                note = ShardNote(shard, len(samples), images, tally.left_out, tally.kinds, tally.turned)
                made = {**made, "shard": asdict(note)}
            size = finish(out, part.path, pages, classes, made, bar)
    except OSError as error:
        raise cannot_write(error, out, need) from error
    except KeyboardInterrupt:
        if progress and part_of(out).exists():
            kept = f"{printable(part_of(out))} keeps what is written, from which the same command goes on"
            console(stderr=True).print(kept, soft_wrap=True)
        raise
    return WriteReport(
        out,
        len(span) - len(tally.left_out),
        classes,
        size,
        [Skipped(name, reason) for name, reason, _ in tally.left_out],
        tally.turned,
        tally.emptied(classes),
        by_frequency(tally.kinds),
        begin,
    )


class _Tally:
    """What has become of images so far."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        self.left_out: list[tuple[str, str, int]] = []
        """Name, reason and label."""
        self.kinds: dict[str, int] = {}
        self.turned = 0
        self._left = Counter(sample.label for sample in samples)
        self._given = set(self._left)

    def add(self, images: Sequence[Written]) -> None:
        for image in images:
            sample = self.samples[image.number]
            if image.reason:
                self.left_out.append((printable(sample.name), image.reason, sample.label))
                self._left[sample.label] -= 1
                continue
            self.turned += image.turned
            self.kinds[image.kind] = self.kinds.get(image.kind, 0) + 1

    def emptied(self, classes: Sequence[str]) -> list[str]:
        return [name for label, name in enumerate(classes) if label in self._given and not self._left[label]]


def by_frequency(kinds: dict[str, int]) -> dict[str, int]:
    """Counts by kind, the most frequent first."""
    return dict(sorted(kinds.items(), key=lambda kind: (-kind[1], kind[0])))


def finish(out: Path, temporary: Path, pages: Pages, classes: list[str], made: dict[str, Any], bar: Progress) -> int:
    """Write the sidecar of a file that is complete but not in its place yet; returns its bytes."""
    size = temporary.stat().st_size
    task = bar.add_task(f"Checksum of {printable(out.name)}", total=size)
    digest = checksum(temporary, lambda count: bar.advance(task, count))
    sidecar = Sidecar(len(pages.sums), classes, size, digest, made, encoded_sums(pages.sums))
    with replacing(Sidecar.path(out)) as (note, _):
        note.write(sidecar.dump())
    return size


def predicted_bytes(samples: Sequence[Sample], encoding: Encoding, workers: int) -> int:
    """How large a file of many images is going to be, by a few dozen of them that are as far apart as possible.

    Each of these is measured as JPEG and as raw pixels: which of the two it becomes says nothing of the others.
    """
    step = max(1, len(samples) // _PREDICT_BY)

    def measure(sample: Sample) -> float | None:
        try:
            return stored_bytes(sample.source, encoding)
        except BadImageError:
            return None

    with ThreadPoolExecutor(workers, "predict") as pool:
        sizes = [size for size in pool.map(measure, samples[step // 2 :: step]) if size is not None]
    if not sizes:
        return 0
    mean = float(np.mean(sizes))
    # A page ends where the next image does not fit: half of one is lost.
    return int(len(samples) * (mean * PAGE_SIZE / (PAGE_SIZE - mean / 2) + 100))


def check_room(out: Path, need: int) -> None:
    """The disk has so many bytes left for `out`.

    Raises:
        OSError: it has less: ENOSPC.
    """
    if need > shutil.disk_usage(out.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def recipe(encoding: Encoding, source: dict[str, Any]) -> dict[str, Any]:
    """What a file is made from and how, as its sidecar records it."""
    return {**asdict(encoding), "source": source}


def up_to_date(target: Path, encoding: Encoding, source: dict[str, Any]) -> bool:
    """Whether a file is there, whole and made in this way."""
    try:
        sidecar = inspect(target).sidecar
    except UserError:
        return False
    return sidecar is not None and sidecar.recipe == recipe(encoding, source)


def _encoded(
    samples: Sequence[Sample], numbers: Sequence[int], encoding: Encoding, workers: int
) -> Iterator[tuple[str, Encoded | BadImageError]]:
    """Encode in threads, a bounded number of images ahead, and yield in order, with the state of where each was."""

    def encode_chunk(chunk: Sequence[int]) -> list[tuple[str, Encoded | BadImageError]]:
        results: list[tuple[str, Encoded | BadImageError]] = []
        for number in chunk:
            source = samples[number].source
            state = state_of(source)
            try:
                results.append((state, encode(source, number, encoding)))
            except BadImageError as error:
                results.append((state, error))
        return results

    pending: deque[Future[list[tuple[str, Encoded | BadImageError]]]] = deque()
    pool = ThreadPoolExecutor(workers, "encode")
    try:
        for start in range(0, len(numbers), _CHUNK):
            pending.append(pool.submit(encode_chunk, numbers[start : start + _CHUNK]))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def replacing(out: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """A temporary file in the same folder that takes the place of `out` at the end, or vanishes on any failure."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file, temporary
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
        sync_folder(out.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _kept(part: Part) -> str:
    """What of a file stays where its writer ends early, for the end of a line."""
    return f"; {part.path} keeps what is written, from which the same command goes on" if part.worth_keeping else ""


def cannot_write(error: OSError, out: Path, need: int) -> UserError:
    """The line for whoever wanted a file of `need` bytes."""
    reason = f"{out.parent}: cannot write {out.name} ({error.strerror or error})"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{reason}; give a folder that can be written")
    free = shutil.disk_usage(out.parent).free
    return UserError(
        f"{reason}: it needs about {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; make room, give another "
        "folder, or write less with --max-resolution or a higher --jpeg-proportion"
    )
