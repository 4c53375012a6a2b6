"""The one place that imports FFCV, and keeps its side effects from the rest of the process.

On import, in every loader and in every epoch's thread FFCV sets the number of torch's threads to its own number of
workers. Training would then run on as many cores as the loader was given; here that call keeps numba's half only.

Where torch sees a GPU, an epoch's thread enters streams for the copies that FFCV's `ToDevice` would make. A thread
begins on device 0, and is back there between batches: that makes a context on it, half a gigabyte, for each process of
a machine. And buffers are pinned, which makes one on the current device also of a process that computes on the CPU.
Here FFCV only fills buffers, which are pinned where the process uses a GPU already, and `loaders.py` copies them.
"""

from __future__ import annotations

from contextlib import suppress

import numba
import numpy as np
import torch

from ssam_scale.errors import UserError

_threads, _typed_dict = torch.get_num_threads(), numba.typed.Dict
# Two codes of how images are stored, read by Python alone: to keep them numba would compile for 2.5 s in each process.
numba.typed.Dict = dict
try:
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.libffcv import lib
    from ffcv.loader import Loader, OrderOption, epoch_iterator
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline import graph
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.transforms import ToTensor
    from ffcv.traversal_order.base import TraversalOrder
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_metadata_type
except ImportError as error:
    raise UserError(
        f"FFCV cannot be imported ({error}); `bash launch/setup.sh` installs it (docs/install.md)"
    ) from error
finally:
    numba.typed.Dict = _typed_dict
    torch.set_num_threads(_threads)


def _set_num_threads(cls: type[Compiler], count: int) -> None:
    cls.num_threads = max(1, min(count, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(cls.num_threads)


def _allocate(query: AllocationQuery, batch_size: int, count: int) -> np.ndarray:
    """So many buffers of a batch, [count, batch size, ...], as a numpy array that owns their memory."""
    shape = (count, batch_size, *query.shape)
    buffers = torch.empty(shape, dtype=torch.from_numpy(np.empty(0, query.dtype)).dtype)
    if torch.cuda.is_initialized():
        with suppress(RuntimeError):  # a system may forbid so much of it; copies are slower then
            buffers = buffers.pin_memory()
    return buffers.numpy()


def own_pipelines(resolution: int) -> dict[str, list[Operation]]:
    """FFCV's own decoders, with the crops and flips of ffcv-imagenet: what ours is measured beside."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.transforms import RandomHorizontalFlip, Squeeze

    image = [RandomResizedCropRGBImageDecoder((resolution, resolution)), RandomHorizontalFlip(), ToTensor()]
    return {"image": image, "label": [IntDecoder(), ToTensor(), Squeeze()]}


Compiler.set_num_threads = classmethod(_set_num_threads)
epoch_iterator.IS_CUDA = False
graph.allocate_query = _allocate

__all__ = [
    "ALLOC_TABLE_TYPE",
    "AllocationQuery",
    "Compiler",
    "EpochIterator",
    "FieldDescType",
    "HeaderType",
    "IntField",
    "Loader",
    "NDArrayField",
    "Operation",
    "OrderOption",
    "PipelineSpec",
    "RGBImageField",
    "State",
    "ToTensor",
    "TraversalOrder",
    "get_metadata_type",
    "lib",
    "own_pipelines",
]
