"""The columns of MLflow's table of runs: a view that is shared with all who open the printed address.

MLflow keeps what its button "share" has made as a tag of the experiment, and finds it by the key in the address.
"""

from __future__ import annotations

import hashlib
import json

_COLUMNS = (
    "metrics.`summary/top1`",
    "metrics.`saving/vs_dense_percent`",
    "metrics.`saving/vs_dense_percent_low`",
    "metrics.`saving/vs_dense_percent_high`",
    "metrics.`saving/seconds_so_far`",
    "metrics.`overhead/vs_base_percent`",
    "metrics.`summary/step_time`",
    "tags.`mask`",
    "tags.`plan`",
    "tags.`density`",
    "tags.`seed`",
)
_STATE = json.dumps({"selectedColumns": list(_COLUMNS)})

KEY = hashlib.sha256(_STATE.encode()).hexdigest()
TAGS = {f"mlflow.sharedViewState.{KEY}": _STATE}
"""Of an experiment, so that an address with `viewStateShareKey` and `KEY` shows the columns."""
QUERY = f"viewStateShareKey={KEY}"
