"""Where images come from: the same images make the same file, whatever they lie in."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat

from ssam_scale.cli.main import main
from ssam_scale.data import verify, write_beton
from ssam_scale.data.beton import Sidecar
from ssam_scale.data.join import join
from ssam_scale.data.shard import Shard
from ssam_scale.data.sources import open_source
from ssam_scale.errors import UserError
from tests.support.images import make_image_folder

CLASSES = ["n00000000", "n00000001", "n00000002"]
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources") / "train"
    make_image_folder(root, classes=3, per_class=4, size_range=(40, 60))
    return root


@pytest.fixture(scope="session")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("expected") / "train.beton"
    write_beton(folder, out, progress=False)
    return out


def write(source: Path, out: Path, **options: Any) -> Any:
    return write_beton(source, out, progress=False, **options)


def tar_of(files: list[tuple[str, bytes]], **options: Any) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", **options) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def images_of(folder: Path) -> list[tuple[str, bytes, int]]:
    """Name, content and label in the order of the folder's file."""
    paths = sorted(folder.rglob("*.JPEG"))
    return [(path.name, path.read_bytes(), CLASSES.index(path.parent.name)) for path in paths]


# ----------------------------------------------------------------------------------------- each makes the folder's file


def imagenet_tar(folder: Path, out: Path) -> Path:
    """As distributed: a tar of tars, whose images are in no order."""
    tars = []
    for name in CLASSES[::-1]:
        inside = [(path.name, path.read_bytes()) for path in sorted((folder / name).iterdir())]
        tars.append((f"{name}.tar", tar_of(inside[::-1])))
    path = out / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_of(tars))
    return path


def class_tars(folder: Path, out: Path) -> Path:
    """The outer tar, unpacked."""
    with tarfile.open(imagenet_tar(folder, out)) as tar:
        tar.extractall(out / "tars", filter="data")
    return out / "tars"


