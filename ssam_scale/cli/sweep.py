"""`ssam-scale sweep`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssam_scale.cli.paths import expanded
from ssam_scale.errors import UserError

if TYPE_CHECKING:
    from ssam_scale.config.sweep import LoadedSweep


def sweep_command(
    file: Annotated[Path, typer.Argument(callback=expanded, help="The sweep's YAML file; its name is the sweep's.")],
    at_once: Annotated[int, typer.Option(min=1, help="Runs at a time on this machine, which they share evenly.")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Processes of each run: of GPUs, one each.")] = 1,
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", callback=expanded, help="A folder for each run goes here; else checkpoints/NAME."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs, and what has become of each; do nothing.")
    ] = False,
    tasks: Annotated[
        bool,
        typer.Option(
            "--tasks", help="Write each run's configuration, and print a line for each task of slurm/sweep.sh."
        ),
    ] = False,
) -> None:
    """Train methods, values and seeds: a folder each, one group in MLflow. The same command goes on where it was.

    Ends with the comparison of the group.
    """
    from ssam_scale import sweep
    from ssam_scale.config.sweep import LoadedSweep
    from ssam_scale.tracking.shutdown import SAVED

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("sweep: starts its runs' processes itself: give --processes, and no torchrun or deepspeed")
    loaded = LoadedSweep(file, folder)
    states = [(run, sweep.state_of(loaded, run)) for run in loaded.runs]  # no keys: a value may be a list
    if dry_run:
        for run, state in states:
            said = f"top-1 {sweep.result_of(loaded, run)['top1']:.2f}%" if state == "done" else state
            print(f"{run.title}: {said} ({loaded.folder / run.name})")
        return
    if tasks:
        for run in loaded.runs:
            # slurm/imagenet_ssam.sh gives a folder of its own to what has none on its command line.
            print(sweep.prepare(loaded, run), f"checkpoint.directory={loaded.folder / run.name}", sep="\t")
        return
    left = [run for run, state in states if state != "done"]
    if done := len(states) - len(left):
        print(f"{done} of {len(states)} runs are done", flush=True)
    at_once = min(at_once, len(loaded.runs))
    if left:
        times = f", {at_once} at a time" if at_once > 1 else ""
        print(f"{len(left)} to do{times}; what each says is in {loaded.folder}/RUN/{sweep.LOG}", flush=True)
        on_cpu = loaded.config(left[0]).train.device == "cpu"
        places = sweep.slots(at_once, processes, [] if on_cpu else sweep.visible_gpus())
        outcome = sweep.do(loaded, left, places, lambda line: print(line, flush=True))
        if outcome.stopped:
            print("ended before all runs were done; the same command goes on", file=sys.stderr)
            raise typer.Exit(SAVED)
        if outcome.failed:
            print(
                f"{len(outcome.failed)} of {len(left)} runs failed; the same command tries them again", file=sys.stderr
            )
    _compare(loaded)
    if left and outcome.failed:
        raise typer.Exit(1)


def _compare(loaded: LoadedSweep) -> None:
    from ssam_scale.cli.compare import compare_command

    tracking = loaded.config(loaded.runs[0]).tracking
    if tracking.store is None:
        print(f"not compared: MLflow, which is not among tracking.trackers, has none of the runs ({loaded.folder})")
        return
    try:
        compare_command(tracking_uri=tracking.store, experiment=tracking.experiment, group=loaded.name)
    except UserError as error:  # what was trained is there, whatever a table lacks
        print(f"ssam-scale: {error}", file=sys.stderr)
