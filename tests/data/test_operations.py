"""Operations in batch form are torchvision's, image for image; policies are theirs whose names they bear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ssam_scale.config.augment_sections import (
    AutoAugment,
    RandAugment,
    RandAugmentIncreasing,
    ThreeAugment,
    TrivialAugment,
)
from ssam_scale.data import erasing
from ssam_scale.data.color_jitter import ColorJitter
from ssam_scale.data.operations import IDENTITY, OPERATIONS, Resampling
from ssam_scale.data.policies import POLICIES
from ssam_scale.models.torchvision_ops import ensure_torchvision

ensure_torchvision()
from torchvision.transforms import v2  # noqa: E402
from torchvision.transforms.v2 import functional as V  # noqa: E402

BLACK, NEAREST = Resampling(), V.InterpolationMode.NEAREST
MEAN = (124.0, 116.0, 104.0)
SECTIONS = {
    "rand_augment": RandAugment(policy="rand_augment"),
    "rand_augment_increasing": RandAugmentIncreasing(policy="rand_augment_increasing"),
    "trivial_augment": TrivialAugment(policy="trivial_augment"),
    "auto_augment": AutoAugment(policy="auto_augment"),
    "three_augment": ThreeAugment(policy="three_augment"),
}


def images(count: int = 6, height: int = 40, width: int = 40, seed: int = 0) -> Tensor:
    """Smooth ones with noise, a gray one, one of a single colour, one of two values."""
    draw = torch.Generator().manual_seed(seed)
    small = 255.0 * torch.rand(count, 3, 5, 5, generator=draw)
    result = torch.nn.functional.interpolate(small, (height, width), mode="bilinear")
    result += 8.0 * torch.randn(result.shape, generator=draw)
    result[1] = result[1].mean(0)
    if count > 3:
        result[2] = torch.tensor([10.0, 200.0, 77.0])[:, None, None]
        result[3] = 40.0 + 20.0 * (torch.rand(3, height, width, generator=draw) < 0.5)
    return result.clamp(0, 255).to(torch.uint8)


def affine(**given: Any) -> Callable[[Tensor, float], Tensor]:
    def one(image: Tensor, m: float) -> Tensor:
        usual: dict[str, Any] = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
        asked = {key: value(m, image) if callable(value) else value for key, value in given.items()}
        return V.affine(image, **{**usual, **asked}, interpolation=NEAREST)

    return one


def degrees(m: float) -> float:
    return float(np.degrees(np.arctan(m)))


# By operation: torchvision's of one image, and magnitudes.
TORCHVISION: dict[str, tuple[Callable[[Tensor, float], Tensor], list[float]]] = {
    "shear_x": (affine(shear=lambda m, _: [degrees(m), 0.0], center=[0, 0]), [-0.3, -0.01, 0.13, 0.99]),
    "shear_y": (affine(shear=lambda m, _: [0.0, degrees(m)], center=[0, 0]), [-0.3, -0.01, 0.13, 0.99]),
    "translate_x": (affine(translate=lambda m, i: [int(m * i.shape[-1]), 0]), [-0.46, -0.03, 0.21]),
    "translate_y": (affine(translate=lambda m, i: [0, int(m * i.shape[-2])]), [-0.46, -0.03, 0.21]),
    "rotate": (lambda image, m: V.rotate(image, m, interpolation=NEAREST), [-30.0, 0.0, 7.5, 135.0]),
    "brightness": (V.adjust_brightness, [0.0, 0.1, 0.73, 1.0, 1.9]),
    "color": (V.adjust_saturation, [0.0, 0.1, 0.73, 1.0, 1.9]),
    "contrast": (V.adjust_contrast, [0.0, 0.1, 0.73, 1.0, 1.9]),
    "sharpness": (V.adjust_sharpness, [0.0, 0.1, 0.73, 1.0, 1.9]),
    "posterize": (lambda image, m: V.posterize(image, int(m)), [0.0, 1.0, 4.0, 7.0, 8.0]),
    "solarize": (V.solarize, [0.0, 100.5, 128.0, 255.0]),
    "auto_contrast": (lambda image, m: V.autocontrast(image), [0.0]),
    "equalize": (lambda image, m: V.equalize(image), [0.0]),
    "invert": (lambda image, m: V.invert(image), [0.0]),
    "grayscale": (lambda image, m: V.rgb_to_grayscale(image, 3), [0.0]),
    "blur": (lambda image, m: V.gaussian_blur(image, [13, 13], [m, m]), [0.1, 0.7, 2.0]),
}


@pytest.mark.parametrize("name", TORCHVISION)
@pytest.mark.parametrize("shape", [(40, 40), (33, 48)], ids=str)
def test_an_operation_is_torchvisions(name: str, shape: tuple[int, int]) -> None:
    """Of all images at once, each by its own magnitude.

    Where float32 rounds a sum the other way, a byte that is rounded down differs by one, and a pixel whose place lies
    just between two others is the other one: of fewer than 1 in 200 pixels.
    """
    one, magnitudes = TORCHVISION[name]
    each = torch.tensor(magnitudes).repeat_interleave(6)
    given = images(6, *shape).repeat(len(magnitudes), 1, 1, 1)
    found = OPERATIONS[name](given.clone(), each, BLACK)
    wanted = torch.stack([one(image, float(m)) for image, m in zip(given, each, strict=True)])
    off = (found.int() - wanted.int()).abs()
    moves = name.startswith(("shear", "translate", "rotate"))
    assert moves or off.max() <= 1
    assert (off > 0).float().mean() < 0.005
    assert found.dtype == torch.uint8


def test_all_operations_are_compared() -> None:
    assert {*OPERATIONS} - {*TORCHVISION} == {"solarize_add"}


def test_solarize_add() -> None:
    given = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    found = OPERATIONS["solarize_add"](given, torch.tensor([99.0]), BLACK).flatten(2)[0, 0].tolist()
    assert found == [min(255, v + 99) if v < 128 else v for v in range(256)]


def test_equalize_is_pillows() -> None:
    given = images()
    found = OPERATIONS["equalize"](given, torch.zeros(6), BLACK)
    for image, equal in zip(given, found, strict=True):
        wanted = ImageOps.equalize(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert np.array_equal(equal.permute(1, 2, 0).numpy(), np.asarray(wanted))


def moved(image: Tensor, name: str, mode: V.InterpolationMode, fill: list[float] | None) -> Tensor:
    if name == "rotate":
        return V.rotate(image, 30.0, mode, fill=fill)
    if name == "shear_x":
        return V.affine(image, 0.0, [0, 0], 1.0, [degrees(0.31), 0.0], mode, fill, [0, 0])
    return V.affine(image, 0.0, [0, 16], 1.0, [0.0, 0.0], mode, fill)


@pytest.mark.parametrize(("name", "m"), [("shear_x", 0.31), ("translate_y", 0.41), ("rotate", 30.0)])
def test_what_lies_outside_is_filled(name: str, m: float) -> None:
    """As torchvision does it by the nearest pixel, and by neighbours where it fills with black.

    Where it fills with another colour it lets black through along the edge, and ours does not: an image of the mean
    colour stays one.
    """
    given, each = images(6), torch.full((6,), m)
    linear = V.InterpolationMode.BILINEAR
    for resampling, mode, fill in ((Resampling(False, MEAN), NEAREST, list(MEAN)), (Resampling(True), linear, None)):
        found = OPERATIONS[name](given, each, resampling)
        off = (found.int() - torch.stack([moved(i, name, mode, fill) for i in given]).int()).abs()
        assert (off > 0).float().mean() < 0.005
    flat = torch.tensor(MEAN)[:, None, None].expand(3, 40, 40).to(torch.uint8)[None]
    for bilinear in (False, True):
        assert torch.equal(OPERATIONS[name](flat, each[:1], Resampling(bilinear, MEAN)), flat)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_image_is_the_same_in_any_batch(name: str) -> None:
    given, each = images(), torch.linspace(0.1, 1.9, 6)
    together = OPERATIONS[name](given, each, BLACK)
    for index in range(6):
        few = slice(index, index + 1)
        assert torch.equal(OPERATIONS[name](given[few], each[few], BLACK), together[few])


# ------------------------------------------------------------------------------------------------------------ policies


def rounds(name: str, count: int = 20_000, **changed: Any) -> list[list[tuple[str, float]]]:
    """What is done to each of many images, by round."""
    policy = POLICIES[name].value(SECTIONS[name].model_copy(update=changed), MEAN)
    drawn = policy.rounds(np.random.default_rng(0).random((count, policy.count)))
    return [list(zip(r.names.tolist(), r.magnitudes.tolist(), strict=True)) for r in drawn]


def test_all_policies_are_tested() -> None:
    assert {*POLICIES} == {*SECTIONS}


@pytest.mark.parametrize("name", SECTIONS)
def test_a_policy_names_operations_that_there_are(name: str) -> None:
    assert {operation for done in rounds(name) for operation, _ in done} <= {*OPERATIONS, IDENTITY}


SPELLING = {
    "ShearX": "shear_x", "ShearY": "shear_y", "TranslateX": "translate_x", "TranslateY": "translate_y",
    "Rotate": "rotate", "Brightness": "brightness", "Color": "color", "Contrast": "contrast", "Sharpness": "sharpness",
    "Posterize": "posterize", "Solarize": "solarize", "AutoContrast": "auto_contrast", "Equalize": "equalize",
    "Invert": "invert", "Identity": IDENTITY,
}  # fmt: skip


def torchvisions(transform: Any, count: int) -> list[Counter[tuple[str, float]]]:
    """What torchvision's transform does to many images, by round."""
    seen: list[list[tuple[str, float]]] = []

    def note(image: Tensor, transform_id: str, magnitude: float, **_: Any) -> Tensor:
        factor = transform_id in ("Brightness", "Color", "Contrast", "Sharpness")
        share = 1 / 224 if transform_id.startswith("Translate") else 255.0 if transform_id == "Solarize" else 1.0
        seen[-1].append((SPELLING[transform_id], round(magnitude * share + factor, 4)))
        return image

    transform._apply_image_or_video_transform = note
    for _ in range(count):
        seen.append([])
        transform(torch.zeros(3, 224, 224, dtype=torch.uint8))
    most = max(map(len, seen))
    return [Counter(done[index] for done in seen if len(done) > index) for index in range(most)]


