"""The trained network as a model of MLflow: a `torch.export` program, which is loaded without unpickling anything."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

NAME = "model"
"""Of the model within its run: `mlflow.pytorch.load_model("runs:/<run id>/model")`."""


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
    logged = client.create_logged_model(experiment_id, NAME, source_run_id=run_id, model_type="image-classifier")
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
            client.log_model_artifacts(logged.model_id, str(path))
    except BaseException:
        client.finalize_logged_model(logged.model_id, "FAILED")
        raise
    client.finalize_logged_model(logged.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(logged.model_id, step)])
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
