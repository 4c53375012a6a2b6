"""LoRA through peft: adapters and a new head are trained and perturbed, the network around them is frozen.

python examples/lora.py

peft puts its layers into the network in place, so that timm's ViT keeps its class and its stages: a cut of the adapters
saves the second pass through the blocks before it. `timm.create_model(..., pretrained=True)` would begin with weights.
"""

from __future__ import annotations

import ssam_scale.models  # noqa: F401 - makes torchvision, which the next ones import, importable beside a CPU torch

# isort: split
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from fashion_mnist import batches
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

from ssam_scale import Depth, SparseSAM, StagedModel
from ssam_scale.models import stages_of

EPOCHS, STEPS, BATCH = 2, 10, 64


def adapted() -> nn.Module:
    """A small ViT whose attention has adapters of rank 8, and which is frozen but for these and the head."""
    options = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 6, "num_heads": 4}
    network = timm.create_model("vit_tiny_patch16_224", in_chans=1, num_classes=10, **options)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["qkv", "proj"], exclude_modules=["patch_embed.proj"])
    model: nn.Module = inject_adapter_in_model(lora, network)
    model.head.requires_grad_(True)
    return model


def loss_fn(forward: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean loss of a batch: `forward` stands for the model."""
    images, labels = batch
    return F.cross_entropy(forward(images), labels)


def main() -> None:
    """Train, and say what of the network that was."""
    torch.manual_seed(0)
    network = adapted()
    model = StagedModel(network, stages_of(network))
    trained = [p for p in model.parameters() if p.requires_grad]
    opt = SparseSAM(model, torch.optim.AdamW(trained, lr=3e-3), rho=0.05, mask=Depth(cut=(0.5, 1.0)))
    total = sum(p.numel() for p in model.parameters())
    print(f"{sum(p.numel() for p in trained):,} of {total:,} weights are trained")
    for epoch in range(EPOCHS):
        for batch in batches(STEPS, BATCH):
            loss = opt.step(loss_fn, batch)
        print(f"epoch {epoch + 1}: loss {loss:.3f}")
    torch.save({**get_peft_model_state_dict(network), **network.head.state_dict(prefix="head.")}, "lora.pt")


if __name__ == "__main__":
    main()