def assert_near(some: set[float], others: set[float]) -> None:
    """The same magnitudes, but for one of many that was not drawn."""
    for these, those in ((some, others), (others, some)):
        assert sum(min(abs(one - other) for other in those) > 2e-4 for one in these) <= len(these) // 20


@pytest.mark.parametrize(
    ("name", "transform"),
    [("rand_augment", v2.RandAugment()), ("trivial_augment", v2.TrivialAugmentWide())],
    ids=["rand_augment", "trivial_augment"],
)
def test_a_policy_draws_what_torchvisions_draws(name: str, transform: Any) -> None:
    """The same operations with the same magnitudes, each as often."""
    count = 6_000
    theirs, ours = torchvisions(transform, count), rounds(name, count)
    assert len(theirs) == len(ours)
    for wanted, found in zip(theirs, ours, strict=True):
        own = Counter((operation, round(m, 4)) for operation, m in found)
        names, our_names = Counter(), Counter()
        for total, counter in ((names, wanted), (our_names, own)):
            for (operation, _), times in counter.items():
                total[operation] += times
        assert {*names} == {*our_names}
        for operation in names:
            assert abs(names[operation] - our_names[operation]) < 150  # five deviations of a difference of such counts
            if operation not in ("auto_contrast", "equalize", IDENTITY):
                assert_near({m for o, m in wanted if o == operation}, {m for o, m in own if o == operation})


