"""Sections that name parameters of the network: those that are not trained, and those that are trained otherwise."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

from .section import Section, regular_expression


def _not_empty(value: str) -> str:
    if not value:
        raise ValueError('is empty; a regular expression is needed, and "." matches every name')
    return regular_expression(value)


Pattern: TypeAlias = Annotated[str, AfterValidator(_not_empty)]


class Named(Section):
    """Parameters by their names in the network."""

    parameters: Pattern = Field(description="a regular expression, searched for anywhere in the names of parameters")

    def of(self, names: Iterable[str]) -> list[str]:
        """Those of the names that it matches."""
        return [name for name in names if re.search(self.parameters, name)]


class Freeze(Named):
    """Parameters that are not trained, at first or at all."""

    until_epoch: int | None = Field(
        None, ge=1, le=10**6, description="the first epoch, from 0, that trains them, too; null: none does"
    )

    def holds(self, epoch: int) -> bool:
        """Whether they are frozen in an epoch, from 0."""
        return self.until_epoch is None or epoch < self.until_epoch


class ParameterGroup(Named):
    """Parameters that are trained otherwise than the rest; each is of one section at the most."""

    lr_scale: float = Field(1.0, gt=0.0, le=1e6, description="factor on the learning rate, and on that of layer_decay")
    weight_decay: float | None = Field(
        None, ge=0.0, le=1000.0, description="weight decay of all of them; null: as of the rest"
    )
    rho: float | None = Field(
        None,
        ge=0.0,
        le=1000.0,
        description="radius of their perturbation; 0: they are left alone; null: perturbation.rho",
    )
