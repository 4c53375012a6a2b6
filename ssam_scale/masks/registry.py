"""From a section of the configuration to the mask it describes: each pattern's own file says how it is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from ssam_scale.config.mask_sections import RefreshedMask
from ssam_scale.config.section import Section
from ssam_scale.registry import Registry

from .plan import Mask


@dataclass(frozen=True)
class RunInfo:
    """What masks know of the run beside their section.

    Attributes:
        seed: of the run.
        steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps in one epoch.
    """

    seed: int
    steps: int
    steps_per_epoch: int

    def steps_between_refreshes(self, section: RefreshedMask) -> int | None:
        """Optimizer steps from one refresh of the mask to the next; None: it is chosen once."""
        if section.refresh_epochs is not None:
            return section.refresh_epochs * self.steps_per_epoch
        return section.refresh_steps


MASKS: Registry[Callable[[Any, RunInfo], Mask]] = Registry("ssam_scale.masks")
"""By `perturbation.mask.pattern`: functions that build a mask from its section and the run."""

S = TypeVar("S", bound=Section)
Build = Callable[[S, RunInfo], Mask]


def register_mask(section: type[S], summary: str, paper: str = "") -> Callable[[Build[S]], Build[S]]:
    """A decorator of the function that builds a mask: `build(section, run) -> Mask`.

    Args:
        section: class of the section in `config/mask_sections.py`, whose `pattern` is the mask's name.
        summary: what is perturbed, in one line.
        paper: where it comes from.
    """
    [pattern] = get_args(section.model_fields["pattern"].annotation)
    return MASKS.register(pattern, summary, paper)


def build_mask(section: Any, run: RunInfo) -> Mask:
    """The mask that `perturbation.mask` describes.

    Args:
        section: one of the sections in `config/mask_sections.py`.
        run: it is going to be used in.
    """
    return MASKS[section.pattern].value(section, run)
