"""Runs whose numbers are known, put into a store by MLflow's own client: no training, some milliseconds each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ssam_scale.config.schema import Config
from ssam_scale.tracking.store import experiment_id, flatten, open_store


@dataclass(frozen=True)
class Course:
    """How a run went: its epochs, each of `steps` steps of 64 images.

    Attributes:
        top1: accuracy after each epoch, percent.
        seconds: of each epoch.
        phases: seconds of a step in each phase.
        steps: of an epoch.
    """

    top1: tuple[float, ...]
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)
    steps: int = 50


def storing(uri: str) -> Callable[..., str]:
    """A function that stores a run in an empty store; later calls are later runs."""
    client = open_store(uri, create=False)
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param

    clock = itertools.count(1_700_000_000_000, 1000)

    def make(
        config: Config,
        *,
        top1: float | None = None,
        ms: float | None = None,
        density: float | None = None,
        probed: tuple[float, ...] = (),
        course: Course | None = None,
        layers: str | None = None,
        digest: str | None = None,
        status: str = "FINISHED",
        **tags: str,
    ) -> str:
        where = {"backend": "single", "world_size": "1", "hardware": "cpu"}
        experiment = experiment_id(client, uri, config.tracking.experiment)
        tags = {"method": config.method} | where | {key.replace("__", "/"): value for key, value in tags.items()}
        start = next(clock)
        made = client.create_run(experiment, start_time=start, tags=tags, run_name=f"{config.method} resnet18")
        run_id = str(made.info.run_id)
        seconds = None if ms is None else ms / 1000
        # A run that goes on has no summary yet.
        names = {"top1": "summary/top1", "step": "summary/step_time", "density": "summary/density"}
        bounds = ("overhead_vs_base_percent", *(f"saving_vs_dense_percent{bound}" for bound in ("", "_low", "_high")))
        bounds = tuple(f"summary/{name}" for name in bounds)
        if status == "RUNNING":
            names = {"top1": "val/top1", "step": "time/step", "density": "mask/density"}
            bounds = (
                "overhead/vs_base_percent",
                *(f"saving/vs_dense_percent{bound}" for bound in ("", "_low", "_high")),
            )
        found = {names["top1"]: top1, names["step"]: seconds, names["density"]: density}
        found |= dict(zip(bounds, probed, strict=False))
        metrics = [Metric(key, value, 0, 0) for key, value in found.items() if value is not None]
        if course is not None:
            for epoch, accuracy in enumerate(course.top1, 1):
                step, now = epoch * course.steps, start + int(1000 * epoch * (course.seconds + 2.0))
                values = {"epoch": epoch, "time/epoch": course.seconds, "val/top1": accuracy}
                values |= {f"time/{phase.replace(' ', '_')}": each for phase, each in course.phases.items()}
                values["train/images_per_second"] = 64 * course.steps / course.seconds
                metrics += [Metric(key, float(value), now, step) for key, value in values.items()]
        client.log_batch(run_id, params=[Param(key, value) for key, value in flatten(config).items()], metrics=metrics)
        if layers is not None:
            client.log_metric(run_id, "mask/density", density or 0.0, step=1)
            client.log_text(run_id, layers, "mask/density.csv")
        if digest is not None:
            data = Dataset("train", digest, "local", "{}")
            client.log_inputs(run_id, [DatasetInput(data, [InputTag("mlflow.data.context", "training")])])
        if status != "RUNNING":
            client.set_terminated(run_id, status)
        return run_id

    return make
