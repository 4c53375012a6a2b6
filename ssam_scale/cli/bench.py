"""`ssam-scale bench`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssam_scale.errors import UserError

from .table import AsJson, Columns, RecordIn, at_least, check_record, markdown, show

if TYPE_CHECKING:
    from ssam_scale.bench.networks import Setting
    from ssam_scale.bench.scenarios import Scenario

app = typer.Typer(help="Measure parts of the package on this machine.", no_args_is_help=True)

Models = Annotated[
    list[str] | None,
    typer.Option(
        help="timm models, of families that have stages; may be given several times. [resnet50 and vit_small]"
    ),
]
Resolution = Annotated[int | None, typer.Option(help="Side of the images, pixels. [96; 224 on a GPU]")]
Plans = Annotated[list[str] | None, typer.Option(help="Only these beside `base`; may be given several times. [all]")]
Compile = Annotated[bool, typer.Option("--compile", help="Compile the networks, as train.compile does.")]
BatchSize = Annotated[int | None, typer.Option(help="Images of a step. [8; 128 on a GPU]")]

_BYTES_RESOLUTION, _BYTES_BATCH = 32, 2


@app.callback()
def _group() -> None:
    """Measure parts of the package on this machine."""


@app.command("masks")
def masks_command(
    scores: Annotated[int, typer.Option(help="Scores over all processes.")] = 86_000_000,
    ranks: Annotated[list[int] | None, typer.Option(help="Processes; may be given several times. [1 and 2]")] = None,
    repeats: Annotated[int, typer.Option(help="Repetitions, of which the median counts.")] = 5,
    means: Annotated[bool, typer.Option("--means", help="Also the means over rows that row masks need.")] = False,
    record: RecordIn = None,
    as_json: AsJson = False,
) -> None:
    """Choose half of the scores: time and memory, and those of concatenating them and calling torch.topk."""
    from ssam_scale.bench.mask_selection import bench_masks

    check_record(record)
    sizes = ranks or [1, 2]
    at_least(1, scores=scores, repeats=repeats, ranks=min(sizes))
    rows = bench_masks(scores, sizes, repeats, means)
    caption = f"{rows[0]['device']}; medians of {rows[0]['repeats']}"
    _report(_Result("mask-selection", "Choosing half of the scores", _MASKS, "what"), rows, caption, record, as_json)


@app.command("storage")
def storage_command(
    weights: Annotated[int, typer.Option(help="Weights of the model.")] = 86_000_000,
    record: RecordIn = None,
    as_json: AsJson = False,
) -> None:
    """Memory that masks of each pattern take, always and while their weights are perturbed."""
    from ssam_scale.bench.mask_memory import bench_storage

    check_record(record)
    at_least(1000, weights=weights)
    rows = bench_storage(weights)
    result = _Result("mask-memory", "Memory that masks take", _STORAGE, "what")
    _report(result, rows, rows[0]["device"], record, as_json)


@app.command("steps")
def steps_command(
    models: Models = None,
    plans: Plans = None,
    repeats: Annotated[int, typer.Option(help="Rounds of every plan, of which the median counts.")] = 10,
    resolution: Resolution = None,
    batch_size: BatchSize = None,
    compile: Compile = False,
    record: RecordIn = None,
    as_json: AsJson = False,
) -> None:
    """Time of a step by plan over the base optimizer's, in turns, and what the cost model predicts."""
    from ssam_scale.bench.step_time import bench_steps

    check_record(record)
    result = _Result("step-time", "Time of a step by plan", _STEPS)
    _compare(bench_steps, result, models, plans, repeats, resolution, batch_size, compile, record, as_json)


@app.command("memory")
def memory_command(
    models: Models = None,
    plans: Plans = None,
    repeats: Annotated[int, typer.Option(help="Steps of every plan, of which the median counts.")] = 3,
    resolution: Resolution = None,
    batch_size: BatchSize = None,
    compile: Compile = False,
    record: RecordIn = None,
    as_json: AsJson = False,
) -> None:
    """Peak memory of a step by plan over the base optimizer's, each in a new process."""
    from ssam_scale.bench.peak_memory import bench_peak

    check_record(record)
    result = _Result("peak-memory", "Peak memory of a step by plan", _PEAK)
    _compare(bench_peak, result, models, plans, repeats, resolution, batch_size, compile, record, as_json)


