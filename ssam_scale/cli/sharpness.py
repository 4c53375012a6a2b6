"""`ssam-scale sharpness`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ssam_scale.cli.paths import expanded, expanded_images, expanded_text
from ssam_scale.cli.table import AsJson, Sheet, at_least
from ssam_scale.cli.trained import EXPERIMENT, URI, Ema, Experiment, TrackingUri
from ssam_scale.console import console
from ssam_scale.errors import UserError

if TYPE_CHECKING:
    from ssam_scale.trained.sharpness import Found


def sharpness_command(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            callback=expanded_text,
            help="Checkpoints, or folders of them and ids or names of runs in MLflow, whose newest are meant.",
        ),
    ],
    data: Annotated[
        Path,
        typer.Option(
            metavar="train|val|PATH",
            callback=expanded_images,
            help="Images: those that the first one was trained on, its validation's, or others as data.val takes them.",
        ),
    ] = Path("train"),
    images: Annotated[int, typer.Option(help="How many of them, at random and the same ones always.")] = 1024,
    rho: Annotated[float, typer.Option(help="Radius of the gap.")] = 0.05,
    eigenvalues: Annotated[int, typer.Option(help="Largest eigenvalues of the Hessian; 0: none.")] = 1,
    probes: Annotated[int, typer.Option(help="Random vectors of the Hessian's trace; 0: no trace.")] = 10,
    directions: Annotated[int, typer.Option(help="Random directions of the mean gap; 0: no mean gap.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            callback=expanded,
            help="Also look at the loss along random directions: curve.svg, and sharpness.json with all numbers.",
        ),
    ] = None,
    plane: Annotated[
        bool, typer.Option("--plane", help="Along two at once, too: plane.svg, of POINTS² losses.")
    ] = False,
    span: Annotated[float, typer.Option(help="How far along directions; 1: as far as the weights are long.")] = 0.5,
    points: Annotated[int, typer.Option(help="Losses along one direction.")] = 21,
    ema: Ema = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    micro_batch: Annotated[int, typer.Option(help="Images of one pass on one process; no result depends on it.")] = 32,
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Where processes compute.")] = "auto",
    tracking_uri: TrackingUri = URI,
    experiment: Experiment = EXPERIMENT,
    as_json: AsJson = False,
) -> None:
    """See how sharp minima are: SAM's gap, the Hessian's eigenvalues and trace, the loss along random directions.

    Checkpoints may be sharded. Under torchrun or deepspeed, every process runs this command on its share of the images.
    """
    at_least(1, images=images, micro_batch=micro_batch)
    at_least(0, eigenvalues=eigenvalues, probes=probes, directions=directions, seed=seed)
    at_least(3, points=points)
    for option, value in (("--rho", rho), ("--span", span)):
        if not (math.isfinite(value) and value > 0.0):
            raise UserError(f"{option} is {value:g}; a number above 0 is needed")
    if plane and output is None:
        raise UserError("--plane is a picture: say where it goes, with -o FOLDER")
    _check_folder(output)

    from ssam_scale.launcher import ended_with_launcher
    from ssam_scale.sharding import join_world
    from ssam_scale.sharpness import Measures
    from ssam_scale.trained import find_checkpoint
    from ssam_scale.trained.sharpness import Asked, sharpness_of

    measures = Measures(rho, eigenvalues, probes, directions, seed)
    along = None if output is None else span
    asked = Asked(measures, str(data), images, micro_batch, ema, along, points, plane)
    with ended_with_launcher(), join_world(device=device) as world:
        out = console(stderr=True, quiet=not world.first)
        places = [
            find_checkpoint(each, best=None, tracking_uri=tracking_uri, experiment=experiment) for each in checkpoints
        ]
        found = sharpness_of(places, asked, world, lambda line: out.print(line, soft_wrap=True))
        if not world.first:
            return
        rows = [_finite(each.row()) for each in found]
        written = [] if output is None else _write(output, found, rows, str(data))
        if as_json:
            print(json.dumps(rows, indent=2, ensure_ascii=False))
        else:
            console().print(_table(found, str(data)))
        for path in written:
            out.print(f"written: {path}", soft_wrap=True)


def _table(found: Sequence[Found], data: str) -> Sheet:
    """What was measured, a row for each checkpoint; a dash is for what was not asked for."""
    count = max(len(each.sharpness.eigenvalues) for each in found)
    titles = ["checkpoint", "loss", "gap", "gradient"]
    titles += ["mean gap"] if any(each.sharpness.random_gap is not None for each in found) else []
    titles += [f"eigenvalue {number}" for number in range(1, count + 1)]
    titles += ["trace"] if any(each.sharpness.trace is not None for each in found) else []
    rows = []
    for each in found:
        of = each.sharpness
        cells = [each.label, f"{of.loss:.4f}", f"{of.gap:.4f}", f"{of.gradient_norm:.3g}"]
        cells += [f"{of.random_gap:.2g}"] if of.random_gap is not None else []
        cells += [f"{value:.3f}" for value in of.eigenvalues] + ["—"] * (count - len(of.eigenvalues))
        if of.trace is not None:
            cells.append(f"{of.trace:.1f}" + (f" ± {of.trace_error:.1f}" if of.trace_error is not None else ""))
        rows.append(cells)
    first = found[0].sharpness
    worst = max((r for each in found for r in each.sharpness.residuals), default=0.0)
    lines = [
        f"{first.images:,} images of {data}; gap: how much higher the loss is at radius {first.rho:g} along its "
        "gradient; BatchNorm by its running statistics",
    ]
    lines += [f"eigenvalues of the Hessian, to {worst:.2g} at the worst"] if count else []
    lines += ["trace: ± its standard error"] if "trace" in titles else []
    return Sheet(titles, rows, "; ".join(lines))


def _finite(value: Any) -> Any:
    """With null in the place of numbers that JSON has no words for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_FILES = ("sharpness.json", "curve.svg", "plane.svg")


def _check_folder(folder: Path | None) -> None:
    """Whether results can be written there, before anything is measured.

    Raises:
        UserError: they cannot.
    """
    if folder is None:
        return
    from ssam_scale.folders import why_not_replaceable, why_not_writable

    if (problem := why_not_writable(folder)) is not None:
        raise UserError(f"-o {folder}: {problem}")
    for name in _FILES:
        if (problem := why_not_replaceable(folder / name)) is not None:
            raise UserError(f"-o {folder}: {name} in it {problem}")


def _write(folder: Path, found: Sequence[Found], rows: list[Any], data: str) -> list[Path]:
    """The numbers and the pictures, each file whole or not there; where they are."""
    from ssam_scale.tracking.compare.files import write_whole
    from ssam_scale.tracking.landscape import Around, curves_picture, planes_picture

    around = [Around(each.label, each.places, each.curve, each.plane) for each in found]
    of = f"loss on {found[0].sharpness.images:,} images of {data}"
    texts = {"sharpness.json": json.dumps(rows, indent=1, ensure_ascii=False), "curve.svg": curves_picture(around, of)}
    if all(each.plane is not None for each in found):
        texts["plane.svg"] = planes_picture(around, of)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"-o {folder}: {error.strerror or error}") from error
    for name, text in texts.items():
        write_whole("-o", folder / name, text)
    return [folder / name for name in texts]
