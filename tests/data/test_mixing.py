"""Mixup and CutMix are those of the papers, of neighbours, and of the whole step whoever computes it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ssam_scale.data.mixing import Mixing, Mixture, mixed

CLASSES = 7


def batch(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 20, 24, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def partner(index: int, count: int) -> int:
    return index ^ 1 if index ^ 1 < count else index - 1


@pytest.mark.parametrize("count", [2, 5, 8])
def test_mixup_is_the_papers_equation_for_each_pixel(count: int) -> None:
    """x̃ = λ x_i + (1 − λ) x_j, ỹ = λ y_i + (1 − λ) y_j (1710.09412, section 2), image by image."""
    images, labels = batch(count)
    kept, one_hot = images.clone(), torch.eye(CLASSES)[labels]
    found, targets = mixed(images, one_hot, Mixture(0.3))
    for i in range(count):
        j = partner(i, count)
        torch.testing.assert_close(found[i], 0.3 * kept[i] + 0.7 * kept[j], rtol=0, atol=1e-6)
        torch.testing.assert_close(targets[i], 0.3 * one_hot[i] + 0.7 * one_hot[j], rtol=0, atol=1e-6)
    assert torch.equal(images, kept)  # others may look at them


def test_cutmix_exchanges_a_box_and_its_share_of_the_label() -> None:
    """x̃ = M ⊙ x_i + (1 − M) ⊙ x_j, and λ is what the box leaves of the area (1905.04899, equation 1)."""
    images, labels = batch(6)
    one_hot = torch.eye(CLASSES)[labels]
    found, targets = mixed(images, one_hot, Mixture(0.5, (0.1, 0.25, 0.6, 1.0)))
    inside = torch.zeros(20, 24, dtype=torch.bool)
    inside[2:12, 6:24] = True
    share = 1.0 - inside.float().mean()
    for i in range(6):
        assert torch.equal(found[i], torch.where(inside, images[i ^ 1], images[i]))
        torch.testing.assert_close(targets[i], share * one_hot[i] + (1 - share) * one_hot[i ^ 1], rtol=0, atol=1e-6)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_one_image_alone_is_itself() -> None:
    images, labels = batch(1)
    mixing = Mixing(1.0, 1.0, CLASSES, seed=0)
    mixing.begin(0, 0)
    found, targets = mixing(images, labels)
    assert torch.equal(found, images)
    assert torch.equal(targets, torch.eye(CLASSES)[labels])


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.4, 1.0)], ids=["mixup", "cutmix", "either"])
def test_any_parts_of_a_batch_are_mixed_as_the_whole(alphas: tuple[float, float]) -> None:
    """Of a process each, or of a micro-batch each: bit for bit."""
    images, labels = batch(16)
    for step in range(6):
        whole, parts = Mixing(*alphas, CLASSES, seed=3), Mixing(*alphas, CLASSES, seed=3)
        whole.begin(1, step)
        expected = whole(images, labels)
        for size in (2, 4, 8):
            parts.begin(1, step)
            pieces = [parts(*part) for part in zip(images.split(size), labels.split(size), strict=True)]
            for index in (0, 1):
                assert torch.equal(torch.cat([piece[index] for piece in pieces]), expected[index])


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_the_memory_format_stays(format: torch.memory_format) -> None:
    images, labels = batch(4)
    for alphas in ((1.0, 0.0), (0.0, 1.0)):
        mixing = Mixing(*alphas, CLASSES, seed=0)
        mixing.begin(0, 0)
        assert mixing(images.contiguous(memory_format=format), labels)[0].is_contiguous(memory_format=format)


def drawn(mixing: Mixing, epochs: int, steps: int) -> list[Mixture]:
    found = []
    for epoch in range(epochs):
        for step in range(steps):
            mixing.begin(epoch, step)
            found.append(mixing._mixture)
    return found


def test_what_is_drawn_is_beta_and_a_function_of_seed_epoch_and_step() -> None:
    found = drawn(Mixing(0.4, 1.0, CLASSES, seed=5), 40, 50)
    assert found == drawn(Mixing(0.4, 1.0, CLASSES, seed=5), 40, 50)
    assert found != drawn(Mixing(0.4, 1.0, CLASSES, seed=6), 40, 50)
    assert len({each.share for each in found}) == 2000
    cut = [each for each in found if each.box is not None]
    assert 0.45 < len(cut) / len(found) < 0.55  # 0.5 ± 4.5 sd
    mixup = [each.share for each in found if each.box is None]
    # Of Beta(α, α) the mean is 1/2 and the variance 1 / (4 (2 α + 1)).
    for shares, alpha in ((mixup, 0.4), ([each.share for each in cut], 1.0)):
        assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
        assert np.var(shares) == pytest.approx(1.0 / (4.0 * (2.0 * alpha + 1.0)), rel=0.15)
    for each in cut:
        assert each.box is not None
        top, left, bottom, right = each.box
        assert 0.0 <= top <= bottom <= 1.0
        assert 0.0 <= left <= right <= 1.0
        side = math.sqrt(1.0 - each.share)
        assert bottom - top <= side + 1e-9  # less where it reaches beyond the image
    assert all(each.box is None for each in drawn(Mixing(0.4, 0.0, CLASSES, seed=5), 2, 50))
    assert all(each.box is not None for each in drawn(Mixing(0.0, 1.0, CLASSES, seed=5), 2, 50))
