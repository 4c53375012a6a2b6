"""The loss function that a step is given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor

Forward: TypeAlias = Callable[..., Any]
"""What a loss function calls in the place of the model."""

LossFn: TypeAlias = Callable[[Forward, Any], Tensor]
"""`loss_fn(forward, batch)`: the mean loss of a batch, of shape (); it does not call backward."""
