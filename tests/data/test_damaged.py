"""No damaged image is trained on unseen: each has a hash, which its decoder compares."""

from __future__ import annotations

import ctypes
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssam_scale.data import inspect, verify
from ssam_scale.data.beton import JPEG, Sidecar, encoded_sums, layout
from ssam_scale.data.check import add_checksums, damaged_images
from ssam_scale.data.damaged import Damaged
from ssam_scale.data.encode import Encoding
from ssam_scale.data.sources import Sample
from ssam_scale.data.write import write_samples
from ssam_scale.data.xxh3 import address, xxh3
from ssam_scale.errors import UserError
from tests.support.images import make_image
from tests.support.loaders import NUMBERED, training
from tests.support.runs import ssam_scale

FLIPS = 200


XXH3 = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t)(address())


@given(st.binary(max_size=600), st.integers(0, 7))
def test_compiled_code_hashes_as_python_does(data: bytes, start: int) -> None:
    """Bytes of every length, also where they do not begin at a word."""
    whole = np.frombuffer(b"-" * start + data, np.uint8)
    assert XXH3(whole.ctypes.data + start, len(data)) == xxh3(data) == xxh3(whole[start:])


def test_the_hash_is_xxh3() -> None:
    """The value of nothing that xxHash's specification names; and every bit of an image matters."""
    assert xxh3(b"") == 0x2D06800538D394C2
    image = bytearray(np.random.default_rng(0).bytes(500))
    seen = {xxh3(image)}
    for bit in range(8 * len(image)):
        image[bit // 8] ^= 1 << bit % 8
        seen.add(xxh3(image))
        image[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 1 + 8 * len(image)


def test_hashes_of_before_are_not_known(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files that the first versions wrote have XXH64's: they are read, and get those of today like a file of FFCV's."""
    note = json.loads(Sidecar.path(copy).read_text())
    hashes = note.pop("xxh3")
    Sidecar.path(copy).write_text(json.dumps({**note, "xxh64": hashes}))
    assert len(inspect(copy).sums) == 0
    assert ssam_scale("data", "check", copy, "--add-checksums") == 0
    assert Sidecar.load(copy) == Sidecar(**note, xxh3=encoded_sums(inspect(copy).sums))
    assert len(inspect(copy).sums) == NUMBERED


@pytest.fixture
def copy(numbered: Path, tmp_path: Path) -> Path:
    for path in (numbered, Sidecar.path(numbered)):
        shutil.copy2(path, tmp_path / path.name.replace("numbered", "x"))
    return tmp_path / "x.beton"


def flip(path: Path, index: int, draw: random.Random) -> None:
    """One bit of an image."""
    beton = inspect(path)
    with path.open("r+b") as file:
        place = int(beton.starts[index]) + draw.randrange(int(beton.sizes[index]))
        file.seek(place)
        byte = file.read(1)[0] ^ 1 << draw.randrange(8)
        file.seek(place)
        file.write(bytes([byte]))


def test_every_flipped_bit_is_found_where_the_image_is_decoded(copy: Path) -> None:
    """JPEG and raw alike: of 200 bits 200, in whatever image."""
    draw, whole = random.Random(0), copy.read_bytes()
    kinds = set()
    for _ in range(FLIPS):
        index = draw.randrange(NUMBERED)
        flip(copy, index, draw)
        beton = inspect(copy)
        kinds.add(bool(beton.is_jpeg[index]))
        assert damaged_images(beton) == [index]
        copy.write_bytes(whole)
    assert kinds == {True, False}
    for index in (0, 7, 20):
        flip(copy, index, draw)
        loader = training(copy, batch_size=1)
        with pytest.raises(UserError, match=rf"x\.beton: image {index} is damaged.*data\.on_damaged=skip.*data check"):
            list(loader)
        copy.write_bytes(whole)


@pytest.mark.parametrize("order", ["random", "pages"])
@pytest.mark.parametrize("workers", [1, 3])
def test_the_next_image_takes_the_place_of_a_damaged_one(copy: Path, order: str, workers: int) -> None:
    """With its own label and crop, on every process, and again in each epoch."""
    draw = random.Random(1)
    whole = {int(label): image for batch in training(copy, order=order) for image, label in zip(*batch, strict=True)}
    for index in (3, 4, NUMBERED - 1):
        flip(copy, index, draw)
    instead = {3: 5, 4: 5, NUMBERED - 1: 0}
    for processes in (1, 2):
        loaders = [
            training(copy, rank, processes, order=order, workers=workers, on_damaged="skip", indices=True)
            for rank in range(processes)
        ]
        for epoch in (0, 0):
            seen = []
            for loader in loaders:
                loader.set_epoch(epoch)
                for batch in loader:
                    assert batch.indices.tolist() == batch.labels.tolist()
                    for image, label in zip(batch.images, batch.labels.tolist(), strict=True):
                        seen.append(label)
                        if label in whole:
                            assert torch.equal(image, whole[label])
            assert not set(seen) & instead.keys()
            assert len(seen) == NUMBERED // 8 * 8
        met = {image: other for loader in loaders for image, other in loader.damaged.items()}
        assert met.items() <= instead.items()
        assert len(met) >= 2  # of 53 images 48 are seen


def test_a_file_of_which_no_image_is_sound_ends_the_run(tmp_path: Path) -> None:
    path, draw = tmp_path / "x.beton", random.Random(0)
    images = [Sample(str(n), make_image(np.random.default_rng(n), 20, 20), n % 2) for n in range(8)]
    write_samples(images, ["a", "b"], path, Encoding(None, 90, 0.5, 0), source={}, progress=False)
    for index in range(8):
        flip(path, index, draw)
    with pytest.raises(UserError, match="all of its 8 images are damaged"):
        list(training(path, on_damaged="skip"))


def test_which_image_takes_a_place_is_the_same_for_all(numbered: Path) -> None:
    damaged = Damaged(inspect(numbered), "skip")
    assert damaged.replace(NUMBERED - 1, lambda image: image == 2) == 2
    assert damaged.replaced(np.array([1, NUMBERED - 1, 0])).tolist() == [1, 2, 0]


def table_says(path: Path, index: int, **fields: int) -> None:
    """Change what the file's table says of an image, as damage or a malicious file would."""
    header, field, meta, _ = layout()
    place = header.itemsize + 2 * field.itemsize + index * meta.itemsize
    with path.open("r+b") as file:
        file.seek(place)
        record = np.frombuffer(file.read(meta.itemsize), meta).copy()
        for name, value in fields.items():
            record["f0"][name] = value
        file.seek(place)
        file.write(record.tobytes())


def test_a_jpeg_of_another_size_than_the_table_says_is_not_decoded(copy: Path) -> None:
    """Also without hashes, as of a file that FFCV wrote: nothing is scaled, nor read behind what was decoded."""
    beton = inspect(copy)
    index = int(np.flatnonzero(beton.is_jpeg)[0])
    Sidecar.path(copy).unlink()
    for change in ({"height": int(beton.heights[index]) + 8}, {"width": int(beton.widths[index]) - 8}):
        shutil.copy2(copy, copy.with_name("y.beton"))
        table_says(copy.with_name("y.beton"), index, **change)
        changed = inspect(copy.with_name("y.beton"))
        assert damaged_images(changed) == [index]
        with pytest.raises(UserError, match=f"1 of 53 images are damaged: {index} "):
            verify(copy.with_name("y.beton"))


def test_tables_that_cannot_be_are_refused_at_opening(copy: Path) -> None:
    beton = inspect(copy)
    raw = int(np.flatnonzero(~beton.is_jpeg)[0])
    jpeg = int(np.flatnonzero(beton.is_jpeg)[0])
    for index, change in (
        (raw, {"height": 60_000}),
        (jpeg, {"width": 0}),
        (raw, {"mode": JPEG + 7}),
        (jpeg, {"data_ptr": int(beton.starts[jpeg]) + 1}),
    ):
        shutil.copy2(copy, copy.with_name("y.beton"))
        table_says(copy.with_name("y.beton"), index, **change)
        with pytest.raises(UserError, match="tables contradict each other"):
            inspect(copy.with_name("y.beton"))


def test_hashes_of_other_images_are_noticed(copy: Path) -> None:
    note = json.loads(Sidecar.path(copy).read_text())
    Sidecar.path(copy).write_text(json.dumps({**note, "xxh3": note["xxh3"][:-24] + "AAAA"}))
    with pytest.raises(UserError, match=r"hashes"):
        inspect(copy)
    Sidecar.path(copy).write_text(json.dumps({**note, "xxh3": "no base64"}))
    with pytest.raises(UserError, match="cannot be read"):
        inspect(copy)


def test_a_file_from_elsewhere_gets_hashes_once(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As FFCV's writer leaves it: without anything beside it."""
    Sidecar.path(copy).unlink()
    assert len(inspect(copy).sums) == 0
    assert ssam_scale("data", "check", copy) == 0
    assert "every image can be decoded; nothing beside it says what" in capsys.readouterr().out.replace("\n", " ")
    assert ssam_scale("data", "check", copy, "--add-checksums") == 0
    beton = inspect(copy)
    assert len(beton.sums) == NUMBERED
    assert beton.classes == NUMBERED
    assert ssam_scale("data", "check", copy) == 0
    flip(copy, 11, random.Random(0))
    capsys.readouterr()
    assert ssam_scale("data", "check", copy) == 2
    assert "1 of 53 images are damaged: 11 (class 11)" in capsys.readouterr().err.replace("\n", " ")
    assert ssam_scale("data", "check", copy, "--add-checksums") == 2
    assert "are in x.beton.json already" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(UserError, match="already"):
        add_checksums(copy)


def test_a_damaged_file_gets_no_hashes(copy: Path) -> None:
    beton = inspect(copy)
    index = int(np.flatnonzero(beton.is_jpeg)[0])
    Sidecar.path(copy).unlink()
    with copy.open("r+b") as file:
        file.seek(int(beton.starts[index]) + int(beton.sizes[index]) // 2)
        file.write(b"\xff\xd9" * 20)
    with pytest.raises(UserError, match=rf"1 images cannot be decoded: {index} "):
        add_checksums(copy)
    assert not Sidecar.path(copy).exists()
