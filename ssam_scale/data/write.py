"""Writing .beton files: atomically, the same bytes for the same input, every image checked.

FFCV's own writer hangs when a worker dies, overwrites its target from the first byte on and fills it in whatever order
its processes finish. Decoding and compressing leave Python's lock, so threads serve as well here, and one place that
appends in order is enough for the disk.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ssam_scale.console import console
from ssam_scale.cores import usable_cores
from ssam_scale.data.beton import Pages, Sidecar, checksum, encoded_sums, inspect
from ssam_scale.data.encode import BadImageError, Encoded, Encoding, Pixels, encode
from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_replaceable

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp"))
"""What counts as an image in a class folder, in lower case; other files are passed over."""
# Not those of torchvision's ImageFolder either.
_OTHER_IMAGES = frozenset(
    (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".npy", ".pfm", ".svg", ".tga")
)

_CHUNK = 16
_LOOK_AT_DISK = 4096


@dataclass(frozen=True)
class Sample:
    """One labelled image to be written."""

    name: str
    source: Path | Pixels
    label: int


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


def write_beton(
    source: Path,
    out: Path,
    *,
    classes_of: Path | None = None,
    max_resolution: int | None = None,
    quality: int = 90,
    jpeg_proportion: float = 0.5,
    workers: int | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    seed: int = 0,
    class_order: ClassOrder = "text",
    progress: bool = True,
) -> WriteReport:
    """Write a folder in ImageNet's layout (one folder of images per class) as `out`, with `out`.json beside it.

    Labels number the class folders in the order of their names; images lie in the file by class, then by name.

    Args:
        source: folder of class folders.
        out: the file to write, replaced only once the new one is complete.
        classes_of: number the classes as another folder or .beton file does, such as the training images': this one
            may lack some of them, and must have no others.
        max_resolution: shrink images whose longer side has more pixels.
        quality: JPEG quality of images that have to be compressed; unchanged JPEG files keep their own bytes.
        jpeg_proportion: share stored as JPEG, the rest as raw pixels, which read faster and take more disk.
        workers: threads; None for the cores this process may use.
        limit: write at most this many images, evenly from all classes.
        skip_bad: leave damaged images out and list them, instead of stopping at the first.
        seed: decides which images are stored raw.
        class_order: of the names: as text, or naturally, 2 before 10.
        progress: show a bar with the remaining time on standard error.

    Raises:
        UserError: no such folder, no class folders, a class without images (but see `classes_of`) or of another name,
            a damaged image, a full disk.
    """
    _check_out(out)
    classes, samples = scan_folder(source, limit, classes_of, class_order)
    if progress and classes_of is None and (note := order_note(classes, class_order)):
        console(stderr=True).print(f"{source}: {note}", soft_wrap=True)
    if progress and (note := passed_over([source / name for name in classes])):
        console(stderr=True).print(f"{source}: {note}", soft_wrap=True)
    return write_samples(
        samples,
        classes,
        out,
        Encoding(max_resolution, quality, jpeg_proportion, seed),
        source={"folder": source.name, "limit": limit},
        workers=workers,
        skip_bad=skip_bad,
        progress=progress,
    )


ClassOrder: TypeAlias = Literal["text", "natural"]
"""How class folders are sorted: as text, as torchvision's ImageFolder does; or as timm's, numbers by their value."""


def natural_key(name: str) -> tuple[list[str | int], str]:
    """What timm's ImageFolder sorts class folders by: numbers by their value, letters whatever their case."""
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], name


def order_note(classes: Sequence[str], order: ClassOrder) -> str | None:
    """A line, where torchvision and timm would number classes otherwise: labels are not those of the other's models."""
    text, natural = sorted(classes), sorted(classes, key=natural_key)
    if text == natural:
        return None
    place = next(i for i, (one, other) in enumerate(zip(text, natural, strict=True)) if one != other)
    return (
        f"label {place} is class {classes[place]}, in {order} order; it is {text[place]} in text order, torchvision's, "
        f"and {natural[place]} in natural order, timm's (--class-order)"
    )


