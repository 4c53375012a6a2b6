"""SparseSAM around a DeepSpeed engine: ZeRO 2, two micro-batches a step, blocks from a moving cut on perturbed.

deepspeed --num_gpus 2 examples/deepspeed_loop.py        on a machine without GPUs with DS_ACCELERATOR=cpu before it
torchrun --nproc_per_node 2 examples/deepspeed_loop.py
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from fashion_mnist import batches
from torch import Tensor

from ssam_scale import Depth, SparseSAM, StagedModel
from ssam_scale.models import stages_of  # before timm, which a CPU build of torch cannot import by itself

# isort: split
import timm

STEPS, BATCH, ACCUMULATION, RANKS = 12, 64, 2, int(os.environ.get("WORLD_SIZE", "1"))
CONFIG = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": BATCH // ACCUMULATION // RANKS,
    "gradient_accumulation_steps": ACCUMULATION,
    "gradient_clipping": 1.0,  # the engine clips; SparseSAM accepts that
    "zero_allow_untested_optimizer": True,  # for torch's own optimizers
    "steps_per_print": 1000,
}


def loss_fn(forward: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a micro-batch."""
    return F.cross_entropy(forward(batch[0]), batch[1])


def train() -> None:
    """One epoch, and DeepSpeed's checkpoint."""
    torch.manual_seed(0)
    size = {"img_size": 28, "patch_size": 7, "in_chans": 1, "embed_dim": 48, "depth": 4, "num_heads": 3}
    network = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    model = StagedModel(network, stages_of(network))
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd, config=CONFIG)

    opt = SparseSAM(engine, sgd, rho=0.05, mask=Depth())  # around the engine, which is not called by hand any more
    for step, part in enumerate(batches(STEPS, BATCH, rank=dist.get_rank(), ranks=RANKS)):
        images, labels = (tensor.to(engine.device).chunk(ACCUMULATION) for tensor in part)
        loss = opt.step(loss_fn, *zip(images, labels, strict=True))
        if dist.get_rank() == 0 and (step + 1) % 4 == 0:
            print(f"step {step + 1}: loss {loss:.3f}", flush=True)

    engine.save_checkpoint("deepspeed_loop_checkpoint", client_state=opt.sparse.state_dict())


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed()
    train()
    gc.collect()  # gloo may abort at exit while the engine is alive
    dist.destroy_process_group()
