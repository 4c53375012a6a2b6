"""The largest eigenvalues of a symmetric matrix that is known by its products with vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .vectors import Vectors


@dataclass(frozen=True)
class Eigenvalues:
    """The largest eigenvalues that were found.

    Attributes:
        values: the largest first.
        residuals: of each, ‖H u − θ u‖ of its unit vector u: some eigenvalue of H is at most so far from it.
        products: products with H that it took.
    """

    values: tuple[float, ...]
    residuals: tuple[float, ...]
    products: int


def largest_eigenvalues(
    product: Callable[[Tensor], Tensor],
    vectors: Vectors,
    count: int,
    *,
    tolerance: float = 1e-3,
    most: int = 60,
    seed: int = 0,
) -> Eigenvalues:
    """The algebraically largest eigenvalues, by the Lanczos iteration with full reorthogonalization.

    Golub and Van Loan, "Matrix Computations" (4th ed.), sections 10.1 to 10.3; for the Hessian of a network as in
    Ghorbani et al., arXiv 1901.10159. Every vector is made orthogonal, twice, to all before it, which are kept for it:
    (products + 1) · weights numbers, shared by the processes. Of several equal eigenvalues one is found from the first
    vector, and the others only after all the rest.

    Args:
        product: H v of v, as runs. Collective.
        vectors: what they are.
        count: how many are wanted; of a smaller matrix, all that it has.
        tolerance: residuals may be so large, relative to the eigenvalue of the largest magnitude.
        most: products that it may take; what is found by then is returned with its residuals. At least `count`.
        seed: of the first vector.
    """
    steps = min(max(most, count), vectors.size)
    rounding = 100.0 * torch.finfo(vectors.dtype).eps
    first = vectors.normal(seed)
    basis = [first / vectors.norm(first)]
    matrix = torch.zeros(steps, steps, dtype=torch.float64)  # tridiagonal: what H is in the basis
    found = Eigenvalues((), (), 0)
    for step in range(steps):
        image = product(basis[step])
        matrix[step, step] = float(vectors.products([image], basis[step]))
        image = _orthogonal_to(basis, image, vectors)
        beta = vectors.norm(image)
        found = _ritz(matrix[: step + 1, : step + 1], beta, count)
        scale = float(torch.linalg.matrix_norm(matrix, ord=float("inf")))
        if scale == 0.0 and beta == 0.0:  # of a random vector: H is zero
            return Eigenvalues((0.0,) * min(count, vectors.size), (0.0,) * min(count, vectors.size), step + 1)
        # Where the vectors so far have no way out by H, its other eigenvalues are looked for from another vector.
        closed = beta <= rounding * scale
        if step + 1 == steps or (step + 1 >= count and not closed and max(found.residuals) <= tolerance * scale):
            break
        if closed:
            image = _orthogonal_to(basis, vectors.normal(seed + step + 1), vectors)
            beta = 0.0
        else:
            matrix[step, step + 1] = matrix[step + 1, step] = beta
        basis.append(image / vectors.norm(image))
    return found


def _orthogonal_to(basis: Sequence[Tensor], vector: Tensor, vectors: Vectors) -> Tensor:
    """What of a vector is orthogonal to an orthonormal basis; twice, as the first time leaves rounding behind."""
    vector = vector.clone()
    for _ in range(2):
        shares = vectors.products(basis, vector).to(vector.dtype)
        for share, each in zip(shares, basis, strict=True):
            vector -= share * each
    return vector


def _ritz(matrix: Tensor, beta: float, count: int) -> Eigenvalues:
    """The largest eigenvalues of the tridiagonal matrix, and how far they are from eigenvalues of H at the most."""
    values, units = torch.linalg.eigh(matrix)
    best = values.argsort(descending=True)[:count]
    residuals = (beta * units[-1, best]).abs()
    return Eigenvalues(tuple(values[best].tolist()), tuple(residuals.tolist()), len(matrix))
