"""What is minimised: a loss of logits and labels, or of logits and the classes' shares of each image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssam_scale.config.schema import Loss


class Criterion:
    """The mean loss of a batch.

    Args:
        section: of the configuration, `loss`; weights that are balanced as the numbers that they come to, which the
            training images say (`class_weights.balanced`).
    """

    def __init__(self, section: Loss) -> None:
        self._section = section
        assert section.class_weights != "balanced"
        self._weights = None if section.class_weights is None else torch.tensor(section.class_weights)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean over images: of the softmax's cross-entropy, or of the mean over classes of each one's own.

        Args:
            logits: float32 of shape [N, classes].
            targets: int64 labels of shape [N], or classes' shares, float32 of shape [N, classes].
        """
        section, weights = self._section, self._weights
        if weights is not None:
            # With labels, torch divides by the sum of the weights, which is each process's own.
            targets = shares(targets, logits.shape[1])
            weights = self._weights = weights.to(logits.device)
        if section.name == "cross_entropy":
            return F.cross_entropy(logits, targets, weights, label_smoothing=section.label_smoothing)
        targets = shares(targets, logits.shape[1])
        if section.label_smoothing:
            targets = targets.lerp(torch.full_like(targets, 1.0 / logits.shape[1]), section.label_smoothing)
        if section.target_threshold is not None:
            targets = targets.gt(section.target_threshold).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, targets, weights)


def shares(targets: Tensor, classes: int) -> Tensor:
    """Labels as classes' shares, float32 of shape [N, classes]; shares as they are."""
    return targets if targets.ndim > 1 else F.one_hot(targets, classes).float()
