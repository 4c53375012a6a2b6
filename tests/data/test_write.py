"""Writing: what goes in comes out, bad input is named, and a failure leaves nothing behind."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from ssam_scale.cli.main import main
from ssam_scale.config.schema import Data
from ssam_scale.data import eval_loader, train_loader, verify, write_beton
from ssam_scale.data.beton import Sidecar
from ssam_scale.data.sources.folder import natural_key, order_note
from ssam_scale.errors import UserError
from ssam_scale.models.torchvision_ops import ensure_torchvision
from tests.support.images import make_image, make_image_folder


def write(source: Path, out: Path, **options: Any) -> Any:
    return write_beton(source, out, progress=False, **options)


def read_all(beton: Path, side: int, classes: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """All images uint8 [N, side, side, 3] and labels [N], through our evaluation loader without any crop."""
    data = Data(
        train=beton, val=beton, batch_size=7, eval_resolution=side, eval_crop_ratio=1.0, mean=(0, 0, 0), std=(1, 1, 1)
    )
    batches = list(eval_loader(data, rank=0, world_size=1, device=torch.device("cpu"), num_classes=classes))
    images = torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1) * 255
    return images.round().to(torch.uint8).numpy(), torch.cat([batch.labels for batch in batches]).numpy()


def assert_same_picture(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within what JPEG's faster transforms and different ways of rounding cost: a few steps of 255."""
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    assert difference.mean() < 1.5
    assert difference.max() <= 12


