"""Which weights are perturbed."""

from .plan import Dense, Depth, Layout, Mask, Plan
from .scored import Scored, add_squares

__all__ = ["Dense", "Depth", "Layout", "Mask", "Plan", "Scored", "add_squares"]
