"""Accuracy that is exact however many processes measure it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.perturbation.batchnorm import evaluation_mode
from ssam_scale.sharding import World


@dataclass(frozen=True)
class Evaluation:
    """Results over `images` images.

    Attributes:
        top1: images whose label scores highest, percent.
        top5: images whose label is among the five highest scores (all, with fewer classes), percent.
        loss: mean cross-entropy.
        images: how many were measured.
    """

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(
    module: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    forwards: int,
    world: World,
    precision: torch.dtype,
) -> Evaluation:
    """Evaluate `module` on all images of all processes.

    A sharded forward is collective, so every process runs as many forwards as the one with the most batches; what a
    process repeats for the sake of the others is not counted.

    Args:
        module: the distributed model; its mode is put back.
        batches: this process's images and labels, each image on exactly one process.
        forwards: number of batches of the process that has most of them.
        world: over whom to sum.
        precision: of the forward, by autocast unless float32.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=world.device)  # top-1, top-5, loss, images
    with evaluation_mode(module):
        batch, done = None, 0
        for batch in batches:
            totals += _measure(module, batch, precision)
            done += 1
        for _ in range(done, forwards):
            if batch is None:
                raise RuntimeError("a process has no image to evaluate; evaluate on fewer processes")
            _measure(module, batch, precision)
    top1, top5, loss, images = world.sum(totals).tolist()
    return Evaluation(100.0 * top1 / images, 100.0 * top5 / images, loss / images, int(images))


def _measure(module: nn.Module, batch: tuple[Tensor, Tensor], precision: torch.dtype) -> Tensor:
    images, labels = batch
    with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
        logits = module(images)
    logits = logits.float()
    best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([best[:, 0].sum(), best.sum(), loss, torch.tensor(len(labels), device=loss.device)]).double()
