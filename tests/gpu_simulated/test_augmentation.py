"""Augmentation on the device: what the CPU makes of the same images, and the host never waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssam_scale.config.schema import Data
from ssam_scale.data.device_augment import device_augment
from ssam_scale.data.policies import POLICIES
from tests.support.pretended_gpu.watch import Watch


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_the_host_goes_on(policy: str) -> None:
    given: dict[str, Any] = {"augment": {"policy": policy}, "color_jitter": 0.4, "erasing": 0.5}
    augment = device_augment(Data(train=Path("x"), val=Path("x"), batch_size=1, **given), seed=1)
    assert augment is not None
    draw, keys = torch.Generator().manual_seed(0), np.arange(64)
    pixels = torch.randint(256, (64, 3, 16, 16), generator=draw, dtype=torch.uint8)
    results = []
    for device in ("cpu", "cuda"):
        images = pixels.clone().to(device)
        with Watch() as watch:
            augmented = augment.pixels(images, keys, epoch=2)
            normalised = augmented.float()
            augment.normalised_(normalised, keys, epoch=2)
        assert not watch.host_waits
        results.append(normalised.cpu())
    assert torch.equal(*results)
    assert not torch.equal(results[0], pixels.float())
