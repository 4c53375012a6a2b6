"""The loss by which per-sample scores estimate the true Fisher information: labels drawn from the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssam_scale.perturbation.loss import Forward


def sampled_labels(logits: Tensor) -> Tensor:
    """Labels drawn from a classifier's own distribution, softmax(logits), by torch's random state.

    Args:
        logits: of shape (samples, classes), any floating dtype.

    Returns:
        int64 of shape (samples,).
    """
    return torch.multinomial(logits.detach().float().softmax(1), 1).squeeze(1)


def sampled_label_loss(forward: Forward, batch: Sequence[Any]) -> Tensor:
    """Mean cross-entropy of labels that are drawn from the model: a loss function for `per_sample_scores`.

    The squared gradients are then one draw a sample from the true Fisher information, the expectation over the model's
    own labels, instead of the empirical one (arXiv 1905.12558 tells them apart).

    Args:
        forward: of a classifier that returns logits of shape (samples, classes).
        batch: whose first element is the input; labels, if there are any, are not looked at.
    """
    logits = forward(batch[0]).float()
    return F.cross_entropy(logits, sampled_labels(logits))
