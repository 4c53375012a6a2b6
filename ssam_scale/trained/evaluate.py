"""All that one pass over images says of a trained network: accuracy, by class too, confusions, and calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ssam_scale.data import Images, central_loader
from ssam_scale.errors import UserError
from ssam_scale.train.evaluation import Evaluation

from .classes import Key
from .network import Forward, Trained, Watch, unwatched

BINS = 15
"""Of confidence, for the calibration error: as many as Guo et al. (1706.04599) have."""


@dataclass(frozen=True)
class ClassAccuracy:
    """Of one class.

    Attributes:
        name: of the class.
        images: of it.
        top1: percent of these that are taken for it; None without images.
    """

    name: str
    images: int
    top1: float | None


@dataclass(frozen=True)
class Accuracy:
    """Results of a network on images.

    Attributes:
        top1: percent whose highest logit is of a right class.
        top5: percent with a right class among the five highest; None with five classes or fewer.
        loss: mean cross-entropy over the classes that are scored; None where images have several labels.
        calibration_error: expected calibration error, percent: see `calibration_error`.
        confidence: mean probability of the class that an image is taken for, percent.
        images: how many count.
        without_label: how many do not, because nothing is right of them.
        damaged: names of images that could not be read, which do not count either.
        classes: each that is scored; empty where images have several labels.
        confusions: int64 [pairs, 3]: a class, another one that images of it were taken for (places in `classes`), and
            how many were; the most frequent first.
    """

    top1: float
    top5: float | None
    loss: float | None
    calibration_error: float
    confidence: float
    images: int
    without_label: int
    damaged: tuple[str, ...]
    classes: tuple[ClassAccuracy, ...]
    confusions: NDArray[np.int64]

    def confusion_matrix(self) -> NDArray[np.int64]:
        """int64 [classes, classes], images of the row's class that were taken for the column's."""
        found = np.zeros((len(self.classes), len(self.classes)), np.int64)
        for place, each in enumerate(self.classes):
            found[place, place] = round(each.images * (each.top1 or 0.0) / 100.0)
        found[self.confusions[:, 0], self.confusions[:, 1]] = self.confusions[:, 2]
        return found

    def mostly_taken_for(self) -> dict[int, str]:
        """By place of a class, the class that its images are wrongly taken for most often, with their share of them."""
        found: dict[int, str] = {}
        for own, other, count in self.confusions.tolist():
            share = 100.0 * count / self.classes[own].images
            found.setdefault(own, f"{self.classes[other].name} ({share:.0f}%)")
        return found

    def as_json(self) -> dict[str, Any]:
        """All of it in plain values."""
        names = [each.name for each in self.classes]
        plain = asdict(self)
        if self.loss is not None and not math.isfinite(self.loss):
            plain["loss"] = None  # JSON has no word for what is no number
        return {
            **plain,
            "confusions": [
                {"class": names[own], "taken_for": names[other], "images": count}
                for own, other, count in self.confusions.tolist()
            ],
        }

    def __str__(self) -> str:
        if self.loss is not None:
            first = str(Evaluation(self.top1, self.top5, self.loss, self.images))
        else:
            first = f"top-1 {self.top1:.2f}%" + ("" if self.top5 is None else f", top-5 {self.top5:.2f}%")
        return f"{first}, calibration error {self.calibration_error:.2f}% ({BINS} bins), on {self.images:,} images"


@dataclass(frozen=True)
class _Seen:
    """What is kept of a batch.

    Attributes:
        best: int64 [N, 5 or fewer], the highest logits' places, falling.
        confidence: float64 [N], probability of the first of them.
        losses: float32 [N], of each image; [0]: there is none.
        loss: their sum, as the run itself sums it up.
    """

    best: NDArray[np.int64]
    confidence: NDArray[np.float64]
    losses: NDArray[np.float32]
    loss: float


def evaluate_on(
    images: Images,
    key: Key,
    trained: Trained,
    watch: Watch = unwatched,
) -> Accuracy:
    """Evaluate a network as its run did: the same crops, precision and batches, and so the same numbers.

    Where one process has trained, these are the bits of its own; several had batches of their own, which changes the
    last digits of the loss.

    Args:
        images: to evaluate on.
        key: what is right of each.
        trained: the network.
        watch: shows how far it is.

    Raises:
        UserError: an image is damaged, unless `data.on_damaged` is skip; or none is left.
    """
    forward, data = Forward(trained), trained.config.data
    loader = central_loader(images, data, device=forward.device, batch=trained.batch, on_damaged=data.on_damaged)
    only = None if key.classes is None else torch.from_numpy(key.classes).to(forward.device)
    answers, seen, done = torch.from_numpy(key.answers).to(forward.device), [], 0
    with closing(iter(loader)) as batches:
        for batch in watch(batches, len(loader)):
            logits = forward(batch.images) if only is None else forward(batch.images)[:, only]
            seen.append(_seen(logits, answers[done : done + len(logits), 0] if key.one_each else None))
            done += len(logits)
    damaged = sorted(loader.damaged)
    counted = key.counted
    counted[damaged] = False
    if not counted.any():
        raise UserError(f"{images.place}: no image is left that counts")
    best = np.concatenate([each.best for each in seen])[counted]
    confidence = np.concatenate([each.confidence for each in seen])[counted]
    right = (best[:, :, None] == key.answers[counted][:, None, :]).any(2)
    total = int(counted.sum())
    scored = trained.classes if key.classes is None else len(key.classes)
    classes, confusions = _by_class(best[:, 0], key, counted, trained) if key.one_each else ((), _NO_CONFUSIONS)
    return Accuracy(
        top1=100.0 * float(right[:, 0].sum()) / total,
        top5=100.0 * float(right.any(1).sum()) / total if scored > 5 else None,
        loss=_loss(seen, counted) if key.one_each else None,
        calibration_error=calibration_error(confidence, right[:, 0]),
        confidence=100.0 * float(confidence.mean()),
        images=total,
        without_label=int((~key.counted).sum()),
        damaged=tuple(images.named(image) for image in damaged),
        classes=classes,
        confusions=confusions,
    )


_NO_CONFUSIONS = np.zeros((0, 3), np.int64)


def calibration_error(confidence: NDArray[np.float64], right: NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error, percent: Guo et al. (1706.04599), equation 3.

    That is the mean over all images of the distance between accuracy and mean confidence in the image's bin, of so many
    of equal width, each with its upper end.

    Args:
        confidence: [images] in [0, 1], the probability of the class that each is taken for.
        right: [images] whether it is of that class.
        bins: how many.
    """
    bin_of = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(bin_of, right.astype(np.float64), bins) - np.bincount(bin_of, confidence, bins)
    return 100.0 * float(np.abs(gap).sum()) / len(confidence)


