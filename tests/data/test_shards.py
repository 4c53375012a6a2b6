"""Writing at scale: what was killed goes on, and shards become the file that one writer writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ssam_scale.cli.main import main
from ssam_scale.data import WriteReport, verify, write_beton
from ssam_scale.data.beton import PAGE_SIZE, Sidecar, inspect
from ssam_scale.data.encode import Encoding
from ssam_scale.data.join import join
from ssam_scale.data.part import growing, log_of, part_of
from ssam_scale.data.shard import Shard
from ssam_scale.data.sources import open_source
from ssam_scale.data.write import predicted_bytes
from ssam_scale.errors import UserError
from tests.support.images import make_image_folder

IMAGES = 56  # of about 500 KB of raw pixels: three pages and a half


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("large") / "images"
    make_image_folder(root, classes=4, per_class=IMAGES // 4, size_range=(380, 440))
    return root


@pytest.fixture(scope="session")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "train.beton"
    write(source, out)
    return out


def write(source: Path, out: Path, **options: Any) -> WriteReport:
    return write_beton(source, out, **{"progress": False, "jpeg_proportion": 0.1, **options})


def same(one: Path, other: Path) -> None:
    """Both files and what lies beside them, byte for byte."""
    assert one.read_bytes() == other.read_bytes()
    assert Sidecar.path(one).read_bytes() == Sidecar.path(other).read_bytes()


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


# ------------------------------------------------------------------------------------------------------- interruptions


def killed(source: Path, out: Path, pages: int, *options: str) -> None:
    """Run the command in a process of its own and kill it once so many pages are written."""
    command = [sys.executable, "-m", "ssam_scale", "data", "write", str(source), str(out), "--jpeg-proportion=0.1"]
    with subprocess.Popen([*command, "--workers=1", *options], stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (log_of(out).exists() and log_of(out).read_bytes().count(b"\n") > pages):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was through before it was killed"


@pytest.mark.slow
def test_a_writer_that_was_killed_goes_on_where_it_was(source: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "train.beton"
    killed(source, out, 1)
    assert names(tmp_path) == {"train.beton.part", "train.beton.part.log"}
    killed(source, out, 2)
    report = write(source, out)
    assert report.resumed >= 2 * (PAGE_SIZE // (440 * 440 * 3))
    same(out, whole)
    assert sum(report.kinds.values()) == report.images == IMAGES
    assert names(tmp_path) == {"train.beton", "train.beton.json"}


def stopped(source: Path, out: Path, at: int = 50, **options: Any) -> None:
    """Leave a part behind: an image far down the list is refused, and then mended."""
    victim = sorted(source.rglob("*.JPEG"))[at]
    kept = victim.read_bytes()
    victim.write_bytes(b"")
    try:
        with pytest.raises(UserError, match=r"empty file; .*train\.beton\.part keeps what is written, from which"):
            write(source, out, **options)
    finally:
        victim.write_bytes(kept)


@pytest.fixture
def mine(source: Path, tmp_path: Path) -> Path:
    """The images again, for a test that changes them."""
    for path in source.rglob("*.JPEG"):
        copy = tmp_path / "source" / "images" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.hardlink_to(path)
    return tmp_path / "source" / "images"


def test_an_image_that_is_refused_does_not_cost_what_was_written_before(
    mine: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "train.beton"
    for path in mine.rglob("*.JPEG"):  # no links any more
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    stopped(mine, out)
    report = write(mine, out)
    assert report.resumed > 0
    same(out, whole)


def test_an_image_that_has_changed_since_is_read_again(mine: Path, tmp_path: Path) -> None:
    """And with it what lies behind it, however sound the pages are."""
    out, fresh = tmp_path / "train.beton", tmp_path / "fresh.beton"
    images = sorted(mine.rglob("*.JPEG"))
    for path in images:  # no links any more
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    per_page = PAGE_SIZE // (440 * 440 * 3)
    for changed, kept in ((images[0], False), (images[2 * per_page + 4], True)):
        stopped(mine, out)
        changed.write_bytes(images[-1].read_bytes())
        report = write(mine, out)
        assert (report.resumed > 0) == kept
        write(mine, fresh)
        same(out, fresh)
        out.unlink()


def flip_byte(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes((byte ^ 1,)))


def cut_off(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size - by)


def add(path: Path, content: bytes) -> None:
    with path.open("ab") as file:
        file.write(content)


DAMAGES = {
    "a byte of the first page": lambda part, log: flip_byte(part, PAGE_SIZE + 5),
    "a byte of the last page": lambda part, log: flip_byte(part, part.stat().st_size - PAGE_SIZE + 5),
    "half of the last page": lambda part, log: cut_off(part, PAGE_SIZE // 2),
    "the end of the log": lambda part, log: cut_off(log, 10),
    "nonsense in the log": lambda part, log: add(log, b'{"images": [[1, 2]], "next": []}\n[]\n'),
    "half a line of the log": lambda part, log: add(log, b'{"images": [[1'),
    "the whole log": lambda part, log: log.write_bytes(b""),
    "the log itself": lambda part, log: log.unlink(),
    "the part itself": lambda part, log: part.unlink(),
    "pages that nobody logged": lambda part, log: add(part, bytes(3 * PAGE_SIZE)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_of_a_part_nothing_is_believed_that_its_bytes_do_not_bear_out(
    source: Path, whole: Path, tmp_path: Path, damage: Any
) -> None:
    out = tmp_path / "train.beton"
    leave_part(source, out)
    damage(part_of(out), log_of(out))
    write(source, out)
    same(out, whole)
    assert names(tmp_path) == {"train.beton", "train.beton.json"}


def leave_part(source: Path, out: Path, **options: Any) -> None:
    """Interrupt a writer behind its second page, as Ctrl-C does."""
    import ssam_scale.data.part as part

    before = part.Part.note
    pages = 0

    def note(self: Any, images: Any, following: int) -> None:
        nonlocal pages
        before(self, images, following)
        pages += 1
        if pages == 2:
            raise KeyboardInterrupt

    part.Part.note = note  # type: ignore[method-assign]
    try:
        with pytest.raises(KeyboardInterrupt):
            write(source, out, **options)
    finally:
        part.Part.note = before  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "other",
    [{"quality": 80}, {"seed": 3}, {"limit": 50}, {"shard": Shard(1, 2)}],
    ids=["quality", "seed", "limit", "shard"],
)
def test_the_part_of_something_else_is_begun_anew(source: Path, tmp_path: Path, other: dict[str, Any]) -> None:
    out = tmp_path / "train.beton"
    leave_part(source, out)
    assert write(source, out, **other).resumed == 0
    write(source, tmp_path / "apart.beton", **other)
    same(out, tmp_path / "apart.beton")


def test_images_that_were_left_out_are_still_listed(mine: Path, tmp_path: Path) -> None:
    bad = mine / "n00000000" / "n00000000_3.JPEG"
    bad.unlink()
    bad.write_bytes(b"")
    out = tmp_path / "out" / "train.beton"
    leave_part(mine, out, skip_bad=True)
    with pytest.raises(UserError, match=r"n00000000_3\.JPEG: empty file"):  # which this one was not told to leave out
        write(mine, out)
    leave_part(mine, out, skip_bad=True)
    report = write(mine, out, skip_bad=True)
    assert report.resumed > 3
    assert [skipped.path for skipped in report.skipped] == [str(bad)]
    write(mine, tmp_path / "apart.beton", skip_bad=True)
    same(out, tmp_path / "apart.beton")


def test_two_writers_of_one_file(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "train.beton"
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        with growing(out, {}) as part:
            part.file.write(b"whole")
            inside.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    try:
        with pytest.raises(UserError, match=r"train\.beton\.part: another process is writing train\.beton; wait for"):
            write(source, out)
    finally:
        done.set()
        thread.join()
    assert out.read_bytes() == b"whole"


@pytest.mark.parametrize(
    "make", [os.mkfifo, Path.mkdir, lambda path: path.symlink_to("x")], ids=["pipe", "folder", "link"]
)
@pytest.mark.parametrize("of", [part_of, log_of], ids=["part", "log"])
def test_what_is_no_file_in_the_place_of_the_part(source: Path, tmp_path: Path, make: Any, of: Any) -> None:
    place = of(tmp_path / "train.beton")
    make(place)
    with pytest.raises(UserError, match=r"part.*: is a (pipe|folder|link); name a file"):
        write(source, tmp_path / "train.beton")
    assert names(tmp_path) == {place.name}


# -------------------------------------------------------------------------------------------------------------- shards


def shards(source: Path, folder: Path, of: int, **options: Any) -> list[Path]:
    paths = [folder / f"{number}.beton" for number in range(1, of + 1)]
    for number, path in enumerate(paths, 1):
        write(source, path, shard=Shard(number, of), **options)
    return paths


@pytest.mark.parametrize("of", [1, 3, 7])
def test_shards_become_the_file_that_one_writer_writes(source: Path, whole: Path, tmp_path: Path, of: int) -> None:
    parts = shards(source, tmp_path, of)
    for path in parts:
        verify(path)
    out = tmp_path / "train.beton"
    report = join(out, parts[::-1], progress=False)
    same(out, whole)
    assert report.images == sum(report.kinds.values()) == IMAGES
    assert report.bytes == whole.stat().st_size


def test_shards_from_machines_where_the_images_lie_elsewhere(
    source: Path, whole: Path, mine: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "1.beton", tmp_path / "2.beton"
    write(source, first, shard=Shard(1, 2))
    write(mine, second, shard=Shard(2, 2))
    join(tmp_path / "train.beton", [first, second], progress=False)
    same(tmp_path / "train.beton", whole)


def test_images_that_shards_leave_out(mine: Path, tmp_path: Path) -> None:
    bad = [mine / "n00000000" / "n00000000_3.JPEG", *sorted((mine / "n00000003").iterdir())]
    for path in bad:
        path.unlink()
        path.write_bytes(b"")
    alone = write(mine, tmp_path / "alone.beton", skip_bad=True)
    report = join(tmp_path / "train.beton", shards(mine, tmp_path, 3, skip_bad=True), progress=False)
    same(tmp_path / "train.beton", tmp_path / "alone.beton")
    assert report.skipped == alone.skipped
    assert len(report.skipped) == len(bad)
    assert report.emptied == alone.emptied == ["n00000003"]
    assert report.kinds == alone.kinds


def test_what_is_not_all_shards_of_one_data_set(source: Path, whole: Path, mine: Path, tmp_path: Path) -> None:
    one, two, three = shards(source, tmp_path, 3)
    (tmp_path / "other").mkdir()
    other = tmp_path / "other"
    write(source, other / "quality.beton", shard=Shard(3, 3), quality=80)
    write(source, other / "fewer.beton", shard=Shard(2, 2))
    (mine / "n00000003" / "n00000003_7.JPEG").unlink()
    write(mine, other / "images.beton", shard=Shard(3, 3))
    cases: dict[str, list[Path]] = {
        r"2 of 3 shards are missing: 1, 3; write them \(`ssam-scale data write … --shard 1/3`\) and give": [two],
        r"both are shard 1/3; give it once": [one, two, three, one],
        rf"quality\.beton: was written with quality 80, and {one} with 90; give the shards": [
            one,
            two,
            other / "quality.beton",
        ],
        r"fewer\.beton: is one of 2 shards, and .* one of 3": [one, other / "fewer.beton"],
        r"images\.beton: is of other images or classes than": [one, two, other / "images.beton"],
        r"train\.beton: is no shard; ": [one, whole],
        r"gone\.beton: no such file": [one, tmp_path / "gone.beton"],
        r"no shards to join": [],
    }
    out = tmp_path / "out" / "train.beton"
    for message, given in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            join(out, given, progress=False)
        assert "\n" not in str(caught.value)
    assert not out.parent.exists()
    with pytest.raises(UserError, match=r"1\.beton: is a shard, and what is to be written too"):
        join(one, [one, two, three], progress=False)
    Sidecar.path(two).unlink()
    with pytest.raises(UserError, match=r"2\.beton: is no shard \(no 2\.beton\.json beside it"):
        join(out, [one, two, three], progress=False)


def test_a_shard_with_a_damaged_image(source: Path, tmp_path: Path) -> None:
    paths = shards(source, tmp_path, 2)
    flip_byte(paths[1], PAGE_SIZE + 1000)
    with pytest.raises(UserError, match=r"2\.beton: image 0 is damaged; copy or write this shard again"):
        join(tmp_path / "train.beton", paths, progress=False)
    assert names(tmp_path) == {"1.beton", "1.beton.json", "2.beton", "2.beton.json"}


@pytest.mark.parametrize("images", [16, 17, 1_281_167])
def test_shards_are_all_images_once_and_as_equal_as_can_be(images: int) -> None:
    spans = [Shard(number, 16).span(images) for number in range(1, 17)]
    assert [index for span in spans for index in span] == list(range(images))
    assert max(map(len, spans)) - min(map(len, spans)) <= 1


@pytest.mark.parametrize("text", ["0/4", "5/4", "3", "a/b", "1/0", "-1/4", "1/4/2", "", "1/²"])
def test_a_shard_that_is_none(text: str, capsys: pytest.CaptureFixture[str], source: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["data", "write", str(source), str(tmp_path / "x.beton"), f"--shard={text}"])
    assert caught.value.code == 2
    assert "from 1/16 to 16/16" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"--shard 1/81: there are only 56 images; give at most as many shards"):
        Shard(1, 81).span(IMAGES)


def test_on_the_command_line(source: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        out = tmp_path / f"{number}.beton"
        with pytest.raises(SystemExit) as caught:
            main(["data", "write", str(source), str(out), "--jpeg-proportion=0.1", f"--shard={number}/2"])
        assert caught.value.code == 0
    out = tmp_path / "train.beton"
    with pytest.raises(SystemExit) as caught:
        main(["data", "join", str(out), str(tmp_path / "1.beton"), str(tmp_path / "2.beton")])
    assert caught.value.code == 0
    assert f"Wrote {out}: {IMAGES} images, 4 classes" in capsys.readouterr().out
    same(out, whole)
    note = json.loads(Sidecar.path(tmp_path / "2.beton").read_text())["recipe"]["shard"]
    assert note["shard"] == {"number": 2, "of": 2}
    assert note["images"] == IMAGES
    assert np.bincount(verify(tmp_path / "2.beton").labels).tolist() == [0, 0, 14, 14]


# ------------------------------------------------------------------------------------------------ bytes said beforehand


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 images of 45 KB of raw pixels or 12 KB of JPEG, some damaged."""
    root = tmp_path_factory.mktemp("many") / "images"
    paths = make_image_folder(root, classes=3, per_class=200, size_range=(100, 150))
    for path in paths[::97]:
        path.write_bytes(b"")
    return root


