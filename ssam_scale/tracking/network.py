"""The trained network as a model of MLflow: a `torch.export` program, which is loaded without unpickling anything."""

from __future__ import annotations

import logging
import tempfile
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ssam_scale.tracking.store import ANSWER_WITHIN_S, within

NAME = "model"
"""Of the model within its run: `mlflow.pytorch.load_model("runs:/<run id>/model")`."""


# Bytes a second, below which a store is given up; and how long it may take to hear of a failure.
_SLOWEST, _FAILED_WITHIN_S = 5e6, 2.0


def log_network(
    client: Any, experiment_id: str, run_id: str, network: nn.Module, *, side: int, classes: int, step: int
) -> str:
    """Log a network with its signature as the model of a run; its id in MLflow. Takes some seconds.

    By a client alone, as MLflow's own function would set its address for the whole process.

    Args:
        client: of the store, `mlflow.MlflowClient`.
        experiment_id: of the run.
        run_id: of the run.
        network: float32 on the CPU, [N, 3, side, side] to [N, classes]; in evaluation mode when this returns.
        side: of the square images, pixels.
        classes: that it tells apart.
        step: steps that it was trained for.

    Raises:
        TimeoutError: the store does not answer within seconds, or takes less than 5 MB of the model a second.
        Exception: of every kind, if `torch.export` does not take the network or the store does not take the model.
    """
    flavour = _flavour()
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types.schema import Schema, TensorSpec

    single = np.dtype(np.float32)
    signature = ModelSignature(
        Schema([TensorSpec(single, (-1, 3, side, side), "images")]),
        Schema([TensorSpec(single, (-1, classes), "logits")]),
    )
    logged = within(
        ANSWER_WITHIN_S,
        lambda: client.create_logged_model(experiment_id, NAME, source_run_id=run_id, model_type="image-classifier"),
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / NAME
            flavour.save_model(
                network.eval(),
                path,
                mlflow_model=Model(run_id=run_id, model_id=logged.model_id),
                signature=signature,
                input_example=np.zeros((2, 3, side, side), np.float32),  # of one, the size would be a constant
                serialization_format="pt2",
                pip_requirements=[f"torch=={torch.__version__}"],  # found out by importing everything otherwise
            )
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            upload = partial(client.log_model_artifacts, logged.model_id, str(path))
            within(ANSWER_WITHIN_S + size / _SLOWEST, upload)
    except TimeoutError:
        raise  # by a store that would not be told of it either
    except BaseException:
        with suppress(TimeoutError):
            within(_FAILED_WITHIN_S, lambda: client.finalize_logged_model(logged.model_id, "FAILED"))
        raise

    def publish() -> None:
        client.finalize_logged_model(logged.model_id, "READY")
        client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])

    within(ANSWER_WITHIN_S, publish)
    return str(logged.model_id)


def _flavour() -> Any:
    """`mlflow.pytorch`, whose import gives the root logger a handler and a level that would hide our warnings."""
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    try:
        import mlflow.pytorch
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
    return mlflow.pytorch
