"""Training with a loss term by outputs of earlier weights: on any ranks and backend, and written out slowly."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.methods import MESA, SAF
from ssam_scale.models.ema import EMA
from ssam_scale.perturbation import DescentSamples, Fresh, SparseSAM
from ssam_scale.perturbation.reference import reference_step
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place
from tests.support.networks import CLASSES, batches, freeze_batchnorm, part, small_network

IMAGES, BATCH, EPOCHS = 27, 12, 4  # each epoch leaves 3 images out, and others than the one before
WEIGHT, TEMPERATURE, LAG, START, DECAY = 2.0, 3.0, 1, 1, 0.6
LR, MOMENTUM = 0.05, 0.9


@dataclass(frozen=True)
class Term:
    """One way of training with a term. `rho` 0: without a perturbation."""

    kind: str
    rho: float = 0.0
    accumulation: int = 1
    family: str = "vit"
    fraction: float = 1.0
    choose: str = "first"
    descent: DescentSamples | None = None


def order(epoch: int) -> Tensor:
    """Which images the epoch has, in their order."""
    return torch.randperm(IMAGES, generator=torch.Generator().manual_seed(100 + epoch))


def images() -> tuple[Tensor, Tensor]:
    [every] = batches(1, IMAGES)
    return every


def loss_of(term: Any) -> Any:
    """What `step` is given."""

    def loss_fn(forward: Any, batch: tuple[Any, ...]) -> Tensor:
        inputs, labels, *reference = batch
        logits = forward(inputs)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        return loss + term.loss(logits, *reference) if reference else loss

    return loss_fn


def train(
    world: World, backend: Any, way: Term, folder: str, epochs: int = EPOCHS, weight: float = WEIGHT
) -> dict[str, Tensor]:
    """The weights after training so many epochs, on this rank."""
    model = freeze_batchnorm(small_network(way.family))
    module, base = place(
        model,
        [stage.block for stage in model.stages],
        backend,
        world,
        lambda: torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM),
        batch_size=BATCH // world.size // way.accumulation,
        accumulation=way.accumulation,
    )
    opt = SparseSAM(module, base, rho=way.rho, direction=Fresh(way.fraction, way.choose), descent=way.descent)
    options = {"weight": weight, "temperature": TEMPERATURE, "start_epoch": START}
    term: Any = (
        SAF(Path(folder), CLASSES, lag_epochs=LAG, world=world, **options)
        if way.kind == "saf"
        else MESA(module, EMA(model.model, DECAY, opt.sharding), **options)
    )
    loss_fn, (inputs, labels) = loss_of(term), images()
    for epoch in range(epochs):
        term.begin_epoch(epoch)
        for which in order(epoch).split(BATCH)[: IMAGES // BATCH]:
            own, _ = part((which, which), world.rank, world.size)
            micro = [
                (inputs[each].to(world.device), labels[each].to(world.device), *((each,) if way.kind == "saf" else ()))
                for each in own.chunk(way.accumulation)
            ]
            opt.step(loss_fn, *term.attach(micro))
            term.after_step()
        term.end_epoch()
    named, sharding = opt.parameters.by_name, opt.sharding
    shards = sharding.shards(list(named.values()))
    return {n: sharding.gather(p, s.weight).clone() for (n, p), s in zip(named.items(), shards, strict=True)}


def written_out(way: Term) -> dict[str, Tensor]:
    """The weights after the same epochs by equations (arXiv 2205.14083), on one process and with no part of `methods`.

    L = cross-entropy + λ τ² mean over the batch of Σ_c p_c (log p_c - log q_c), p = softmax(z'/τ), q = softmax(z/τ):
    SAF's z' is what the image had LAG epochs before, and 0 divergence if it had nothing; MESA's that of the weights
    v ← β v + (1 - β) w after each step, v = w at first.
    """
    model = freeze_batchnorm(small_network(way.family)).model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    teacher = copy.deepcopy(model).eval()
    remembered: dict[tuple[int, int], Tensor] = {}
    inputs, _ = images()
    for epoch in range(EPOCHS):
        for which in order(epoch).split(BATCH)[: IMAGES // BATCH]:
            with torch.no_grad():
                averaged = dict(zip(which.tolist(), teacher(inputs[which]), strict=True))

            loss_fn = partial(_loss, way, epoch, averaged, remembered)
            if way.rho:
                every = {name: torch.ones_like(p) for name, p in model.named_parameters()}
                seen = which[: max(1, round(way.fraction * len(which)))]
                reference_step(
                    model, optimizer, loss_fn, which, rho=way.rho, mask=every, norm="masked", ascent_batch=seen
                )
            else:
                optimizer.zero_grad()
                loss_fn(model, which).backward()
                optimizer.step()
            with torch.no_grad():
                for v, w in zip(teacher.parameters(), model.parameters(), strict=True):
                    v.mul_(DECAY).add_(w, alpha=1.0 - DECAY)
    return {name: p.detach() for name, p in model.named_parameters()}


def _loss(
    way: Term,
    epoch: int,
    averaged: dict[int, Tensor],
    remembered: dict[tuple[int, int], Tensor],
    forward: Any,
    which: Tensor,
) -> Tensor:
    """Of these images; remembers what they are."""
    inputs, labels = images()
    logits = forward(inputs[which])
    total: Tensor = nn.functional.cross_entropy(logits, labels[which])
    for image, z in zip(which.tolist(), logits, strict=True):
        then = averaged[image] if way.kind == "mesa" else remembered.get((epoch - LAG, image))
        remembered[epoch, image] = z.detach().half().float()
        if then is not None and epoch >= START:
            p, q = (then / TEMPERATURE).exp(), (z / TEMPERATURE).exp()
            p, q = p / p.sum(), q / q.sum()
            total = total + WEIGHT * TEMPERATURE**2 * (p * (p.log() - q.log())).sum() / len(which)
    return total
