"""The story at the head of a run's page."""

from __future__ import annotations

import pytest

from ssam_scale.tracking.describe import story

PARAMS = {"model.name": "resnet50", "train.epochs": "90"}
TAGS = {"backend": "fsdp2", "world_size": "8", "hardware": "8 × H100", "command": "ssam-scale train --config it.yaml"}
ENDED = {"summary/top1": 77.5, "summary/best_top1": 77.5, "summary/step_time": 0.25}
SAVED = {
    "summary/overhead_vs_base_percent": 21.0,
    "summary/saving_vs_dense_percent": 39.4,
    "summary/saving_vs_dense_percent_low": 38.0,
    "summary/saving_vs_dense_percent_high": 41.0,
    "summary/saving_seconds_so_far": 12345.6,
}


def test_of_a_sparse_run() -> None:
    tags = TAGS | {"method": "ssam-depth", "mask": "depth rotate 0.5–1"}
    assert story(PARAMS, tags, ENDED | SAVED) == (
        "**ssam-depth** (depth rotate 0.5–1): resnet50, 90 epochs, fsdp2 on 8 processes, 8 × H100. Top-1 **77.50%**. "
        "A step takes 250.0 ms, 1.21 times the base optimizer's. **39% less time than dense SAM** (95% interval 38 to "
        "41%): 12,346 s saved. \n\n`ssam-scale train --config it.yaml`"
    )


@pytest.mark.parametrize(
    ("method", "summary", "said", "unsaid"),
    [
        ("base", ENDED | {"summary/overhead_vs_base_percent": 0.0}, "**base**: resnet50", "times the base"),
        ("sam", ENDED | SAVED | {"summary/saving_vs_dense_percent": 0.0}, "1.21 times the base", "less time"),
        (
            "ssam-element",
            ENDED
            | SAVED
            | {
                "summary/saving_vs_dense_percent": -4.0,
                "summary/saving_vs_dense_percent_low": -9.0,
                "summary/saving_vs_dense_percent_high": 1.0,
                "summary/saving_seconds_so_far": -60.0,
            },
            "**4% more time than dense SAM** (95% interval −1 to 9%): 60 s lost.",
            "-9",
        ),
        ("ssam-depth", {"summary/top1": 1.0, "summary/best_top1": 3.0}, "(best 3.00%)", "step"),
        ("ssam-depth", {}, "90 epochs", "Top-1"),
    ],
)
def test_what_is_not_known_is_not_said(method: str, summary: dict[str, float], said: str, unsaid: str) -> None:
    text = story(PARAMS, TAGS | {"method": method, "mask": "", "command": "train"}, summary)
    assert said in text
    assert unsaid not in text
