"""The networks and batches that steps are measured on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.costs.profile import Batch
from ssam_scale.errors import UserError
from ssam_scale.models import check_compiler, stages_of
from ssam_scale.models.timm_model import check_known
from ssam_scale.perturbation import StagedModel
from ssam_scale.sharding.device import has_bf16, to_device

from .processes import bench_device

DEFAULT_MODELS = ("resnet50", "vit_small")

_SHORT_NAMES = {"vit_small": "vit_small_patch16_224", "vit_tiny": "vit_tiny_patch16_224"}
_CLASSES = 1000
_CPU_RESOLUTION, _CPU_BATCH = 96, 8
_CUDA_RESOLUTION, _CUDA_BATCH = 224, 128
# Of a network that is tried out: normalization over a batch needs two images.
_FEW = 2


@dataclass(frozen=True)
class Setting:
    """On what steps are measured.

    Attributes:
        model: a name that timm knows, of a family that has stages; `vit_small` stands for ViT-S/16,
            `vit_tiny` for ViT-Ti/16.
        resolution: side of the images, pixels.
        batch_size: images of a step.
        device: where.
        asked: the precision of passes, `bf16` or `fp32`; None: bf16 on a GPU that has it, otherwise float32.
        compile: whether the network is compiled, by blocks.
    """

    model: str
    resolution: int
    batch_size: int
    device: torch.device
    asked: str | None = None
    compile: bool = False

    @property
    def precision(self) -> str:
        """`bf16`, which is by autocast, or `fp32`."""
        usual = "bf16" if self.device.type == "cuda" and has_bf16(self.device) else "fp32"
        return self.asked or usual

    @property
    def dtype(self) -> torch.dtype:
        """The same."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32

    def network(self) -> StagedModel:
        """The network in stages, in training mode, the same weights each time.

        Raises:
            UserError: timm knows no such model, or it has no stages, or does not take images of this size.
        """
        torch.manual_seed(0)
        model = self._built()
        staged = StagedModel(model, stages_of(model)).train()
        if self.compile:
            staged.compile()
        return to_device(staged, self.device)

    def batch(self, images: int | None = None) -> Batch:
        """Random images and labels, the same each time."""
        size = self.batch_size if images is None else images
        generator = torch.Generator().manual_seed(1)
        pixels = torch.randn(size, 3, self.resolution, self.resolution, generator=generator)
        labels = torch.randint(_CLASSES, (size,), generator=generator)
        return pixels.to(self.device), labels.to(self.device)

    def loss_fn(self, forward: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
        """Mean cross-entropy."""
        with self.autocast():
            return F.cross_entropy(forward(batch[0]), batch[1])

    def autocast(self) -> torch.autocast:
        """The precision of forwards."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.precision == "bf16")

    def check(self) -> None:
        """Build the network and show it two images, on the CPU.

        Raises:
            UserError: that does not work.
        """
        small = Setting(self.model, self.resolution, _FEW, torch.device("cpu"))
        network = small.network()
        try:
            with torch.no_grad():
                small.loss_fn(network, small.batch())
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{self.model} does not take images of {self.resolution} × {self.resolution}: {reason}"
            ) from error

    def _built(self) -> nn.Module:
        import timm  # only after ssam_scale.models, which makes torchvision importable beside a CPU torch

        name = _SHORT_NAMES.get(self.model, self.model)
        check_known(name, "--models")
        try:
            model: nn.Module = timm.create_model(name, pretrained=False, num_classes=_CLASSES)
            resize = getattr(model, "set_input_size", None)
            if resize is not None and "img_size" in inspect.signature(resize).parameters:
                resize(img_size=self.resolution)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise UserError(f"--models: timm could not build {name} for {self.resolution} pixels: {error}") from error
        return model


def setting_of(model: str, resolution: int | None, batch_size: int | None, compile: bool = False) -> Setting:
    """The setting of this machine: small images where there is no GPU, ImageNet's usual ones on a GPU.

    Raises:
        UserError: as `bench_device`; or nothing can be compiled here and it is asked for.
    """
    device = bench_device()
    if compile:
        check_compiler(device, "--compile")
    if device.type == "cuda":
        return Setting(model, resolution or _CUDA_RESOLUTION, batch_size or _CUDA_BATCH, device, compile=compile)
    return Setting(model, resolution or _CPU_RESOLUTION, batch_size or _CPU_BATCH, device, compile=compile)
