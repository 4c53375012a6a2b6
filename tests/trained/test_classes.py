"""Which of the network's classes images are of, and what is counted of a network with more than five."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from ssam_scale.config.load import load
from ssam_scale.data import central_loader, open_images
from ssam_scale.errors import UserError
from ssam_scale.sharding import World
from ssam_scale.train.evaluation import evaluate
from ssam_scale.trained import Key, Trained, by_folders, by_labels, evaluate_on
from tests.support.images import make_image_folder
from tests.support.runs import RESNET, write_config

CLASSES = 8
NAMES = [f"n{label:08d}" for label in range(CLASSES)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images of each class."""
    folder = tmp_path_factory.mktemp("images")
    make_image_folder(folder / "all", CLASSES, 2, (36, 44))
    return folder / "all"


def trained(home: Path, names: list[str]) -> Trained:
    """A network of random weights."""
    model = {**RESNET, "num_classes": CLASSES}
    config = load(write_config(home / "run.yaml", home, store=False, model=model))
    torch.manual_seed(1)
    network = timm.create_model("resnet18", num_classes=CLASSES, **RESNET["kwargs"]).eval()
    torch.nn.init.normal_(network.fc.weight, std=3.0)
    return Trained(network, config, names, "a network", 5, "raw")


def renamed(images: Path, target: Path, names: dict[int, str]) -> Path:
    for label, name in names.items():
        shutil.copytree(images / NAMES[label], target / name)
    return target


def key_of(folder: Path, home: Path, names: list[str]) -> Key:
    return by_folders(open_images(Path(f"folder:{folder}")), trained(home, names))


def test_top_five_and_loss_are_those_of_the_training_loop(images: Path, tmp_path: Path) -> None:
    network = trained(tmp_path, NAMES)
    found = open_images(Path(f"folder:{images}"))
    loader = central_loader(found, network.config.data, device=torch.device("cpu"), batch=5)
    expected = evaluate(network.network, loader, 0, World(), torch.float32)
    result = evaluate_on(found, by_folders(found, network), network)
    assert (result.top1, result.top5, result.loss, result.images) == (
        expected.top1,
        expected.top5,
        expected.loss,
        expected.images,
    )
    assert result.top5 is not None
    assert 0.0 < result.top5 < 100.0
    matrix = result.confusion_matrix()
    assert matrix.sum(1).tolist() == [2] * CLASSES
    assert 100.0 * matrix.trace() / 16 == result.top1
    assert f"top-5 {result.top5:.2f}%" in str(result)


def test_of_five_classes_or_fewer_top_five_would_be_all(images: Path, tmp_path: Path) -> None:
    folder = renamed(images, tmp_path / "some", {label: NAMES[label] for label in range(5)})
    found = open_images(Path(f"folder:{folder}"))
    network = trained(tmp_path, NAMES)
    assert evaluate_on(found, by_folders(found, network), network).top5 is None


def test_names_in_another_order_are_the_same_classes(images: Path, tmp_path: Path) -> None:
    key = key_of(images, tmp_path, NAMES[::-1])
    assert key.classes is None
    assert key.answers[:, 0].tolist() == [7 - label for label in range(CLASSES) for _ in range(2)]


def test_numbers_are_sorted_as_text_and_mean_numbers(images: Path, tmp_path: Path) -> None:
    folder = renamed(images, tmp_path / "numbered", {0: "7", 1: "00", 2: "3"})
    key = key_of(folder, tmp_path, NAMES)
    assert key.classes is not None
    assert key.classes.tolist() == [0, 3, 7]
    assert key.answers[:, 0].tolist() == [0, 0, 1, 1, 2, 2]  # by name: 00, 3, 7


def test_numbers_that_are_names_of_classes_are_those_classes(images: Path, tmp_path: Path) -> None:
    folder = renamed(images, tmp_path / "numbered", {0: "1", 1: "2"})
    key = key_of(folder, tmp_path, ["2", "1", *NAMES[2:]])
    assert key.classes is not None
    assert key.classes.tolist() == [0, 1]
    assert key.answers[:, 0].tolist() == [1, 1, 0, 0]
    assert key.said == "2 of 8 classes scored, by name"


def test_where_nobody_has_named_the_classes_their_order_counts(images: Path, tmp_path: Path) -> None:
    key = key_of(images, tmp_path, [])
    assert "in the order of their names, as nobody has named the network's" in key.said
    with pytest.raises(UserError, match="has 2 classes, and a network tells 8 apart, whose names are not known"):
        key_of(renamed(images, tmp_path / "some", {0: "cat", 1: "dog"}), tmp_path, [])


def test_what_matches_nothing_is_a_line(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cat, dog are not among the 8 classes of a network"):
        key_of(renamed(images, tmp_path / "pets", {0: "cat", 1: "dog", 2: NAMES[2]}), tmp_path, NAMES)
    with pytest.raises(UserError, match="1, 99 are not among the 8 classes"):
        key_of(renamed(images, tmp_path / "large", {0: "99", 1: "1"}), tmp_path, NAMES)
    with pytest.raises(UserError, match="two of its classes are the same number, 1; rename one of them"):
        key_of(renamed(images, tmp_path / "twice", {0: "1", 1: "01"}), tmp_path, NAMES)


def test_labels_by_name_are_numbers_or_names_of_classes(images: Path, tmp_path: Path) -> None:
    network = trained(tmp_path, NAMES)
    found = open_images(Path(f"folder:{images}"))
    names = [Path(found.named(image)).name for image in range(found.images)]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({Path(name).stem: [NAMES[3], 5] if n else 1 for n, name in enumerate(names)}))
    key = by_labels(found, network, file)
    assert key.answers.tolist() == [[1, -1], *[[3, 5]] * 15]
    assert key.counted.all()
    result = evaluate_on(found, key, network)
    assert (result.loss, result.classes) == (None, ())
    for said, problem in (
        ('{"x": [1]}', "has nothing on n00000000_0.JPEG and 15 others"),
        ("[[0]]", "has nothing on n00000000_0.JPEG and 7 others"),
        (json.dumps({name: [8] for name in names}), "8 is none of the 8 classes"),
        (json.dumps({name: [True] for name in names}), "true is none of the 8 classes"),
        (json.dumps({name: ["cat"] for name in names}), '"cat" is none of the 8 classes'),
        (json.dumps({name: [] for name in names}), "has no label for any image"),
        (json.dumps({name: {"a": 1} for name in names}), "needed are labels by image"),
        ("{}", "needed are labels by image"),
        ("\xff", "is no JSON"),
    ):
        file.write_text(said, encoding="latin-1")
        with pytest.raises(UserError, match=r"--labels .*labels.json: ") as raised:
            by_labels(found, network, file)
        assert problem in str(raised.value)
    assert np.array_equal(found.labels, np.repeat(np.arange(CLASSES), 2))
