"""Weights of classes by how many images they have: `loss.class_weights: balanced` as the numbers that it comes to."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass

from ssam_scale.config.schema import Config
from ssam_scale.data import Images, images_by_class
from ssam_scale.errors import UserError

_FEW = 5  # classes are named in a line


@dataclass(frozen=True)
class ClassWeights:
    """The weights of a run's classes, by label.

    Attributes:
        names: of the classes; those that nobody has named are their labels.
        images: that are trained on, of each.
        weights: images of all / (classes · images of the class).
    """

    names: tuple[str, ...]
    images: tuple[int, ...]
    weights: tuple[float, ...]

    def __str__(self) -> str:
        """The least and the most of them, in a line."""
        named = sorted(zip(self.weights, self.names, self.images, strict=True))
        shown = (f"{weight:.4g} ({name}, {images:,} images)" for weight, name, images in (named[0], named[-1]))
        return f"loss.class_weights balanced: from {' to '.join(shown)}"

    def table(self) -> str:
        """A row of CSV for each class."""
        table = io.StringIO()
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["label", "class", "images", "weight"])
        writer.writerows(
            [label, name, images, repr(weight)]
            for label, (name, images, weight) in enumerate(zip(self.names, self.images, self.weights, strict=True))
        )
        return table.getvalue()

    def put_into(self, config: Config) -> Config:
        """The configuration with these numbers in the place of `balanced`."""
        loss = config.loss.model_copy(update={"class_weights": self.weights})
        return config.model_copy(update={"loss": loss})


def balanced(config: Config, images: Images) -> ClassWeights | None:
    """The weights that `loss.class_weights: balanced` comes to; None: the configuration says something else.

    Args:
        config: of the run.
        images: that `data.train` names.

    Raises:
        UserError: a class has no images, or a label is outside the model's classes.
    """
    if config.loss.class_weights != "balanced":
        return None
    classes = config.model.num_classes
    counts = [int(count) for count in images_by_class(config.data, images, classes)]
    known = images.class_names
    names = tuple(known[label] if label < len(known) else str(label) for label in range(classes))
    if empty := [name for name, count in zip(names, counts, strict=True) if not count]:
        where = config.data.train if config.data.subset is None else f"data.subset {config.data.subset}"
        more = f" and {len(empty) - _FEW} more" if len(empty) > _FEW else ""
        raise UserError(
            f"loss.class_weights balanced: {where} has no image of class {', '.join(empty[:_FEW])}{more}, of "
            f"model.num_classes {classes}, whose weight would be infinite; lower model.num_classes, or give a list"
        )
    total = sum(counts)
    return ClassWeights(names, tuple(counts), tuple(total / (classes * count) for count in counts))
