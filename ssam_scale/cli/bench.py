"""`ssam-scale bench`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ssam_scale.errors import UserError

from .paths import expanded
from .table import AsJson, Columns, RecordIn, at_least, check_record, markdown, show

if TYPE_CHECKING:
    from ssam_scale.bench.networks import Setting
    from ssam_scale.bench.scenarios import Scenario
    from ssam_scale.config.study import LoadedStudy

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


@app.command("loader")
def loader_command(
    folder: Annotated[Path, typer.Argument(callback=expanded, help="Photographs: one folder of them per class.")],
    proportions: Annotated[
        list[float] | None,
        typer.Option(
            "--jpeg-proportion", help="Share of a .beton file's images that are JPEG; several times. [1 and 0.5]"
        ),
    ] = None,
    max_resolution: Annotated[
        int | None, typer.Option(help="Longer side in .beton files, pixels. [photographs have their own size]")
    ] = None,
    workers: Annotated[list[int] | None, typer.Option(help="Threads, or processes; several times. [1]")] = None,
    processes: Annotated[list[int] | None, typer.Option(help="That share the images; several times. [1]")] = None,
    resolution: Annotated[int, typer.Option(help="Side of the crops, pixels.")] = 224,
    batch_size: Annotated[int, typer.Option(help="Images of a batch.")] = 64,
    rounds: Annotated[int, typer.Option(help="Epochs of every reader in turns, of which the median counts.")] = 5,
    cold: Annotated[bool, typer.Option("--cold", help="From the disk, and not from the system's memory.")] = False,
    record: RecordIn = None,
    as_json: AsJson = False,
) -> None:
    """Read photographs as training does: ours, FFCV's decoder, ImageFolder, and WebDataset and DALI if installed."""
    from ssam_scale.bench.loader import Workload, bench_loader

    check_record(record)
    shares, counts, sizes = proportions or [1.0, 0.5], workers or [1], processes or [1]
    at_least(1, workers=min(counts), processes=min(sizes), batch_size=batch_size, rounds=rounds)
    at_least(8, resolution=resolution)
    if max_resolution is not None:
        at_least(8, max_resolution=max_resolution)
    if wrong := [share for share in shares if not 0.0 <= share <= 1.0]:
        raise UserError(f"--jpeg-proportion {wrong[0]:g}: a share is from 0 to 1")
    rows = bench_loader(Workload(folder, shares, max_resolution, counts, sizes, resolution, batch_size, rounds, cold))
    first = rows[0]
    size = f"a longer side of {max_resolution} pixels in .beton files" if max_resolution else "their own size"
    caption = (
        f"{first['hardware']}; {first['photographs']:,} photographs of {size}, {'cold' if cold else 'warm'}, crops of "
        f"{resolution} × {resolution}, batches of {batch_size}; medians of {rounds}"
    )
    _report(_Result("loader", "Reading photographs", _LOADER, "what"), rows, caption, record, as_json)


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


