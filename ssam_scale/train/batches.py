"""One epoch's batches with a lookahead: what is scored before a step is what is trained on next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

from ssam_scale.data import Batch, ImageLoader, IndexedBatch

Transform: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Of images and labels, on their device."""

MicroBatch: TypeAlias = tuple[Any, ...]
"""Images and targets; with a loader of `IndexedBatch` also which images they are."""


class EpochBatches:
    """One epoch's batches of this process, by steps, which can be looked at before they are trained on.

    Where the device works beside the host, the batches of the next step are copied to it and transformed while it is
    still at the step before.

    Args:
        loader: of the training images, its epoch set.
        transform: of each batch, such as mixing; None: there is none.
        per_step: micro-batches of a step.
        steps: that the epoch has left.
        begin: called before a step's batches are transformed, with the number of the step from 0.
    """

    def __init__(
        self,
        loader: ImageLoader,
        transform: Transform | None = None,
        per_step: int = 1,
        steps: int | None = None,
        begin: Callable[[int], None] | None = None,
    ) -> None:
        self._loader, self._transform, self._per_step, self._begin = loader, transform, per_step, begin
        self._left = len(loader) // per_step if steps is None else steps
        self._done = 0
        self._loaded = iter(loader)
        self._ahead: deque[Batch] = deque()  # as they are loaded, what is prepared among them
        self._prepared: list[MicroBatch] = []

    def next_step(self) -> list[MicroBatch]:
        """The micro-batches of the next step, transformed.

        Raises:
            StopIteration: the epoch has no further step.
        """
        self._prepare()
        prepared, self._prepared = self._prepared, []
        for _ in prepared:
            self._ahead.popleft()
        self._left -= 1
        self._done += 1
        return prepared

    def peek(self) -> list[MicroBatch]:
        """What `next_step` will return.

        Raises:
            StopIteration: the epoch has no further step.
        """
        self._prepare()
        return list(self._prepared)

    def prefetch(self) -> None:
        """Prepare the next step's, if there is one, and if that goes on beside the step that the device is at."""
        if self._loader.aside.overlaps and self._left > 0:
            self._prepare()

    def ahead(self, samples: int) -> list[Batch]:
        """The next batches, which stay where they are: as many as hold `samples`, or all that the epoch has left."""
        while sum(len(batch.labels) for batch in self._ahead) < samples:
            batch = next(self._loaded, None)
            if batch is None:
                break
            self._ahead.append(batch)
        result: list[Batch] = []
        while samples > 0 and len(result) < len(self._ahead):
            result.append(Batch(*self._ahead[len(result)]))
            samples -= len(result[-1].labels)
        return result

    def close(self) -> None:
        """End the loader's iteration."""
        self._loaded.close()

    def _prepare(self) -> None:
        """Load what is not loaded yet of the next step, and transform it, in the order of the batches."""
        if not self._prepared and self._begin is not None:
            self._begin(self._done)
        while len(self._prepared) < self._per_step:
            index = len(self._prepared)
            if index == len(self._ahead):
                self._ahead.append(next(self._loaded))
            self._prepared.append(self._transformed(self._ahead[index]))

    def _transformed(self, batch: Batch) -> MicroBatch:
        result: tuple[Tensor, Tensor] = batch
        if self._transform is not None:
            with self._loader.aside as aside:
                result = self._transform(*batch)
            aside.hand_over(result)
        return (*result, batch.indices) if isinstance(batch, IndexedBatch) else result
