"""The one place that imports FFCV, and keeps its side effects from the rest of the process.

On import, in every loader and in every epoch's thread FFCV sets the number of torch's threads to its own number of
workers. Training would then run on as many cores as the loader was given; here that call keeps numba's half only.
"""

from __future__ import annotations

import numba
import torch

from ssam_scale.errors import UserError

_threads = torch.get_num_threads()
try:
    from ffcv.fields import IntField, RGBImageField
    from ffcv.libffcv import lib
    from ffcv.loader import Loader, OrderOption
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.transforms import ToTensor
    from ffcv.traversal_order import QuasiRandom
    from ffcv.traversal_order.base import TraversalOrder
    from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_metadata_type
except ImportError as error:
    raise UserError(f"FFCV cannot be imported ({error}); install it with `bash launch/setup.sh`") from error
finally:
    torch.set_num_threads(_threads)


def _set_num_threads(cls: type[Compiler], count: int) -> None:
    cls.num_threads = max(1, min(count, numba.config.NUMBA_NUM_THREADS))
    numba.set_num_threads(cls.num_threads)


Compiler.set_num_threads = classmethod(_set_num_threads)

__all__ = [
    "ALLOC_TABLE_TYPE",
    "AllocationQuery",
    "Compiler",
    "EpochIterator",
    "FieldDescType",
    "HeaderType",
    "IntField",
    "Loader",
    "Operation",
    "OrderOption",
    "PipelineSpec",
    "QuasiRandom",
    "RGBImageField",
    "State",
    "ToTensor",
    "TraversalOrder",
    "get_metadata_type",
    "lib",
]
