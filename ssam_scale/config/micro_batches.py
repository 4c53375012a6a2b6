"""How the images of a step are shared out to processes and micro-batches: decided here and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssam_scale.errors import UserError

if TYPE_CHECKING:
    from .schema import Config


@dataclass(frozen=True)
class MicroBatches:
    """What each of `processes` processes does in a step: `accumulation` micro-batches of `images` images."""

    processes: int
    accumulation: int
    images: int

    @property
    def batch(self) -> int:
        """Images of a step over all processes."""
        return self.processes * self.accumulation * self.images

    def __str__(self) -> str:
        many = "1 micro-batch" if self.accumulation == 1 else f"{self.accumulation} micro-batches"
        return f"{many} of {self.images} images on each process"


def accumulation_on(config: Config, processes: int, found: int | None = None, *, batch: int | None = None) -> int:
    """Micro-batches of a step: what `train.accumulation` says, or the fewest equal ones of a size that is allowed.

    Allowed is `max_micro_batch` where it is a number, and else what was found.

    Args:
        config: of the run.
        processes: that share the batch.
        found: what `max_micro_batch: auto` has come to, or the micro-batch that a run had before it lost
            processes; None: there is neither, and a process takes its part whole.
        batch: images of a step; None: the configured `data.batch_size`.

    Raises:
        UserError: the batch does not divide over the processes.
    """
    train = config.train
    largest = train.max_micro_batch if isinstance(train.max_micro_batch, int) else found
    if train.accumulation is not None or largest is None:
        return train.accumulation or 1
    batch = batch or config.data.batch_size
    if batch % processes:
        raise UserError(_indivisible(batch, processes, 1))
    part = batch // processes
    return next(count for count in range(-(-part // largest), part + 1) if part % count == 0)


def micro_batches(config: Config, processes: int, found: int | None = None) -> MicroBatches:
    """How a step is shared out.

    Args:
        config: of the run.
        processes: that share the batch.
        found: see `accumulation_on`.

    Raises:
        UserError: the batch does not divide, or `train.accumulation` makes larger micro-batches than
            `train.max_micro_batch` allows.
    """
    batch, largest = config.data.batch_size, config.train.max_micro_batch
    count = accumulation_on(config, processes, found)
    pieces = processes * count
    if batch % pieces:
        raise UserError(_indivisible(batch, processes, count))
    split = MicroBatches(processes, count, batch // pieces)
    if isinstance(largest, int) and split.images > largest:
        raise UserError(
            f"train.accumulation {count} makes micro-batches of {split.images} images on {processes} processes, above "
            f"train.max_micro_batch {largest}; leave train.accumulation out, which max_micro_batch then chooses"
        )
    return split


def _indivisible(batch: int, processes: int, count: int) -> str:
    pieces = processes * count
    below = batch // pieces * pieces
    each = "" if count == 1 else f" with {count} micro-batches each"
    near = " or ".join(str(n) for n in (below, below + pieces) if n)
    return (
        f"data.batch_size {batch} does not divide over {processes} processes{each}; use a multiple of {pieces}, such "
        f"as {near}"
    )
