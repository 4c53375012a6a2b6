"""Schedules by the name that a configuration gives them: a file each, and nothing else to be told."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from ssam_scale.config.schema import Perturbation, RhoSchedule
from ssam_scale.errors import UserError
from ssam_scale.perturbation import schedules
from ssam_scale.perturbation.schedules import (
    RADIUS_SCHEDULES,
    WRAPPERS,
    ConstantRadius,
    CosineRadius,
    Interval,
    LRRadius,
    Window,
    build_schedule,
    ever_reuses,
    reuse_at,
)

STEPS = 100


def section(**keys: object) -> Perturbation:
    return Perturbation.model_validate({"rho": 0.1, **keys})


def test_the_files_of_the_folder_are_the_registered_names_and_what_a_configuration_may_say() -> None:
    files = [p.stem for p in (Path(schedules.__file__).parent / "radius").glob("*.py") if p.stem != "__init__"]
    assert sorted(RADIUS_SCHEDULES) == sorted(files) == sorted(get_args(RhoSchedule))
    assert set(WRAPPERS) <= set(Perturbation.model_fields)
    assert all(entry.summary for entry in (*RADIUS_SCHEDULES.values(), *WRAPPERS.values()))


def test_what_a_configuration_says_is_built() -> None:
    assert build_schedule(section(), STEPS) == ConstantRadius()
    assert build_schedule(section(rho_schedule="cosine", rho_final=0.5), STEPS) == CosineRadius(STEPS, 0.5)
    assert build_schedule(section(rho_schedule="lr"), STEPS) == LRRadius(0.0)
    assert build_schedule(section(interval=5, reuse=0.5), STEPS) == Interval(5, ConstantRadius(), 0.5)
    inside = Interval(2, LRRadius(0.25))
    window = build_schedule(section(rho_schedule="lr", rho_final=0.25, interval=2, window=(0.5, 0.75)), STEPS)
    assert window == Window(50, 75, inside)
    with pytest.raises(UserError, match=r"perturbation\.window \[0\.5, 0\.501\] holds none of the run's 100 steps"):
        build_schedule(section(window=(0.5, 0.501)), STEPS)


def test_what_an_ascent_brought_is_reused_between_two_of_them_and_in_the_window_only() -> None:
    schedule = Window(4, 8, Interval(2, reuse=0.5))
    assert [reuse_at(schedule, step) for step in range(10)] == [0.0] * 5 + [0.5, 0.0, 0.5] + [0.0] * 2
    assert ever_reuses(schedule)
    assert not ever_reuses(Window(4, 8, Interval(1, reuse=0.5)))
    assert not ever_reuses(Interval(2))
    assert ever_reuses(Interval(3, Interval(2, reuse=0.5)))
    assert not ever_reuses(LRRadius())
    assert reuse_at(CosineRadius(5), 3) == 0.0
