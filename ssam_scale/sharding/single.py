"""One process that holds everything."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn

from .base import Unsharded
from .peers import Peers


class Single(Unsharded):
    """A plain module."""

    def __init__(self, module: nn.Module) -> None:
        self.network = self.ascent_module = self.descent_module = module
        self.peers = Peers()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients accumulate in `.grad` by themselves."""
        return nullcontext()

    def reduce_ascent(self, parameters: Sequence[nn.Parameter]) -> None:
        """There is no other process."""