def test_auto_augments_table_is_torchvisions() -> None:
    theirs = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)._policies
    from ssam_scale.data.policies.auto_augment import TABLE

    ours = [line.split() for line in TABLE.strip().splitlines()]
    assert len(ours) == len(theirs)
    for line, pair in zip(ours, theirs, strict=True):
        for (name, probability, level), (operation, share, magnitude) in zip((line[:3], line[3:]), pair, strict=True):
            assert (name, float(probability), int(level)) == (SPELLING[operation], share, magnitude or 0)


def test_auto_augment_does_what_torchvisions_does() -> None:
    """Of all images together, the same share is rotated, and by the same angles."""
    count = 6_000
    theirs = torchvisions(v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET), count)
    wanted = sum(theirs, Counter())
    found = Counter((o, round(m, 4)) for done in rounds("auto_augment", count) for o, m in done if o != IDENTITY)
    for operation in ("rotate", "posterize", "solarize", "color", "contrast", "shear_x", "sharpness"):
        assert_near({m for o, m in wanted if o == operation}, {m for o, m in found if o == operation})
    for operation in {o for o, _ in wanted}:
        one, other = (sum(times for (o, _), times in c.items() if o == operation) for c in (wanted, found))
        assert abs(one - other) < 5.0 * np.sqrt(2.0 * max(one, 1)) + 1


@pytest.mark.parametrize("magnitude", [9.0, 5.0, 0.0, 10.0])
def test_timms_severities(magnitude: float) -> None:
    """The argument that timm gives to each of its operations at this magnitude, without deviation."""
    from timm.data import auto_augment as timm

    ours = {"ColorIncreasing": "color", "ContrastIncreasing": "contrast", "BrightnessIncreasing": "brightness"}
    ours |= {"SharpnessIncreasing": "sharpness", "PosterizeIncreasing": "posterize", "SolarizeIncreasing": "solarize"}
    ours |= {"SolarizeAdd": "solarize_add", "TranslateXRel": "translate_x", "TranslateYRel": "translate_y"}
    wanted: dict[str, set[float]] = {}
    for name in timm.rand_augment_choices("", increasing=True):
        level = timm.LEVEL_TO_ARG[name]
        arguments = {round(float(level(magnitude, {})[0]), 4) for _ in range(60)} if level else {0.0}
        wanted[ours.get(name) or SPELLING[name]] = arguments
    done = rounds("rand_augment_increasing", magnitude=magnitude, magnitude_std=0.0, probability=1.0)
    found: dict[str, set[float]] = {}
    for operation, m in done[0]:
        found.setdefault(operation, set()).add(round(m, 4) + 0.0)
    assert found == {name: {m + 0.0 for m in values} for name, values in wanted.items()}


