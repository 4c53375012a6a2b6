"""Several .beton files as one data set: shards are read as the file that `data join` makes of them, bit for bit."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssam_scale.data import ImageLoader, open_images, write_beton
from ssam_scale.data.beton import Beton, Sidecar, inspect
from ssam_scale.data.check import add_checksums, damaged_images
from ssam_scale.data.encode import Encoding
from ssam_scale.data.join import join
from ssam_scale.data.shard import Shard
from ssam_scale.data.sources import Sample
from ssam_scale.data.sources.base import expand
from ssam_scale.data.write import write_samples
from ssam_scale.errors import UserError
from tests.support.images import make_image, make_image_folder
from tests.support.loaders import evaluation, training
from tests.support.runs import ssam_scale

PER_CLASS, CLASSES = 9, 3
IMAGES = PER_CLASS * CLASSES
NAMES = {1: "c", 2: "a", 3: "b"}
"""Of the files of shards: the order of names is not theirs."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards in `shards/`, and what `data join` makes of them."""
    root = tmp_path_factory.mktemp("several")
    make_image_folder(root / "images", CLASSES, PER_CLASS, size_range=(30, 90))
    for number, name in NAMES.items():
        write_beton(root / "images", shard(root, number), shard=Shard(number, 3), jpeg_proportion=0.5, progress=False)
        assert shard(root, number).name == f"{name}.beton"
    join(root / "whole.beton", [shard(root, number) for number in NAMES], progress=False)
    return root


def shard(root: Path, number: int) -> Path:
    return root / "shards" / f"{NAMES[number]}.beton"


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Path:
    """The shards again, for a test that changes them."""
    shutil.copytree(written / "shards", tmp_path / "shards")
    return tmp_path


def batches(loader: ImageLoader, epoch: int = 1, seen: int = 0) -> list[tuple[torch.Tensor, ...]]:
    loader.set_epoch(epoch, seen)
    return [(batch.images, batch.labels, getattr(batch, "indices", batch.labels)) for batch in loader]