def _seen(logits: Tensor, labels: Tensor | None) -> _Seen:
    best = logits.topk(min(5, logits.shape[1])).indices
    confidence = logits.double().softmax(1).gather(1, best[:, :1])[:, 0]
    if labels is None:
        return _Seen(best.cpu().numpy(), confidence.cpu().numpy(), np.zeros(0, np.float32), 0.0)
    losses, loss = (F.cross_entropy(logits, labels, reduction=how) for how in ("none", "sum"))
    return _Seen(best.cpu().numpy(), confidence.cpu().numpy(), losses.cpu().numpy(), float(loss))


def _loss(seen: Sequence[_Seen], counted: NDArray[np.bool_]) -> float:
    """The mean; where images do not count, without theirs."""
    if counted.all():
        return sum(each.loss for each in seen) / len(counted)
    return float(np.concatenate([each.losses for each in seen])[counted].mean(dtype=np.float64))


def _by_class(
    taken_for: NDArray[np.int64], key: Key, counted: NDArray[np.bool_], trained: Trained
) -> tuple[tuple[ClassAccuracy, ...], NDArray[np.int64]]:
    """Accuracy by class, and confusions."""
    label = key.answers[counted][:, 0]
    known = np.arange(trained.classes) if key.classes is None else key.classes
    images = np.bincount(label, minlength=len(known))
    right = np.bincount(label[label == taken_for], minlength=len(known))
    classes = tuple(
        ClassAccuracy(trained.named(number), count, 100.0 * hits / count if count else None)
        for number, count, hits in zip(known.tolist(), images.tolist(), right.tolist(), strict=True)
    )
    pairs, times = np.unique(np.stack([label, taken_for], 1)[label != taken_for], axis=0, return_counts=True)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -times))
    return classes, np.column_stack([pairs, times])[order].astype(np.int64).reshape(-1, 3)