def webdataset(folder: Path, out: Path, suffix: str = "jpg", shards: int = 3) -> Path:
    """By WebDataset's own writer."""
    import webdataset as wds

    (out / "shards").mkdir()
    images = images_of(folder)
    for shard in range(shards):
        with wds.TarWriter(str(out / "shards" / f"train-{shard:04d}.tar")) as writer:
            per = -(-len(images) // shards)
            for index, (_, content, label) in enumerate(images[shard * per : (shard + 1) * per]):
                key = f"{shard:02d}/{index:06d}"
                writer.write({"__key__": key, suffix: content, "cls": label, "json": {"index": index}})
    return out / "shards"


def hugging_face(folder: Path, out: Path, split: str = "train", **changes: Any) -> Path:
    """The columns, row groups and metadata of imagenet-1k."""
    images = images_of(folder)
    (out / "data").mkdir(exist_ok=True)
    features = {"label": {"names": CLASSES, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    for part in range(2):
        rows = images[part * 6 : part * 6 + 6]
        table = pa.table(
            {
                "image": [{"bytes": content, "path": name} for name, content, _ in rows],
                "label": pa.array([label for *_, label in rows], pa.int64()),
                **changes,
            }
        )
        path = out / "data" / f"{split}-{part:05d}-of-00002.parquet"
        pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=4)
    return out / "data"


SOURCES: dict[str, Callable[[Path, Path], Path]] = {
    "ImageNet's tar": imagenet_tar,
    "a tar per class": class_tars,
    "WebDataset": webdataset,
    "a pattern with a span": lambda folder, out: webdataset(folder, out) / "train-{0000..0002}.tar",
    "a pattern with a star": lambda folder, out: webdataset(folder, out) / "train-*.tar",
    "Hugging Face": hugging_face,
    "a pattern of parquet files": lambda folder, out: hugging_face(folder, out) / "train-*.parquet",
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_the_same_images_make_the_same_file(folder: Path, expected: Path, tmp_path: Path, make: Any) -> None:
    source = make(folder, tmp_path)
    report = write(source, tmp_path / "train.beton")
    assert (tmp_path / "train.beton").read_bytes() == expected.read_bytes()
    names_are_known = ("train-" not in source.name and source.name != "shards") or source.suffix == ".parquet"
    assert report.classes == (CLASSES if names_are_known else ["0", "1", "2"])
    write(source, tmp_path / "named.beton", classes_of=expected)
    assert Sidecar.load(tmp_path / "named.beton").classes == CLASSES  # type: ignore[union-attr]
    assert verify(tmp_path / "named.beton").labels.tolist() == verify(expected).labels.tolist()


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES.keys())
def test_shards_and_extracts_of_each(folder: Path, expected: Path, tmp_path: Path, make: Any) -> None:
    source = make(folder, tmp_path)
    parts = [tmp_path / f"{number}.beton" for number in range(1, 4)]
    for number, part in enumerate(parts, 1):
        write(source, part, shard=Shard(number, 3))
    join(tmp_path / "joined.beton", parts, progress=False)
    assert (tmp_path / "joined.beton").read_bytes() == expected.read_bytes()
    write(source, tmp_path / "few.beton", limit=7)
    write(folder, tmp_path / "same.beton", limit=7)
    assert (tmp_path / "few.beton").read_bytes() == (tmp_path / "same.beton").read_bytes()


# --------------------------------------------------------------------------------------- ImageNet's validation images

NUMBERS = {"n00000000": 3, "n00000001": 1, "n00000002": 2}  # ILSVRC2012_IDs follow another order than the names


def validation(folder: Path, out: Path) -> tuple[Path, list[str]]:
    """The tar, and the class of each image in the order of their numbers, which has classes mixed."""
    images = images_of(folder)
    order = np.random.default_rng(0).permutation(len(images))
    files = [(f"ILSVRC2012_val_{place + 1:08d}.JPEG", images[index][1]) for place, index in enumerate(order)]
    path = out / "ILSVRC2012_img_val.tar"
    path.write_bytes(tar_of(files[::-1]))
    return path, [CLASSES[images[index][2]] for index in order]


def meta_mat() -> bytes:
    synsets = [(NUMBERS[name], name, "words", "gloss", 0) for name in CLASSES] + [(4, "n00000009", "all", "gloss", 3)]
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    made = io.BytesIO()
    savemat(made, {"synsets": np.array(synsets, kinds).reshape(-1, 1)})
    return made.getvalue()


def truth(classes: list[str]) -> bytes:
    return "".join(f"{NUMBERS[name]}\n" for name in classes).encode()


def devkit(classes: list[str], out: Path) -> Path:
    data = f"{DEVKIT.partition('.')[0]}/data"
    files = [(f"{data}/meta.mat", meta_mat()), (f"{data}/ILSVRC2012_validation_ground_truth.txt", truth(classes))]
    path = out / DEVKIT
    path.write_bytes(gzip.compress(tar_of(files)))
    return path


def unpacked(classes: list[str], out: Path) -> Path:
    with tarfile.open(devkit(classes, out)) as tar:
        tar.extractall(out, filter="data")
    return out / DEVKIT.partition(".")[0]


def as_text(classes: list[str], out: Path) -> Path:
    (out / "synsets.txt").write_text("\n".join(classes) + "\n")
    return out / "synsets.txt"


def kaggle(classes: list[str], out: Path) -> Path:
    lines = [f"ILSVRC2012_val_{number:08d},{name} 1 2 3 4" for number, name in enumerate(classes, 1)]
    (out / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines[::-1]]))
    return out / "LOC_val_solution.csv"


LABELS: dict[str, Callable[[list[str], Path], Path]] = {
    "devkit": devkit,
    "unpacked devkit": unpacked,
    "its ground truth": lambda classes, out: unpacked(classes, out) / "data/ILSVRC2012_validation_ground_truth.txt",
    "text": as_text,
    "Kaggle's": kaggle,
}


