"""Shards of one data set, made into the file that one writer would have made of all images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssam_scale.data.beton import JPEG, RAW, Beton, Pages, Sidecar, inspect
from ssam_scale.data.progress import progress_bar
from ssam_scale.data.shard import Shard, ShardNote
from ssam_scale.data.sources import printable
from ssam_scale.data.write import (
    Skipped,
    WriteReport,
    by_frequency,
    cannot_write,
    check_out,
    check_room,
    finish,
    replacing,
)
from ssam_scale.errors import UserError


@dataclass(frozen=True)
class _Part:
    beton: Beton
    sidecar: Sidecar
    note: ShardNote
    made: dict[str, Any]
    """Its recipe without what is of this shard alone."""


def join(out: Path, shards: Sequence[Path], *, progress: bool = True) -> WriteReport:
    """Write the images of all shards of a data set as `out`, byte for byte what a single writer would have written.

    Every image is compared with its hash on the way, and the shards stay.

    Args:
        out: the file to write, replaced only once the new one is complete.
        shards: files of `data write --shard`, in any order.
        progress: show a bar.

    Raises:
        UserError: a file is no shard, is damaged or of another data set; one is missing or given twice; or `out`
            cannot be written.
    """
    check_out(out)
    parts = _all_of_one(out, shards)
    first = parts[0]
    need = sum(part.beton.bytes for part in parts)
    counts = np.zeros(len(first.sidecar.classes), np.int64)
    kinds: dict[str, int] = {}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        check_room(out, need)
        with progress_bar(progress) as bar, replacing(out) as (file, temporary):
            task = bar.add_task(
                f"Joining {printable(out.name)}", total=sum(part.beton.images for part in parts), unit="images"
            )
            pages = Pages(file, first.note.images)
            for part in parts:
                _copy(part.beton, pages, lambda: bar.advance(task))
                counts += np.bincount(part.beton.labels, minlength=len(counts))
                for kind, count in part.note.kinds.items():
                    kinds[kind] = kinds.get(kind, 0) + count
            pages.finish()
            file.flush()
            size = finish(out, temporary, pages, first.sidecar.classes, first.made, bar)
    except OSError as error:
        raise cannot_write(error, out, need) from error
    left_out = [each for part in parts for each in part.note.left_out]
    skipped = [Skipped(name, reason) for name, reason, _ in left_out]
    emptied = [first.sidecar.classes[label] for label in sorted({label for *_, label in left_out}) if not counts[label]]
    turned = sum(part.note.turned for part in parts)
    return WriteReport(out, len(pages.sums), first.sidecar.classes, size, skipped, turned, emptied, by_frequency(kinds))


def _copy(beton: Beton, pages: Pages, advance: Any) -> None:
    data = np.memmap(beton.path, np.uint8, "r")
    for index in range(beton.images):
        content = data[beton.starts[index] : beton.starts[index] + beton.sizes[index]].tobytes()
        mode = JPEG if beton.is_jpeg[index] else RAW
        pages.append(mode, int(beton.heights[index]), int(beton.widths[index]), content, int(beton.labels[index]))
        if pages.sums[-1] != beton.sums[index]:
            raise UserError(f"{beton.path}: image {index} is damaged; copy or write this shard again")
        advance()


def _all_of_one(out: Path, shards: Sequence[Path]) -> list[_Part]:
    """All shards of a data set in their order."""
    parts: dict[int, _Part] = {}
    first: _Part | None = None
    for path in shards:
        part = _read(path)
        if out.exists() and path.samefile(out):
            raise UserError(f"{path}: is a shard, and what is to be written too; give another name for the whole")
        first = first or part
        if (difference := _difference(first, part)) is not None:
            raise UserError(f"{path}: {difference}; join the shards of one data set")
        number = part.note.shard.number
        if number in parts:
            raise UserError(f"{path} and {parts[number].beton.path}: both are shard {part.note.shard}; give it once")
        parts[number] = part
    if first is None:
        raise UserError(f"{out}: no shards to join; give the files of `ssam-scale data write --shard`")
    of = first.note.shard.of
    if missing := [number for number in range(1, of + 1) if number not in parts]:
        few = ", ".join(map(str, missing[:10])) + (" …" if len(missing) > 10 else "")
        raise UserError(
            f"{out}: {len(missing):,} of {of:,} shards are missing: {few}; write them (`ssam-scale data write … "
            f"--shard {missing[0]}/{of}`) and give them, too"
        )
    return [parts[number] for number in range(1, of + 1)]


def _read(path: Path) -> _Part:
    beton = inspect(path)
    note = None if beton.sidecar is None else beton.sidecar.recipe.get("shard")
    if beton.sidecar is None or note is None:
        beside = "" if beton.sidecar else f" (no {Sidecar.path(path).name} beside it, which would say so)"
        raise UserError(f"{path}: is no shard{beside}; `ssam-scale data write --shard` writes them")
    try:
        known = ShardNote(**{**note, "shard": Shard(**note["shard"])})
        known.shard.span(known.images)
    except (KeyError, TypeError) as error:
        raise UserError(f"{Sidecar.path(path)}: does not say which shard it is ({error}); write it again") from error
    if len(beton.sums) != beton.images:
        raise UserError(f"{Sidecar.path(path)}: lacks the hashes of its images; write it again")
    made = {key: value for key, value in beton.sidecar.recipe.items() if key != "shard"}
    return _Part(beton, beton.sidecar, known, made)


def _difference(one: _Part, other: _Part) -> str | None:
    """What tells shards of two data sets apart; None: nothing does."""
    if one.note.shard.of != other.note.shard.of:
        return f"is one of {other.note.shard.of:,} shards, and {one.beton.path} one of {one.note.shard.of:,}"
    if (one.note.listing, one.note.images, one.sidecar.classes) != (
        other.note.listing,
        other.note.images,
        other.sidecar.classes,
    ):
        return f"is of other images or classes than {one.beton.path}"
    for key in sorted(one.made.keys() | other.made.keys()):
        if (given := other.made.get(key)) != (before := one.made.get(key)):
            return f"was written with {key.replace('_', ' ')} {given}, and {one.beton.path} with {before}"
    return None
