"""How long a checkpoint delays training, in the background and in the foreground, beside the copy alone.

    python benchmarks/checkpoint_delay.py TRAIN.beton VAL.beton

One training of ViT-B/16 with AdamW. A round of it takes some steps without a checkpoint; saves as `ssam-scale train`
does, and goes on until the disk has it; and saves while training waits. What a save in the background costs is the
copy, for which training waits, and what the steps beside the writing take longer than those without.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.cli.table import Columns, markdown
from ssam_scale.config.load import load
from ssam_scale.config.schema import Config
from ssam_scale.perturbation import StepReport
from ssam_scale.sharding import World, join_world
from ssam_scale.train import checkpoint, loop
from ssam_scale.train.build import Components
from ssam_scale.train.hooks import Hook
from ssam_scale.train.progress import Progress

WARM_UP, PLAIN = 3, 5  # steps
COLUMNS: Columns = {"seconds": ("seconds", 1.0, ".2f"), "iqr": ("iqr", 1.0, ".2f"), "times": ("times", 1.0, ".0f")}
CONFIG = """
model: {{name: vit_base_patch16_224, num_classes: 1000, kwargs: {{img_size: {side}}}}}
data: {{train: {train}, val: {val}, batch_size: {batch}, resolution: {side}, eval_resolution: {side}, workers: 1}}
optimizer: {{name: adamw, lr: 0.0001}}
train: {{epochs: 1000, device: cpu}}
checkpoint: {{directory: {folder}/checkpoints, every_steps: 1, every_minutes: null, keep: 1}}
tracking: {{uri: "sqlite:///{folder}/mlflow.db", log_model: false, system_metrics: false}}
"""


class DoneError(Exception):
    """Enough was measured."""


class Delay(Hook):
    """Saves now and then, in the place of `SaveCheckpoint`, and takes the times.

    Args:
        config: of the run.
        world: of one process.
        components: whose state is saved.
        save: what `ssam-scale train` saves with.
        rounds: how many.

    Attributes:
        seconds: by what was measured.
    """

    def __init__(
        self, config: Config, world: World, components: Components, save: checkpoint.SaveCheckpoint, rounds: int
    ) -> None:
        self._config, self._world, self._components, self._save = config, world, components, save
        self._rounds, self._step, self._began = rounds, -WARM_UP, time.perf_counter()
        self._beside: list[float] | None = None
        self._awaited = ""
        self.seconds: dict[str, list[float]] = {"plain": [], "copy": [], "beside": [], "delay": [], "foreground": []}

    def after_step(self, progress: Progress, report: StepReport) -> None:
        """One step is done."""
        taken = time.perf_counter() - self._began
        if self._beside is not None:
            self._beside.append(taken)
            if (self._config.checkpoint.directory / self._awaited).exists():
                self._is_written()
        elif self._step >= 0:
            self.seconds["plain"].append(taken)
        self._step += self._beside is None
        if self._step == PLAIN and self._beside is None:
            self._awaited = f"epoch_{progress.epoch:04d}_step_{progress.step:06d}"
            self._beside = []
            self.seconds["copy"].append(_timed(lambda: self._save.after_step(progress, report)))
        self._began = time.perf_counter()

    def _is_written(self) -> None:
        assert self._beside is not None
        plain = statistics.median(self.seconds["plain"])
        self.seconds["beside"] += self._beside
        self.seconds["delay"].append(self.seconds["copy"][-1] + sum(each - plain for each in self._beside))
        save = lambda: checkpoint.save(self._config, self._world, self._components)  # noqa: E731
        self.seconds["foreground"].append(_timed(save))
        self._beside, self._step = None, -1  # the next one finds caches that are another's
        if len(self.seconds["delay"]) == self._rounds:
            raise DoneError


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(config: Config, rounds: int) -> dict[str, list[float]]:
    """Seconds, by what was measured."""
    delays: list[Delay] = []
    build = loop.build_hooks

    def hooks(config: Config, world: World, components: Components, *others: Any) -> list[Hook]:
        *rest, save = build(config, world, components, *others)
        assert isinstance(save, checkpoint.SaveCheckpoint)
        delays.append(Delay(config, world, components, save, rounds))
        return [*rest, delays[0]]

    with join_world(device="cpu") as world, patch.object(loop, "build_hooks", hooks), suppress(DoneError):
        loop.train(config, world)
    return delays[0].seconds


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("val", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--side", type=int, default=64, help="of the images, pixels")
    parser.add_argument("--folder", type=Path, help="of the checkpoints [a temporary one]")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    arguments = parser.parse_args()
    made = provenance()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        places = {"train": arguments.train.resolve(), "val": arguments.val.resolve(), "folder": folder}
        file = Path(folder) / "run.yaml"
        file.write_text(CONFIG.format(**places, side=arguments.side, batch=arguments.batch_size))
        found = measured(load(file, []), arguments.rounds)
    titles = {
        "plain": "a step without a checkpoint",
        "beside": "a step while one is written beside it",
        "copy": "the copy, for which training waits",
        "delay": "delay by one in the background: the copy, and what steps beside the writing take longer",
        "foreground": "delay by one in the foreground",
    }
    rows = []
    for key, title in titles.items():
        each = found[key]
        quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else [each[0]] * 3
        middle, spread = statistics.median(each), quartiles[2] - quartiles[0]
        rows.append({"what": title, "seconds": middle, "iqr": spread, "times": len(each), "all_seconds": each})
    table = markdown(rows, COLUMNS, "what")
    print("\n".join(table))
    caption = (
        f"ViT-B/16 with AdamW in fp32 on one process, threads: {torch.get_num_threads()}, {arguments.batch_size} "
        f"images of {arguments.side} px; medians."
    )
    text = ["# How long a checkpoint delays training", "", caption, "", *table]
    threads = torch.get_num_threads()
    what = f"checkpoint-delay-{threads}-thread{'s'[: threads > 1]}"
    write(result_path(arguments.output, what), text, rows, made)


if __name__ == "__main__":
    main()
