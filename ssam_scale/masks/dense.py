"""No mask: all weights are perturbed (dense SAM, arXiv 2010.01412)."""

from __future__ import annotations

from .plan import Layout, Plan


class Dense:
    """All weights: dense SAM."""

    def check(self, layout: Layout) -> None:
        """Any weights will do."""

    def plan(self, layout: Layout, step: int) -> Plan:
        """Everything, from the first block on."""
        return layout.suffix(layout.first_stage, may_cut=layout.first_stage > 0)