def scan_folder(
    source: Path, limit: int | None = None, classes_of: Path | None = None, class_order: ClassOrder = "text"
) -> tuple[list[str], list[Sample]]:
    """The class names and the labelled image files of a folder in ImageNet's layout, sorted by class and name.

    Raises:
        UserError: `source` is missing or no folder, has no class folders, or one of them has no images; with
            `classes_of` (see `write_beton`): has a class that is not among those.
    """
    folders = _class_folders(source, class_order)
    if classes_of is not None:
        folders = _numbered_as(class_names(classes_of, class_order), folders, source, classes_of)
    try:
        files = [_images(folder) if folder.is_dir() else [] for folder in folders]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for folder, found in zip(folders, files, strict=True):
        if not found and classes_of is None:
            deeper = any(entry.is_dir() for entry in folder.iterdir())
            hint = (
                f"; it has folders of its own: did you mean {folder}?"
                if deeper
                else "; fill or remove it, or name what has all classes: --classes-of TRAIN.beton"
            )
            raise UserError(f"{folder}: a class folder without images ({', '.join(sorted(SUFFIXES))}){hint}")
    if not any(files):
        raise UserError(f"{source}: no images ({', '.join(sorted(SUFFIXES))}) in any of its class folders")
    if limit is not None:
        # The first of every class, then the second of every class, …: small extracts still hold all classes.
        rounds = sorted((place, label) for label, found in enumerate(files) for place in range(len(found)))[:limit]
        counts = [0] * len(files)
        for _, label in rounds:
            counts[label] += 1
        files = [found[:count] for found, count in zip(files, counts, strict=True)]
    samples = [Sample(str(path), path, label) for label, found in enumerate(files) for path in found]
    return [folder.name for folder in folders], samples


def passed_over(folders: Sequence[Path]) -> str | None:
    """A line, where images are not taken: beside class folders, in folders inside of them, or of other formats."""
    deeper: list[Path] = []
    others: dict[str, int] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                suffix = os.path.splitext(entry.name)[1].lower()  # noqa: PTH122
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry.path):  # noqa: PTH112 - a link in a circle is none; DirEntry's raises
                    deeper.append(Path(entry.path))
                elif suffix in _OTHER_IMAGES:
                    others[suffix] = others.get(suffix, 0) + 1
    beside: list[str] = []
    for parent in {folder.parent for folder in folders}:
        names = [entry.name for entry in os.scandir(parent) if entry.is_file()]
        beside += [name for name in names if name[0] != "." and os.path.splitext(name)[1].lower() in SUFFIXES]  # noqa: PTH122
    notes = []
    if beside:
        images = "image" if len(beside) == 1 else "images"
        notes.append(f"{len(beside):,} {images} beside the class folders ({min(beside)})")
    if deeper:
        notes.append(f"{len(deeper):,} {'folder' if len(deeper) == 1 else 'folders'} in class folders ({min(deeper)})")
    if others:
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(others.items()))
        notes.append(f"files of formats that are not read ({counts})")
    return f"passed over {' and '.join(notes)}" if notes else None


def class_names(of: Path, class_order: ClassOrder = "text") -> list[str]:
    """The classes of a folder in ImageNet's layout, in this order, or of a .beton file, in that of their numbers.

    Raises:
        UserError: it is neither, or a file without the .json that names its classes.
    """
    if of.is_dir():
        return [folder.name for folder in _class_folders(of, class_order)]
    sidecar = Sidecar.load(of)
    if sidecar is None:
        what = f"no {Sidecar.path(of).name} beside it, which would name its classes" if of.exists() else "no such file"
        raise UserError(f"--classes-of {of}: {what}; give the folder or the .beton file of the training images")
    return sidecar.classes


def _class_folders(source: Path, class_order: ClassOrder) -> list[Path]:
    """The folders of a data set's classes, sorted by name."""
    if not source.is_dir():
        what = "is a file" if source.exists() else "no such folder"
        raise UserError(f"{source}: {what}; give a folder with one folder of images per class")
    try:
        entries = [entry for entry in source.iterdir() if not entry.name.startswith(".")]
        if gone := sorted(entry for entry in entries if entry.is_symlink() and not entry.exists()):
            raise UserError(f"{gone[0]}: a link to nothing, in the place of a class folder; mend or remove it")
        folders = sorted(entry for entry in entries if entry.is_dir())
        if class_order == "natural":
            folders.sort(key=lambda folder: natural_key(folder.name))
        if not folders:
            loose = "only files" if any(source.iterdir()) else "nothing"
            raise UserError(
                f"{source}: {loose} in there; needs one folder of images per class, as ImageNet's train/ has"
            )
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for folder in folders:
        try:
            folder.name.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{source}: the class folder {folder.name!r} has a name that is not UTF-8; rename it"
            ) from None
    return folders


def _numbered_as(names: list[str], folders: list[Path], source: Path, classes_of: Path) -> list[Path]:
    """The folders of other classes' names, some of which may not be there."""
    if others := [folder.name for folder in folders if folder.name not in set(names)]:
        few = ", ".join(others[:3]) + (f" and {len(others) - 3:,} more" if len(others) > 3 else "")
        are, them = ("is", "it") if len(others) == 1 else ("are", "them")
        raise UserError(
            f"{source}: {few} {are} not among the {len(names):,} classes of {classes_of}; rename or remove {them}"
        )
    return [source / name for name in names]


