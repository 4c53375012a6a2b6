"""What Weights & Biases has on disk of offline runs: https://github.com/google/leveldb/blob/main/doc/log_format.md."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

from tests.support.processes import wait_until

_FILE_HEADER, _RECORD_HEADER, _BLOCK = 7, 7, 32768
_FULL, _LAST = 1, 4
_PATIENCE_S = 60.0


def wandb_files(folder: Path) -> list[Path]:
    """Those of the runs of a folder of checkpoints, which have ended; the oldest first."""
    found = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    for path in found:  # W&B's own process writes on for a moment
        wait_until(lambda path=path: exit_code(path) is not None, _PATIENCE_S, f"the end of {path}")  # type: ignore[misc]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns)


def records(path: Path) -> Iterator[Any]:
    """The records of a file, in order."""
    data, at, begun = path.read_bytes(), _FILE_HEADER, b""
    assert data[:4] in (b":W&B", b"")
    while at + _RECORD_HEADER <= len(data):
        if (left := _BLOCK - at % _BLOCK) < _RECORD_HEADER:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        at += _RECORD_HEADER
        begun += data[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(begun)
            begun = b""
            yield record


def history(path: Path) -> dict[str, list[tuple[int, Any]]]:
    """Step and value of each metric's points, in order; those of W&B's own left out."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            for item in record.history.item:
                key = _key(item)
                if not key.startswith("_"):
                    found.setdefault(key, []).append((record.history.step.num, json.loads(item.value_json)))
    return found


def last(path: Path, kind: str) -> dict[str, Any]:
    """What the file has in the end of the run's `config` or `summary`."""
    found: dict[str, Any] = {}
    for record in records(path):
        of = record.run.config if kind == "config" and record.HasField("run") else getattr(record, kind)
        for item in of.update:
            found[_key(item)] = json.loads(item.value_json)
    return found


def exit_code(path: Path) -> int | None:
    """That the run ended with; None: it has not."""
    codes = [record.exit.exit_code for record in records(path) if record.WhichOneof("record_type") == "exit"]
    return codes[-1] if codes else None


def run_id(path: Path) -> str:
    """By which W&B knows the run."""
    return next(str(record.run.run_id) for record in records(path) if record.WhichOneof("record_type") == "run")


def _key(item: Any) -> str:
    return "/".join(item.nested_key) or str(item.key)
