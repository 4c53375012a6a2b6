"""What is measured of how sharp a minimum is, and the numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from torch import Tensor

from ssam_scale.errors import NotFiniteError

from .hutchinson import trace
from .lanczos import largest_eigenvalues
from .loss import MeanLoss


@dataclass(frozen=True)
class Measures:
    """What is to be measured.

    Attributes:
        rho: radius of the gaps.
        eigenvalues: how many, the largest first; 0: none.
        probes: of the trace; 0: no trace.
        random: directions of the mean gap; 0: none.
        seed: of all vectors that are drawn.
    """

    rho: float
    eigenvalues: int = 1
    probes: int = 0
    random: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Sharpness:
    """Of the mean loss L over fixed images, at the weights w.

    Attributes:
        images: how many.
        rho: radius of the gaps.
        loss: L(w).
        gradient_norm: ‖∇L(w)‖.
        gap: L(w + ε) − L(w) at ε = ρ ∇L(w) / ‖∇L(w)‖, by which SAM perturbs (Foret et al., arXiv 2010.01412, equation
            2), here with the gradient of all images: how much the loss rises where it rises fastest, to first order.
        random_gap: the mean of L(w + ε) − L(w) over random ε of length ρ; None: not asked for.
        eigenvalues: the largest of the Hessian, the largest first.
        residuals: of each, how far from an eigenvalue it is at the most.
        products: of the Hessian with vectors that it took to find them.
        trace: of the Hessian, estimated; None: not asked for.
        trace_error: its standard error; None of one probe, too.
    """

    images: int
    rho: float
    loss: float
    gradient_norm: float
    gap: float
    random_gap: float | None
    eigenvalues: tuple[float, ...]
    residuals: tuple[float, ...]
    products: int
    trace: float | None
    trace_error: float | None

    def metrics(self) -> Mapping[str, float]:
        """What was measured, by the names of metrics."""
        found: dict[str, float | None] = {
            "loss": self.loss,
            "gradient_norm": self.gradient_norm,
            "gap": self.gap,
            "random_gap": self.random_gap,
            **{f"eigenvalue_{number}": value for number, value in enumerate(self.eigenvalues, 1)},
            "trace": self.trace,
            "trace_error": self.trace_error,
        }
        return {f"sharpness/{name}": value for name, value in found.items() if value is not None}


def measure(loss: MeanLoss, measures: Measures) -> Sharpness:
    """Measure how sharp L is at w. Collective.

    A gradient takes a forward and a backward pass over the images, a value of the loss a forward, a product with the
    Hessian a forward and two backwards; eigenvalues take some ten to some dozen products, the trace one a probe.

    Args:
        loss: L, with the weights w.
        measures: what is wanted.

    Raises:
        NotFiniteError: the loss or its gradient at w is not.
        UserError: eigenvalues or a trace are wanted of a network that cannot be differentiated twice.
    """
    vectors, rho, seed = loss.vectors, measures.rho, measures.seed
    gradient = loss.gradient()
    norm = vectors.norm(gradient)
    # At a stationary point there is no direction of fastest ascent, and to first order the loss rises by nothing.
    steepest = vectors.whole(gradient * (rho / norm if norm > 0.0 else 0.0))
    here, there = loss.values([None, steepest])
    if not (math.isfinite(here) and math.isfinite(norm)):
        raise NotFiniteError(f"the loss is {here} and its gradient {norm} long, where sharpness means nothing")
    del gradient, steepest  # as long as the weights each
    random = (_of_length(rho, vectors.whole(vectors.normal(seed + n))) for n in range(measures.random))
    gaps = [value - here for value in loss.values(random)]
    found = None
    if measures.eigenvalues:
        found = largest_eigenvalues(loss.hessian_product, vectors, measures.eigenvalues, seed=seed)
    traced = trace(loss.hessian_product, vectors, measures.probes, seed=seed) if measures.probes else None
    return Sharpness(
        images=loss.images,
        rho=rho,
        loss=here,
        gradient_norm=norm,
        gap=there - here,
        random_gap=fmean(gaps) if gaps else None,
        eigenvalues=() if found is None else found.values,
        residuals=() if found is None else found.residuals,
        products=0 if found is None else found.products,
        trace=None if traced is None else traced.value,
        trace_error=None if traced is None else traced.error,
    )


def _of_length(length: float, vector: Tensor) -> Tensor:
    return vector * (length / vector.norm())
