"""Coming from a SAM with `first_step` and `second_step` (davda54/sam and its kin): the same training in three ways.

python examples/coming_from_sam.py

There, a SAM is built from parameters and the class of a base optimizer, and a step is two calls:

    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)

    loss_of(model(x), y).backward();  optimizer.first_step(zero_grad=True)
    loss_of(model(x), y).backward();  optimizer.second_step(zero_grad=True)

Here it is built around the model and a base optimizer that exists already, which learning-rate schedulers may step too.
Nobody has to switch BatchNorm's running statistics off for the second pass, nor to bring weights back after an error.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from fashion_mnist import batches
from torch import Tensor, nn

from ssam_scale import SparseSAM


def make() -> tuple[nn.Module, SparseSAM]:
    """The same model and optimizer each time."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    return model, SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)


def two_passes_by_hand(model: nn.Module, opt: SparseSAM, x: Tensor, y: Tensor) -> Tensor:
    """The loop as it was: what stood between `first_step` and `second_step` stands in the `with` block."""
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    with opt.perturbed():  # first_step(zero_grad=True) on the way in; the weights come back on the way out
        F.cross_entropy(model(x), y).backward()
    opt.step()  # second_step(zero_grad=True)
    opt.zero_grad()
    return loss.detach()


def closure(model: nn.Module, opt: SparseSAM, x: Tensor, y: Tensor) -> Tensor:
    """In torch's own form; there, the closure covers the second pass only and the first is run before `step`."""

    def both() -> Tensor:
        opt.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return opt.step(both).detach()


def loss_function(model: nn.Module, opt: SparseSAM, x: Tensor, y: Tensor) -> Tensor:
    """The form to end with: only here can a sparse mask save time, and gradients be accumulated and sharded."""
    return opt.step(lambda forward, batch: F.cross_entropy(forward(batch[0]), batch[1]), (x, y))


if __name__ == "__main__":
    ways: list[Callable[..., Tensor]] = [two_passes_by_hand, closure, loss_function]
    ends = []
    for way in ways:
        model, opt = make()
        for batch in batches(20, 64):
            loss = way(model, opt, *batch)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        apart = float((ends[-1] - ends[0]).abs().max())
        print(f"{way.__name__}: loss {loss:.3f}, weights within {apart:.0e} of the first way's")