def contents(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "train.beton"


def test_classes_are_numbered_as_torchvision_or_as_timm_does(
    tmp_path: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever has a model that timm has trained on numbered folders needs its labels."""
    ensure_torchvision()
    from timm.data.readers.reader_image_folder import find_images_and_targets
    from torchvision.datasets import ImageFolder

    names = ["0", "1", "2", "10", "B7", "a", "b08", "x2y10", "x2y9"]
    for name in names:
        (tmp_path / "images" / name).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "images" / name / "1.jpg"), np.zeros((8, 8, 3), np.uint8))
    theirs = {
        "text": ImageFolder(tmp_path / "images").class_to_idx,
        "natural": find_images_and_targets(str(tmp_path / "images"))[1],
    }
    notes = []
    for order, labels in theirs.items():
        assert write(tmp_path / "images", out, class_order=order).classes == sorted(labels, key=labels.__getitem__)
        assert json.loads((out.parent / f"{out.name}.json").read_text())["classes"] == sorted(labels, key=labels.get)
        assert capsys.readouterr().err == ""
        write_beton(tmp_path / "images", out, class_order=order)
        notes.append(capsys.readouterr().err)
    apart = tmp_path / "apart.beton"
    write(tmp_path / "images", apart)
    data = Data(train=out, val=apart, batch_size=1)
    with pytest.raises(UserError, match=r"in another order, .* write both with the same --class-order"):
        eval_loader(data, rank=0, world_size=1, device=torch.device("cpu"), num_classes=9)
    both = "it is 10 in text order, torchvision's, and 2 in natural order, timm's (--class-order)"
    assert f"images: label 2 is class 10, in text order; {both}\n" in notes[0]
    assert f"images: label 2 is class 2, in natural order; {both}\n" in notes[1]
    assert order_note(["cat", "dog", "n01440764"], "text") is None
    # timm numbers names that it takes for equal by the seed of Python's hashes, differently in each process.
    assert sorted(["b7", "b07", "B7"], key=natural_key) == ["B7", "b07", "b7"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_image_folder(tmp_path / "images", classes=3, per_class=4, size_range=(40, 60))
    return tmp_path / "images"


def decode(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("jpeg_proportion", [0.0, 0.5, 1.0])
def test_every_image_comes_back_as_pillow_sees_its_source(tmp_path: Path, out: Path, jpeg_proportion: float) -> None:
    paths = make_image_folder(tmp_path / "images", classes=3, per_class=5, size_range=(48, 48))
    report = write(tmp_path / "images", out, jpeg_proportion=jpeg_proportion)
    images, labels = read_all(out, 48)
    assert report.images == len(images) == 15
    assert labels.tolist() == [0] * 5 + [1] * 5 + [2] * 5
    for image, path in zip(images, paths, strict=True):
        np.testing.assert_array_equal(image, decode(path))
    beton = verify(out)
    assert beton.jpegs == {0.0: 0, 1.0: 15}.get(jpeg_proportion, beton.jpegs)
    assert jpeg_proportion != 0.5 or 0 < beton.jpegs < 15


def test_ffcvs_own_loader_reads_the_file(tmp_path: Path, out: Path) -> None:
    make_image_folder(tmp_path / "images", classes=2, per_class=5, size_range=(48, 48))
    write(tmp_path / "images", out)
    images, labels = read_all(out, 48)
    from ssam_scale.data.ffcv_import import Loader

    theirs = [(image.clone(), label.clone()) for image, label in Loader(str(out), 5, num_workers=1)]
    assert_same_picture(torch.cat([image for image, _ in theirs]).numpy(), images)
    np.testing.assert_array_equal(torch.cat([label for _, label in theirs]).numpy()[:, 0], labels)


def test_jpeg_files_that_need_no_change_keep_their_own_bytes(source: Path, out: Path) -> None:
    write(source, out, jpeg_proportion=1.0)
    content = out.read_bytes()
    assert all(path.read_bytes() in content for path in source.rglob("*.JPEG"))


def test_the_file_depends_on_its_input_alone(source: Path, out: Path) -> None:
    write(source, out, workers=1)
    first = out.read_bytes()
    write(source, out, workers=4)
    assert out.read_bytes() == first
    write(source, out, seed=1)
    assert out.read_bytes() != first


def test_what_the_sidecar_says(source: Path, out: Path) -> None:
    report = write(source, out, max_resolution=50, quality=80)
    note = json.loads((out.parent / "train.beton.json").read_text())
    assert note["images"] == report.images == 12
    assert note["classes"] == report.classes == ["n00000000", "n00000001", "n00000002"]
    assert note["file_bytes"] == report.bytes == out.stat().st_size
    digest = subprocess.run(["sha256sum", out], capture_output=True, text=True, check=True).stdout.split()[0]
    assert note["sha256"] == digest
    assert note["recipe"]["max_resolution"] == 50
    assert note["recipe"]["quality"] == 80
    assert contents(out.parent) == {"train.beton", "train.beton.json"}


def test_long_sides_are_shrunk_and_the_picture_stays(tmp_path: Path, out: Path) -> None:
    [path] = make_image_folder(tmp_path / "images", classes=1, per_class=1, size_range=(120, 120))
    write(tmp_path / "images", out, max_resolution=60, jpeg_proportion=0.0)
    assert verify(out).pixels.tolist() == [3600]
    expected = np.asarray(Image.open(path).reduce(2))
    assert_same_picture(read_all(out, 60)[0][0], expected)


@pytest.mark.parametrize("kind", ["png", "palette", "gray", "cmyk", "progressive", "disguised"])
def test_other_kinds_of_images_are_read_as_rgb(tmp_path: Path, out: Path, kind: str) -> None:
    image = Image.fromarray(make_image(np.random.default_rng(0), 40, 40))
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    path = folder / ("x.png" if kind in ("png", "palette") else "x.jpg")
    if kind == "gray":
        image.convert("L").save(path, quality=95)
    elif kind == "cmyk":
        image.convert("CMYK").save(path, quality=95)
    elif kind == "palette":
        image.convert("P").save(path)
    elif kind == "disguised":  # ImageNet has a PNG file by the name of .JPEG
        image.save(path, format="PNG")
    else:
        image.save(path, **({"quality": 95, "progressive": True} if kind == "progressive" else {}))
    write(tmp_path / "images", out, jpeg_proportion=0.0)
    np.testing.assert_array_equal(read_all(out, 40)[0][0], decode(path))
    write(tmp_path / "images", out, jpeg_proportion=1.0, quality=100)
    assert np.abs(read_all(out, 40)[0][0].astype(int) - decode(path)).mean() < 20  # chroma at half the resolution


def test_a_limit_takes_evenly_from_all_classes(source: Path, out: Path) -> None:
    report = write(source, out, limit=7)
    assert report.images == 7
    assert np.bincount(verify(out).labels).tolist() == [3, 2, 2]


def test_files_that_are_no_images_are_passed_over(source: Path, out: Path) -> None:
    (source / "n00000000" / "readme.txt").write_text("hello")
    (source / "n00000000" / ".hidden.jpg").write_text("hello")
    (source / "list.txt").write_text("hello")
    assert write(source, out).images == 12


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def scramble(path: Path) -> None:
    data = bytearray(path.read_bytes())
    middle = len(data) * 2 // 3
    data[middle : middle + 40] = b"\xff\xd9" * 20
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("not an image at all")


def truncated_png(path: Path) -> None:
    data = io.BytesIO()
    Image.fromarray(make_image(np.random.default_rng(0), 40, 40)).save(data, "PNG")
    path.write_bytes(data.getvalue()[:-800])


damages = pytest.mark.parametrize("damage", [truncate, scramble, empty, text, truncated_png])


@damages
def test_a_damaged_image_is_named_and_nothing_is_written(source: Path, out: Path, damage: Any) -> None:
    victim = source / "n00000001" / "n00000001_2.JPEG"
    damage(victim)
    with pytest.raises(UserError, match=r"n00000001_2\.JPEG: .*--skip-bad") as caught:
        write(source, out)
    assert "\n" not in str(caught.value)
    assert "0x" not in str(caught.value)
    assert contents(out.parent) == set()


@damages
def test_skip_bad_leaves_damaged_images_out_and_lists_them(source: Path, out: Path, damage: Any) -> None:
    victims = [source / "n00000000" / "n00000000_0.JPEG", source / "n00000002" / "n00000002_3.JPEG"]
    for victim in victims:
        damage(victim)
    report = write(source, out, skip_bad=True)
    assert [skipped.path for skipped in report.skipped] == [str(victim) for victim in victims]
    assert all(skipped.reason for skipped in report.skipped)
    assert report.images == 10
    assert read_all(out, 40)[1].tolist() == [0] * 3 + [1] * 4 + [2] * 3


def test_what_lies_in_the_place_of_an_image(source: Path, out: Path) -> None:
    """A pipe was waited for without end."""
    place = source / "n00000001" / "x.jpg"
    makes = {
        "not a file": lambda: os.mkfifo(place),
        "No such file or directory": lambda: place.symlink_to(source / "gone"),
        "Too many levels of symbolic links": lambda: place.symlink_to(place),
        "a pointer of Git LFS": lambda: place.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a page of HTML": lambda: place.write_text("<!DOCTYPE html><html>404</html>"),
    }
    for message, make in makes.items():
        make()
        with pytest.raises(
            UserError, match=rf"x\.jpg: {message}.*; mend or remove it \(`data write --skip-bad` leaves"
        ):
            write_beton(source, out, progress=True)
        place.unlink()
    (source / "n00000009").symlink_to(source / "gone")
    with pytest.raises(UserError, match="n00000009: a link to nothing, in the place of a class folder"):
        write(source, out)


@pytest.mark.parametrize("beside", [False, True], ids=["file", "sidecar"])
@pytest.mark.parametrize(
    ("kind", "make"),
    {
        "a link": lambda place: place.symlink_to(place.with_name("precious")),
        "a pipe": os.mkfifo,
        "a folder": Path.mkdir,
        "a socket": lambda place: socket.socket(socket.AF_UNIX).bind(str(place)),
    }.items(),
)
def test_what_is_no_file_is_not_replaced(source: Path, out: Path, kind: str, make: Any, beside: bool) -> None:
    """As root, a device's node was replaced by a file."""
    (out.parent / "precious").write_text("kept")
    place = Sidecar.path(out) if beside else out
    make(place)
    before = place.lstat()
    with pytest.raises(UserError, match=f"{place.name}: is {kind}; name a file, which need not be there yet"):
        write(source, out)
    assert place.lstat() == before
    assert (out.parent / "precious").read_text() == "kept"
    assert contents(out.parent) == {"precious", place.name}


def test_what_is_left_out_is_said(source: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (source / "n00000000" / "more").mkdir()
    (source / "n00000001" / "x.avif").touch()
    (source / "loose.PNG").touch()
    (source / "labels.csv").touch()
    for path in (source / "n00000002").iterdir():
        empty(path)
    exif = Image.Exif()
    exif[0x112] = 6
    side = Image.new("RGB", (40, 20))
    for name in ("turned.jpg", "turned.webp"):
        side.save(source / "n00000000" / name, exif=exif)
    side.save(source / "n00000000" / "turned.tif", tiffinfo=exif)  # of which Pillow, so torchvision, turns the pixels
    with pytest.raises(SystemExit):
        main(["data", "write", str(source), str(out), "--skip-bad"])
    said = capsys.readouterr()
    assert "passed over 1 image beside the class folders (loose.PNG) and 1 folder in class folders (" in said.err
    assert f"{source}/n00000000/more) and files whose suffix is not that of an image that is read (1 .avif)" in said.err
    assert "of 1 classes no image is left: n00000002" in said.out
    assert "2 images say by EXIF that they are shown turned; their pixels are stored as they lie" in said.out


@pytest.mark.parametrize("mode", ["CMYK", "P", "LA", "RGBA", "1", "L", "16 bits", "palette with transparency"])
def test_every_kind_of_image_is_what_pillow_makes_of_it(mode: str, tmp_path: Path, out: Path) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    path = tmp_path / "images" / "a" / ("x.jpg" if mode == "CMYK" else "x.png")
    pixels = make_image(np.random.default_rng(0), 40, 40)
    if mode == "16 bits":
        cv2.imwrite(str(path), pixels.astype(np.uint16) * 257)
    elif mode.startswith("palette"):
        Image.fromarray(pixels).convert("P").save(path, transparency=bytes(range(256)))
    else:
        Image.fromarray(pixels).convert(mode).save(path)
    write(tmp_path / "images", out, jpeg_proportion=0.0)  # without a warning, which the suite takes for an error
    np.testing.assert_array_equal(read_all(out, 40)[0][0], np.asarray(Image.open(path).convert("RGB")))


def test_bytes_behind_a_jpegs_end_of_data_are_harmless(source: Path, out: Path) -> None:
    """libjpeg complains of stray bytes before a marker, and some ImageNet files have them; the picture is whole."""
    path = source / "n00000000" / "n00000000_0.JPEG"
    data = path.read_bytes()
    path.write_bytes(data[:-2] + b"\x00\x00\x00" + data[-2:])
    expected = decode(path)
    write(source, out, jpeg_proportion=1.0, limit=1, quality=100)
    size = expected.shape[:2]
    assert verify(out).pixels.tolist() == [size[0] * size[1]]


def test_only_bad_images(source: Path, out: Path) -> None:
    for path in source.rglob("*.JPEG"):
        truncate(path)
    with pytest.raises(UserError, match="none of the 12 images"):
        write(source, out, skip_bad=True)
    assert contents(out.parent) == set()


def test_a_folder_that_is_not_in_imagenets_layout(tmp_path: Path, source: Path, out: Path) -> None:
    cases = {
        tmp_path / "nowhere": "no such folder",
        source / "n00000000" / "n00000000_0.JPEG": "is a file",
        source / "n00000000": "only files in there; needs one folder of images per class",
        tmp_path / "empty": "nothing in there",
        tmp_path / "hollow": r"hollow/b: a class folder without images",
        tmp_path: "did you mean .*images",
    }
    (tmp_path / "empty").mkdir()
    (tmp_path / "hollow" / "a").mkdir(parents=True)
    (tmp_path / "hollow" / "b").mkdir()
    cv2.imwrite(str(tmp_path / "hollow" / "a" / "x.png"), make_image(np.random.default_rng(0), 9, 9))
    for folder, message in cases.items():
        if folder == tmp_path:  # the parent of a data set: its `images` looks like a class, but holds only folders
            folder = tmp_path / "parent"
            folder.mkdir()
            source.rename(folder / "images")
        with pytest.raises(UserError, match=message):
            write(folder, out)
        assert contents(out.parent) == set()


def test_classes_are_numbered_as_the_training_images_are(source: Path, out: Path, tmp_path: Path) -> None:
    write(source, out)
    val = tmp_path / "val"
    shutil.copytree(source / "n00000002", val / "n00000002")
    for classes_of in (out, source):  # the first class is missing, the second is empty and then missing, too
        (val / "n00000001").mkdir(exist_ok=True)
        write(val, out.with_name("val.beton"), classes_of=classes_of)
        (val / "n00000001").rmdir()
        written = verify(out.with_name("val.beton"))
        assert written.sidecar is not None
        assert written.sidecar.classes == verify(out).sidecar.classes  # type: ignore[union-attr]
        assert written.labels.tolist() == [2] * 4
    assert read_all(out.with_name("val.beton"), 8, 3)[1].tolist() == [2] * 4  # beside the training images, too


def test_classes_that_the_training_images_do_not_have(source: Path, out: Path, tmp_path: Path) -> None:
    val = tmp_path / "val"
    for name in ("dog", "n00000000"):
        (val / name).mkdir(parents=True)
    cases = {
        source: f"{val}: dog is not among the 3 classes of {source}; rename or remove it",
        tmp_path / "none.beton": "none.beton: no such file; give the folder or the .beton file of the training images",
        val / "n00000000": "nothing in there",
        val: "no images .* in any of its class folders",
    }
    for classes_of, message in cases.items():
        with pytest.raises(UserError, match=message):
            write(val, out, classes_of=classes_of)
    write(source, out)
    Sidecar.path(out).unlink()
    with pytest.raises(UserError, match=r"no train.beton.json beside it, which would name its classes"):
        write(source, out.with_name("val.beton"), classes_of=out)


def test_a_failure_leaves_the_old_file_alone(source: Path, out: Path) -> None:
    write(source, out)
    before = out.read_bytes()
    truncate(source / "n00000002" / "n00000002_3.JPEG")
    with pytest.raises(UserError):
        write(source, out)
    assert out.read_bytes() == before
    verify(out)
    assert contents(out.parent) == {"train.beton", "train.beton.json"}


def test_an_output_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        write(source, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        write(source, tmp_path / "file" / "train.beton")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """19 MB of raw pixels."""
    make_image_folder(tmp_path / "large", classes=2, per_class=20, size_range=(400, 400))
    return tmp_path / "large"


def test_a_full_disk(large: Path, out: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", out.parent]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(UserError) as caught:
            write(large, out, jpeg_proportion=0.0)
        assert f"{out.parent}: cannot write train.beton (No space left on device)" in str(caught.value)
        assert "it needs about 2" in str(caught.value)
        assert "13 MB are free" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert contents(out.parent) == set()
    finally:
        subprocess.run(["umount", out.parent], check=True)


def test_a_file_larger_than_allowed(large: Path, out: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write train\.beton \(File too large\): it needs about 2"):
            write(large, out, jpeg_proportion=0.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert contents(out.parent) == set()


def test_an_interrupted_run_leaves_nothing_behind(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(source, out)
    assert contents(out.parent) == set()


@pytest.mark.slow
def test_a_thousand_classes_of_full_size_images(tmp_path: Path, out: Path) -> None:
    make_image_folder(tmp_path / "images", classes=1000, per_class=2, size_range=(300, 500))
    report = write(tmp_path / "images", out, jpeg_proportion=0.8)
    assert (report.images, len(report.classes)) == (2000, 1000)
    data = Data(train=out, val=out, batch_size=64, resolution=64)
    loader = train_loader(
        data, rank=0, world_size=1, device=torch.device("cpu"), seed=0, micro_batch=64, num_classes=1000
    )
    labels = torch.cat([batch.labels for batch in loader])
    assert len(labels) == 2000 // 64 * 64
    assert torch.bincount(labels).max() <= 2
    assert len(labels.unique()) > 950
