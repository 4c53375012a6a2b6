"""`ssam-scale stages`: the blocks of a model, and what a cut before each would share and perturb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale import Depth
from ssam_scale.config.load import load
from ssam_scale.models import build_model
from tests.support.configs import SMALL
from tests.support.runs import ssam_scale

Row = dict[str, Any]
BYOBNET = ["test_byobnet", "model.stages=[stages.0, stages.1, stages.2, stages.3]"]


def rows(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[Row]:
    assert ssam_scale("stages", *arguments, "--json") == 0
    found: list[Row] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("arguments", [["test_vit"], ["test_efficientnet"], BYOBNET], ids=lambda a: a[0])
def test_shares_are_of_the_whole_and_cuts_those_of_a_mask(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(capsys, *arguments)
    (tmp_path / "run.yaml").write_text(SMALL)
    network = build_model(load(tmp_path / "run.yaml", [f"model={{name: {arguments[0]}}}", *arguments[1:]]))
    model = network.model
    assert [row["stage"] for row in found] == [stage.name for stage in network.stages]
    assert sum(row["weights"] for row in found) == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counted:
        # The size that these are built for; a CPU's attention is of no kind that is counted.
        model.to("meta")(torch.zeros(1, 3, 160, 160, device="meta"))
    assert sum(row["flops"] for row in found) == counted.get_total_flops()
    whole = {"weights_share": "perturbed_weights", "compute_share": "perturbed_compute"}
    for share, cumulative in whole.items():
        for i, row in enumerate(found):
            assert row[cumulative] == pytest.approx(sum(each[share] for each in found[i:]))
    for i, row in enumerate(found):
        assert Depth(row["cut"]).cuts(len(found), 0) == range(i, i + 1)
        assert row["shared_compute"] == pytest.approx(1 - row["perturbed_compute"])
    costs = [row["step_over_base"] for row in found]
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == 2.0
    assert 1.0 < costs[-1] < 2.0


def test_the_table_has_what_the_json_has(capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "test_vit", "--resolution", "80", "model.kwargs={img_size: 80, depth: 3}")
    assert ssam_scale("stages", "test_vit", "--resolution", "80", "model.kwargs={img_size: 80, depth: 3}") == 0
    out = capsys.readouterr().out
    for row in found:
        [line] = [line for line in out.splitlines() if line.startswith(f"│ {row['stage']} ")]
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        assert cells[1:] == [
            f"{row['cut']:.3f}",
            f"{row['weights'] / 1e6:.3f}",
            *(f"{row[key]:.1%}" for key in ("weights_share", "compute_share", "perturbed_weights", "shared_compute")),
            f"{row['step_over_base']:.3f}",
        ]
    assert "test_vit at 80 px" in out


def test_the_model_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(SMALL.replace("resnet18", "test_resnet"))
    config = ["--config", str(tmp_path / "run.yaml")]
    found = rows(capsys, *config)
    assert [row["stage"] for row in found] == [f"layer{i}.0" for i in range(1, 5)]
    assert found[-1]["weights"] < rows(capsys, *config, "model.num_classes=20")[-1]["weights"]
    assert rows(capsys, "model.num_classes=20", *config)[-1] == rows(capsys, *config, "model.num_classes=20")[-1]
    small = rows(capsys, *config, "--resolution", "64")
    assert sum(row["flops"] for row in small) < sum(row["flops"] for row in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "stages: a model is needed, such as `ssam-scale stages resnet50`, or --config FILE"),
        (["resnet81"], "model.name: timm .* knows no model 'resnet81'; nearest: "),
        (
            ["test_byobnet"],
            r"ByobNet has no stages: .* by model\.stages .*\(its blocks may be stages\.0 to stages\.3\)",
        ),
        (["test_vit", "--resolution", "161"], "VisionTransformer cannot take images of 161 px: Input height"),
        (["test_vit", "--resolution", "0"], "--resolution is 0; at least 1 is needed"),
        (["test_vit", "model.kwarg=1"], r"model\.kwarg: unknown key; did you mean model\.kwargs\?"),
        (["test_vit", "model.kwargs={features_only: true}"], "features_only does not belong here"),
        (["test_vit", "model.stages=[]"], r"model\.stages"),
        (
            ["test_vit", "model.stages=[blocks.0, block.1]"],
            r"model\.stages: .* no module 'block\.1'; nearest: blocks\.1",
        ),
        (["test_byobnet", "model.stages=[stages.1, stages.0]"], r"model\.stages: stages\.0 runs before stages\.1"),
        (
            ["vit_small_patch16_rope_mixed_224", "model.kwargs={depth: 2}"],
            "Eva has no stages here: its blocks share one parameter of rotary positions; use another rope_type",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_the_users_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert ssam_scale("stages", *arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert re.search(message, err), err