@pytest.mark.parametrize("make", LABELS.values(), ids=LABELS.keys())
def test_validation_images_have_the_labels_of_the_devkit(folder: Path, tmp_path: Path, make: Any) -> None:
    tar, classes = validation(folder, tmp_path)
    out = tmp_path / "val.beton"
    with pytest.raises(SystemExit) as caught:
        main(["data", "write", str(tar), str(out), "--labels", str(make(classes, tmp_path))])
    assert caught.value.code == 0
    for number, name in enumerate(classes, 1):  # what a script makes of the tar, as torchvision's does
        (tmp_path / "val" / name).mkdir(parents=True, exist_ok=True)
        with tarfile.open(tar) as images:
            image = images.extractfile(f"ILSVRC2012_val_{number:08d}.JPEG")
            assert image is not None
            (tmp_path / "val" / name / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(image.read())
    write(tmp_path / "val", tmp_path / "same.beton")
    assert out.read_bytes() == (tmp_path / "same.beton").read_bytes()
    assert Sidecar.load(out).classes == CLASSES  # type: ignore[union-attr]


def test_labels_that_are_not_those_of_the_validation_images(folder: Path, tmp_path: Path) -> None:
    tar, classes = validation(folder, tmp_path)

    def text(name: str, content: str | bytes) -> Path:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path / name

    os.mkfifo(tmp_path / "pipe")
    text("damaged/meta.mat", meta_mat()[:200])
    text("strange/meta.mat", b"MATLAB 5.0 MAT-file" + bytes(200))
    cases: dict[str, Path | None] = {
        rf"labels are not in there; pass --labels {DEVKIT}": None,
        r"gone\.txt: cannot be read": tmp_path / "gone.txt",
        r"pipe: not a file; give ILSVRC2012_devkit": tmp_path / "pipe",
        r"numbers\.txt: has the devkit's own numbers, which only its meta\.mat translates": text(
            "numbers.txt", truth(classes)
        ),
        r"few\.txt: has 11 labels of 12 images": text("few.txt", "\n".join(classes[1:])),
        r"words\.txt: neither a devkit nor a text": text("words.txt", "tench\n" * 12),
        r"one\.csv: has no class for ILSVRC2012_val_00000002": text("one.csv", "ILSVRC2012_val_00000001,n00000000 1"),
        r"damaged/t\.txt: its meta\.mat cannot be read": text("damaged/t.txt", truth(classes)),
        r"strange/t\.txt: its meta\.mat cannot be read": text("strange/t.txt", truth(classes)),
        r"other\.tar: a tar without ILSVRC2012_validation_ground_truth": text("other.tar", tar_of([("a", b"b")])),
        r"has no ILSVRC2012_validation_ground_truth\.txt; give": tmp_path / "damaged",
    }
    for message, labels in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            write(tar, tmp_path / "out" / "x.beton", labels=labels)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"is for ImageNet's validation tar; .*train has its own"):
        write(folder, tmp_path / "out" / "x.beton", labels=as_text(classes, tmp_path))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------- what cannot be read


