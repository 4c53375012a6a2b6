"""Triton's kernels on the CPU, by its own interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from ssam_scale.masks import masked
from ssam_scale.masks.kernels import move


@contextmanager
def interpreted() -> Iterator[None]:
    """Tensors on the CPU are taken for a GPU's inside, where `gpus.hide_gpus` was called."""
    from ssam_scale.masks.kernels import gpu

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(move, "streams", lambda tensor: False)
        patch.setattr(masked, "_is_on_gpu", lambda tensor: True)
        patch.setattr(masked, "_gpu", lambda: gpu)
        yield
