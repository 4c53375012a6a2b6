"""The trackers, one file each: `mlflow.py`, `tensorboard.py`, `wandb.py`. None imports its library before a run."""
