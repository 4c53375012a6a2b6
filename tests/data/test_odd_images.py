"""Odd image files: each is read right, as Pillow reads it where Pillow is right, or refused by name."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from ssam_scale.cli.main import main
from ssam_scale.data import write_beton
from ssam_scale.data.encode import BadImageError, Encoding, encode
from ssam_scale.data.scans import missing_scans
from ssam_scale.errors import UserError
from tests.support.images import make_image_folder
from tests.support.odd_images import HEIGHT, ODD, WIDTH, Odd, save, scans, table, with_exif

RAW = Encoding(None, 90, 0.0, 0)
DOCS = Path(__file__).parents[2] / "docs" / "writing.md"
cases = pytest.mark.parametrize("odd", ODD, ids=[odd.what for odd in ODD])


def pillow(path: Path) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of EXIF, and of transparency
        return np.asarray(Image.open(path).convert("RGB"))


def pixels(path: Path, encoding: Encoding = RAW) -> np.ndarray:
    made = encode(path, 0, encoding)
    return np.frombuffer(made.data, np.uint8).reshape(made.height, made.width, 3)


@cases
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_is_read_right_or_refused_by_name(odd: Odd, tmp_path: Path) -> None:
    path = tmp_path / f"x{odd.suffix}"
    path.write_bytes(odd.content)
    if odd.reads is None:
        with pytest.raises(BadImageError) as caught:
            encode(path, 0, RAW)
        assert odd.says.lower() in str(caught.value).lower()
        assert "\n" not in str(caught.value)
        return
    made = encode(path, 0, RAW)
    assert (made.kind, made.turned, made.height, made.width) == (odd.says, odd.turned, HEIGHT, WIDTH)
    np.testing.assert_array_equal(pixels(path), pillow(path) if isinstance(odd.reads, str) else odd.reads)
    assert (encode(path, 0, Encoding(None, 90, 1.0, 0)).data == odd.content) == odd.kept


def test_the_table_is_in_the_docs() -> None:
    """To renew it: `python -c "from tests.support.odd_images import table; print(table())"`."""
    assert table() in DOCS.read_text()


def test_the_report_counts_them_by_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    for number, odd in enumerate(ODD):
        (folder / f"{number:02d}{odd.suffix}").write_bytes(odd.content)
    for suffix in (".gif", ".heic", ".jfif", ".jpe", ".mpo", ".txt"):
        (folder / f"x{suffix}").touch()
    (folder / "README").touch()
    with pytest.raises(SystemExit) as caught:
        main(["data", "write", str(tmp_path / "images"), str(tmp_path / "x.beton"), "--skip-bad"])
    assert caught.value.code == 0
    said = capsys.readouterr()
    counts: dict[str, int] = {}
    for odd in ODD:
        if odd.reads is not None:
            counts[odd.says] = counts.get(odd.says, 0) + 1
    for kind, count in counts.items():
        assert f"{count:>13,}  {kind}\n" in said.out
    refused = sum(odd.reads is None for odd in ODD)
    assert f"{len(ODD) - refused} images, 1 classes" in said.out
    assert f"{refused} damaged images left out" in said.out
    passed = "1 .gif, 1 .heic, 1 .jfif, 1 .jpe, 1 .mpo, 1 .txt, 1 without a suffix"
    assert f"passed over files whose suffix is not that of an image that is read ({passed})" in said.err


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "webp"])
def test_exif_turns_what_is_asked_to_be_turned(orientation: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{kind}"
    path.write_bytes(with_exif(orientation))
    if kind == "webp":
        exif = Image.Exif()
        exif[0x112] = orientation
        path.write_bytes(save(Image.open(path), "WEBP", lossless=True, exif=exif))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    np.testing.assert_array_equal(pixels(path, Encoding(None, 90, 0.0, 0, upright=True)), upright)
    assert not encode(path, 0, Encoding(None, 90, 1.0, 0, upright=True)).turned
    np.testing.assert_array_equal(pixels(path), pillow(path))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_of_a_progressive_jpeg_every_scan_is_needed(mode: str) -> None:
    whole = save(
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).convert(mode),
        "JPEG",
        progressive=True,
    )
    count = whole.count(b"\xff\xda")
    assert count > 4
    assert missing_scans(whole) is None
    for some in range(1, count):
        assert f"of which only {some} " in str(missing_scans(scans(whole, some) + b"\xff\xd9"))
        assert f"of which only {some} " in str(missing_scans(scans(whole, some)))


def test_scans_of_bytes_that_are_no_jpeg() -> None:
    """Whatever they are, there is no exception."""
    whole = bytearray(save(Image.new("RGB", (16, 16)), "JPEG", progressive=True))
    draw = np.random.default_rng(0)
    for _ in range(300):
        changed = bytearray(whole)
        for place in draw.integers(0, len(whole), 4):
            changed[place] = draw.integers(256)
        missing_scans(bytes(changed[: draw.integers(len(whole))]))


# ------------------------------------------------------------------------------------------------- names and links


def latin(name: str) -> str:
    return os.fsdecode(name.encode("latin-1"))


def test_names_that_are_not_utf_8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of files they serve; of a class, whose name is kept, they are refused before anything is read."""
    root = tmp_path / latin("bücher")
    [path] = make_image_folder(root, classes=1, per_class=1, size_range=(20, 20))
    path.rename(path.with_name(latin("häuser.JPEG")))
    (path.parent / latin("düster.jpg")).write_bytes(b"")
    (path.parent / latin("x.größe")).touch()
    with pytest.raises(SystemExit) as caught:
        main(["data", "write", str(root), str(tmp_path / latin("ß.beton")), "--skip-bad"])
    assert caught.value.code == 0
    said = capsys.readouterr()
    assert r"\xdf.beton: 1 images" in said.out
    assert r"d\xfcster.jpg: empty file" in said.out
    assert r"(1 .gr\xf6\xdfe)" in said.err
    with pytest.raises(UserError, match=r"d\\xfcster\.jpg: empty file; mend or remove it"):
        write_beton(root, tmp_path / "y.beton", progress=False)
    (path.parent).rename(root / latin("küche"))
    with pytest.raises(UserError, match=r"the class folder .* has a name that is not UTF-8; rename it") as refused:
        write_beton(root, tmp_path / "y.beton", progress=False)
    str(refused.value).encode()
    assert not (tmp_path / "y.beton").exists()


def test_links_in_a_circle(tmp_path: Path) -> None:
    [path] = make_image_folder(tmp_path / "images", classes=1, per_class=1, size_range=(20, 20))
    circle = path.parent / "circle"
    circle.symlink_to(path.parent)  # back to where it is: a folder in a class folder
    assert write_beton(tmp_path / "images", tmp_path / "x.beton", progress=False).images == 1
    itself = path.parent / "itself.jpg"
    itself.symlink_to(itself)
    with pytest.raises(UserError, match=r"itself\.jpg: Too many levels of symbolic links; mend or remove it"):
        write_beton(tmp_path / "images", tmp_path / "x.beton", progress=False)
    itself.unlink()
    (tmp_path / "images" / "around").symlink_to(tmp_path / "images" / "around")
    with pytest.raises(UserError, match=r"around: a link to nothing, in the place of a class folder"):
        write_beton(tmp_path / "images", tmp_path / "x.beton", progress=False)