@app.command("accuracy")
def accuracy_command(
    study: Annotated[
        Path, typer.Argument(callback=expanded, help="The study's YAML file, such as those in benchmarks/studies.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            callback=expanded,
            metavar="FOLDER",
            help="Its images: train/ and val/ (or test/) with a folder per class; of Fashion-MNIST, the idx.gz files.",
        ),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(callback=expanded, help="Where its results and its MLflow store are. [runs/accuracy-STUDY]"),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Do the runs of this method only; may be given several times. [all]")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="At most so many seeds of each method. [the study's]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the runs that are left, and their time.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Do no runs; report on those that have finished.")] = False,
    record: RecordIn = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy against overhead: tune every method by the same budget, train it with several seeds, and compare.

    Each run is kept as it finishes; the same command goes on where it was stopped, at whatever moment.
    """
    from ssam_scale.config.study import LoadedStudy
    from ssam_scale.folders import why_not_writable

    check_record(record)
    at_least(1, seeds=seeds)
    loaded = LoadedStudy(study)
    place = folder or Path("runs") / f"accuracy-{loaded.name}"
    if (problem := why_not_writable(place)) is not None:
        raise UserError(f"--folder {place}: {problem}")
    from ssam_scale.bench.accuracy.results import alone
    from ssam_scale.bench.accuracy.work import Work, estimate, in_time

    work = Work(loaded, place, only or (), seeds)
    if dry_run:
        left = work.left()
        for cell in left:
            print(cell.name)
        print(f"{len(left)} runs, {in_time(estimate(left, work.results.lines))}; {len(work.results.lines)} are done")
        return
    if not report:
        from ssam_scale.bench.accuracy.train import Trainer
        from ssam_scale.data.split import prepare_split

        place.mkdir(parents=True, exist_ok=True)
        images = loaded.study.data
        with alone(place):
            work = Work(loaded, place, only or (), seeds)  # what another one has done in the meantime
            split = prepare_split(
                place / "data", images.source, data, train=images.train, tune=images.tune, val=images.val
            )
            work.do(Trainer(loaded, place, split).run, lambda line: print(line, file=sys.stderr, flush=True))
    if aside := work.set_aside:
        print(f"{aside} finished runs are of the study as it was, and do not count", file=sys.stderr)
    _report_accuracy(loaded, work.results.lines, place, record, as_json)


def _report_accuracy(
    loaded: LoadedStudy, lines: Mapping[str, Mapping[str, Any]], place: Path, record: Path | None, as_json: bool
) -> None:
    """Show what is known of a study, and write it into its folder and where `--record` says."""
    from ssam_scale.bench.accuracy.report import report as report_of
    from ssam_scale.bench.accuracy.report import tuning
    from ssam_scale.bench.record import provenance, result_path, write
    from ssam_scale.train.predict_flops import predictor

    if not lines:
        raise UserError(f"{place}: no run of {loaded.name} has finished there")
    found = report_of(loaded, lines, predictor(loaded, _LARGE))
    rows = [{**row, **_flat(row)} for row in found.rows]
    study = loaded.study
    show(rows, _ACCURACY, "\n".join(found.said), as_json, "method")
    text = [
        f"# {study.title}: accuracy against overhead",
        "",
        *(f"{sentence}  " for sentence in found.said),
        "",
        *markdown(rows, _ACCURACY, "method"),
        "",
        f"{study.data.train:,} training images, {loaded.epochs} epochs; knobs chosen by successive halving on "
        f"{study.data.tune:,} other training images, {study.tuning.candidates} candidates of every method. p: paired "
        "t test of top-1 with dense SAM's over the same seeds, Holm's correction over all methods. The overhead is by "
        "the runs' own probes, with the mean of their 95% intervals; at 224 px it is by FLOPs alone, without what a "
        "GPU takes to perturb, to choose masks and to launch kernels.",
        "",
        "## Tuning",
        "",
        "Mean top-1 on the tuning images of each candidate, by the last round that it was in; in brackets its runs.",
        "",
        *tuning(found.rows),
    ]
    for path in (place / "report.md", *([result_path(record, f"accuracy-{loaded.name}")] if record else [])):
        drawn = []
        if found.picture is not None:
            path.with_suffix(".svg").write_text(found.picture.svg, encoding="utf-8")
            drawn = ["", f"![{found.picture.alternative}]({path.with_suffix('.svg').name})", "", found.picture.caption]
        write(path, [*text, *drawn], rows, provenance())
    if not as_json:
        print(f"written: {place / 'report.md'}, .json and .svg")


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of a row, what its table shows of pairs and sections."""
    over, interval = row["overhead_interval"] or (None, None), row["over_sam_interval"] or (None, None)
    return {
        "overhead_low": over[0],
        "overhead_high": over[1],
        "over_sam_low": interval[0],
        "over_sam_high": interval[1],
        **{f"predicted_{name}": value for name, value in row["predicted"].items()},
    }


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
_LOADER: Columns = {
    "processes": ("processes", 1, ""),
    "workers": ("workers", 1, ""),
    "images/s": ("images_per_second", 1.0, ",.0f"),
    "processor ms an image": ("processor_seconds", 1e3, ".3f"),
    "FFCV's / it": ("over_ffcv", 1.0, ".2f"),
    "ImageFolder's / it": ("over_image_folder", 1.0, ".2f"),
    "first batch of an epoch ms": ("first_batch_seconds", 1e3, ".0f"),
    "a batch ms": ("batch_seconds", 1e3, ".0f"),
    "start s": ("start_seconds", 1.0, ".1f"),
    "memory MB": ("memory", 1e-6, ",.0f"),
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
_LARGE = {"resnet50": "resnet50", "vit_base": "vit_base_patch16_224"}
_ACCURACY: Columns = {
    "knobs": ("knobs_in_words", 1, ""),
    "seeds": ("seeds", 1, "d"),
    "top-1 %": ("top1", 1.0, ".2f"),
    "sd": ("top1_sd", 1.0, ".2f"),
    "over SAM": ("over_sam", 1.0, "+.2f"),
    "from": ("over_sam_low", 1.0, "+.2f"),
    "to": ("over_sam_high", 1.0, "+.2f"),
    "p": ("p", 1.0, ".3f"),
    "p (Holm)": ("p_holm", 1.0, ".3f"),
    "step / base": ("overhead", 1.0, ".3f"),
    "from ": ("overhead_low", 1.0, ".3f"),
    "to ": ("overhead_high", 1.0, ".3f"),
    "ResNet-50 at 224": ("predicted_resnet50", 1.0, ".3f"),
    "ViT-B/16 at 224": ("predicted_vit_base", 1.0, ".3f"),
}
_PEAK: Columns = {
    "model": ("model", 1, ""),
    "density": ("density", 1.0, ".3f"),
    "kept MiB": ("persistent_bytes", 2**-20, ",.1f"),
    "in the step MiB": ("step_bytes", 2**-20, ",.1f"),
    "peak MiB": ("peak_bytes", 2**-20, ",.1f"),
    "peak / base": ("peak_over_base", 1.0, ".3f"),
}
