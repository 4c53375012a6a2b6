"""Vectors as long as a network has weights, of which each process holds a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ssam_scale.sharding import World
from ssam_scale.torch_compat import all_gather_single, reduce_scatter_single


@dataclass(frozen=True)
class Vectors:
    """Vectors of `size` numbers, shared out evenly: what many of them take (Lanczos keeps all) is divided as well.

    Each process has a run of `run` numbers of every vector; behind the vector's end they are zeros. What is drawn is
    the same vector on any number of processes.

    Attributes:
        size: numbers of a whole vector.
        world: the processes. All methods but `own`, `normal` and `signs` are collective.
        dtype: of the numbers.
    """

    size: int
    world: World = field(default_factory=World)
    dtype: torch.dtype = torch.float32

    @property
    def run(self) -> int:
        """How many of the numbers a process has."""
        return -(-self.size // self.world.size)

    def own(self, whole: Tensor) -> Tensor:
        """This process's run, of shape (run,), of a vector of shape (size,) that every process has."""
        begin = self.world.rank * self.run
        mine = whole[begin : begin + self.run]
        return F.pad(mine, (0, self.run - len(mine))).to(self.world.device, self.dtype)

    def whole(self, run: Tensor) -> Tensor:
        """The vector, of shape (size,), of which each process has its run. Collective."""
        if self.world.size == 1:
            return run
        every = run.new_empty(self.run * self.world.size)
        all_gather_single(every, run)
        return every[: self.size]

    def summed(self, part: Tensor) -> Tensor:
        """This process's run of the sum, over the processes, of vectors of shape (size,). Collective."""
        if self.world.size == 1:
            return part
        padded = F.pad(part, (0, self.run * self.world.size - self.size))
        run = part.new_empty(self.run)
        reduce_scatter_single(run, padded, dist.ReduceOp.SUM, None)
        return run

    def products(self, runs: Sequence[Tensor], run: Tensor) -> Tensor:
        """The inner products, float64 of shape (vectors,), of vectors with one. Collective.

        Args:
            runs: this process's of them, of shape (run,) each.
            run: of the one, likewise.
        """
        found = [(each * run).sum(dtype=torch.float64) for each in runs]
        return self.world.sum(torch.stack(found))

    def norm(self, run: Tensor) -> float:
        """The Euclidean norm of a vector. Collective."""
        return float(self.products([run], run).clamp(min=0.0).sqrt())

    def normal(self, seed: int) -> Tensor:
        """This process's run of a vector of independent normal numbers."""
        return self.own(torch.randn(self.size, generator=torch.Generator().manual_seed(seed), dtype=self.dtype))

    def signs(self, seed: int) -> Tensor:
        """This process's run of a vector of independent signs, 1 and −1 (Rademacher)."""
        bits = torch.randint(2, (self.size,), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)
        return 2 * self.own(bits) - self.own(torch.ones(self.size, dtype=torch.int8))
