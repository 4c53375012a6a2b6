"""The normalization layers alone: SAM-ON (arXiv 2306.04226)."""

from __future__ import annotations

from ssam_scale.config.mask_sections import NormMask

from .plan import Layout, Mask, Plan
from .registry import RunInfo, register_mask


class Norms:
    """The normalization layers alone: SAM-ON (arXiv 2306.04226)."""

    def check(self, layout: Layout) -> None:
        """There must be one.

        Raises:
            ValueError: there is none.
        """
        if not layout.norms & layout.shapes.keys():
            raise ValueError("the model has no normalization layer with weights that could be perturbed")

    def plan(self, layout: Layout, step: int) -> Plan:
        """Their weights and biases."""
        return Plan.of_parameters(layout, layout.norms)


@register_mask(NormMask, "weights and biases of normalization layers (SAM-ON)", "arXiv 2306.04226")
def build(section: NormMask, run: RunInfo) -> Mask:
    """The mask of its section."""
    return Norms()
