"""Images on disk and in batches: writing .beton files, checking them, and reading them for training and evaluation.

Importing this package imports neither FFCV nor numba; the first loader or writer does.
"""

from ssam_scale import torch_compat  # noqa: F401 - refuses a torch that is too old, before anything looks for more
from ssam_scale.data.beton import Beton, inspect
from ssam_scale.data.check import verify
from ssam_scale.data.fashion_mnist import prepare_fashion_mnist
from ssam_scale.data.images import Images
from ssam_scale.data.loaders import (
    Batch,
    ImageLoader,
    IndexedBatch,
    central_loader,
    eval_loader,
    images_by_class,
    images_of_an_epoch,
    sample_loader,
    train_loader,
)
from ssam_scale.data.opening import open_images
from ssam_scale.data.write import WriteReport, write_beton

__all__ = [
    "Batch",
    "Beton",
    "ImageLoader",
    "Images",
    "IndexedBatch",
    "WriteReport",
    "central_loader",
    "eval_loader",
    "images_by_class",
    "images_of_an_epoch",
    "inspect",
    "open_images",
    "prepare_fashion_mnist",
    "sample_loader",
    "train_loader",
    "verify",
    "write_beton",
]
