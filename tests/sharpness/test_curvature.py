"""Gap, eigenvalues and trace against what the whole Hessian of small networks says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, hessian

from ssam_scale.errors import NotFiniteError, UserError
from ssam_scale.sharding import World
from ssam_scale.sharpness import MeanLoss, Measures, Vectors, largest_eigenvalues, measure, trace
from tests.support.networks import small_network
from tests.support.ranks import run_ranks

CLASSES = 3


def criterion(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def tiny(kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of some 100 weights in float64, images and labels."""
    torch.manual_seed(1)
    if kind == "convolution":
        network: nn.Module = nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, CLASSES)
        )
        images = torch.randn(11, 2, 4, 4)
        network(images)  # gives BatchNorm statistics
    elif kind == "linear":
        network, images = nn.Linear(5, CLASSES), torch.randn(11, 5)
    else:
        network, images = Attention(), torch.randn(11, 3, 4)
    return network.double(), images.double(), torch.arange(11) % CLASSES


class Attention(nn.Module):
    """By the function whose fused kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x))[:, None].chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v)[:, 0].mean(1))


def whole_hessian(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """By torch.func over all weights at once, without attention's fused kernels."""
    shapes = {name: p.shape for name, p in network.named_parameters()}
    flat = nn.utils.parameters_to_vector(network.parameters()).detach()

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        weights = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return criterion(functional_call(network, weights, (images,)), labels)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return hessian(loss)(flat)


def split(images: Tensor, labels: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(images.split(sizes), labels.split(sizes), strict=True))


@pytest.mark.parametrize("kind", ["convolution", "linear", "attention"])
def test_all_numbers_are_those_of_the_whole_hessian(kind: str) -> None:
    network, images, labels = tiny(kind)
    loss = MeanLoss(network, split(images, labels, [4, 4, 3]), criterion)
    matrix = whole_hessian(network.eval(), images, labels)
    size = len(matrix)
    assert loss.vectors.size == size
    assert loss.images == 11
    columns = torch.stack([loss.hessian_product(column) for column in torch.eye(size, dtype=torch.float64)])
    torch.testing.assert_close(columns, matrix)

    found = measure(loss, Measures(rho=0.1, eigenvalues=3, probes=40, random=5))
    values = torch.linalg.eigvalsh(matrix).flip(0)
    # An eigenvalue is as far as the residual at the most, which is a thousandth of the largest.
    assert found.eigenvalues == pytest.approx(values[:3].tolist(), abs=2e-3 * float(values[0]))
    for value, residual in zip(found.eigenvalues, found.residuals, strict=True):
        assert float((values - value).abs().min()) <= residual + 1e-12
    signs = [loss.vectors.signs(seed) for seed in range(40)]
    samples = [float(v @ matrix @ v) for v in signs]
    assert found.trace == pytest.approx(np.mean(samples))
    assert found.trace_error == pytest.approx(np.std(samples, ddof=1) / math.sqrt(40))
    assert (
        abs(found.trace - float(matrix.trace())) < 4 * found.trace_error
    )  # 1 in 16,000 is farther, and seeds are fixed

    weights = list(network.parameters())
    value = criterion(network(images), labels)
    gradient, before = nn.utils.parameters_to_vector(torch.autograd.grad(value, weights)), value.item()
    assert found.gradient_norm == pytest.approx(float(gradient.norm()))
    assert found.loss == pytest.approx(before)
    start = nn.utils.parameters_to_vector(weights).detach().clone()

    def higher(step: Tensor) -> float:
        with torch.no_grad():
            nn.utils.vector_to_parameters(start + step, weights)
            return float(criterion(network(images), labels) - before)

    assert found.gap == pytest.approx(higher(0.1 * gradient / gradient.norm()))
    random = [loss.vectors.normal(seed) for seed in range(5)]
    assert found.random_gap == pytest.approx(np.mean([higher(0.1 * v / v.norm()) for v in random]))


def test_measuring_leaves_the_network_as_it_was() -> None:
    network, images, labels = tiny("convolution")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.get_rng_state()
    measure(MeanLoss(network, [(images, labels)], criterion), Measures(rho=0.5, eigenvalues=2, probes=2, random=2))
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.nn.attention._cur_sdpa_kernel_backends() != [torch.nn.attention.SDPBackend.MATH]


