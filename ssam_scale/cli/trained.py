"""`ssam-scale evaluate`, `predict`, `export` and `average`: what comes after training."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssam_scale.cli.paths import expanded, expanded_images, expanded_text, expanded_uri
from ssam_scale.cli.table import Sheet
from ssam_scale.console import console
from ssam_scale.errors import UserError

if TYPE_CHECKING:
    from ssam_scale.trained import Accuracy, Key, Trained

_CLASSES = 10  # and confusions, of which a table for a terminal has the worst
_LISTED = 20

Place = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        callback=expanded_text,
        help="A checkpoint, such as checkpoints/epoch_0090; a folder of them, or the id or name of a run in MLflow: "
        "its newest; or, with --config, a file of weights.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Dotted overrides of the run's configuration, e.g. data.eval_resolution=288."),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", callback=expanded, help="Of a file of weights: the YAML file of its network."),
]
Ema = Annotated[
    bool | None,
    typer.Option("--ema/--no-ema", help="The averaged weights, or the raw ones. [averaged, where there are any]"),
]
Best = Annotated[
    str | None,
    typer.Option(metavar="METRIC", help="Of several checkpoints the best by its evaluation: top1, top5, loss."),
]
TrackingUri = Annotated[
    str, typer.Option("--tracking-uri", callback=expanded_uri, help="Where a run is looked for: MLflow's tracking URI.")
]
Experiment = Annotated[str, typer.Option("--experiment", help="In which a run's name is looked for.")]
URI, EXPERIMENT = "sqlite:///mlflow.db", "ssam_scale"


def evaluate_command(
    checkpoint: Place,
    overrides: Overrides = None,
    data: Annotated[
        Path | None,
        typer.Option(
            callback=expanded_images,
            help="Images: a folder of class folders, a .beton file, wds:SHARDS. [data.val of the run]",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="JSON",
            callback=expanded,
            help="All labels that are right of each image, by its name, as ReaL's real.json has them.",
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", callback=expanded, help="Draw which classes are taken for which: .png, .svg, .pdf."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    ema: Ema = None,
    best: Best = None,
    config: ConfigFile = None,
    tracking_uri: TrackingUri = URI,
    experiment: Experiment = EXPERIMENT,
) -> None:
    """Evaluate a trained network: top-1 and top-5, loss, accuracy by class, calibration, confusions.

    Images of other folders are matched with the classes that it was trained on by their names, or by numbers that are
    their names, and only those classes are scored.
    """
    from ssam_scale import trained as after
    from ssam_scale.data import open_images
    from ssam_scale.data.tree import images_of_tree
    from ssam_scale.tracking.confusion import check_picture, draw_confusions

    if picture is not None:
        check_picture(picture)
    network = _opened(checkpoint, overrides, config, ema, best, tracking_uri, experiment)
    place = data or network.config.data.val
    if labels is not None and place.is_dir():
        images, closed = images_of_tree(place)
        if closed:
            name, why = min(closed.items())
            raise UserError(f"{place}: {name} {why}; mend or remove it")
        key = after.by_labels(images, network, labels)
    else:
        found = open_images(_in_place(place))
        if not found.images:
            raise UserError(f"{found.place}: no images in there")
        images = found  # type: ignore[assignment]
        key = after.by_folders(found, network) if labels is None else after.by_labels(found, network, labels)
    if picture is not None and not key.one_each:
        raise UserError("--picture: images of --labels have several labels, so that none is taken for another")
    result = after.evaluate_on(images, key, network, _watched("evaluating"))
    if picture is not None:
        names = [each.name for each in result.classes]
        title = f"top-1 {result.top1:.2f}% of {result.images:,} images"
        draw_confusions(picture, names, result.confusion_matrix(), title)
    if as_json:
        print(json.dumps(_as_json(network, images.place, key, result), indent=2, ensure_ascii=False))
        return
    _print_accuracy(network, images.place, key, result)
    if picture is not None:
        print(f"written: {picture}")


def predict_command(
    checkpoint: Place,
    folder: Annotated[
        Path,
        typer.Argument(
            callback=expanded_images, help="A folder of images, however they lie in it; or a .beton file, wds:SHARDS."
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=expanded, help="The table: a .csv or .parquet file.")
    ],
    overrides: Overrides = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes of each image.")] = 1,
    ema: Ema = None,
    best: Best = None,
    config: ConfigFile = None,
    tracking_uri: TrackingUri = URI,
    experiment: Experiment = EXPERIMENT,
) -> None:
    """Write what a trained network takes images for: their names, the most probable classes, and how probable."""
    from ssam_scale import trained as after

    after.check_table(output)
    network = _opened(checkpoint, overrides, config, ema, best, tracking_uri, experiment)
    found = after.predict(folder, network, top, _watched("predicting"))
    found.write(output)
    print(f"{output}: {len(found.files):,} images by {network.source}, {network.weights} weights")
    if found.unreadable:
        more = f", and {len(found.unreadable) - _LISTED:,} more" if len(found.unreadable) > _LISTED else ""
        print(f"{len(found.unreadable):,} could not be read, and are left out:", file=sys.stderr)
        print(*found.unreadable[:_LISTED], sep="\n", end=f"{more}\n", file=sys.stderr)


def export_command(
    checkpoint: Place,
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=expanded, help="A folder for safetensors; else a file.")
    ],
    format: Annotated[
        str,
        typer.Option(
            help="safetensors: a folder that timm loads; onnx; torch-export: a .pt2 file, run without the model's code."
        ),
    ] = "safetensors",
    overrides: Overrides = None,
    data: Annotated[
        Path | None,
        typer.Option(callback=expanded_images, help="Images to compare its logits by. [data.val of the run]"),
    ] = None,
    ema: Ema = None,
    best: Best = None,
    config: ConfigFile = None,
    tracking_uri: TrackingUri = URI,
    experiment: Experiment = EXPERIMENT,
) -> None:
    """Write a trained network for others, read it back, and compare its logits on real images."""
    from ssam_scale import trained as after

    after.check_export(format, output)
    network = _opened(checkpoint, overrides, config, ema, best, tracking_uri, experiment)
    print(f"{network.source}, {network.weights} weights")
    print(after.export(network, format, output, None if data is None else _in_place(data)))


def average_command(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CHECKPOINT...", callback=expanded, help="Two or more; or a folder of them.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", callback=expanded, help="The folder of the new checkpoint.")
    ],
    last: Annotated[int | None, typer.Option(metavar="K", min=2, help="Of a folder, the K newest.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            callback=expanded_images,
            help="Training images, by which BatchNorm's statistics are made anew. [they are averaged, too]",
        ),
    ] = None,
    ema: Ema = None,
) -> None:
    """Write a checkpoint whose weights are the mean of several checkpoints': a uniform soup (arXiv 2203.05482)."""
    from ssam_scale import trained as after

    place = None if data is None else _in_place(data)
    print(after.average(checkpoints, output, last=last, ema=ema, data=place, watch=_watched("measuring BatchNorm")))