def assert_equal(one: list[tuple[torch.Tensor, ...]], other: list[tuple[torch.Tensor, ...]]) -> None:
    assert len(one) == len(other) > 0
    for mine, theirs in zip(one, other, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def together(path: Path, processes: int, **values: Any) -> list[tuple[torch.Tensor, ...]]:
    ranks = [batches(training(path, rank, processes, indices=True, **values)) for rank in range(processes)]
    return [tuple(torch.cat(parts) for parts in zip(*batch, strict=True)) for batch in zip(*ranks, strict=True)]


@pytest.mark.parametrize("pattern", ["*.beton", "[a-c].beton", "{b,c,a}.beton"])
def test_shards_are_read_as_the_file_joined_of_them(written: Path, pattern: str) -> None:
    """On one process and two, from the beginning of an epoch and from its middle, whatever the files are called."""
    shards, whole = written / "shards" / pattern, written / "whole.beton"
    expected = together(whole, 1)
    for processes in (1, 2):
        assert_equal(together(shards, processes), expected)
    assert_equal(batches(training(shards, workers=3, indices=True), seen=8), expected[1:])
    for rank in range(2):
        assert_equal(batches(evaluation(shards, rank, 2)), batches(evaluation(whole, rank, 2)))
    found, joined = open_images(shards), open_images(whole)
    assert (found.images, found.classes, found.class_names) == (IMAGES, CLASSES, joined.class_names)
    assert found.counts == joined.counts
    assert found.labels.tolist() == joined.labels.tolist()
    assert found.place == str(shards)


def test_pages_are_numbered_over_all_files(written: Path) -> None:
    """An order by them sees each image once, and the same batches on two processes as on one."""
    shards = written / "shards" / "*.beton"
    found, parts = open_images(shards), [inspect(shard(written, number)) for number in (1, 2, 3)]
    assert found.pages is not None
    pages = np.split(found.pages, 3)
    for own, part in zip(pages, parts, strict=True):
        assert (own - own[0]).tolist() == (part.pages - part.pages[0]).tolist()
    assert all(one.max() < other.min() for one, other in pairwise(pages))
    alone = together(shards, 1, order="pages", memory=1e-6, batch_size=9)
    assert sorted(torch.cat([numbers for _, _, numbers in alone]).tolist()) == list(range(IMAGES))
    assert_equal(together(shards, 3, order="pages", memory=1e-6, batch_size=9), alone)
    random, seen = (by_number(epoch) for epoch in (together(shards, 1), alone))
    assert all(torch.equal(seen[number], image) for number, image in random.items())


def by_number(epoch: list[tuple[torch.Tensor, ...]]) -> dict[int, torch.Tensor]:
    return {int(number): image for images, _, numbers in epoch for number, image in zip(numbers, images, strict=True)}


def damage(path: Path, image: int) -> None:
    beton = inspect(path)
    with path.open("r+b") as file:
        file.seek(int(beton.starts[image]))
        file.write(bytes([path.read_bytes()[int(beton.starts[image])] ^ 1]))


def test_a_damaged_image_is_named_by_its_file(copy: Path, written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And replaced by the one that takes its place in the joined file."""
    shards = copy / "shards" / "*.beton"
    damage(shard(copy, 2), 4)
    damage(shard(copy, 3), 8)  # the last of all: the first of all takes its place
    assert damaged_images(open_images(shards)) == [13, 26]
    with pytest.raises(UserError, match=rf"b\.beton: image 8 is damaged.*data check '{copy}/shards/\*\.beton'"):
        batches(training(shards, batch_size=27))
    seen = batches(loader := training(shards, on_damaged="skip", batch_size=27, indices=True))
    assert loader.damaged == {13: 14, 26: 0}
    assert sorted(seen[0][2].tolist()) == sorted([*range(13), *range(14, 26), 14, 0])
    assert loader.source.named(13) == f"4 of {shard(copy, 2)}"
    assert ssam_scale("data", "check", shards) == 2
    said = capsys.readouterr().err.replace("\n", " ")
    assert f"2 of 27 images are damaged: 4 of {shard(copy, 2)} (class n00000001), 8 of {shard(copy, 3)}" in said
    assert ssam_scale("data", "check", written / "shards" / "*.beton") == 0
    assert "27 images" in (said := capsys.readouterr().out)
    assert "whole: every byte as it was written" in said


def test_a_byte_beside_the_images_is_found_and_its_file_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with shard(copy, 3).open("r+b") as file:
        file.seek(inspect(shard(copy, 3)).starts[0] - 1)
        file.write(b"x")
    assert ssam_scale("data", "check", copy / "shards" / "*.beton") == 2
    assert f"{shard(copy, 3)}: its content has changed" in capsys.readouterr().err.replace("\n", "")


def test_a_file_that_changes_is_named(copy: Path) -> None:
    loader = training(copy / "shards" / "*.beton")
    batches(loader)
    os.utime(shard(copy, 2), (1, 1))
    with pytest.raises(UserError, match=r"a\.beton: has changed since the run began to read it"):
        batches(loader)
    loader = training(copy / "shards" / "*.beton")
    os.truncate(shard(copy, 3), 4096)
    with pytest.raises(UserError, match=r"b\.beton: has become shorter"):
        batches(loader)


def remove(root: Path) -> None:
    for path in (shard(root, 2), Sidecar.path(shard(root, 2))):
        path.unlink()


def repeat(root: Path) -> None:
    for path in (shard(root, 2), Sidecar.path(shard(root, 2))):
        shutil.copy(path, root / "shards" / path.name.replace("a.", "d."))


def other_images(root: Path) -> None:
    make_image_folder(root / "others", CLASSES, PER_CLASS, size_range=(30, 40))
    shutil.rmtree(root / "others" / "n00000002")
    write_beton(root / "others", shard(root, 2), shard=Shard(2, 3), jpeg_proportion=0.5, progress=False)


def no_shard(root: Path) -> None:
    Sidecar.path(shard(root, 2)).unlink()


def cut(root: Path) -> None:
    os.truncate(shard(root, 2), 100_000)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            remove,
            r"\*\.beton: 1 of 3 shards are missing: 2; write them \(`ssam-scale data write … --shard 2/3`\) and give",
        ),
        (repeat, r"d\.beton and .*a\.beton: both are shard 2/3; give it once"),
        (other_images, r"[abc]\.beton: is of other images or classes than .*[abc]\.beton; give the shards of one data"),
        (
            no_shard,
            r"a\.beton: is no shard \(no a\.beton\.json beside it, which would say so\); give shards of one data",
        ),
        (cut, r"a\.beton: cut short or never finished"),
    ],
    ids=["missing", "twice", "other images", "no shard", "cut short"],
)
def test_shards_that_are_no_data_set(copy: Path, change: Callable[[Path], None], told: str) -> None:
    change(copy)
    with pytest.raises(UserError, match=told):
        training(copy / "shards" / "*.beton")


# ------------------------------------------------------------------------------------------------- files of all kinds


def write(path: Path, images: int, classes: str = "xyz", seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    samples = [Sample(str(number), make_image(draw, 20, 30), number % 3) for number in range(images)]
    write_samples(samples, list(classes), path, Encoding(None, 90, 0.5, 0), source={}, progress=False)
    return path


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """Two data sets with the same classes, in folders of their own."""
    for number, name in enumerate(("one", "other")):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "train.beton", 10 + number, seed=number)
    return tmp_path


def test_data_sets_with_the_same_classes_follow_each_other_as_they_are_named(two: Path) -> None:
    for names in (("one", "other"), ("other", "one")):
        found = open_images(two / f"{{{','.join(names)}}}" / "train.beton")
        parts = [inspect(two / name / "train.beton") for name in names]
        assert found.labels.tolist() == [label for part in parts for label in part.labels.tolist()]
        assert found.sums.tolist() == [digest for part in parts for digest in part.sums.tolist()]
        assert found.bytes == sum(part.bytes for part in parts)
        assert found.class_names == ["x", "y", "z"]
    assert open_images(two / "{one,other}/train.beton").fingerprint != found.fingerprint
    training(two / "{one,other}/train.beton", val=two / "one/train.beton")
    with pytest.raises(UserError, match=r"different classes \(only one has w, z\)"):
        training(write(two / "w.beton", 9, "xyw"), val=two / "{one,other}/train.beton")


def test_hashes_that_are_known_of_one_file_alone_are_compared(two: Path) -> None:
    """As of two files that FFCV wrote, of one of which `data check --add-checksums` has noted them."""
    for name in ("one", "other"):
        Sidecar.path(two / name / "train.beton").unlink()
    add_checksums(two / "other" / "train.beton")
    place = two / "{one,other}/train.beton"
    assert damaged_images(open_images(place)) == []
    assert len(batches(training(place, batch_size=21))) == 1
    raw = [int(np.flatnonzero(~inspect(two / name / "train.beton").is_jpeg)[0]) for name in ("one", "other")]
    for name, image in zip(("one", "other"), raw, strict=True):
        damage(two / name / "train.beton", image)
    assert damaged_images(open_images(place)) == [10 + raw[1]]  # pixels may be anything
    with pytest.raises(UserError, match=rf"other/train\.beton: image {raw[1]} is damaged"):
        batches(training(place, batch_size=21))


def test_pages_of_two_sizes(two: Path) -> None:
    """Both are powers of two, so that a small page lies in a large one."""
    small, large = open_images(two / "one" / "train.beton"), open_images(two / "other" / "train.beton")
    assert isinstance(small, Beton)
    with (two / "one" / "train.beton").open("r+b") as file:
        data = bytearray(file.read())
        at = data.index((1 << 23).to_bytes(4, "little"))
        data[at : at + 4] = (1 << 21).to_bytes(4, "little")
        file.seek(0)
        file.write(data)
    assert inspect(two / "one" / "train.beton").page_size == 1 << 21
    found = open_images(two / "{one,other}/train.beton")
    assert (found.page_size, large.page_size) == (1 << 23, 1 << 23)
    assert len(set(found.pages)) == 2  # type: ignore[arg-type]
    assert len(batches(training(two / "{one,other}/train.beton", order="pages", batch_size=21))) == 1


def without_names(root: Path) -> None:
    Sidecar.path(root / "other" / "train.beton").unlink()


def same(root: Path) -> None:
    for end in ("", ".json"):
        shutil.copy(root / "one" / f"train.beton{end}", root / "other" / f"train.beton{end}")


def link(root: Path) -> None:
    shutil.rmtree(root / "other")
    (root / "other").symlink_to(root / "one")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda root: write(root / "other/train.beton", 9, "xyw"),
            r"different classes \(only one has w, z\).*--classes-",
        ),
        (lambda root: write(root / "other/train.beton", 9, "xzy"), "have the same classes in another order"),
        (without_names, r"nothing names the classes of train\.beton.*copy train\.beton\.json, too"),
        (same, r"other/train\.beton and .*one/train\.beton: have the same content"),
        (link, r"other/train\.beton and .*one/train\.beton: have the same content"),
        (lambda root: (root / "other/train.beton").write_bytes(b""), r"other/train\.beton: not a \.beton file"),
        (lambda root: (root / "other/train.beton").unlink(), r"other/train\.beton: no such file"),
    ],
    ids=["classes", "order of classes", "no names", "a copy", "a link", "no bytes", "missing"],
)
def test_files_that_are_no_data_set(two: Path, change: Callable[[Path], Any], told: str) -> None:
    change(two)
    with pytest.raises(UserError, match=told):
        training(two / "{one,other}/train.beton")


def test_patterns_that_nothing_fits(two: Path) -> None:
    with pytest.raises(UserError, match=r"val-\*\.beton: no file fits this pattern"):
        training(two / "one" / "train.beton", val=two / "val-*.beton")
    with pytest.raises(UserError, match=r"train\.beton\.json: not a \.beton file"):
        training(two / "one" / "train*")
    assert ssam_scale("data", "check", "--add-checksums", two / "{one,other}/train.beton") == 2


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("{08..11}", "08 09 10 11"),
        ("{8..11}", "8 9 10 11"),
        ("{b,a}", "b a"),
        ("{a-{1..2},b}x", "a-1x a-2x bx"),
        ("{a,b}{1..2}", "a1 a2 b1 b2"),
        ("{a,}b", "ab b"),
        ("{a}{b,c}", "{a}b {a}c"),
        ("x{1..2", "x{1..2"),
        ("[ab]?", "a1 b2"),
        ("{b*,a*}", "b2 a1"),
        ("x}{y", "x}{y"),
        ("{3..1}", "{3..1} is empty"),
        ("{a*,none*}", "none*: no file fits"),
        ("{1..2}", "2: no such file"),
        ("{2..4}", "2: no such file, and 2 more of 3"),
        ("{there}", "{there}"),
    ],
)
def test_braces_and_stars(tmp_path: Path, pattern: str, expected: str) -> None:
    """As a shell has them: braces in their order, files of a star by name."""
    if ": no" in expected or "empty" in expected:
        for name in ("1", "a1"):
            (tmp_path / name).touch()
        with pytest.raises(UserError) as raised:
            expand(tmp_path / pattern)
        assert expected in str(raised.value)
        return
    for name in expected.split():
        (tmp_path / name).touch()
    assert [path.name for path in expand(tmp_path / pattern)] == expected.split()
