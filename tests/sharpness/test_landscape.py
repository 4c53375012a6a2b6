"""The loss along directions whose filters are as long as the weights'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from ssam_scale.sharpness import MeanLoss, curve, filter_normalized, plane

SHAPES = {"conv": (4, 3, 3, 3), "norm": (4,), "linear": (5, 4), "bias": (5,), "token": (1, 1, 4)}


@given(seed=st.integers(0, 1000), scale=st.floats(1e-3, 1e3))
def test_every_filter_is_as_long_as_the_weights_and_what_has_one_dimension_stays(seed: int, scale: float) -> None:
    weights = {name: scale * torch.randn(shape) for name, shape in SHAPES.items()}
    weights["conv"][2] = 0.0  # a filter that was pruned
    direction = filter_normalized(weights, seed)
    parts = dict(zip(weights, direction.split([w.numel() for w in weights.values()]), strict=True))
    for name, weight in weights.items():
        part = parts[name].view(weight.shape)
        if weight.ndim == 1:
            assert not part.any()
        else:
            torch.testing.assert_close(part.flatten(1).norm(dim=1), weight.flatten(1).norm(dim=1), rtol=1e-5, atol=0)
    # The same for the same shapes: of weights of another scale it is as much longer.
    torch.testing.assert_close(filter_normalized({n: 2 * w for n, w in weights.items()}, seed), 2 * direction)
    assert not torch.equal(filter_normalized(weights, seed + 1), direction)


class Scaled(nn.Module):
    """Two layers, of which a factor can be taken from the one and given to the other."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.first, self.last = nn.Linear(6, 7, bias=False), nn.Linear(7, 3, bias=False)
        with torch.no_grad():
            self.first.weight.mul_(factor)
            self.last.weight.div_(factor)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


def test_the_curve_does_not_see_a_factor_that_layers_take_back() -> None:
    """What filter normalization is for (arXiv 1712.09913, section 3)."""
    batch = torch.randn(8, 6), torch.arange(8) % 3
    curves = []
    for factor in (1.0, 16.0):  # a power of two, which float32 multiplies by without rounding
        loss = MeanLoss(Scaled(factor), [batch], F.cross_entropy)
        curves.append(curve(loss, filter_normalized(loss.weights, 0), [-1.0, -0.5, 0.0, 0.5, 1.0]))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)
    assert min(curves[0]) < max(curves[0])


def test_a_plane_has_its_rows_along_the_second_direction_and_the_curve_in_its_middle() -> None:
    batch = torch.randn(8, 6), torch.arange(8) % 3
    network = Scaled(1.0)
    loss = MeanLoss(network, [batch], F.cross_entropy)
    first, second = (filter_normalized(loss.weights, seed) for seed in (0, 1))
    places = [-0.5, 0.0, 0.5]
    rows = plane(loss, (first, second), places)
    assert rows[1] == curve(loss, first, places)
    assert [row[1] for row in rows] == curve(loss, second, places)
    assert rows[2][0] == loss.value(-0.5 * first + 0.5 * second)
    assert rows[1][1] == loss.value()
