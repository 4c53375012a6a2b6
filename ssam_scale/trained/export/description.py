"""What somebody who has only an exported network needs to know of it."""

from __future__ import annotations

from typing import Any

from ssam_scale.trained.network import Trained

# As timm calls them; box is Pillow's, and the mean over the area that a pixel covers.
_INTERPOLATIONS = {"area": "box"}


def preprocessing(trained: Trained) -> dict[str, Any]:
    """How images are cropped, resized and normalised, in timm's words."""
    data = trained.config.data
    return {
        "input_size": [3, data.eval_resolution, data.eval_resolution],
        "interpolation": _INTERPOLATIONS.get(data.interpolation, data.interpolation),
        "crop_pct": data.eval_crop_ratio,
        "crop_mode": "center",
        "mean": list(data.mean),
        "std": list(data.std),
    }


def described(trained: Trained) -> dict[str, Any]:
    """Architecture, classes and preprocessing, for what is written beside or into a file."""
    return {
        "architecture": trained.config.model.name.partition(".")[0],
        "num_classes": trained.classes,
        **({"label_names": trained.class_names} if trained.class_names else {}),
        **preprocessing(trained),
    }
