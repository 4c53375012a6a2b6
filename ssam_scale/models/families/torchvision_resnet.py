"""torchvision's ResNets: ResNeXt and Wide ResNet, too."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torchvision.models import ResNet

from ssam_scale.models.stages import blocks_of, register_family, with_ends
from ssam_scale.perturbation.staged_model import Stage


@register_family(ResNet, "a stage for each residual block (basic or bottleneck)", "arXiv 1512.03385")
def resnet_stages(model: ResNet) -> list[Stage]:
    """A stage for each block."""
    blocks = blocks_of((f"layer{i}", getattr(model, f"layer{i}")) for i in range(1, 5))
    stem = [model.conv1, model.bn1, model.relu, model.maxpool]
    return with_ends(blocks, stem, [partial(_logits, model)], ("fc",))


def _logits(model: ResNet, features: Tensor) -> Tensor:
    """Of the last feature maps; with the classifier that the model has when it is called."""
    logits: Tensor = model.fc(model.avgpool(features).flatten(1))
    return logits