def test_tars_that_are_damaged_or_of_another_kind(folder: Path, tmp_path: Path) -> None:
    image = images_of(folder)[0][1]
    whole = imagenet_tar(folder, tmp_path).read_bytes()
    sample = [("a.jpg", image), ("a.cls", b"0")]
    link = io.BytesIO()
    with tarfile.open(fileobj=link, mode="w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "b.jpg"
        tar.addfile(info)
    at_a_boundary = 512 * (2 + -(-len(image) // 512) + 1)
    cases = {
        "cut short or damaged": whole[: len(whole) // 2],
        r"cut short \(no end of archive\)": tar_of(sample)[:at_a_boundary],
        "no tar, or cut short or damaged": b"hello" * 1000,
        "compressed by gzip, so that images cannot be read where they lie": gzip.compress(tar_of(sample)),
        r"a\.jpg is a link or has holes, and no file": link.getvalue(),
        "a has an image and no .cls": tar_of([("a.jpg", image), ("b.cls", b"0")]),
        "a has several images": tar_of([("a.jpg", image), ("a.png", image), ("a.cls", b"0")]),
        r"labels are numbers \(0\) and others \('cat'\)": tar_of([*sample, ("b.jpg", image), ("b.cls", b"cat")]),
        "label 3000000000: too large for the number of a class": tar_of([sample[0], ("a.cls", b"3000000000")]),
        "label 99999999999999999999: too large": tar_of([sample[0], ("a.cls", b"9" * 5000)]),
        "has no images with a .cls": tar_of([("a.txt", b"hello")]),
        "has no images with a .cls ": tar_of([]),
        "the tar of class n00000001 has no images": tar_of([("n00000001.tar", tar_of([]))]),
    }
    for message, content in cases.items():
        path = tmp_path / "x.tar"
        path.write_bytes(content)
        with pytest.raises(UserError, match=message.strip()) as caught:
            write(path, tmp_path / "out" / "x.beton")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_no_image_in_imagenets_tars_is_counted(folder: Path, tmp_path: Path) -> None:
    image = images_of(folder)[0][1]
    path = tmp_path / "train.tar"
    path.write_bytes(tar_of([("n00000000.tar", tar_of([("a.JPEG", image), ("b.gif", b""), ("README", b"")]))]))
    source = open_source(path)
    assert [Path(sample.name).name for sample in source.samples] == ["a.JPEG"]
    assert source.notes == [
        "passed over files whose suffix is not that of an image that is read (1 .gif, 1 without a suffix)"
    ]


def test_an_image_in_a_tar_that_is_damaged_is_named(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    name = "köln.jpg".encode("latin-1").decode("utf-8", "surrogateescape")
    path.write_bytes(tar_of([(name, b"text"), (name[:-3] + "cls", b"0"), ("._a.jpg", b"of Finder")]))
    with pytest.raises(UserError, match=r"x\.tar/k\\xf6ln\.jpg: text, and not an image; mend or remove it"):
        write(path, tmp_path / "x.beton")


def test_names_and_numbers_of_classes(folder: Path, expected: Path, tmp_path: Path) -> None:
    image = images_of(folder)[0][1]
    names = [f"{n}.jpg" for n in range(3)]
    named = tmp_path / "named.tar"
    labels = [b"dog", b"cat", b"dog\n"]
    files = [each for n in range(3) for each in ((names[n], image), (f"{n}.cls", labels[n]))]
    named.write_bytes(tar_of(files))
    source = open_source(named)
    assert source.classes == ["cat", "dog"]
    assert [sample.label for sample in source.samples] == [1, 0, 1]
    with pytest.raises(UserError, match=r"class dog is not among the 3 of"):
        open_source(named, classes_of=expected)
    many = tmp_path / "many.tar"
    many.write_bytes(tar_of([("a.jpg", image), ("a.cls", b"3")]))
    with pytest.raises(UserError, match=r"label 3, and .*train\.beton has 3 classes, from 0"):
        open_source(many, classes_of=expected)
    assert open_source(many).classes == ["0", "1", "2", "3"]
    assert open_source(many).notes == ["numbers in the place of names of classes; --classes-of would name them"]
    (tmp_path / "other" / "dog").mkdir(parents=True)
    with pytest.raises(UserError, match=r"n00000000, n00000001, n00000002 are not among the 1 classes of"):
        open_source(imagenet_tar(folder, tmp_path), classes_of=tmp_path / "other")


def test_patterns_and_folders_that_say_too_little(folder: Path, tmp_path: Path) -> None:
    shards = webdataset(folder, tmp_path)
    hugging_face(folder, tmp_path)
    data = hugging_face(folder, tmp_path, split="validation")
    cases = {
        shards / "val-*.tar": "no file fits this pattern",
        shards / "train-{0000..0003}.tar": r"train-0003\.tar: no such file",
        shards / "train-{0003..0000}.tar": "{0003..0000} is empty; give the lower number first",
        data: rf"has files of train, validation; say which, such as '{data}/validation\*\.parquet'",
        tmp_path / "x.zip": "is a file; give a folder with one folder of images per class, or ImageNet's tar",
        tmp_path / "gone.tar": "no such folder",
    }
    (tmp_path / "x.zip").write_bytes(b"PK")
    for path, message in cases.items():
        with pytest.raises(UserError, match=message):
            write(path, tmp_path / "out" / "x.beton")
    assert not (tmp_path / "out").exists()


def test_tables_without_images_or_labels(folder: Path, tmp_path: Path) -> None:
    def table(name: str, columns: dict[str, Any]) -> Path:
        pq.write_table(pa.table(columns), tmp_path / name)
        return tmp_path / name

    image = {"bytes": images_of(folder)[0][1], "path": None}
    (tmp_path / "text.parquet").write_text("hello")
    cases = {
        r"label 3000000000: too large for the number of a class": table(
            "0.parquet", {"image": [image], "label": [3_000_000_000]}
        ),
        r"has the columns label; needs one of images": table("1.parquet", {"label": [1]}),
        r"has the columns image; needs": table("2.parquet", {"image": [image]}),
        r"3\.parquet:1: its label is -1: test images, whose": table(
            "3.parquet", {"image": [image] * 2, "label": [0, -1]}
        ),
        r"its label is None": table("4.parquet", {"image": [image], "label": pa.array([None], pa.int64())}),
        r"text\.parquet: cannot be read as parquet": tmp_path / "text.parquet",
        r"6\.parquet:0: has no bytes in its row": table(
            "6.parquet",
            {
                "image": pa.array(
                    [{"bytes": None, "path": "x.jpg"}], pa.struct([("bytes", pa.binary()), ("path", pa.string())])
                ),
                "label": [0],
            },
        ),
        r"has no rows": table("7.parquet", {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}),
    }
    for message, path in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            write(path, tmp_path / "x.beton")
        assert "\n" not in str(caught.value)
    plain = table("plain.parquet", {"img": [image["bytes"]] * 2, "fine_label": [1, 0]})  # other data sets' columns
    assert write(plain, tmp_path / "x.beton").classes == ["0", "1"]
    assert verify(tmp_path / "x.beton").labels.tolist() == [1, 0]


@pytest.mark.slow
def test_without_pyarrow_a_line_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    source = hugging_face(folder, tmp_path)
    code = "import sys; sys.modules['pyarrow'] = None; from ssam_scale.__main__ import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "data", "write", str(source), str(tmp_path / "x.beton")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "parquet files are read by pyarrow, which is not installed; pip install 'ssam_scale[parquet]'" in done.stderr
    assert "Traceback" not in done.stderr
