"""A file that is damaged, cut short or something else is refused before the first image is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from ssam_scale.data import inspect, verify
from ssam_scale.data.beton import PAGE_SIZE, layout
from ssam_scale.errors import UserError
from tests.support.loaders import NUMBERED, evaluation, training


@pytest.fixture
def copy(numbered: Path, tmp_path: Path) -> Path:
    shutil.copy(numbered.with_name(numbered.name + ".json"), tmp_path / "x.beton.json")
    return Path(shutil.copy(numbered, tmp_path / "x.beton"))


def sidecar(beton: Path) -> Path:
    return beton.with_name(beton.name + ".json")


def patch(beton: Path, offset: int, data: bytes) -> None:
    with beton.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_whole_file(copy: Path) -> None:
    beton = verify(copy)
    assert beton.images == NUMBERED
    assert beton.labels.tolist() == list(range(NUMBERED))
    assert 0 < beton.jpegs < NUMBERED
    sidecar(copy).unlink()
    assert verify(copy).images == NUMBERED


@pytest.mark.parametrize("with_sidecar", [True, False])
@pytest.mark.parametrize("keep", [30, 1000, 4000, PAGE_SIZE, PAGE_SIZE + 5000, 2 * PAGE_SIZE, -24, -1])
def test_a_file_that_is_cut_short(copy: Path, keep: int, with_sidecar: bool) -> None:
    size = copy.stat().st_size
    with copy.open("r+b") as file:
        file.truncate(keep if keep > 0 else size + keep)
    if not with_sidecar:
        sidecar(copy).unlink()
    with pytest.raises(UserError, match=r"x\.beton: cut short"):
        training(copy)


def test_a_file_that_was_never_finished(copy: Path) -> None:
    patch(copy, 16, bytes(8))
    with pytest.raises(UserError, match="never finished"):
        inspect(copy)


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x89PNG\r\n\x1a\n" + bytes(5000), bytes(range(256)) * 100, bytes(9000)]
)
def test_something_else(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.beton"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.beton: not a \.beton file"):
        evaluation(path)


def test_a_missing_file(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "x.beton", "no such file"), (tmp_path, "is a folder, and a .beton file is needed")):
        with pytest.raises(UserError, match=f"{what}; write it with"):
            training(path)


def test_a_beton_of_other_fields(copy: Path) -> None:
    patch(copy, 24, b"\x05")
    with pytest.raises(
        UserError, match=r"has no field of RGB images: `image` \(JSON\), `label` \(int\); write it again"
    ):
        inspect(copy)
    patch(copy, 24, b"\x4d")
    with pytest.raises(UserError, match=r"`image` \(kind 77, which FFCV has not\)"):
        inspect(copy)


def test_a_beton_of_another_version(copy: Path) -> None:
    patch(copy, 0, b"\x03\x00")
    with pytest.raises(UserError, match=r"x\.beton: is of version 3 of the \.beton format; version 2 is read"):
        inspect(copy)


def test_a_beton_of_the_other_byte_order(copy: Path) -> None:
    """FFCV fixes the order, so that only another program leaves such a file."""
    header = np.fromfile(copy, layout()[0], 1)
    patch(copy, 0, header.astype(header.dtype.newbyteorder()).tobytes())
    with pytest.raises(UserError, match=r"x\.beton: its numbers have the other byte order"):
        inspect(copy)


def test_damage_in_the_tables(copy: Path) -> None:
    generator = np.random.default_rng(0)
    tables = 24 + 2 * 1041 + 32 * NUMBERED
    original = copy.read_bytes()
    for _ in range(40):
        offset = int(generator.integers(2200, tables))
        patch(copy, offset, bytes([original[offset] ^ 0xFF]))
        with pytest.raises(UserError):
            verify(copy)
        patch(copy, offset, original[offset : offset + 1])
    verify(copy)


def test_a_changed_byte_in_an_image_is_found_by_verify(copy: Path) -> None:
    patch(copy, PAGE_SIZE + 12345, bytes([copy.read_bytes()[PAGE_SIZE + 12345] ^ 1]))
    inspect(copy)
    with pytest.raises(UserError, match=r"1 of 53 images are damaged: \d+ \(class \d+\)"):
        verify(copy)


def test_a_damaged_jpeg_ends_the_epoch_instead_of_being_trained_on(copy: Path) -> None:
    content = copy.read_bytes()
    victim = content.index(b"\xff\xd8\xff", PAGE_SIZE)
    end = content.index(b"\xff\xd9", victim)
    patch(copy, (victim + end) // 2, bytes(end - (victim + end) // 2))
    with pytest.raises(UserError, match=r"x\.beton: image \d+ is damaged.*data check"):
        list(evaluation(copy))


def test_a_file_that_its_sidecar_does_not_describe(copy: Path) -> None:
    note = json.loads(sidecar(copy).read_text())
    sidecar(copy).write_text(json.dumps({**note, "images": 7}))
    with pytest.raises(UserError, match=r"53 images.*x\.beton\.json describes 7 images"):
        inspect(copy)
    sidecar(copy).write_text("{")
    with pytest.raises(UserError, match=r"x\.beton\.json: not a description"):
        inspect(copy)
    sidecar(copy).write_text("{}")
    with pytest.raises(UserError, match=r"x\.beton\.json: not a description"):
        inspect(copy)
