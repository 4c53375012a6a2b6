"""Networks: timm models, cut into stages for the shared prefix."""

from ssam_scale import torch_compat  # noqa: F401 - refuses a torch that is too old, before anything looks for more

from .torchvision_ops import ensure_torchvision

ensure_torchvision()

from .check_stages import check_stages  # noqa: E402
from .compiler import check_compiler  # noqa: E402
from .drop import drop_by_row  # noqa: E402
from .freezing import freeze, most_trained, train_mode, unfreezes  # noqa: E402
from .pretrained import Loaded, load_pretrained  # noqa: E402
from .stages import FAMILIES, Family, register_family, staged, stages_of  # noqa: E402
from .timm_model import average_statistics, build_model, build_network  # noqa: E402

__all__ = [
    "FAMILIES",
    "Family",
    "Loaded",
    "average_statistics",
    "build_model",
    "build_network",
    "check_compiler",
    "check_stages",
    "drop_by_row",
    "freeze",
    "load_pretrained",
    "most_trained",
    "register_family",
    "staged",
    "stages_of",
    "train_mode",
    "unfreezes",
]