class Dense:
    """Products with a matrix that is there."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix, self.vectors = matrix, Vectors(len(matrix), dtype=matrix.dtype)

    def __call__(self, vector: Tensor) -> Tensor:
        return self.matrix @ vector


spectra = st.lists(st.floats(-10, 10).map(lambda x: round(x, 2)), min_size=1, max_size=30)


@given(spectrum=spectra, count=st.integers(1, 5), seed=st.integers(0, 100))
def test_lanczos_finds_the_largest_of_any_spectrum_that_it_may_exhaust(
    spectrum: list[float], count: int, seed: int
) -> None:
    """Equal ones, negative ones, zeros: up to 30 products it goes on to the end of the space where it has to."""
    size = len(spectrum)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    matrix = Dense(basis.Q @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ basis.Q.T)
    found = largest_eigenvalues(matrix, matrix.vectors, count, tolerance=0.0, seed=seed)
    wanted = sorted(spectrum, reverse=True)[:count]
    assert found.values == pytest.approx(wanted, abs=1e-9)
    assert found.products <= size


def test_lanczos_ends_when_it_has_found_them_and_says_how_well() -> None:
    values = torch.cat([torch.linspace(0, 1, 997), torch.tensor([3.0, 5.0, 9.0])]).double()
    matrix = Dense(torch.diag(values))
    found = largest_eigenvalues(matrix, matrix.vectors, 2, tolerance=1e-4)
    assert found.values == pytest.approx([9.0, 5.0], abs=9e-4)
    assert max(found.residuals) <= 9e-4
    assert found.products < 30
    few = largest_eigenvalues(matrix, matrix.vectors, 2, tolerance=1e-4, most=4)
    assert few.products == 4
    assert max(few.residuals) > 9e-4
    assert all(float((values - v).abs().min()) <= r for v, r in zip(few.values, few.residuals, strict=True))


def test_a_diagonal_matrix_takes_one_probe() -> None:
    matrix = Dense(torch.diag(torch.arange(7.0)))
    found = trace(matrix, matrix.vectors, 1)
    assert (found.value, found.error, found.probes) == (21.0, None, 1)


def _measured(world: World, kind: str) -> dict[str, Any]:
    network, images, labels = tiny(kind)
    # Unequal shares: process 0 has 4 of 11 images in two batches, process 1 has 7 in one.
    mine = {
        (0, 1): [(images, labels)],
        (0, 2): split(images[:4], labels[:4], [3, 1]),
        (1, 2): [(images[4:], labels[4:])],
    }
    loss = MeanLoss(network, mine[world.rank, world.size], criterion, world)
    runs = loss.vectors
    assert len(loss.gradient()) == runs.run == -(-runs.size // world.size)
    found = measure(loss, Measures(rho=0.1, eigenvalues=2, probes=4, random=3))
    return {**dict(found.metrics()), "gradient": runs.whole(loss.gradient())}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["convolution", "attention"])
def test_two_processes_find_what_one_finds(kind: str) -> None:
    one, ranks = _measured(World(), kind), run_ranks(2, _measured, kind)
    for found in ranks:
        assert found.keys() == one.keys()
        for name, value in one.items():
            # float64 sums in another order, which the iteration magnifies no further than it converges.
            torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(value), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", ["resnet", "vit", "convnext"])
def test_timms_networks_can_be_differentiated_twice(family: str) -> None:
    """In float32, against differences of gradients in float64."""
    network = small_network(family).model
    with torch.no_grad():  # as they are made, residual blocks add nothing, and ReLUs are at their kinks
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 10
    loss = MeanLoss(network, [(images, labels)], criterion)
    direction = loss.vectors.normal(1)
    direction = direction / direction.norm()
    found = loss.hessian_product(direction).double()
    far, near = (_by_differences(network.double(), images, labels, direction, h) for h in (1e-6, 1e-7))
    # Where both agree, no unit has met its kink in between, and their errors are below one another's difference.
    smooth = (far - near).abs() <= 1e-5 * near.abs().max()
    assert smooth.double().mean() > 0.99
    assert float((found - near)[smooth].abs().max()) <= 1e-3 * float(near.abs().max())


def _by_differences(network: nn.Module, images: Tensor, labels: Tensor, direction: Tensor, h: float) -> Tensor:
    gradients = []
    for way in (h, -h):
        moved, place = {}, 0
        for name, p in network.named_parameters():
            part = direction[place : place + p.numel()].view(p.shape).double()
            moved[name], place = (p.detach() + way * part).requires_grad_(), place + p.numel()
        value = criterion(functional_call(network, moved, (images.double(),)), labels)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(moved.values()))]))
    return (gradients[0] - gradients[1]) / (2 * h)


class Once(torch.autograd.Function):
    """Without a second derivative, as many fused kernels are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_a_network_without_a_second_derivative_has_a_gap_and_is_refused_more() -> None:
    network = nn.Sequential(nn.Linear(4, CLASSES), Squared())
    loss = MeanLoss(network, [(torch.randn(5, 4), torch.arange(5) % CLASSES)], criterion)
    assert measure(loss, Measures(0.1, eigenvalues=0)).gap > 0
    with pytest.raises(UserError, match=r"without a second derivative .* ask for 0 eigenvalues and 0 probes"):
        measure(loss, Measures(0.1))


def test_a_loss_that_is_not_finite_has_no_sharpness() -> None:
    network = nn.Linear(4, CLASSES)
    with torch.no_grad():
        network.weight.fill_(math.inf)
    with pytest.raises(NotFiniteError, match="the loss is nan"):
        measure(MeanLoss(network, [(torch.ones(5, 4), torch.arange(5) % CLASSES)], criterion), Measures(0.1))


def test_weights_without_a_gradient_are_constants() -> None:
    network, images, labels = tiny("convolution")
    network[0].weight.requires_grad_(False)
    loss = MeanLoss(network, [(images, labels)], criterion)
    assert loss.vectors.size == sum(p.numel() for p in network.parameters()) - network[0].weight.numel()
    assert measure(loss, Measures(0.1)).gap > 0
    for p in network.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="no weights that require a gradient"):
        MeanLoss(network, [(images, labels)], criterion)
