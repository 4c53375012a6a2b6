"""Files that the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ssam_scale.data.encode import Encoding
from ssam_scale.data.sources import Sample
from ssam_scale.data.write import write_samples
from tests.support.images import make_image
from tests.support.loaders import NUMBERED


@pytest.fixture(scope="session")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of images of many sizes, JPEG and raw, whose labels are their indices: who is who after shuffling."""
    generator = np.random.default_rng(7)
    samples = [
        Sample(str(index), make_image(generator, *(int(side) for side in generator.integers(20, 90, 2))), index)
        for index in range(NUMBERED)
    ]
    out = tmp_path_factory.mktemp("numbered") / "numbered.beton"
    write_samples(
        samples, [str(k) for k in range(NUMBERED)], out, Encoding(None, 90, 0.5, 0), source={}, progress=False
    )
    return out
