"""What recording a run in MLflow takes, with and without probes, beside the same training that records nothing.

    python benchmarks/tracking_overhead.py TRAIN.beton VAL.beton

Trainings of one configuration in turns, in processes of their own, so that a machine's slow minutes are everybody's.
What counts is the time from the end of the tenth step to that of the last of one epoch, by the clock and by the
processor (all threads of the process, those that send to MLflow among them), without evaluation and checkpoints.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.cli.table import Columns, markdown
from ssam_scale.config.load import load
from ssam_scale.config.schema import Config
from ssam_scale.perturbation import StepReport
from ssam_scale.sharding import join_world
from ssam_scale.tracking.run import Run
from ssam_scale.train import loop
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress

FIRST = 10  # steps until kernels, memory and threads are there
WAYS: dict[str, list[str]] = {
    "nothing is recorded": ["tracking.probe_every=null"],
    "recorded": ["tracking.probe_every=null"],
    "recorded, with probes": ["tracking.probe_every=auto"],
}
COLUMNS: Columns = {
    "ms a step": ("milliseconds", 1.0, ".2f"),
    "over nothing": ("over", 1.0, ".3f"),
    "iqr": ("over_iqr", 1.0, ".3f"),
    "processor, ms a step": ("processor_milliseconds", 1.0, ".2f"),
    "over nothing, processor": ("processor_over", 1.0, ".3f"),
}


class Clock(Hook):
    """Notes the times of the first and the last step that count."""

    def __init__(self) -> None:
        self.marks: list[tuple[int, float, float]] = []

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """One step is done."""
        if progress.step == FIRST or progress.step_of_epoch == progress.steps_per_epoch:
            self.marks.append((progress.step, time.perf_counter(), time.process_time()))


def trained(way: str, overrides: list[str]) -> tuple[float, float]:
    """Seconds of a step, by the clock and by the processor."""
    clock, build = Clock(), loop.build_hooks

    def hooks(*arguments: Any) -> list[Hook]:
        return [*build(*arguments), clock]

    config, open_run = load(Path("configs/quickstart.yaml"), overrides), loop.open_run

    def opened(config: Config, *, enabled: bool, **options: Any) -> Run:
        return open_run(config, enabled=enabled and way != "nothing is recorded", **options)

    with (
        join_world(device="cpu") as world,
        patch.object(loop, "build_hooks", hooks),
        patch.object(loop, "open_run", opened),
    ):
        loop.train(config, world)
    (first, began, processor), (last, ended, processor_ended) = clock.marks
    return (ended - began) / (last - first), (processor_ended - processor) / (last - first)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images", type=int, default=32000, help="of the one epoch")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *(f"data.train={arguments.train}", f"data.val={arguments.val}", f"data.subset={arguments.images}"),
            *(f"data.batch_size={arguments.batch_size}", "train.epochs=1", "schedule.warmup_epochs=0"),
            *(f"tracking.uri=sqlite:///{folder}/mlflow.db", f"checkpoint.directory={folder}/checkpoints"),
            *("train.device=cpu", "tracking.log_model=false"),
        ]
        if arguments.one is not None:
            print(json.dumps(trained(arguments.one, [*overrides, *WAYS[arguments.one]])))
            return
    taken: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for number in range(arguments.repeats):
        for way in list(WAYS)[number % 3 :] + list(WAYS)[: number % 3]:
            command = [sys.executable, *sys.argv, "--one", way]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            taken[way].append(json.loads(said.splitlines()[-1]))
    rows = []
    nothing = taken["nothing is recorded"]
    for way, each in taken.items():
        over, processor_over = (
            sorted(mine[k] / other[k] for mine, other in zip(each, nothing, strict=True)) for k in (0, 1)
        )
        quartiles = statistics.quantiles(over, n=4) if len(over) > 1 else [over[0]] * 3
        rows.append(
            {
                "way": way,
                "milliseconds": 1e3 * statistics.median(seconds for seconds, _ in each),
                "over": statistics.median(over),
                "over_iqr": quartiles[2] - quartiles[0],
                "processor_milliseconds": 1e3 * statistics.median(seconds for _, seconds in each),
                "processor_over": statistics.median(processor_over),
                "all_seconds": each,
            }
        )
    table = markdown(rows, COLUMNS, "way")
    print("\n".join(table))
    caption = (
        f"`configs/quickstart.yaml` on one process, an epoch of {arguments.images // arguments.batch_size} steps of "
        f"{arguments.batch_size} images, {arguments.repeats} times each in turns; medians, of ratios within a turn."
    )
    text = ["# Recording a run", "", caption, "", *table]
    write(result_path(arguments.output, "tracking-overhead"), text, rows, provenance())


if __name__ == "__main__":
    main()
