"""A loop with Hugging Face's accelerate: what is prepared in SparseSAM, mixed precision in the loss function.

accelerate launch examples/accelerate_loop.py          (or `python`, on one process)

The base optimizer is prepared with the model, as accelerate's FSDP2 gives it the sharded weights. SparseSAM is not, and
is built last: `AcceleratedOptimizer.step` takes no batches, and what it does beside (skipping steps of an accumulation)
SparseSAM does itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from fashion_mnist import batches
from torch import nn

from ssam_scale import Scored, SparseSAM


def main() -> None:
    """Four steps of 128 images over all processes."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))
    sgd = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    model, prepared = accelerator.prepare(network, sgd)  # first: it moves the model, and wraps or shards it
    opt = SparseSAM(model, prepared.optimizer, rho=0.05, mask=Scored("row", 0.5, score="weight"))
    opt.refresh()

    def loss_fn(forward: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with accelerator.autocast():
            return F.cross_entropy(forward(batch[0]), batch[1])

    for x, y in batches(4, 128, rank=accelerator.process_index, ranks=accelerator.num_processes):
        loss = opt.step(loss_fn, (x.to(accelerator.device), y.to(accelerator.device)))
        accelerator.print(f"loss {float(loss):.4f}")


if __name__ == "__main__":
    main()
