"""`ssam-scale stages`: where a model can be cut, and what each cut would perturb and share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ssam_scale.cli.paths import expanded
from ssam_scale.cli.table import AsJson, Columns, at_least, show
from ssam_scale.cli.train import Overrides
from ssam_scale.errors import UserError


def stages_command(
    model: Annotated[
        str, typer.Argument(help="timm's name; left out where --config says it.", show_default=False)
    ] = "",
    overrides: Overrides = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", callback=expanded, help="Take the model of a run's YAML file.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(help="Side of the images. [of --config, or the model's own]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's stages: their shares of weights and compute, and what a cut before each would cost."""
    given = list(overrides or [])
    if "=" in model:  # an override, and no model before it
        model, given = "", [model, *given]
    at_least(1, resolution=resolution)
    if not model and config is None:
        raise UserError("stages: a model is needed, such as `ssam-scale stages resnet50`, or --config FILE")
    from ssam_scale.config.load import load, resolved

    if config is None:
        values = {**_NEEDED, "model": {"name": model}}
        run = resolved(values, {(): "the command line"}, given)
    else:
        run = load(config, [*([f"model.name={model}"] if model else []), *given])
    import torch

    from ssam_scale.models import build_model, check_stages, stages_of
    from ssam_scale.train.predict_flops import stage_rows

    torch.manual_seed(run.train.seed)
    network = build_model(run)
    side = resolution or (run.data.resolution if config is not None else _own_side(network.model))
    if run.model.stages is None:
        stages_of(network.model)  # says what would work
    rows = stage_rows(network, side)
    if run.model.stages is not None:
        check_stages(network.model, network.stages, (2, 3, side, side))
    total, flops = sum(row["weights"] for row in rows), sum(row["flops"] for row in rows)
    caption = (
        f"{run.model.name} at {side} px: {total / 1e6:,.4g} M weights, {flops / 1e9:,.4g} GFLOPs in the forward of an "
        "image. weights, compute: a stage's share of them. With perturbation.mask.cut at a stage, the weights from it "
        "to the end are perturbed, and the compute before it is shared by both passes; step / base: the FLOPs of such "
        "a step over the base optimizer's (`ssam-scale cost` measures time)"
    )
    show(rows, _COLUMNS, caption, as_json, "stage", ["M weights", "weights"])


_COLUMNS: Columns = {
    "cut": ("cut", 1, ".3f"),
    "M weights": ("weights", 1e-6, ",.3f"),
    "weights": ("weights_share", 1, ".1%"),
    "compute": ("compute_share", 1, ".1%"),
    "perturbed": ("perturbed_weights", 1, ".1%"),
    "shared": ("shared_compute", 1, ".1%"),
    "step / base": ("step_over_base", 1, ".3f"),
}

# What a configuration has to say beside its model; nothing of it is read.
_NEEDED: dict[str, Any] = {
    "data": {"train": "unread.beton", "val": "unread.beton", "batch_size": 1},
    "optimizer": {"lr": 0.1},
    "train": {"epochs": 1},
}


def _own_side(model: Any) -> int:
    """Of the images that a model is built for."""
    size = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is None:
        size = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 224, 224))[1:]
    return int(size[0])
