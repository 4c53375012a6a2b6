"""What a trained network takes images for that nobody has labelled, as a table."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ssam_scale.data import central_loader, open_images
from ssam_scale.data.sources import printable
from ssam_scale.data.tree import images_of_tree
from ssam_scale.errors import UserError
from ssam_scale.folders import why_not_a_file, write_whole

from .network import Forward, Trained, Watch, unwatched

SUFFIXES = (".csv", ".parquet")


@dataclass(frozen=True)
class Predicted:
    """The most probable classes of images.

    Attributes:
        files: names of the images, below their folder.
        labels: int64 [images, top], the classes, the most probable first.
        probabilities: float64 [images, top], softmax over all classes.
        class_names: by label.
        unreadable: why each image that is missing could not be read.
    """

    files: list[str]
    labels: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    class_names: list[str]
    unreadable: tuple[str, ...]

    def columns(self) -> dict[str, Sequence[str] | Sequence[float]]:
        """As a table: `file`, and `class_1`, `probability_1` and so on."""
        found: dict[str, Sequence[str] | Sequence[float]] = {"file": self.files}
        for place in range(self.labels.shape[1]):
            found[f"class_{place + 1}"] = [self.class_names[label] for label in self.labels[:, place].tolist()]
            found[f"probability_{place + 1}"] = self.probabilities[:, place].tolist()
        return found

    def write(self, path: Path) -> None:
        """Write the table, whole or not at all, as what the file's suffix says.

        Raises:
            UserError: it cannot be written.
        """
        try:
            write_whole(path, self._as_parquet if path.suffix == ".parquet" else self._as_csv)
        except OSError as error:
            raise UserError(f"-o {path}: was not written: {error.strerror or error}") from error

    def _as_csv(self, path: Path) -> None:
        columns = self.columns()
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(zip(*columns.values(), strict=True))

    def _as_parquet(self, path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table(self.columns()), path)


def check_table(path: Path) -> None:
    """Refuse a table that could not be written, before anything is computed.

    Raises:
        UserError: of another suffix than `SUFFIXES`, or nothing can be put there.
        ModuleNotFoundError: pyarrow is not installed, and it is parquet.
    """
    if path.suffix not in SUFFIXES:
        raise UserError(f"-o {path}: what kind of table is meant? Name it {path.with_suffix('.csv').name} or .parquet")
    if (problem := why_not_a_file(path)) is not None:
        raise UserError(f"-o {path}: {problem}")
    if path.suffix == ".parquet":
        import pyarrow  # noqa: F401


def predict(place: Path, trained: Trained, top: int, watch: Watch = unwatched) -> Predicted:
    """Classify images; what cannot be read is listed, and left out.

    Args:
        place: a folder of any form, or an image file; or images as `data.val` has them.
        trained: by which network.
        top: how many classes of each image.
        watch: shows how far it is.

    Raises:
        UserError: there is no image, or none that can be read; or fewer classes than asked for.
    """
    if not 1 <= top <= trained.classes:
        raise UserError(f"--top {top}: {trained.source} tells {trained.classes:,} classes apart")
    unreadable: list[str] = []
    if place.is_dir() or (place.is_file() and place.suffix != ".beton"):
        images, closed = images_of_tree(place)
        unreadable += [f"{printable(name)}: {why}" for name, why in closed.items()]
    else:
        images = open_images(place)  # type: ignore[assignment]
    if not images.images:
        raise UserError(f"{place}: no images in there")
    forward = Forward(trained)
    loader = central_loader(images, trained.config.data, device=forward.device, batch=trained.batch, on_damaged="skip")
    labels, probabilities = [], []
    with closing(iter(loader)) as batches:
        for batch in watch(batches, len(loader)):
            best = forward(batch.images).double().softmax(1).topk(top)
            labels.append(best.indices.cpu().numpy())
            probabilities.append(best.values.cpu().numpy())
    damaged = sorted(loader.damaged)
    sound = np.setdiff1d(np.arange(images.images), damaged)
    unreadable += [images.complaint(image).partition("; ")[0] for image in damaged]
    return Predicted(
        [images.named(image) for image in sound.tolist()],
        np.concatenate(labels)[sound],
        np.concatenate(probabilities)[sound],
        [trained.named(label) for label in range(trained.classes)],
        tuple(unreadable),
    )
