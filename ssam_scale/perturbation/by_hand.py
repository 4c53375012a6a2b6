"""Passes that the caller runs: what can be told of them, and is said before a step is another one than was meant."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor


class StaleGradients:
    """Notices a first pass that is added to what the second pass of the step before has left in `.grad`.

    So it is where nobody clears gradients after a step, and where `perturbed` is entered for each micro-batch: the
    ascent would be by a mixture, and the descent by the last micro-batch alone. It is noticed by a hook of one
    parameter, which runs before autograd accumulates; not where weights are sharded, which autograd never sees.
    """

    def __init__(self) -> None:
        self._parameter: nn.Parameter | None = None
        self._hook: Any = None

    def watch(self, parameters: Iterable[nn.Parameter]) -> None:
        """The second pass is over, and its gradients are in `.grad`."""
        self.forget()
        held = (p for p in parameters if p.grad is not None and p.requires_grad and not isinstance(p, DTensor))
        if (parameter := next(held, None)) is None:
            return
        self._parameter = parameter
        graph = parameter.view_as(parameter).grad_fn
        assert graph is not None
        self._node = graph.next_functions[0][0]  # which lives as long as somebody holds it
        assert self._node is not None
        self._hook = self._node.register_prehook(self._before_accumulating)

    def _before_accumulating(self, gradients: Any) -> None:
        if not self.found:
            self.forget()

    @property
    def found(self) -> bool:
        """Whether they are there still, or have been added to."""
        grad = None if self._parameter is None else self._parameter.grad
        return grad is not None and bool(grad.any())

    def forget(self) -> None:
        """They are gone."""
        self._parameter = self._node = None
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
