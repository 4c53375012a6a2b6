"""The loss of a run: torch's and timm's own, and the same however a batch is shared out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor

from ssam_scale.config.schema import Loss
from ssam_scale.train.criterion import Criterion

N, CLASSES = 12, 5


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and classes' shares."""
    generator = torch.Generator().manual_seed(0)
    logits = 3.0 * torch.randn(N, CLASSES, generator=generator)
    labels = torch.randint(CLASSES, (N,), generator=generator)
    other = torch.randint(CLASSES, (N,), generator=generator)
    return logits, labels, 0.7 * F.one_hot(labels, CLASSES) + 0.3 * F.one_hot(other, CLASSES)


def of(**section: Any) -> Criterion:
    return Criterion(Loss.model_validate(section))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_timms(smoothing: float) -> None:
    logits, labels, shares = batch()
    ours = of(label_smoothing=smoothing)
    torch.testing.assert_close(ours(logits, labels), LabelSmoothingCrossEntropy(smoothing)(logits, labels))
    smooth = shares * (1 - smoothing) + smoothing / CLASSES  # which timm's mixing does
    torch.testing.assert_close(ours(logits, shares), SoftTargetCrossEntropy()(logits, smooth))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2, 0.5])
def test_binary_cross_entropy_is_timms(smoothing: float, threshold: float | None) -> None:
    logits, labels, shares = batch()
    ours = of(name="binary_cross_entropy", label_smoothing=smoothing, target_threshold=threshold)
    theirs = BinaryCrossEntropy(smoothing, threshold)
    torch.testing.assert_close(ours(logits, labels), theirs(logits, labels))
    torch.testing.assert_close(ours(logits, shares), theirs(logits, shares * (1 - smoothing) + smoothing / CLASSES))


@pytest.mark.parametrize("name", ["cross_entropy", "binary_cross_entropy"])
def test_weights_of_classes_are_factors_and_do_not_depend_on_how_a_batch_is_shared_out(name: str) -> None:
    logits, labels, shares = batch()
    weights = [0.5, 1.0, 0.0, 4.0, 2.0]
    weighted, plain = of(name=name, class_weights=weights), of(name=name)
    for targets in (labels, shares):
        parts = [weighted(logits[i : i + 3], targets[i : i + 3]) for i in range(0, N, 3)]
        torch.testing.assert_close(torch.stack(parts).mean(), weighted(logits, targets))
    for row in range(N):
        alone = weighted(logits[row : row + 1], labels[row : row + 1])
        if name == "cross_entropy":
            torch.testing.assert_close(
                alone, weights[int(labels[row])] * plain(logits[row : row + 1], labels[row : row + 1])
            )
    torch.testing.assert_close(of(name=name, class_weights=[1.0] * CLASSES)(logits, labels), plain(logits, labels))


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"target_threshold": 0.2}, "target_threshold is of binary_cross_entropy, and name is cross_entropy"),
        ({"class_weights": [0.0, 0.0]}, "class_weights are all 0"),
        ({"class_weights": [1.0, -1.0]}, "must be a list of numbers from 0 to 1e"),
    ],
    ids=["of another loss", "nothing", "negative"],
)
def test_what_cannot_be_meant(section: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        of(**section)
