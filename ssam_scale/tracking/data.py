"""Image files as data sets of MLflow: which data a run has trained on, by a fingerprint of the content."""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from ssam_scale.data.images import Images


def dataset_input(images: Images, context: str, side: int) -> Any:
    """Images as an `mlflow.entities.DatasetInput`, which the run's page and the filter of data sets show.

    Args:
        images: all of them.
        context: what the run does with it: `training` or `validation`.
        side: of the square that images are cropped to, pixels.
    """
    from mlflow.data.schema import TensorDatasetSchema
    from mlflow.entities import Dataset, DatasetInput, InputTag
    from mlflow.types.schema import Schema, TensorSpec

    pixels = TensorSpec(np.dtype(np.float32), (-1, 3, side, side), "images")
    labels = TensorSpec(np.dtype(np.int64), (-1,), "labels")
    schema = TensorDatasetSchema(Schema([pixels]), Schema([labels]))
    profile = {"images": images.images, "classes": images.classes, **images.counts, "bytes": images.bytes}
    dataset = Dataset(
        name=images.path.name,
        digest=images.fingerprint,
        source_type="local",
        source=json.dumps({"uri": str(images.path.absolute())}),
        schema=json.dumps(schema.to_dict()),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])
