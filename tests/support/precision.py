"""Low precision where a library would refuse it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def fp16_supported() -> Iterator[None]:
    """DeepSpeed refuses fp16 on most CPUs, because it is slow there. PyTorch computes it all the same."""
    from deepspeed.accelerator import get_accelerator

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
        yield
