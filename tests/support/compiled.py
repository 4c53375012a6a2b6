"""Networks compiled with `torch.compile`, and how many graphs that takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch._dynamo.utils import counters

from tests.support.networks import freeze_batchnorm, small_network
from tests.support.training import Case

# What a block is compiled for: its input with a gradient (descent, and the ascent behind the first perturbed block) and
# without (the first perturbed block of the ascent, whose input is detached); with several micro-batches also without
# any graph (the ascent's prefix). All blocks of a ViT are one code, so that none of it is per block.
FORMS = {1: 2, 2: 3}
# What is before the first block and after the last: the stem with and, in a prefix, without a graph; the head.
ENDS = {1: 2, 2: 3}


@dataclass(frozen=True)
class Compiled(Case):
    """A case whose network is compiled, by blocks, as a user would do it."""

    compiler: str = "inductor"
    again: bool = False
    statistics: bool = False

    def make_model(self) -> Any:
        network = small_network(self.family)
        model = network.train() if self.statistics else freeze_batchnorm(network)
        model.activation_checkpointing = self.again
        if self.compiler != "none":
            model.compile(backend=self.compiler)
        return model

    def plain(self) -> Case:
        """The same case without the compiler."""
        return Case(**{field.name: getattr(self, field.name) for field in fields(Case)})


@contextmanager
def counting_graphs() -> Iterator[Any]:
    """Counts the graphs compiled inside, by calling what is yielded."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
