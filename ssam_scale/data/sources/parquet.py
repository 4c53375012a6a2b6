"""Parquet files as Hugging Face has data sets of images: rows of an image's bytes and a label."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssam_scale.data.progress import Advance
from ssam_scale.data.sources.base import Sample, Source, evenly, printable
from ssam_scale.data.sources.webdataset import numbered
from ssam_scale.errors import UserError

_CACHED_BYTES = 256 << 20
_LABELS = ("label", "labels")


@dataclass(frozen=True, slots=True)
class Row:
    """The image of one row."""

    groups: Groups
    path: Path
    group: int
    row: int

    @property
    def name(self) -> str:
        """It has none."""
        return ""

    def read_bytes(self) -> bytes:
        """The content. Raises OSError."""
        content = self.groups.column(self.path, self.group)[self.row].as_py()
        if content is None:
            raise OSError("has no bytes in its row, at most the path of a file elsewhere")
        return bytes(content)


class Groups:
    """Columns of images by file and group of rows, of which those used last are kept.

    Args:
        column: name of the column, with that of the field in it.
    """

    def __init__(self, column: str) -> None:
        self._column = column
        self._kept: OrderedDict[tuple[Path, int], Any] = OrderedDict()
        self._lock = threading.Lock()

    def column(self, path: Path, group: int) -> Any:
        """The column of a group of rows: binary [rows]. Raises OSError."""
        import pyarrow.parquet as pq
        from pyarrow import ArrowException

        with self._lock:
            if (found := self._kept.get((path, group))) is None:
                try:
                    with pq.ParquetFile(path) as file:
                        found = file.read_row_group(group, columns=[self._column]).column(0)
                except ArrowException as error:
                    raise OSError(f"its group of rows cannot be read ({_first_line(error)})") from error
                if "." in self._column:
                    found = _only_field(found)
                self._kept[path, group] = found
            self._kept.move_to_end((path, group))
            while len(self._kept) > 2 and sum(each.nbytes for each in self._kept.values()) > _CACHED_BYTES:
                self._kept.popitem(last=False)
            return found


def parquet_source(
    files: Sequence[Path],
    root: Path,
    *,
    limit: int | None,
    classes_of: Path | None,
    advance: Advance,
) -> Source:
    """Images of parquet files, in the order of the files' names and of their rows.

    Args:
        files: the files.
        root: the folder that they are in.
        limit: at most this many images, evenly from all classes.
        classes_of: a data set whose classes are numbered in the same way.
        advance: told the bytes that are passed.

    Raises:
        UserError: pyarrow is not installed, a file is damaged, or has no images or labels.
    """
    try:
        import pyarrow.parquet as pq
        from pyarrow import ArrowException
    except ModuleNotFoundError as error:
        raise UserError(
            f"{printable(files[0])}: parquet files are read by pyarrow, which is not installed; "
            "pip install 'ssam_scale[parquet]'"
        ) from error
    samples: list[Sample] = []
    labels: list[str] = []
    names: list[str] | None = None
    groups: Groups | None = None
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                image, label = _columns(file.schema_arrow, path)
                groups = groups or Groups(image)
                names = names or _names(file.schema_arrow.metadata, label)
                for group in range(file.num_row_groups):
                    found = file.read_row_group(group, columns=[label]).column(0).to_pylist()
                    labels += [str(each) for each in found]
                    rows = len(samples)
                    samples += [
                        Sample(f"{path}:{len(samples) - rows + row}", Row(groups, path, group, row), 0)
                        for row in range(len(found))
                    ]
        except (ArrowException, OSError) as error:
            raise UserError(f"{printable(path)}: cannot be read as parquet ({_first_line(error)})") from error
        advance(path.stat().st_size)
    if not samples:
        raise UserError(f"{printable(root)}: has no rows")
    if (bad := next((row for row, label in enumerate(labels) if label in ("None", "-1")), None)) is not None:
        raise UserError(
            f"{printable(samples[bad].name)}: its label is {labels[bad]}: test images, whose labels are not public?"
        )
    of, classes = numbered(labels, classes_of, root)
    if classes_of is None and names is not None and len(names) >= len(classes):
        classes = names
    samples = [Sample(sample.name, sample.source, label) for sample, label in zip(samples, of, strict=True)]
    return Source(classes, evenly(samples, limit), {"parquet": len(files), "limit": limit}, root)


def _only_field(column: Any) -> Any:
    """Of a column of structs of which one field was read: that."""
    import pyarrow as pa

    return pa.concat_arrays([chunk.flatten()[0] for chunk in column.chunks])


def _columns(schema: Any, path: Path) -> tuple[str, str]:
    """The columns of the images' bytes and of the labels."""
    from pyarrow import types

    images = []
    for field in schema:
        if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            images.append(f"{field.name}.bytes")
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            images.append(field.name)
    labels = [field.name for field in schema if types.is_integer(field.type)]
    label = next((name for name in _LABELS if name in schema.names), labels[0] if len(labels) == 1 else None)
    if len(images) != 1 or label is None:
        raise UserError(
            f"{printable(path)}: has the columns {', '.join(schema.names)}; needs one of images (their bytes, or bytes "
            "and path) and one by the name of label"
        )
    return images[0], label


def _names(metadata: dict[bytes, bytes] | None, label: str) -> list[str] | None:
    """What Hugging Face's library writes down of the classes' names."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
        return [str(name) for name in names] if isinstance(names, list) else None
    except (KeyError, TypeError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
