"""Tensors in the files of a checkpoint, of which each process reads what it needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of a tensor in one file, or all of it.

    Attributes:
        file: an open safetensors file.
        name: of the tensor in it.
        start: the place of its first element in the full tensor.
        count: of its elements.
    """

    file: Any
    name: str
    start: int
    count: int

    def run(self, first: int, last: int) -> Tensor:
        """The elements from `first` to before `last`, counted in the full tensor; of what the file has."""
        view = self.file.get_slice(self.name)
        shape = view.get_shape()
        if not shape:
            return self.file.get_tensor(self.name).reshape(1)
        row = self.count // shape[0]
        begin, end = first - self.start, last - self.start
        rows = view[begin // row : -(-end // row)].reshape(-1)
        skipped = begin // row * row
        return rows[begin - skipped : end - skipped]


class FileTensor:
    """A full tensor that lies in one file, or in runs in several: a `SavedTensor`.

    Args:
        shape: of the full tensor.
        pieces: that make it up, in any order.
    """

    def __init__(self, shape: Sequence[int], pieces: Sequence[Piece]) -> None:
        self.shape = torch.Size(shape)
        self._pieces = sorted(pieces, key=lambda piece: piece.start)
        first = self._pieces[0]
        view = first.file.get_slice(first.name)
        of_dtype = view[0:0] if view.get_shape() else first.file.get_tensor(first.name)
        self.dtype: torch.dtype = of_dtype.dtype

    def run(self, start: int, count: int) -> Tensor:
        """See `SavedTensor`."""
        found = [torch.empty(0, dtype=self.dtype)]
        for piece in self._pieces:
            first, last = max(start, piece.start), min(start + count, piece.start + piece.count)
            if first < last:
                found.append(piece.run(first, last))
        return torch.cat(found)

    def whole(self) -> Tensor:
        """See `SavedTensor`."""
        if len(self._pieces) == 1:
            [piece] = self._pieces
            return piece.file.get_tensor(piece.name).view(self.shape)
        return self.run(0, self.shape.numel()).view(self.shape)


def part_of(file_name: str) -> str:
    """The part of a checkpoint that a file belongs to."""
    return file_name.partition(".")[0]


def open_tensors(
    path: Path, state: Mapping[str, Any], parts: Collection[str] | None = None
) -> dict[str, dict[str, FileTensor]]:
    """The tensors of a checkpoint, by part and name.

    Args:
        path: the checkpoint.
        state: what `state.json` says.
        parts: whose; None: of all.

    Raises:
        SafetensorError: a file is none.
    """
    pieces: dict[str, dict[str, list[Piece]]] = {}
    for file_name, said in state["files"].items():
        if parts is not None and part_of(file_name) not in parts:
            continue
        file = safe_open(path / file_name, "pt")
        of_part = pieces.setdefault(part_of(file_name), {})
        runs = said.get("runs", {})
        for name in file.keys():  # noqa: SIM118  (no mapping)
            start, count = runs.get(name) or (0, torch.Size(file.get_slice(name).get_shape()).numel())
            of_part.setdefault(name, []).append(Piece(file, name, start, count))
    shapes = state.get("shapes", {})
    return {
        part: {
            name: FileTensor(shapes.get(part, {}).get(name, found[0].file.get_slice(name).get_shape()), found)
            for name, found in of_part.items()
        }
        for part, of_part in pieces.items()
    }
