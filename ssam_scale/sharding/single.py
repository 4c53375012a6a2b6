"""One process that holds everything."""

from contextlib import AbstractContextManager, nullcontext

from torch import nn

from .base import Unsharded
from .needs import Needed
from .peers import Peers


class Single(Unsharded):
    """A plain module."""

    def __init__(self, module: nn.Module) -> None:
        self.network = self.ascent_module = self.descent_module = module
        self.peers = Peers()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients accumulate in `.grad` by themselves."""
        return nullcontext()

    def ascent(self, needed: Needed) -> AbstractContextManager[None]:
        """There is no other process."""
        return nullcontext()