@app.command("bytes")
def bytes_command(
    models: Annotated[
        list[str] | None,
        typer.Option(help="timm models, of families that have stages; may be given several times. [vit_tiny]"),
    ] = None,
    plans: Annotated[
        list[str] | None, typer.Option(help="Only these beside `base` and `sam`; may be given several times. [all]")
    ] = None,
    backends: Annotated[
        list[str] | None,
        typer.Option(help="ddp, fsdp2, hsdp (two copies), zero0 to zero3; may be given several times. [all]"),
    ] = None,
    ranks: Annotated[int, typer.Option(help="Processes that share or copy the weights; hsdp takes twice as many.")] = 2,
    bf16: Annotated[
        bool,
        typer.Option("--bf16", help="Under bf16 autocast, as with train.precision=bf16; a GPU that has it does so."),
    ] = False,
    record: RecordIn = None,
    as_json: AsJson = False,
) -> None:
    """Bytes that a process sends in a step, by plan and backend, and those of the ascent beside their floor."""
    from ssam_scale.bench.bytes_sent import bench_bytes, chosen_backends
    from ssam_scale.bench.networks import setting_of
    from ssam_scale.bench.scenarios import select_scenarios, sharded_scenarios

    check_record(record)
    if ranks < 2:
        raise UserError(f"--ranks is {ranks}; at least 2 are needed to send anything")
    compared, chosen = select_scenarios(plans, sharded_scenarios(), ("base", "sam")), chosen_backends(backends)
    # What is sent depends neither on the images nor on how many there are.
    settings = [setting_of(model, _BYTES_RESOLUTION, _BYTES_BATCH) for model in models or ["vit_tiny"]]
    settings = [replace(setting, asked="bf16") if bf16 else setting for setting in settings]
    for setting in settings:
        setting.check()
    rows = [row for setting in settings for row in bench_bytes(setting, ranks, chosen, compared)]
    versions = rows[0]["versions"]
    precision = rows[0]["precision"]
    caption = f"bytes that one process sends, {precision}; torch {versions['torch']}, timm {versions['timm']}"
    _report(_Result("ascent-bytes", "Bytes that an ascent sends", _BYTES), rows, caption, record, as_json)


def _compare(
    bench: Callable[[Setting, int, Sequence[Scenario]], list[dict[str, Any]]],
    result: _Result,
    models: list[str] | None,
    plans: list[str] | None,
    repeats: int,
    resolution: int | None,
    batch_size: int | None,
    compile: bool,
    record: Path | None,
    as_json: bool,
) -> None:
    """Measure each model under the plans on one process, and show it."""
    from ssam_scale.bench.scenarios import scenarios, select_scenarios

    settings = _settings(models, repeats, resolution, batch_size, compile)
    compared = select_scenarios(plans, scenarios(), batch_size=min(setting.batch_size for setting in settings))
    rows = [row for setting in settings for row in bench(setting, repeats, compared)]
    _report(result, rows, _caption(rows), record, as_json)


@dataclass(frozen=True)
class _Result:
    """What a result is called in its file's name and heading, and what its table shows of the rows."""

    what: str
    title: str
    columns: Columns
    name: str = "plan"


def _report(result: _Result, rows: list[dict[str, Any]], caption: str, record: Path | None, as_json: bool) -> None:
    """Show what was measured, and write it where `--record` says."""
    show(rows, result.columns, caption, as_json, result.name)
    if record is None:
        return
    from ssam_scale.bench.record import provenance, result_path, write

    text = [f"# {result.title}", "", f"{caption}.", "", *markdown(rows, result.columns, result.name)]
    write(result_path(record, result.what), text, rows, provenance())


def _settings(
    models: list[str] | None, repeats: int, resolution: int | None, batch_size: int | None, compile: bool
) -> list[Setting]:
    """One a model; all are looked at before the first is measured."""
    from ssam_scale.bench.networks import DEFAULT_MODELS, setting_of

    at_least(1, repeats=repeats, resolution=resolution)
    at_least(4, batch_size=batch_size)  # half of a batch is a plan of its own, and BatchNorm needs two images
    settings = [setting_of(model, resolution, batch_size, compile) for model in models or DEFAULT_MODELS]
    for setting in settings:
        setting.check()
    return settings


