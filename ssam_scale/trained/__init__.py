"""What comes after training: evaluating, predicting with, exporting and averaging networks that were trained."""

from .average import Averaged, average
from .classes import Key, by_folders, by_labels
from .evaluate import Accuracy, ClassAccuracy, evaluate_on
from .export import FORMATS, Exported, check_export, export
from .find import find_checkpoint
from .network import Trained, open_trained
from .predict import Predicted, check_table, predict

__all__ = [
    "FORMATS",
    "Accuracy",
    "Averaged",
    "ClassAccuracy",
    "Exported",
    "Key",
    "Predicted",
    "Trained",
    "average",
    "by_folders",
    "by_labels",
    "check_export",
    "check_table",
    "evaluate_on",
    "export",
    "find_checkpoint",
    "open_trained",
    "predict",
]
