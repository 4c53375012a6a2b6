"""`ssam-scale cost`: look at what was asked for, measure, predict, print."""

from __future__ import annotations

from pathlib import Path

import torch

from ssam_scale.cli.table import Columns, show
from ssam_scale.config.schema import Config
from ssam_scale.errors import UserError
from ssam_scale.train.predict_cost import Machines, cost_rows, measured, rehearsal_rows, spreading_of, staged_model

# Of the pass that is measured.
_CPU_IMAGES, _CUDA_IMAGES = 8, 64

_COLUMNS: Columns = {
    "GPUs": ("gpus", 1, "d"),
    "images": ("images", 1, ",.4g"),
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


def show_cost(
    config: Config,
    machines: Machines,
    *,
    images: int | None,
    repeats: int,
    times: Path | None,
    save: Path | None,
    as_json: bool,
) -> None:
    """Measure or read, predict, and print.

    Raises:
        UserError: what is asked for makes no sense, or cannot be had.
    """
    machines.check()
    for option, value, least in (("images", images, 4), ("repeats", repeats, 1)):
        if value is not None and value < least:
            raise UserError(f"--{option} is {value}; at least {least} {'is' if least == 1 else 'are'} needed")
    for gpus in machines.gpus:
        spreading_of(config, machines.cluster(gpus))
    size = images or (_CUDA_IMAGES if torch.cuda.is_available() else _CPU_IMAGES)
    found = measured(config, staged_model(config), images=size, repeats=repeats, times=times, save=save)
    caption = (
        f"{found.model}, {found.precision}, measured with {found.images} images of {found.resolution} px on "
        f"{found.hardware}; {machines.scaling} scaling; {machines.node_bandwidth / 1e9:g} GB/s inside a node of "
        f"{machines.per_node}, {machines.network_bandwidth / 1e9:g} GB/s between nodes. A real step lies between ms, "
        "with what is sent hidden as far as it can be, and unhidden ms. Memory is in GiB of one GPU"
    )
    show(cost_rows(config, found, machines), _COLUMNS, caption, as_json, "plan")


def show_rehearsal(config: Config, machines: Machines, *, as_json: bool) -> None:
    """Run one process of the largest job, and print.

    Raises:
        UserError: what is asked for makes no sense, or cannot be had.
    """
    machines.check()
    caption = (
        "One process, with torch's fake process group in the place of the others; sent in a step, held of the weights, "
        "the optimizer's state and the mask. Where a mask is chosen by scores, these were random ones"
    )
    rows = rehearsal_rows(config, machines.cluster(max(machines.gpus)))
    show(rows, _DRY_COLUMNS, caption, as_json, "plan")