def _caption(rows: list[dict[str, Any]]) -> str:
    first = rows[0]
    side, versions = first["resolution"], first["versions"]
    precision = f"{first['precision']}{', compiled' if first['compile'] else ''}"
    caption = (
        f"{first['hardware']}, {first['threads']} threads; batches of {first['batch_size']} images of {side} × {side}, "
        f"{precision}; medians of {first['repeats']}; torch {versions['torch']}, timm {versions['timm']}"
    )
    missing = importlib.util.find_spec("pytorch_optimizer") is None
    return caption + ("; pytorch_optimizer is not installed and left out" if missing else "")


_MASKS: Columns = {
    "scores": ("scores", 1, ",d"),
    "ranks": ("ranks", 1, "d"),
    "exact": ("exact", 1, ""),
    "ms": ("seconds", 1e3, ",.1f"),
    "topk ms": ("topk_seconds", 1e3, ",.1f"),
    "topk / ours": ("topk_time_over_ours", 1.0, ".1f"),
    "unsorted topk / ours": ("unsorted_topk_time_over_ours", 1.0, ".1f"),
    "extra bytes per weight": ("extra_bytes_per_weight", 1.0, ".3f"),
    "of topk": ("topk_extra_bytes_per_weight", 1.0, ".1f"),
    "bytes to collectives": ("collective_bytes", 1.0, ",.0f"),
    "by topk": ("topk_collective_bytes", 1.0, ",.0f"),
}
_STORAGE: Columns = {
    "weights": ("weights", 1, ",d"),
    "density": ("density", 1, ".3f"),
    "restored exactly": ("exact", 1, ""),
    "persistent bytes per weight": ("persistent_bytes_per_weight", 1.0, ".4f"),
    "transient bytes per weight": ("transient_bytes_per_weight", 1.0, ".3f"),
    "transient / (density × weights)": ("transient_over_perturbed", 1.0, ".3f"),
}
_STEPS: Columns = {
    "model": ("model", 1, ""),
    "density": ("density", 1.0, ".3f"),
    "t": ("suffix_share", 1.0, ".3f"),
    "f": ("fraction", 1.0, ".2g"),
    "ms": ("seconds", 1e3, ",.1f"),
    "ms iqr": ("seconds_iqr", 1e3, ",.1f"),
    "time / base": ("time_over_base", 1.0, ".3f"),
    "time / base iqr": ("time_over_base_iqr", 1.0, ".3f"),
    "predicted": ("predicted_over_base", 1.0, ".3f"),
    "at most": ("target_over_base", 1.0, ".3f"),
    "perturb / floor": ("perturb_over_floor", 1.0, ".2f"),
}
_BYTES: Columns = {
    "model": ("model", 1, ""),
    "backend": ("backend", 1, ""),
    "processes": ("ranks", 1, "d"),
    "density": ("density", 1.0, ".3f"),
    "step KiB": ("step_bytes", 2**-10, ",.1f"),
    "predicted": ("predicted_bytes", 2**-10, ",.1f"),
    "ascent KiB": ("ascent_bytes", 2**-10, ",.1f"),
    "collectives": ("ascent_calls", 1.0, ".4g"),
    "step / base": ("step_bytes_over_base", 1.0, ".3f"),
    "ascent / dense": ("ascent_bytes_over_dense", 1.0, ".3f"),
    "floor": ("floor_over_dense", 1.0, ".3f"),
    "at most": ("target_over_dense", 1.0, ".3f"),
}
_PEAK: Columns = {
    "model": ("model", 1, ""),
    "density": ("density", 1.0, ".3f"),
    "kept MiB": ("persistent_bytes", 2**-20, ",.1f"),
    "in the step MiB": ("step_bytes", 2**-20, ",.1f"),
    "peak MiB": ("peak_bytes", 2**-20, ",.1f"),
    "peak / base": ("peak_over_base", 1.0, ".3f"),
}
