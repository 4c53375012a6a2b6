"""What libraries leave changed in a process, put back for whatever runs there next."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

_FUNCTIONAL = dict(vars(torch.nn.functional))


@contextlib.contextmanager
def functional_put_back() -> Iterator[None]:
    """`torch.nn.functional` is afterwards as torch has it: DeepSpeed's ZeRO 3 leaves its own `linear` there."""
    try:
        yield
    finally:
        vars(torch.nn.functional).update(_FUNCTIONAL)