def _images(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if os.path.splitext(entry.name)[1].lower() in SUFFIXES]  # noqa: PTH122
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def _check_out(out: Path) -> None:
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
    progress: bool = True,
) -> WriteReport:
    """Write labelled images, from files or from memory, as `out` and `out`.json; `source` goes into the sidecar.

    Raises:
        UserError: nothing to write, a damaged image, or the folder of `out` cannot be written or is full.
    """
    if not samples:
        raise UserError(f"{out}: there are no images to write")
    _check_out(out)
    skipped: list[Skipped] = []
    written = need = turned = 0
    counts = [0] * len(classes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings(), _progress(progress) as bar, replacing(out) as (file, temporary):
            warnings.filterwarnings("ignore", module="PIL")  # of large images, and of transparency, which is left out
            task = bar.add_task(f"Writing {out.name}", total=len(samples))
            pages = Pages(file, len(samples))
            for number, result in enumerate(_encoded(samples, encoding, workers or usable_cores())):
                label = samples[number].label
                if isinstance(result, Encoded):
                    pages.append(result.mode, result.height, result.width, result.data, label)
                    counts[label] += 1
                    turned += result.turned
                elif skip_bad:
                    skipped.append(Skipped(samples[number].name, str(result)))
                else:
                    raise UserError(f"{samples[number].name}: {result}; mend or remove it, or pass --skip-bad")
                written = number + 1
                need = pages.start + (pages.end - pages.start) * len(samples) // written
                bar.update(task, completed=written)
                # Rather now than in an hour, but only where the estimate leaves no doubt.
                if written % _LOOK_AT_DISK == 0 and need - pages.end > 1.25 * shutil.disk_usage(out.parent).free:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if len(skipped) == len(samples):
                raise UserError(f"{out}: none of the {len(samples):,} images can be read, e.g. {skipped[0].path}")
            pages.finish()
            file.flush()
            os.fsync(file.fileno())
            size = temporary.stat().st_size
            task = bar.add_task(f"Checksum of {out.name}", total=size)
            digest = checksum(temporary, lambda count: bar.advance(task, count))
            sums = encoded_sums(pages.sums)
            sidecar = Sidecar(len(samples) - len(skipped), classes, size, digest, recipe(encoding, source), sums)
            with replacing(Sidecar.path(out)) as (note, _):
                note.write(sidecar.dump())
    except OSError as error:
        raise _cannot_write(error, out, need) from error
    given = {sample.label for sample in samples}
    emptied = [name for label, name in enumerate(classes) if label in given and not counts[label]]
    return WriteReport(out, len(samples) - len(skipped), classes, size, skipped, turned, emptied)


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


def _encoded(samples: Sequence[Sample], encoding: Encoding, workers: int) -> Iterator[Encoded | BadImageError]:
    """Encode in threads, a bounded number of images ahead, and yield in order."""

    def encode_chunk(start: int) -> list[Encoded | BadImageError]:
        results: list[Encoded | BadImageError] = []
        for index in range(start, min(start + _CHUNK, len(samples))):
            try:
                results.append(encode(samples[index].source, index, encoding))
            except BadImageError as error:
                results.append(error)
        return results

    pending: deque[Future[list[Encoded | BadImageError]]] = deque()
    pool = ThreadPoolExecutor(workers, "encode")
    try:
        for start in range(0, len(samples), _CHUNK):
            pending.append(pool.submit(encode_chunk, start))
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
        with suppress(OSError):  # some network file systems cannot sync a folder; the file itself is safe
            folder = os.open(out.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _cannot_write(error: OSError, out: Path, need: int) -> UserError:
    reason = f"{out.parent}: cannot write {out.name} ({error.strerror or error})"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(f"{reason}; give a folder that can be written")
    free = shutil.disk_usage(out.parent).free
    return UserError(
        f"{reason}: it needs about {need / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free; make room, give another "
        "folder, or write less with --max-resolution or a higher --jpeg-proportion"
    )


def _progress(shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console(stderr=True),
        disable=not shown,
    )


Advance = Callable[[int], None]


@contextmanager
def progress_of_bytes(description: str, total: int, shown: bool = True) -> Iterator[Advance]:
    """A bar with the remaining time for a stretch measured in bytes."""
    with _progress(shown) as bar:
        task = bar.add_task(description, total=total)
        yield lambda count: bar.advance(task, count)
