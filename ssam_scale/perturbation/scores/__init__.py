"""What masks are chosen by: a score of every weight, the same bit for bit however the weights are sharded.

| to read | for |
|---|---|
| `registry.py` | what a score is given, and how one is added |
| `per_sample.py` | `fisher` and `gradient`; `samples.py`: who computes which sample, `sharded_sums.py`: who adds up |
| `accumulated.py`, `weight.py`, `random.py` | the scores of these names, which take no pass |
| `sampled_labels.py` | the loss that makes `fisher` an estimate of the true Fisher information |
"""

from .accumulated import AccumulatedFisher
from .per_sample import per_sample_scores
from .random import random_scores
from .registry import SCORES, ScoreRequest, compute_scores, register_score
from .sampled_labels import sampled_label_loss, sampled_labels
from .weight import weight_scores

__all__ = [
    "SCORES",
    "AccumulatedFisher",
    "ScoreRequest",
    "compute_scores",
    "per_sample_scores",
    "random_scores",
    "register_score",
    "sampled_label_loss",
    "sampled_labels",
    "weight_scores",
]
