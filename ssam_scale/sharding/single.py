"""One process that holds everything."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from .base import Unsharded


class Single(Unsharded):
    """A plain module."""

    def __init__(self, module: nn.Module) -> None:
        self.network = self.ascent_module = self.descent_module = module

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients accumulate in `.grad` by themselves."""
        return nullcontext()

    def reduce_ascent(self, parameters: Sequence[nn.Parameter]) -> None:
        """There is no other process."""

    def gather_samples(self, samples: Tensor) -> Tensor:
        """`samples`."""
        return samples
