"""Images read from where they lie: the same batches, bit for bit, as from a .beton file written of them."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssam_scale.config.section import SOURCES
from ssam_scale.data import ImageLoader, open_images, write_beton
from ssam_scale.data.check import damaged_images
from ssam_scale.data.jpeg_header import jpeg_sizes
from ssam_scale.data.sources import open_source
from ssam_scale.errors import UserError
from tests.support.images import make_image, make_image_folder
from tests.support.loaders import evaluation, training
from tests.support.runs import ssam_scale

PER_CLASS, CLASSES = 9, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("in place") / "images"
    make_image_folder(root, CLASSES, PER_CLASS, size_range=(30, 90))
    return root


@pytest.fixture(scope="module")
def written(folder: Path) -> Path:
    out = folder.parent / "images.beton"
    write_beton(folder, out, jpeg_proportion=1.0, progress=False)
    return out


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def of(folder: Path) -> Path:
    return Path(f"folder:{folder}")


def batches(loader: ImageLoader, epoch: int = 1, seen: int = 0) -> list[tuple[torch.Tensor, ...]]:
    loader.set_epoch(epoch, seen)
    return [(batch.images, batch.labels, getattr(batch, "indices", batch.labels)) for batch in loader]


def assert_equal(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def test_every_source_is_opened() -> None:
    for source in SOURCES:
        with pytest.raises(UserError, match="nowhere: no such"):
            open_images(Path(f"{source}:nowhere"))


@pytest.mark.parametrize(
    "options",
    [{}, {"workers": 3}, {"indices": True}, {"subset": 20}, {"interpolation": "area"}, {"seed": 9, "flip": 1.0}],
    ids=["plain", "workers", "indices", "subset", "area", "seed"],
)
def test_training_batches_are_those_of_the_file_written_of_it(
    folder: Path, written: Path, options: dict[str, Any]
) -> None:
    mine, theirs = training(of(folder), **options), training(written, **options)
    assert (mine.images, mine.pool, len(mine)) == (theirs.images, theirs.pool, len(theirs))
    for epoch in (0, 3):
        assert_equal(batches(mine, epoch), batches(theirs, epoch))


def test_any_number_of_processes_and_a_start_within_an_epoch(folder: Path, written: Path) -> None:
    whole = batches(training(written))
    ranks = [batches(training(of(folder), rank, 2)) for rank in range(2)]
    together = [tuple(torch.cat(parts) for parts in zip(*both, strict=True)) for both in zip(*ranks, strict=True)]
    assert_equal(together, whole)
    assert_equal(batches(training(of(folder)), seen=8), whole[1:])


@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_batches_are_those_of_the_file(folder: Path, written: Path, processes: int) -> None:
    for rank in range(processes):
        assert_equal(batches(evaluation(of(folder), rank, processes)), batches(evaluation(written, rank, processes)))


KINDS: dict[str, Callable[[Image.Image, Path], None]] = {
    "png": lambda image, path: image.save(path, "png"),
    "gray png": lambda image, path: image.convert("L").save(path, "png"),
    "palette": lambda image, path: image.quantize(40).save(path, "png"),
    "transparent": lambda image, path: image.convert("RGBA").save(path, "png"),
    "webp": lambda image, path: image.save(path, "webp"),
    "bmp": lambda image, path: image.save(path, "bmp"),
    "tiff": lambda image, path: image.save(path, "tiff"),
    "gray": lambda image, path: image.convert("L").save(path, "jpeg"),
    "cmyk": lambda image, path: image.convert("CMYK").save(path, "jpeg"),
    "progressive": lambda image, path: image.save(path, "jpeg", progressive=True),
    "turned": lambda image, path: image.save(path, "jpeg", exif=_turned()),
    "restart markers": lambda image, path: image.save(path, "jpeg", restart_marker_blocks=1),
    "garbage behind": lambda image, path: path.write_bytes(_jpeg(image) + b"garbage") and None,
    # In the header, where no pixel is wrong: libjpeg complains, and `data write` takes it.
    "stray bytes": lambda image, path: path.write_bytes(_jpeg(image).replace(b"\xff\xdb", b"\0\0\xff\xdb", 1)) and None,
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


def test_images_of_every_kind_are_what_would_be_written(tmp_path: Path) -> None:
    """As pixels, of which nothing is lost."""
    draw, root = np.random.default_rng(0), tmp_path / "images"
    for number, save in enumerate(KINDS.values()):
        for label in "ab":
            (root / label).mkdir(parents=True, exist_ok=True)
            save(Image.fromarray(make_image(draw, 40 + number, 70 - number)), root / label / f"{number:02}.png")
    write_beton(root, tmp_path / "x.beton", jpeg_proportion=0.0, progress=False)
    for workers in (1, 2):
        assert_equal(
            batches(training(of(root), workers=workers, indices=True)),
            batches(training(tmp_path / "x.beton", workers=workers, indices=True)),
        )
    assert_equal(batches(evaluation(of(root))), batches(evaluation(tmp_path / "x.beton")))
    assert damaged_images(open_images(of(root))) == []


def damage(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def test_a_damaged_image_ends_the_run_and_is_named(copy: Path) -> None:
    victim = copy / "n00000001" / "n00000001_4.JPEG"
    damage(victim)
    with pytest.raises(
        UserError, match=rf"{victim}: .*; mend or remove it, .*data\.on_damaged=skip; `ssam-scale data "
    ):
        batches(training(of(copy), batch_size=1))
    victim.write_text("<html>")
    with pytest.raises(UserError, match=rf"{victim}: a page of HTML"):
        batches(training(of(copy), batch_size=1))
    victim.write_bytes(b"")
    with pytest.raises(UserError, match=rf"{victim}: empty file"):
        batches(evaluation(of(copy)))


def test_the_next_image_takes_the_place_of_a_damaged_one(copy: Path) -> None:
    damage(copy / "n00000001" / "n00000001_4.JPEG")
    (copy / "n00000002" / "n00000002_8.JPEG").write_bytes(b"nothing")
    at, last = PER_CLASS + 4, CLASSES * PER_CLASS - 1
    loader = training(of(copy), batch_size=1, on_damaged="skip", indices=True)
    seen = [int(indices) for _, _, indices in batches(loader)]
    assert loader.damaged == {at: at + 1, last: 0}
    assert sorted(seen) == sorted([*(set(range(last)) - {at}), at + 1, 0])


def test_check_names_the_damaged_ones(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ssam_scale("data", "check", of(copy)) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"folder:{copy}: 27 images (27 .jpeg), 3 classes" in said
    assert "every image can be decoded" in said
    damage(copy / "n00000001" / "n00000001_4.JPEG")
    assert ssam_scale("data", "check", of(copy)) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert "1 of 27 images are damaged: n00000001/n00000001_4.JPEG (class n00000001)" in said
    assert ssam_scale("data", "check", of(copy), "--add-checksums") == 2
    assert "none can be kept" in capsys.readouterr().err


def test_pixels_of_few_images_are_in_memory_at_a_time(tmp_path: Path) -> None:
    """However many are in a batch, or are checked: of a folder of PNGs they are larger than the files by far."""
    (tmp_path / "a").mkdir()
    Image.new("RGB", (600, 600)).save(tmp_path / "a" / "0.png")
    for number in range(1, 64):
        (tmp_path / "a" / f"{number}.png").hardlink_to(tmp_path / "a" / "0.png")
    images = open_images(of(tmp_path))
    damaged_images(images, workers=1)  # compiles
    tracemalloc.start()
    try:
        assert damaged_images(images, workers=1) == []
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 * 3 * 600 * 600  # of 64; eight, twice while they are put behind one another, and what decodes one


@pytest.mark.parametrize("change", ["shorter", "other", "gone"])
def test_a_file_that_changes_while_a_run_reads_it_ends_the_run(copy: Path, change: str) -> None:
    loader = training(of(copy))
    batches(loader, 0)
    victim = copy / "n00000000" / "n00000000_1.JPEG"
    if change == "shorter":
        damage(victim)
    elif change == "other":
        written = victim.stat().st_mtime_ns
        os.utime(victim, ns=(written, written + 10**9))
    else:
        victim.unlink()
    with pytest.raises(UserError, match=rf"{victim}: (has changed since the run began|cannot be read any more)"):
        [batches(loader, epoch) for epoch in range(1, 6)]


def test_the_fingerprint_tells_one_data_set_from_another(folder: Path, copy: Path) -> None:
    """Wherever it lies."""
    before = open_images(of(folder)).fingerprint
    assert open_images(of(copy)).fingerprint == before
    victim = copy / "n00000000" / "n00000000_1.JPEG"
    found = {before}
    victim.rename(victim.with_name("x.jpg"))
    found.add(open_images(of(copy)).fingerprint)
    victim.with_name("x.jpg").write_bytes(b"shorter")
    found.add(open_images(of(copy)).fingerprint)
    victim.with_name("x.jpg").unlink()
    found.add(open_images(of(copy)).fingerprint)
    (copy / "n00000002").rename(copy / "z")
    found.add(open_images(of(copy)).fingerprint)
    assert len(found) == 5


@pytest.fixture
def shards(folder: Path, tmp_path: Path) -> Path:
    """The folder's images as WebDataset has them: three tars, in which an image and its label's number follow."""
    paths = sorted(folder.rglob("*.JPEG"))
    generator = np.random.default_rng(3)
    generator.shuffle(paths)
    place = tmp_path / "shards"
    place.mkdir()
    for number, part in enumerate(np.array_split(np.array(paths, object), 3)):
        with tarfile.open(place / f"train-{number:03}.tar", "w") as tar:
            for path in part:
                add(tar, f"{path.stem}.jpg", path.read_bytes())
                add(tar, f"{path.stem}.cls", str(int(path.parent.name[1:])).encode())
                add(tar, f"{path.stem}.json", b"{}")
    return place


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def test_shards_are_read_as_the_file_written_of_them(shards: Path, tmp_path: Path) -> None:
    """By a folder of them, or by a pattern."""
    write_beton(shards, tmp_path / "x.beton", jpeg_proportion=1.0, progress=False)
    for place in (f"wds:{shards}", f"wds:{shards}/train-{{000..002}}.tar", f"wds:{shards}/train-*.tar"):
        for options in ({}, {"workers": 2, "indices": True}):
            expected = batches(training(tmp_path / "x.beton", **options), 2)
            assert_equal(batches(training(Path(place), **options), 2), expected)
        assert_equal(batches(evaluation(Path(place))), batches(evaluation(tmp_path / "x.beton")))
    assert_equal(batches(training(Path(f"wds:{shards}")), seen=8), batches(training(tmp_path / "x.beton"))[1:])
    found = open_images(Path(f"wds:{shards}"))
    assert (found.images, found.classes, found.class_names) == (CLASSES * PER_CLASS, CLASSES, [])
    assert found.fingerprint != open_images(Path(f"wds:{shards}/train-00[01].tar")).fingerprint


def test_other_formats_in_shards(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(9):
            for suffix, save in (("png", KINDS["png"]), ("jpg", KINDS["progressive"])):
                save(Image.fromarray(make_image(draw, 40, 30 + number)), tmp_path / "image")
                add(tar, f"{number}{suffix}.{suffix}", (tmp_path / "image").read_bytes())
                add(tar, f"{number}{suffix}.cls", b"cat" if number % 2 else b"dog")
    write_beton(tmp_path / "a.tar", tmp_path / "x.beton", jpeg_proportion=0.0, progress=False)
    place = Path(f"wds:{tmp_path / 'a.tar'}")
    assert_equal(batches(training(place)), batches(training(tmp_path / "x.beton")))
    assert open_images(place).class_names == ["cat", "dog"]
    training(place, val=tmp_path / "x.beton")


def test_a_damaged_image_of_a_shard_is_named(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, place = shards / "train-001.tar", Path(f"wds:{shards}")
    with tarfile.open(path) as tar:
        member = next(member for member in tar if member.name.endswith(".jpg"))
    content = bytearray(path.read_bytes())
    content[member.offset_data + 2 : member.offset_data + member.size] = bytes(member.size - 2)
    loader = training(place)
    batches(loader)
    path.write_bytes(content)
    os.utime(path, (1, 1))
    with pytest.raises(UserError, match=rf"{path}: has changed since the run began"):
        batches(loader, 0)
    with pytest.raises(UserError, match=rf"{path}/{member.name}: .*; mend or remove it"):
        batches(training(place, batch_size=1))
    assert ssam_scale("data", "check", place) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"1 of 27 images are damaged: train-001.tar/{member.name}" in said


def test_shards_that_cannot_be_read_where_they_lie(shards: Path, folder: Path, written: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress((shards / "train-000.tar").read_bytes()))
    for place, told in {
        packed: r"packed\.tar: compressed by gzip, so that images cannot be read where they lie; uncompress it first",
        shards / "train-{000..004}.tar": r"train-003\.tar: no such file",
        shards / "val-*.tar": "no file fits this pattern",
        folder: r"has no \.tar in it; give shards of WebDataset, or folder:",
        written: r"images\.beton: no tar",
    }.items():
        with pytest.raises(UserError, match=told):
            training(Path(f"wds:{place}"))
    with pytest.raises(ValueError, match=r"order: pages is of \.beton files, and train is wds:; use random"):
        training(Path(f"wds:{shards}"), order="pages")


def test_a_folder_of_shards_is_of_one_part_of_a_data_set(shards: Path) -> None:
    """Validation images beside them are not trained on, as `data write` does not write them; what is hidden is none."""
    (shards / "._train-000.tar").write_bytes(b"of Finder")
    assert open_images(Path(f"wds:{shards}")).images == CLASSES * PER_CLASS
    (shards / "train-002.tar").rename(shards / "val-000.tar")
    told = rf"has files of train, val; say which, such as '{shards}/val\*\.tar'"
    for read in (lambda: training(Path(f"wds:{shards}")), lambda: open_source(shards)):
        with pytest.raises(UserError, match=told):
            read()


def test_sources_that_there_are_not(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no source of images is called imagenet:; there are folder:, wds:"):
        training(Path(f"imagenet:{folder}"))


def test_classes_of_shards_are_compared_by_name(tmp_path: Path) -> None:
    jpeg = _jpeg(Image.new("RGB", (9, 9)))
    for name, labels in (("train", ("cat", "dog")), ("val", ("cat", "emu"))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number, label in enumerate(labels):
                add(tar, f"{number}.jpg", jpeg)
                add(tar, f"{number}.cls", label.encode())
    with pytest.raises(UserError, match=r"different classes \(only one has dog, emu\)"):
        training(Path(f"wds:{tmp_path}/train.tar"), val=Path(f"wds:{tmp_path}/val.tar"), batch_size=1)


def test_what_cannot_be(folder: Path, written: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"order: pages is of \.beton files, and train is folder:; use random"):
        training(of(folder), order="pages")
    with pytest.raises(UserError, match=r"nowhere: no such folder; give a folder with one folder of images per class"):
        training(of(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"images\.beton: is a file; give a folder"):
        training(of(written))
    make_image_folder(tmp_path / "others", CLASSES + 1, 2, size_range=(9, 9))
    for train, val in ((of(folder), of(tmp_path / "others")), (written, of(tmp_path / "others"))):
        with pytest.raises(UserError, match=r"different classes \(only one has n00000003\)"):
            training(train, val=val)
    training(of(folder), val=written)
    (folder.parent / "pipe" / "a").mkdir(parents=True)
    os.mkfifo(folder.parent / "pipe" / "a" / "x.jpg")
    with pytest.raises(UserError, match=r"x\.jpg: is no file"):
        training(of(folder.parent / "pipe"))


def sizes_of(contents: list[bytes]) -> list[tuple[int, int]]:
    data = np.frombuffer(b"".join(contents), np.uint8)
    sizes = np.array([len(content) for content in contents], np.int64)
    heights, widths = np.full(len(sizes), -1), np.full(len(sizes), -1)
    jpeg_sizes(data, np.cumsum(sizes) - sizes, sizes, heights, widths)
    return list(zip(heights.tolist(), widths.tolist(), strict=True))


def test_sizes_are_read_from_headers() -> None:
    image = Image.fromarray(make_image(np.random.default_rng(0), 37, 61))
    plain, thumbnail = _jpeg(image), _jpeg(image.resize((8, 8)))
    comment = plain[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail + plain[2:]
    fill = plain.replace(b"\xff\xc0", b"\xff\xff\xff\xc0", 1)
    assert sizes_of([plain, comment, fill]) == [(37, 61)] * 3
    buffer = io.BytesIO()
    image.save(buffer, "jpeg", progressive=True)
    assert sizes_of([buffer.getvalue(), b"", b"\xff\xd8", b"\x89PNG" + bytes(40)]) == [(0, 0)] * 4
    cut = [plain[:count] for count in range(len(plain))]
    assert set(sizes_of(cut)) == {(0, 0), (37, 61)}


@given(st.binary(max_size=60))
def test_no_bytes_are_read_behind_an_image(data: bytes) -> None:
    """What follows it is another one's."""
    other = _jpeg(Image.new("RGB", (3, 5)))
    assert sizes_of([b"\xff\xd8" + data, other]) == [sizes_of([b"\xff\xd8" + data])[0], (5, 3)]
