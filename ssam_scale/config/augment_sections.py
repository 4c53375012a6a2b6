"""The section `data.augment`: what is done to the pixels of a training crop, one section a policy."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from .section import Section, Share

_Operations: TypeAlias = Annotated[int, Field(ge=1, le=8)]


class RandAugment(Section):
    """RandAugment (arXiv 1909.13719) as torchvision does it: 14 operations, of which some are done to each image."""

    policy: Literal["rand_augment"] = Field(description="some operations at random, as torchvision's RandAugment")
    operations: _Operations = Field(2, description="how many are done to each image, one after another (N)")
    magnitude: float = Field(9.0, ge=0.0, le=30.0, description="how much of each, from 0 to 30 (M)")


class RandAugmentIncreasing(Section):
    """RandAugment as timm does it: 15 operations, their severities drawn around one magnitude."""

    policy: Literal["rand_augment_increasing"] = Field(description="some at random, as timm's rand-m9-mstd0.5-inc1")
    operations: _Operations = Field(2, description="how many are chosen for each image, one after another (n)")
    magnitude: float = Field(9.0, ge=0.0, le=10.0, description="how much of each, from 0 to 10 (m)")
    magnitude_std: float = Field(0.5, ge=0.0, le=10.0, description="deviation of that, drawn each time (mstd)")
    probability: Share = Field(0.5, description="that an operation that was chosen is done (p)")


class TrivialAugment(Section):
    """TrivialAugment (arXiv 2103.10158) as torchvision's TrivialAugmentWide: one operation by a random magnitude."""

    policy: Literal["trivial_augment"] = Field(description="one operation by a random magnitude")


class AutoAugment(Section):
    """AutoAugment (arXiv 1805.09501): one of 25 pairs of operations that were searched for on ImageNet."""

    policy: Literal["auto_augment"] = Field(description="pairs of operations searched for on ImageNet")


class ThreeAugment(Section):
    """3-Augment (DeiT III, arXiv 2204.07118): gray, solarized or blurred."""

    policy: Literal["three_augment"] = Field(description="gray, solarized or blurred, each as likely: DeiT III's")


Augment: TypeAlias = Annotated[
    RandAugment | RandAugmentIncreasing | TrivialAugment | AutoAugment | ThreeAugment, Field(discriminator="policy")
]