def _in_place(data: Path) -> Path:
    """As `data.val` has it; a folder is one of class folders."""
    return Path(f"folder:{data}") if data.is_dir() else data


def _opened(
    checkpoint: str,
    overrides: Sequence[str] | None,
    config: Path | None,
    ema: bool | None,
    best: str | None,
    tracking_uri: str,
    experiment: str,
) -> Trained:
    from ssam_scale.trained import find_checkpoint, open_trained

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("this is the work of one process; start it without torchrun, deepspeed or srun")
    if config is None:
        place = find_checkpoint(checkpoint, best=best, tracking_uri=tracking_uri, experiment=experiment)
    else:
        place = Path(checkpoint)
    return open_trained(place, overrides or [], config_file=config, ema=ema)


def _watched(doing: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """A bar on a terminal's standard error."""
    out = console(stderr=True)

    def watched(batches: Iterable[Any], count: int) -> Iterable[Any]:
        if not out.is_terminal:
            return batches
        from rich.progress import track

        return track(batches, doing, total=count, console=out, transient=True)

    return watched


def _as_json(network: Trained, place: str, key: Key, result: Accuracy) -> dict[str, Any]:
    return {
        "checkpoint": network.source,
        "weights": network.weights,
        "model": network.config.model.name,
        "data": place,
        "eval_resolution": network.config.data.eval_resolution,
        "eval_crop_ratio": network.config.data.eval_crop_ratio,
        "eval_flip": network.config.data.eval_flip,
        "scored": key.said,
        **result.as_json(),
    }


def _print_accuracy(network: Trained, place: str, key: Key, result: Accuracy) -> None:
    print(f"{network.config.model.name}, {network.weights} weights of {network.source}, on {place}: {key.said}")
    print(result)
    if result.damaged:
        print(f"{len(result.damaged):,} damaged images do not count: {', '.join(result.damaged[:_LISTED])}")
    known = [(index, each) for index, each in enumerate(result.classes) if each.top1 is not None]
    if not known:
        return
    known.sort(key=lambda pair: pair[1].top1 or 0.0)
    mostly = result.mostly_taken_for()
    rows = [[each.name, mostly.get(index, "—"), f"{each.images:,}", f"{each.top1:.2f}"] for index, each in known]
    caption = (
        f"the {_CLASSES} classes of the lowest top-1; --json has all {len(known):,}" if len(rows) > _CLASSES else ""
    )
    console().print(Sheet(["class", "otherwise taken for", "images", "top-1 %"], rows[:_CLASSES], caption, words=2))
