"""Make `import torchvision` work beside a CPU build of torch.

torchvision's wheels register `nms` in a library that only loads beside the CUDA build of torch they were made for. On a
CPU torch the import of torchvision, and so of timm, ends in a RuntimeError although neither needs the operator to train
a classifier. Declaring its schema is enough; where the import works (every CUDA user) nothing is declared.
"""

import importlib
from contextlib import suppress

import torch

_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def ensure_torchvision() -> None:
    """Import torchvision, declaring the operators that a CPU build of torch lacks.

    Raises:
        RuntimeError: torchvision cannot be imported for another reason.
        ImportError: torchvision is not installed.
    """
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        for name, schema in _SCHEMAS.items():
            with suppress(RuntimeError):  # another library may have declared it first
                torch.library.define(name, schema)
        importlib.import_module("torchvision")
