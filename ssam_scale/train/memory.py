"""What fits into the device's memory: the largest micro-batch, tried before training; and what is said if it runs out.

`train.max_micro_batch: auto` is found on a copy of the network, on each process by itself: a pass that runs out of
memory between collectives would leave the other processes waiting, and DeepSpeed's engine with half a reduction that
nothing takes back. What the backend holds beside a plain network, and what the run holds beside its step, is stood for
by as much memory. The processes share nothing but the number that comes out, and nothing else is left of the search:
it draws from random states that are put back, and its copy has been trained instead of the network.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ssam_scale.config.micro_batches import MicroBatches
from ssam_scale.config.schema import Config
from ssam_scale.config.trajectory_sections import MESATrajectory
from ssam_scale.errors import UserError
from ssam_scale.perturbation import SparseSAM, StagedModel
from ssam_scale.perturbation.directions import build_direction
from ssam_scale.perturbation.loss import LossFn
from ssam_scale.sharding import BACKENDS, World
from ssam_scale.sharding.device import to_device

FLOAT = 4  # bytes


def averages_of(config: Config) -> int:
    """How many averages of the weights a run keeps: EMA's, MESA's."""
    return (config.train.ema_decay is not None) + isinstance(config.trajectory, MESATrajectory)


# What a GPU must have left: gaps between allocations, buffers of the communication library, what kernels work with.
_SPARE = 0.1

# What is said where no exception of its own says it.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that a device, or the host, has no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


@contextmanager
def explaining_out_of_memory(config: Config, split: MicroBatches | None = None) -> Iterator[None]:
    """What runs out of memory inside becomes a line that names what would fit.

    Args:
        config: of the run.
        split: how a step is shared out; None: before there is a step.

    Raises:
        UserError: in the place of whatever said that there is no memory left.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        if split is None:
            hint = "a backend that shards weights takes less of it: sharding.backend=fsdp2 or zero3"
            raise UserError(f"out of memory before the first step; {hint} ({reason})") from error
        ways = []
        if split.images > 1:
            chosen = "" if config.train.accumulation is None else "train.accumulation=null "
            ways.append(f"{chosen}train.max_micro_batch={split.images // 2}")
        if not config.train.activation_checkpointing:
            ways.append("train.activation_checkpointing=true")
        hint = f"try {', or '.join(ways)}" if ways else "use smaller images or a smaller network"
        raise UserError(f"out of memory with {split}; {hint} ({reason})") from error


def largest_micro_batch(
    config: Config,
    world: World,
    backend: str,
    model: StagedModel,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loss_fn: LossFn,
) -> int:
    """The most images of a micro-batch that every process can take a step with. Collective; leaves no trace.

    Tried are the sizes that a process's part of the batch divides into, the largest first, by a step of dense SAM,
    which takes at least as much memory as that of any mask. A CPU on which nothing runs out takes the part whole.

    Args:
        config: of the run.
        world: the processes.
        backend: that the network will be placed on.
        model: the network, as it will be placed; not changed.
        make_optimizer: builds the base optimizer over a network's parameters.
        loss_fn: that training is by.

    Raises:
        UserError: there is not even memory for a single image.
    """
    part = config.data.batch_size // world.size
    sizes = [part // count for count in range(1, part + 1) if part % count == 0]
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _leaving_some(world.device):
        make_trial = partial(_Trial, config, world.device, backend, model, make_optimizer, loss_fn)
        found = _first_that_fits(sizes, world.device, make_trial)
    fits = world.smallest(found)
    if not fits:
        raise UserError(
            "train.max_micro_batch auto: beside the whole network with its gradients and its optimizer's state, with "
            "which it is tried, one device has no room for an image; with a backend that shards them, set a number"
        )
    return fits


def _first_that_fits(sizes: list[int], device: torch.device, make_trial: Callable[[], _Trial]) -> int:
    """On this process; 0 if none does."""
    trial: _Trial | None = None
    for images in [0, *sizes]:
        try:
            if trial is None:
                trial = make_trial()
            else:
                trial.step(images, sizes[0])
                return images
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if trial is None:
                return 0
        finally:
            # Now that the exception, and with it the frames in which it was raised, is gone.
            _free(device)
    return 0


class _Trial:
    """Steps of a copy of the network in the conditions of training."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        backend: str,
        model: StagedModel,
        make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        loss_fn: LossFn,
    ) -> None:
        self._config, self._device, self._loss_fn = config, device, loss_fn
        network = to_device(copy.deepcopy(model), device).train()
        section = config.perturbation
        self._opt = SparseSAM(
            network,
            make_optimizer(network.model),
            rho=0.0 if section is None else section.rho,
            adaptive=section is not None and section.adaptive,
            direction=None if section is None else build_direction(section.direction),
            max_grad_norm=config.optimizer.clip_grad_norm,
        )
        weights = sum(p.numel() for p in network.parameters())
        self._beside = self._take(FLOAT * weights * self._copies() + self._beside_backend(backend, weights))
        self.step(2, 2)  # from here on there is the optimizer's state

    def step(self, images: int, part: int) -> None:
        """A step with micro-batches of so many images, beside what a process has loaded of its part of the batch."""
        side, classes = self._config.data.resolution, self._config.model.num_classes
        like_loaded = torch.channels_last if self._device.type == "cuda" else torch.contiguous_format
        batch = torch.rand(images, 3, side, side, device=self._device).contiguous(memory_format=like_loaded)
        targets = torch.zeros(images, dtype=torch.int64, device=self._device)
        parts = 2  # of this step, and on a GPU of the next one
        if self._config.loss.mixup or self._config.loss.cutmix:
            targets = torch.nn.functional.one_hot(targets, classes).float()
            parts = 3  # the next one's are mixed already
        others = self._take(batch.nbytes // images * (parts * part - images))
        # With several, gradients are there while a forward runs.
        self._opt.step(self._loss_fn, *[(batch, targets)] * min(2, part // images))
        del others

    def _copies(self) -> float:
        """Of all weights in float32, that a run holds beside what a step of dense SAM holds."""
        section = self._config.perturbation
        averages = averages_of(self._config)
        mask = section is not None and section.mask is not None
        reuse = section is not None and section.reuse > 0.0
        remembers = self._opt.options.direction.remembers  # before the first step nothing is
        gap = section is not None and section.gap > 0.0  # which keeps ε
        return averages + (1 + 1 / 32) * mask + 2.0 * reuse + remembers + gap  # of a mask, its ε and its bits

    def _beside_backend(self, backend: str, weights: int) -> int:
        return BACKENDS[backend].value.held_beside(weights, self._config.sharding.deepspeed)

    def _take(self, size: float) -> torch.Tensor:
        return torch.empty(int(size), dtype=torch.uint8, device=self._device)


@contextmanager
def _leaving_some(device: torch.device) -> Iterator[None]:
    """On a GPU, memory runs out inside before all of it is taken."""
    if device.type != "cuda":
        yield
        return
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((1.0 - _SPARE) * usable / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        _free(device)


def _free(device: torch.device) -> None:
    # A backward that raised on the CPU leaves what was to come next, and with it its graph, in the thread's queue; the
    # next backward takes it off.
    torch.ones((), requires_grad=True).mul(1.0).backward()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
