"""A torch optimizer that wraps another one and shares its parameter groups and state."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.amp.grad_scaler import OptState

# A GradScaler tells nobody that it has unscaled an optimizer's gradients, but it asks for its groups to do it.
_UNSCALE = torch.amp.GradScaler._unscale_grads_.__code__


def has_unscaled(scaler: torch.amp.GradScaler, optimizer: Any) -> bool:
    """Whether `scaler.unscale_(optimizer)` was called since the scaler was updated, of which it tells nobody either."""
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer))
    return state is not None and state["stage"] is OptState.UNSCALED


def living_scalers() -> list[weakref.ref[torch.amp.GradScaler]]:
    """Every `GradScaler` that there is. By its type, because to ask an object for its class may run its code."""
    found = [each for each in gc.get_objects() if issubclass(type(each), torch.amp.GradScaler)]
    return [weakref.ref(scaler) for scaler in found]


@contextmanager
def refused(optimizer: Any, why: str) -> Iterator[None]:
    """Within the `with`, `optimizer.step` raises a RuntimeError that says why.

    Not where it is no torch optimizer, nor around one: DeepSpeed's, which nobody else steps.
    """

    def refuse(*_: Any) -> None:
        raise RuntimeError(why)

    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        yield
        return
    handle = optimizer.register_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class OptimizerWrapper(torch.optim.Optimizer):
    """A torch optimizer whose `param_groups` and `state` are the base optimizer's.

    They are looked up each time, because `load_state_dict` gives an optimizer new lists and dictionaries.

    Args:
        base_optimizer: the one that is wrapped.
        options: defaults of the options that every group has beside the base optimizer's.

    Raises:
        ValueError: it is around another optimizer and not one itself.

    Attributes:
        unscaled: whether a `GradScaler` has unscaled the gradients since this was last set to False.
    """

    unscaled = False

    def __init__(self, base_optimizer: torch.optim.Optimizer, **options: Any) -> None:
        if not hasattr(base_optimizer, "defaults"):
            raise ValueError(
                f"base_optimizer is a {type(base_optimizer).__name__}, which is around another optimizer and has no "
                "defaults: give the optimizer inside of it, and do after opt.step what it does beside stepping that"
            )
        super().__init__(base_optimizer.param_groups, base_optimizer.defaults | options)
        self.base_optimizer = base_optimizer
        self._own_options = tuple(options)
        self.complete_groups()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's."""
        caller = sys._getframe(1)
        if caller.f_code is _UNSCALE:
            self.note_unscaled(caller.f_locals["self"])
        return self.base_optimizer.param_groups if "base_optimizer" in self.__dict__ else self._given_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self._given_groups = groups  # torch's constructor

    def note_unscaled(self, scaler: torch.amp.GradScaler) -> None:
        """A `GradScaler` is about to unscale the gradients that are there now.

        Raises:
            RuntimeError: it has done so already, for the base optimizer.
        """
        if has_unscaled(scaler, self.base_optimizer):
            raise RuntimeError(
                "scaler.unscale_ was called for the base optimizer, and the scaler would divide the same gradients by "
                "the scale once more: call scaler.unscale_(opt) and scaler.step(opt) with the SparseSAM alone"
            )
        self.unscaled = True

    @property
    def state(self) -> Any:
        """The base optimizer's."""
        return self.base_optimizer.state

    @state.setter
    def state(self, state: Any) -> None:
        pass  # torch's constructor

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        if "base_optimizer" not in self.__dict__:  # torch's constructor, before there is anything to add to
            super().add_param_group(param_group)
            return
        self.base_optimizer.add_param_group(param_group)
        self.complete_groups()

    def complete_groups(self) -> None:
        """Give every group the options that the base optimizer does not know, where it lacks them."""
        for group in self.param_groups:
            for option in self._own_options:
                group.setdefault(option, self.defaults[option])
