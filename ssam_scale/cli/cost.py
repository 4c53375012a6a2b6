"""`ssam-scale cost`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssam_scale.cli.paths import expanded
from ssam_scale.cli.table import AsJson, Columns, at_least, show
from ssam_scale.cli.train import ConfigFile, Overrides

if TYPE_CHECKING:
    from ssam_scale.costs.profile import Measured
    from ssam_scale.train.predict_cost import Machines


def cost_command(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[list[int] | None, typer.Option(help="GPUs; may be given several times. [1 and 8]")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of one node. [8]")] = None,
    node_bandwidth: Annotated[
        float | None, typer.Option(help="GB/s that a GPU sends inside of its node. [300]")
    ] = None,
    network_bandwidth: Annotated[float | None, typer.Option(help="GB/s that a GPU sends to another node. [25]")] = None,
    scaling: Annotated[
        str, typer.Option(help="weak: a GPU keeps the images that were measured; strong: it shares the batch.")
    ] = "weak",
    images: Annotated[
        int | None, typer.Option(help="Images of the largest pass that is measured. [8; 64 on a GPU]")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements, of which the median counts.")] = 5,
    times: Annotated[
        Path | None, typer.Option(callback=expanded, help="Take the times from this file; measure nothing.")
    ] = None,
    save_times: Annotated[
        Path | None, typer.Option(callback=expanded, help="Write the measured times to this file.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Instead, run one process of the largest job here, and compare what it sends."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Predict time, bytes on the wire and memory of a step: base optimizer, dense SAM, the configured plan."""
    from ssam_scale.config.load import load
    from ssam_scale.train.predict_cost import Machines, cost_rows, measured, placement_of, simulated_rows

    given = {"node_bandwidth": node_bandwidth, "network_bandwidth": network_bandwidth}
    known: dict[str, Any] = {name: 1e9 * value for name, value in given.items() if value is not None}
    known |= {} if gpus_per_node is None else {"per_node": gpus_per_node}
    machines = Machines(gpus or [1, 8], scaling=scaling, **known)
    resolved = load(config, overrides or [])
    machines.check()
    if dry_run:
        rows = simulated_rows(resolved, machines.cluster(max(machines.gpus)))
        show(rows, _DRY_COLUMNS, _DRY_CAPTION, as_json, "plan")
        return
    at_least(4, images=images)
    at_least(1, repeats=repeats)
    for count in machines.gpus:  # before minutes of measuring
        placement_of(resolved, machines.cluster(count))
    found = measured(resolved, images=images, repeats=repeats, times=times, save=save_times)
    predicted = cost_rows(resolved, found, machines)
    show(predicted, _COLUMNS, _caption(found, machines, predicted), as_json, "plan")


def _caption(found: Measured, machines: Machines, rows: Sequence[Mapping[str, Any]]) -> str:
    fewest, sizes = found.times.fewest, ", ".join(str(each.images) for each in found.times.passes)
    few = any(0 < row["ascent_images"] < fewest for row in rows)
    return (
        f"{found.model}, {found.precision}, measured with {sizes} images of {found.resolution} px on "
        f"{found.hardware}; {machines.scaling} scaling; {machines.node_bandwidth / 1e9:g} GB/s inside a node of "
        f"{machines.per_node}, {machines.network_bandwidth / 1e9:g} GB/s between nodes. A real step lies between ms, "
        "with what is sent hidden as far as it can be, and unhidden ms. Memory is in GiB of one GPU; host copy: of the "
        "first process's machine, while a checkpoint is written"
        + (f". Passes of fewer than {fewest} images are taken to last as long as those of {fewest}" if few else "")
    )


_DRY_CAPTION = (
    "One process, with torch's fake process group in the place of the others; sent in a step, held of the weights, "
    "the optimizer's state and the mask. Where a mask is chosen by scores, these were random ones"
)
_COLUMNS: Columns = {
    "GPUs": ("gpus", 1, "d"),
    "images": ("images", 1, ",.4g"),
    "ascent": ("ascent_images", 1, ",.4g"),
    "density": ("density", 1, ".3f"),
    "ms": ("seconds", 1e3, ",.1f"),
    "unhidden ms": ("seconds_unhidden", 1e3, ",.1f"),
    "ms / base": ("seconds_over_base", 1, ".3f"),
    "MiB sent": ("bytes", 2**-20, ",.1f"),
    "sent / base": ("bytes_over_base", 1, ".3f"),
    "model GiB": ("memory_model", 2**-30, ".3f"),
    "perturbing": ("memory_perturbing", 2**-30, ".3f"),
    "activations": ("memory_activations", 2**-30, ".3f"),
    "all": ("memory_total", 2**-30, ".3f"),
    "host copy": ("memory_copy", 2**-30, ".3f"),
}
_DRY_COLUMNS: Columns = {
    "GPUs": ("gpus", 1, "d"),
    "backend": ("backend", 1, ""),
    "mask": ("mask", 1, ""),
    "density": ("density", 1, ".3f"),
    "MiB sent": ("sent", 2**-20, ",.2f"),
    "predicted": ("predicted_sent", 2**-20, ",.2f"),
    "MiB held": ("held", 2**-20, ",.2f"),
    "predicted ": ("predicted_held", 2**-20, ",.2f"),
    "model GiB": ("memory_model", 2**-30, ".3f"),
    "perturbing": ("memory_perturbing", 2**-30, ".3f"),
}
