"""SparseSAM on weights sharded by FSDP2: half of the single weights, chosen by Fisher score, chosen anew now and then.

torchrun --nproc_per_node 2 examples/fsdp2_loop.py

Every process reads its own part of each batch. The mask and the weights are those of one process and the whole batch.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from fashion_mnist import batches
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard

from ssam_scale import Scored, SparseSAM, StagedModel
from ssam_scale.models import stages_of  # before timm, which a CPU build of torch cannot import by itself

# isort: split
import timm

STEPS, BATCH, REFRESH = 20, 64, 10


def loss_fn(forward: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of this process's part of a batch."""
    return F.cross_entropy(forward(batch[0]), batch[1])


def train(device: torch.device) -> None:
    """One epoch, and a checkpoint that any number of processes can load."""
    torch.manual_seed(0)  # the same initial weights on every process
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    model = StagedModel(network, stages_of(network)).to(device)
    for block in network.blocks:
        fully_shard(block)
    fully_shard(model)

    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)  # after sharding, as with any optimizer
    opt = SparseSAM(model, adamw, rho=0.05, mask=Scored("element", sparsity=0.5, score="fisher", every=REFRESH))
    for step, (images, labels) in enumerate(batches(STEPS, BATCH, rank=dist.get_rank(), ranks=dist.get_world_size())):
        batch = images.to(device), labels.to(device)
        if opt.refresh_is_due:
            opt.refresh(loss_fn, batch, samples=32)  # of all processes' samples together
        loss = opt.step(loss_fn, batch)
        dist.all_reduce(loss, op=dist.ReduceOp.SUM)
        if dist.get_rank() == 0 and (step + 1) % 5 == 0:
            print(f"step {step + 1}: loss {loss / dist.get_world_size():.3f}", flush=True)

    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, opt),
        "sparse": opt.sparse,
    }
    dcp.save(state, checkpoint_id="fsdp2_loop_checkpoint")


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    train(torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"))
    gc.collect()  # gloo may abort at exit while FSDP's states are alive
    dist.destroy_process_group()