@pytest.mark.parametrize(
    "options", [{}, {"jpeg_proportion": 1.0}, {"max_resolution": 60}], ids=["half", "JPEG", "small"]
)
def test_how_large_a_file_is_going_to_be(many: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """By 64 of 600 images: sizes differ by a fifth, their mean by a fortieth, and a file ends with a page of 8 MiB."""
    encoding = Encoding(**{"max_resolution": None, "quality": 90, "jpeg_proportion": 0.5, "seed": 0, **options})
    predicted = predicted_bytes(open_source(many).samples, encoding, workers=2)
    written = write(many, tmp_path / "x.beton", **{"jpeg_proportion": 0.5, **options}, skip_bad=True).bytes
    stored = int(inspect(tmp_path / "x.beton").sizes.sum())
    assert 0.93 * stored < predicted < 1.07 * stored + 600 * 100
    assert predicted < written + PAGE_SIZE


def test_a_disk_that_has_too_little_room_is_refused_before_anything_is_written(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "disk" / "train.beton"
    out.parent.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", out.parent]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(UserError, match=r"it needs about 2\d MB and 13 MB are free; make room") as caught:
            write(many, out, jpeg_proportion=0.0, skip_bad=True)
        assert "\n" not in str(caught.value)
        assert names(out.parent) == set()
    finally:
        subprocess.run(["umount", out.parent], check=True)


def test_presets_are_what_ffcv_imagenet_writes(source: Path, tmp_path: Path) -> None:
    recipes = {
        (): (None, 0.5, 90),
        ("--preset=small",): (None, 1.0, 90),
        ("--preset=ffcv-rn50",): (500, 0.5, 90),
        ("--preset=ffcv-rn18",): (400, 0.1, 90),
        ("--preset=ffcv-rn18", "--quality=80", "--jpeg-proportion=0"): (400, 0.0, 80),
    }
    out = tmp_path / "x.beton"
    for options, expected in recipes.items():
        with pytest.raises(SystemExit):
            main(["data", "write", str(source), str(out), "--limit=4", *options])
        recipe = json.loads(Sidecar.path(out).read_text())["recipe"]
        assert (recipe["max_resolution"], recipe["jpeg_proportion"], recipe["quality"]) == expected
    with pytest.raises(SystemExit) as caught:
        main(["data", "write", str(source), str(out), "--preset=ffcv"])
    assert caught.value.code == 2
