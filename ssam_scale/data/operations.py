"""Operations on pixels by a magnitude for each image, in batch form: those of the AutoAugment family.

Each takes uint8 images [N, 3, H, W] on any device and float32 magnitudes [N], and returns new images; none waits for
the device. Of one image they are what torchvision's `transforms.v2.functional` makes of its bytes, where it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Resampling:
    """How pixels that lie between others, or outside, are made.

    Attributes:
        bilinear: or the nearest.
        fill: red, green and blue of what lies outside, from 0 to 255.
    """

    bilinear: bool = False
    fill: tuple[float, float, float] = (0.0, 0.0, 0.0)


Operation = Callable[[Tensor, Tensor, Resampling], Tensor]


def _shear_x(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """By m pixels to the side for each row below the first."""
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    return _affine(images, (one, m, 0.5 * images.shape[-2] * m, zero, one, zero), resampling)


def _shear_y(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    return _affine(images, (one, zero, zero, m, one, 0.5 * images.shape[-1] * m), resampling)


def _translate_x(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """To the right by m of the width, in whole pixels."""
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    return _affine(images, (one, zero, -(m * images.shape[-1]).trunc(), zero, one, zero), resampling)


def _translate_y(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    one, zero = torch.ones_like(m), torch.zeros_like(m)
    return _affine(images, (one, zero, zero, zero, one, -(m * images.shape[-2]).trunc()), resampling)


def _rotate(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """Counter-clockwise around the middle, by degrees."""
    angle = torch.deg2rad(m)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(m)
    return _affine(images, (cos, -sin, zero, sin, cos, zero), resampling)


def _affine(images: Tensor, inverse: tuple[Tensor, ...], resampling: Resampling) -> Tensor:
    """Each pixel from where six numbers for each image say: x and y in pixels from the middle, to where they were."""
    height, width = images.shape[-2:]
    x = torch.arange(width, dtype=torch.float32, device=images.device) + 0.5 * (1 - width)
    y = torch.arange(height, dtype=torch.float32, device=images.device)[:, None] + 0.5 * (1 - height)
    a, b, c, d, e, f = (number[:, None, None] for number in inverse)
    grid = torch.stack([(a * x + b * y + c) / (0.5 * width), (d * x + e * y + f) / (0.5 * height)], -1)
    pixels = images.float()
    fill = [value for value in resampling.fill if value]
    if fill:  # zero is what lies outside, so what is outside is sampled as how much of it is not
        pixels = torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1)
    mode = "bilinear" if resampling.bilinear else "nearest"
    pixels = F.grid_sample(pixels, grid, mode, "zeros", align_corners=False)
    if fill:
        pixels, inside = pixels[:, :3], pixels[:, 3:]
        colour = [(1.0 - inside) * value for value in resampling.fill]
        pixels = pixels + torch.cat(colour, 1)
    return pixels.round_().to(torch.uint8)


def _brightness(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """m times as bright."""
    return _blended(images.float(), images.new_zeros((), dtype=torch.float32), m)


def _color(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """m of the image, and the rest of its gray one."""
    return _blended(images.float(), _gray(images), m)


def _contrast(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """m of the image, and the rest of its mean gray."""
    return _blended(images.float(), _gray(images).mean((-3, -2, -1), keepdim=True), m)


def _sharpness(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """m of the image, and the rest of a smoothed one, but for the outermost pixels, which stay."""
    pixels = images.float()
    inner = pixels[..., 1:-1, 1:-1]
    smooth = (9.0 * F.avg_pool2d(pixels, 3, 1) + 4.0 * inner).div_(13.0).round_()
    out = images.clone()
    out[..., 1:-1, 1:-1] = (inner + (smooth - inner) * _each(1.0 - m)).clamp_(0.0, 255.0).to(torch.uint8)
    return out


def _posterize(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """The m highest bits."""
    lost = 2.0 ** (8.0 - m.trunc())
    return (images.float().div_(_each(lost)).floor_().mul_(_each(lost))).to(torch.uint8)


def _solarize(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """What is at least m, of 0 to 256, inverted."""
    return torch.where(images >= _each(m), 255 - images, images)


def _solarize_add(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """What is below 128 is made brighter by m."""
    brighter = (images.float() + _each(m)).clamp_(0.0, 255.0).to(torch.uint8)
    return torch.where(images < 128, brighter, images)


def _auto_contrast(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """Each channel from 0 to 255, if it has more than one value."""
    pixels = images.float()
    low, high = pixels.amin((-2, -1), keepdim=True), pixels.amax((-2, -1), keepdim=True)
    scale = (high - low) * (1.0 / 255.0)
    stretched = (pixels - low).div_(scale.clamp(min=1.0 / 255.0)).clamp_(0.0, 255.0)
    return torch.where(high > low, stretched, pixels).to(torch.uint8)


def _equalize(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """Each channel's values as evenly spread as they can be, in the whole numbers that Pillow reckons with."""
    flat = images.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(2, flat, torch.ones((), dtype=torch.int64, device=images.device).expand_as(flat))
    before = counts.cumsum(2) - counts
    largest = flat.amax(2, keepdim=True)
    step = (flat.shape[2] - counts.gather(2, largest)).div(255, rounding_mode="floor")
    table = (before + step // 2).div(step.clamp(min=1), rounding_mode="floor").clamp_(0, 255)
    return torch.where(step > 0, table.gather(2, flat), flat).to(torch.uint8).view_as(images)


def _invert(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    return 255 - images


def _grayscale(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    return _gray(images).to(torch.uint8).expand_as(images)


_RADIUS = 6  # of the blur's kernel, pixels: three deviations of the widest


def _blur(images: Tensor, m: Tensor, resampling: Resampling) -> Tensor:
    """By a Gaussian of m pixels, at most 2."""
    count, _, height, width = images.shape
    places = torch.arange(-_RADIUS, _RADIUS + 1, dtype=torch.float32, device=images.device)
    kernel = torch.softmax(-0.5 * (places / m[:, None]) ** 2, 1).repeat_interleave(3, 0)
    pixels = images.float().reshape(1, 3 * count, height, width)
    pixels = F.pad(pixels, (_RADIUS,) * 4, "reflect")
    for shape in ((-1, 1, 1, 2 * _RADIUS + 1), (-1, 1, 2 * _RADIUS + 1, 1)):
        pixels = F.conv2d(pixels, kernel.view(shape), groups=3 * count)
    return pixels.round_().clamp_(0.0, 255.0).to(torch.uint8).view(count, 3, height, width)


def _each(magnitudes: Tensor) -> Tensor:
    return magnitudes[:, None, None, None]


def _gray(images: Tensor) -> Tensor:
    """Whole numbers in float32 [N, 1, H, W]: ITU-R 601-2 luma, rounded down."""
    red, green, blue = images.float().split(1, 1)
    return (0.2989 * red).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()


def _blended(pixels: Tensor, others: Tensor, share: Tensor) -> Tensor:
    """Shares of each image, and the rest of another: below 0 and above 1 too, rounded down to bytes."""
    share = _each(share)
    return (pixels * share + others * (1.0 - share)).clamp_(0.0, 255.0).to(torch.uint8)


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "shear_x": _shear_x,
        "shear_y": _shear_y,
        "translate_x": _translate_x,
        "translate_y": _translate_y,
        "rotate": _rotate,
        "brightness": _brightness,
        "color": _color,
        "contrast": _contrast,
        "sharpness": _sharpness,
        "posterize": _posterize,
        "solarize": _solarize,
        "solarize_add": _solarize_add,
        "auto_contrast": _auto_contrast,
        "equalize": _equalize,
        "invert": _invert,
        "grayscale": _grayscale,
        "blur": _blur,
    }
)
"""All that there are, by the names of the literature."""

IDENTITY = "identity"
"""The name of doing nothing."""
