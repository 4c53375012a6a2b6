"""Runs of a model whose blocks are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.runs import RESNET, differing, ssam_scale, write_config

LAYERS = [f"layer{i}" for i in range(1, 5)]


@pytest.mark.slow
def test_a_run_by_names_is_that_of_the_family_with_the_same_cut(home: Path, data: Path) -> None:
    """With dropout that a ResNet calls as a function, and BatchNorm whose statistics are not those of the check."""
    mask = {"pattern": "depth", "cut": 0.5}
    for name, stages in (("family", None), ("names", LAYERS)):
        config = write_config(
            home / f"{name}.yaml",
            data,
            model={**RESNET, "drop_rate": 0.3, "drop_path_rate": 0.2, "stages": stages},
            perturbation={"rho": 0.1, "mask": mask},
            train={"epochs": 1},
            checkpoint={"directory": str(home / name)},
        )
        assert ssam_scale("train", "--config", config) == 0
    assert differing(home / "family" / "epoch_0001", home / "names" / "epoch_0001") == []


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({**RESNET, "stages": [*LAYERS, "layer5"]}, "model.stages: ResNet has no module 'layer5'; nearest: layer"),
        (
            {
                "name": "densenet121",
                "num_classes": 4,
                "stages": [f"features.denseblock1.denselayer{i}" for i in (1, 2)],
            },
            "model.stages: from features.denseblock1.denselayer1 to features.denseblock1.denselayer2 2 values pass",
        ),
        (
            {"name": "crossvit_9_240", "num_classes": 4, "stages": ["blocks.0", "blocks.1"]},
            "model.stages: the forward of CrossVit cannot be parted between these blocks, because it cannot be traced",
        ),
    ],
    ids=["no such block", "what passes a block", "not traced"],
)
def test_blocks_that_cannot_be_cut_between_are_refused_at_once(
    model: dict[str, object], message: str, home: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(home / "run.yaml", data, model=model, perturbation={"rho": 0.1, "mask": {"pattern": "depth"}})
    assert ssam_scale("train", "--config", config) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
