"""One epoch's batches with a lookahead: what is scored before a step is what is trained on next."""

from __future__ import annotations

from collections import deque

from ssam_scale.data import Batch, ImageLoader


class EpochBatches:
    """One epoch's batches of this process, which can be looked at before they are trained on.

    Args:
        loader: of the training images, its epoch set.
    """

    def __init__(self, loader: ImageLoader) -> None:
        self._loaded = iter(loader)
        self._ahead: deque[Batch] = deque()

    def __next__(self) -> Batch:
        return self._ahead.popleft() if self._ahead else next(self._loaded)

    def ahead(self, samples: int) -> list[Batch]:
        """The next batches, which stay where they are: as many as hold `samples`, or all that the epoch has left."""
        while sum(len(batch.labels) for batch in self._ahead) < samples:
            batch = next(self._loaded, None)
            if batch is None:
                break
            self._ahead.append(batch)
        result: list[Batch] = []
        while samples > 0 and len(result) < len(self._ahead):
            result.append(self._ahead[len(result)])
            samples -= len(result[-1].labels)
        return result

    def close(self) -> None:
        """End the loader's iteration."""
        self._loaded.close()