def test_timms_deviation_and_probability() -> None:
    done = rounds("rand_augment_increasing")
    assert len(done) == 2
    for each in done:
        assert sum(name == IDENTITY for name, _ in each) / len(each) == pytest.approx(0.5, abs=0.02)
        angles = np.abs([m for name, m in each if name == "rotate"]) / 3.0
        inside = angles[angles < 10.0]  # what is beyond the end of the range is at its end: a fortieth
        assert len(inside) / len(angles) == pytest.approx(0.977, abs=0.02)
        assert np.median(angles) == pytest.approx(9.0, abs=0.1)
        assert np.quantile(angles, 0.1587) == pytest.approx(8.5, abs=0.1)


def test_three_augment() -> None:
    (done,) = rounds("three_augment")
    assert {m for name, m in done if name == "solarize"} == {128.0}
    widths = [m for name, m in done if name == "blur"]
    assert 0.1 <= min(widths) < 0.11
    assert 1.99 < max(widths) <= 2.0
    for name in ("grayscale", "solarize", "blur"):
        assert sum(n == name for n, _ in done) / len(done) == pytest.approx(1 / 3, abs=0.02)


def test_color_jitter() -> None:
    """Every order of the three is as likely; factors lie evenly around 1."""
    jitter = ColorJitter(0.4)
    done = jitter.rounds(np.random.default_rng(0).random((12_000, jitter.count)))
    orders = Counter(zip(*(each.names.tolist() for each in done), strict=True))
    assert len(orders) == 6
    assert all(sorted(order) == ["brightness", "color", "contrast"] for order in orders)
    assert max(orders.values()) < 2_250  # 2,000 and six deviations
    factors = np.concatenate([each.magnitudes for each in done])
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4


# ------------------------------------------------------------------------------------------------------------- erasing


def test_boxes_are_timms() -> None:
    """Areas and ratios as timm draws them: compared at ten places of their distributions."""
    from timm.data.random_erasing import RandomErasing

    count, side = 4_000, 64
    ours = erasing.boxes(np.random.default_rng(0).random((count, erasing.COUNT)), 1.0, side)
    timm = RandomErasing(1.0, max_area=1 / 3, mode="const", device="cpu")
    blank = timm(torch.ones(count, 3, side, side))[:, 0] == 0
    heights, widths = blank.any(2).sum(1).numpy(), blank.any(1).sum(1).numpy()
    sides = [(ours[:, 2] - ours[:, 0], heights), (ours[:, 3] - ours[:, 1], widths)]
    tops = ours[:, 0], blank.any(2).int().argmax(1).numpy()
    for one, other in [*sides, tops]:
        places = np.linspace(0.05, 0.95, 10)
        assert np.quantile(one, places) == pytest.approx(np.quantile(other, places), abs=2.0)
    assert (ours[:, 2:] <= side).all()


def test_probability_of_a_box() -> None:
    numbers = np.random.default_rng(0).random((10_000, erasing.COUNT))
    assert erasing.boxes(numbers, 0.25, 32).any(1).mean() == pytest.approx(0.25, abs=0.02)
    assert not erasing.boxes(numbers, 0.0, 32).any()


def test_a_box_is_noise_and_the_rest_stays() -> None:
    given = torch.zeros(3, 3, 64, 64)
    box = torch.tensor([[10, 5, 60, 55], [0, 0, 64, 63]])
    out = given.clone()
    erasing.erase_(out, torch.tensor([0, 2]), box, torch.tensor([123, 456_789]))
    assert not out[1].any()
    noise = out[0, :, 10:60, 5:55]
    assert out[0].count_nonzero() == noise.numel() == noise.count_nonzero()
    assert out[2, :, :, 63].count_nonzero() == 0
    both = torch.cat([noise.reshape(-1), out[2, :, :, :63].reshape(-1)])
    assert both.mean().abs() < 0.03  # four deviations of such a mean
    assert both.std() == pytest.approx(1.0, abs=0.02)
    assert both.abs().max() > 3.0
    flat = noise.reshape(3, -1)
    assert torch.corrcoef(flat).fill_diagonal_(0.0).abs().max() < 0.08
    again = given.clone()
    erasing.erase_(again, torch.tensor([1]), box[:1], torch.tensor([123]))
    assert torch.equal(again[1], out[0]), "noise is a function of the seed alone"
