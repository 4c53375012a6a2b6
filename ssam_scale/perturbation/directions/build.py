"""Builds the direction of ε that a configuration names."""

from __future__ import annotations

from ssam_scale.config import direction_sections

from .interface import DIRECTIONS, Direction


def build_direction(section: direction_sections.Direction) -> Direction:
    """The direction of the section `perturbation.direction`."""
    return DIRECTIONS[section.source].value(section)
