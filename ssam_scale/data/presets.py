"""Named ways of storing images: longest side, share of JPEGs and their quality."""

from __future__ import annotations

from dataclasses import dataclass

from ssam_scale.errors import UserError


@dataclass(frozen=True)
class Preset:
    """What `Encoding` has, but for what depends on the images."""

    max_resolution: int | None
    jpeg_proportion: float
    quality: int
    source: str


PRESETS = {
    "default": Preset(None, 0.5, 90, "images at their own size, half of them raw"),
    "small": Preset(None, 1.0, 90, "images at their own size, all JPEG: about as large as the folder"),
    "ffcv-rn50": Preset(500, 0.5, 90, "ffcv-imagenet's README for ResNet-50: write_dataset.sh 500 0.50 90"),
    "ffcv-rn18": Preset(400, 0.1, 90, "ffcv-imagenet's README for ResNet-18: write_dataset.sh 400 0.10 90"),
}


def preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"--preset {name}: no such preset; there are {', '.join(PRESETS)}")
    return PRESETS[name]
