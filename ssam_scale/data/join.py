"""Shards of one data set, made into the file that one writer would have made of all images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssam_scale.data.beton import JPEG, RAW, Beton, Pages, inspect
from ssam_scale.data.progress import progress_bar
from ssam_scale.data.shard import all_of_one
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
    betons = [inspect(path) for path in shards]
    if given := [path for path in shards if out.exists() and path.samefile(out)]:
        raise UserError(f"{given[0]}: is a shard, and what is to be written too; give another name for the whole")
    parts = all_of_one(out, betons)
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
