"""Masks by the name that a configuration gives them: every section has its mask, and the other way round."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import TypeAdapter

from ssam_scale.config import mask_sections
from ssam_scale.masks import MASKS, NM, Annealed, Depth, DepthByCost, Dynamic, Mask, Named, Norms, RunInfo, build_mask
from ssam_scale.masks.top_scores import Scored

RUN = RunInfo(seed=7, steps=40, steps_per_epoch=10)


def built(**section: Any) -> Mask:
    return build_mask(TypeAdapter(mask_sections.Mask).validate_python(section), RUN)


def test_every_section_has_a_mask_and_every_mask_a_section() -> None:
    [union, _] = get_args(mask_sections.Mask)
    patterns = [p for section in get_args(union) for p in get_args(section.model_fields["pattern"].annotation)]
    assert sorted(MASKS) == sorted(patterns)
    assert len(patterns) == len(get_args(union)), "a section for each pattern"
    assert all(entry.summary for entry in MASKS.values())


@pytest.mark.parametrize("pattern", ["element", "row", "tensor", "block"])
def test_highest_scores(pattern: str) -> None:
    mask = built(pattern=pattern, sparsity=0.75, score="weight", refresh_epochs=2)
    assert isinstance(mask, Scored)
    assert (mask.pattern, mask.sparsity, mask.kinds, mask.every, mask.seed) == (pattern, 0.75, ("weight",), 20, 7)
    assert mask.allocation == "global"


def test_what_the_sections_of_highest_scores_may_say_beside() -> None:
    row = built(pattern="row", allocation="erk", sparsity=0.2, sparsity_final=0.8, refresh_steps=3)
    assert isinstance(row, Scored)
    assert isinstance(row.sparsity, Annealed)
    assert (row.allocation, row.every) == ("erk", 3)
    assert [row.sparsity(step) for step in (0, 20, 40)] == pytest.approx([0.2, 0.5, 0.8])
    dynamic = built(pattern="element", dynamic={"drop": "weight", "drop_rate": 0.25})
    assert isinstance(dynamic, Dynamic)
    assert (dynamic.drop, dynamic.grow, dynamic.drop_rate, dynamic.steps) == ("weight", "random", 0.25, 40)
    assert (dynamic.every, dynamic.seed) == (10, 7)


def test_the_other_patterns() -> None:
    nm = built(pattern="nm", n=1, m=8, others="unperturbed", refresh_epochs=None)
    assert isinstance(nm, NM)
    assert (nm.n, nm.m, nm.others, nm.indivisible, nm.every) == (1, 8, "unperturbed", "refused", None)
    assert isinstance(built(pattern="norm"), Norms)
    assert isinstance(built(pattern="named", parameters=["^fc"]), Named)
    depth = built(pattern="depth", policy="fixed", cut=0.5)
    assert type(depth) is Depth
    assert list(depth.cuts(8, 0)) == [4]
    moving = built(pattern="depth", draw="annealed", cut=[0.0, 0.5], cut_final=[0.5, 1.0])
    assert type(moving) is Depth
    assert [moving.cuts(8, step) for step in (0, 40)] == [range(5), range(4, 8)]
    by_cost = built(pattern="depth", draw="cost", refresh_steps=5)
    assert isinstance(by_cost, DepthByCost)
    assert (by_cost.every, by_cost.seed) == (5, 7)
