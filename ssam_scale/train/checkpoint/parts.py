"""The parts of a checkpoint: the network's weights, the base optimizer's state, and any state as JSON and tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ssam_scale.perturbation import SparseSAM
from ssam_scale.perturbation.fused import fit_state
from ssam_scale.sharding import Sharding
from ssam_scale.sharding.chunks import Chunk, gathered, whole

_TENSOR = "$tensor"


@runtime_checkable
class ShardedStateful(Protocol):
    """A part of a checkpoint with a state that is sharded over the processes: `Stateful`, and the state in chunks."""

    def sharded_state_dict(self) -> dict[str, Any]:
        """What `state_dict` returns in full. Collective."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` or `sharded_state_dict` returned, in full. Collective."""


class ModelState:
    """Weights and buffers as a part of a checkpoint.

    Args:
        network: the part of the model that names the parameters.
        sharding: how it is distributed.
    """

    def __init__(self, network: nn.Module, sharding: Sharding) -> None:
        self._network, self._sharding = network, sharding

    def state_dict(self) -> dict[str, Any]:
        """By name, in full tensors. Collective."""
        return dict(gathered(self.sharded_state_dict()))

    def sharded_state_dict(self) -> dict[str, Any]:
        """By name."""
        return dict(self._sharding.named_model_state(self._network))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. Collective."""
        self._sharding.load_named_model_state(self._network, state_dict)
        torch.clear_autocast_cache()  # an autocast around this may remember low-precision copies of those before


class OptimizerState:
    """The base optimizer's state as a part of a checkpoint, by parameter.

    Args:
        network: the part of the model that names the parameters.
        opt: around the base optimizer.
    """

    def __init__(self, network: nn.Module, opt: SparseSAM) -> None:
        self._network, self._opt = network, opt

    def state_dict(self) -> dict[str, Any]:
        """What `sharded_state_dict` returns, in full tensors. Collective."""
        return dict(gathered(self.sharded_state_dict()))

    def sharded_state_dict(self) -> dict[str, Any]:
        """`state` and `param_groups`, by parameters' names. Collective.

        And `own`, what the optimizer's own `state_dict` has beside these two (kron: its generator's state).
        """
        base = self._opt.base_optimizer
        self._opt.sharding.reshard()  # after an evaluation FSDP2's root shows gathered weights as its parameters
        state = self._opt.sharding.named_optimizer_state(self._network, base)
        own = _own_state(base)
        return {**state, "own": own} if own else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned, but the options of the groups. Collective.

        A run is what its configuration says: weight decay, momentum and the like may be changed on resuming.
        """
        opt = self._opt
        # `initial_lr` is what the radius that follows the learning rate compares it with.
        keys = [*opt.defaults, "initial_lr", "lr_scale"]
        configured = [{key: group[key] for key in keys if key in group} for group in opt.param_groups]
        own, saved = whole(state_dict.get("own")), {key: value for key, value in state_dict.items() if key != "own"}
        saved["param_groups"] = whole(saved["param_groups"])  # an option may be a tensor
        saved, begun = self._with_what_begins(saved)
        opt.sharding.load_named_optimizer_state(self._network, opt.base_optimizer, saved)
        for p in begun:  # by zeros, as fused kernels take no part of a group without a state, and no step of theirs yet
            if "step" in (state := opt.base_optimizer.state.get(p, {})):
                state["step"] = torch.zeros_like(step) if isinstance(step := state["step"], Tensor) else 0
        if own:
            opt.base_optimizer.load_state_dict({**opt.base_optimizer.state_dict(), **_tuples(own)})
        for group, options in zip(opt.param_groups, configured, strict=True):
            group.update(options)
        fit_state(opt.base_optimizer)

    def _with_what_begins(self, saved: dict[str, Any]) -> tuple[dict[str, Any], list[nn.Parameter]]:
        """What was saved, of the parameters and in the groups that there are now. Collective.

        They are others where a run trains more than before, or is configured so.

        Returns:
            The state; and the parameters whose state begins anew, where it is kept by parameter.
        """
        known: list[set[str]] = [set() for _ in self._opt.param_groups]
        for name, index in self._opt.parameters.group_of.items():
            known[index].add(name)
        if known == [set(group["params"]) for group in saved["param_groups"]]:
            return saved, []
        mine = self._opt.sharding.named_optimizer_state(self._network, self._opt.base_optimizer)
        groups = [group["params"] for group in mine["param_groups"]]
        of = {name: group for group in saved["param_groups"] for name in group["params"]}
        named = dict(self._network.named_parameters())
        names = [name for params in groups for name in params]
        begun = [name for name in names if name not in of]
        fresh = gathered({name: mine["state"].get(name, {}) for name in begun})
        return {
            "state": {name: saved["state"].get(name, fresh.get(name, {})) for name in names},
            "param_groups": [
                {**group, **next((of[name] for name in group["params"] if name in of), {}), "params": group["params"]}
                for group in mine["param_groups"]
            ],
        }, [named[name] for name in begun if name in named]


class SparsePart:
    """What a SparseSAM remembers beside the base optimizer's state, as a part of a checkpoint.

    Args:
        opt: whose it is.
    """

    def __init__(self, opt: SparseSAM) -> None:
        self._opt = opt

    def state_dict(self) -> dict[str, Any]:
        """In full tensors. Collective."""
        return self._opt.sparse.state_dict()

    def sharded_state_dict(self) -> dict[str, Any]:
        """What `state_dict` returns, before what is sharded of it is gathered. Collective."""
        return self._opt.sparse.sharded_state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; the norm is calibrated anew where more is trained now. Collective.

        Raises:
            ValueError: it is of another mask.
        """
        names, shares = self._opt.parameters.by_name, state_dict["shares"]
        if shares.keys() != names.keys():
            nothing = {"shares": {name: torch.zeros(()) for name in names}, "calibrated": torch.tensor(-1)}
            state_dict = {**state_dict, **nothing, "kappa": torch.tensor(-1.0)}
        self._opt.sparse.load_state_dict(state_dict)


def check_savable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state no checkpoint can hold.

    Args:
        optimizer: over some parameters of its own, which it steps.

    Raises:
        TypeError: it is such a one; names what cannot be held.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state_dict()
    split({**state, "state": {str(index): entry for index, entry in state["state"].items()}}, {})


def _own_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    if type(optimizer).state_dict is torch.optim.Optimizer.state_dict:
        return {}
    return {key: value for key, value in optimizer.state_dict().items() if key not in ("state", "param_groups")}


def _tuples(value: Any) -> Any:
    """With tuples for lists, which is what a generator's state is made of."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(_tuples(each) for each in value) if isinstance(value, list) else value


def split(value: Any, tensors: dict[str, Tensor | Chunk], name: str = "") -> Any:
    """`value` as JSON, its tensors put into `tensors` under the keys that lead to them, joined by dots.

    Raises:
        TypeError: there is something in it that is neither a tensor nor JSON.
        ValueError: two tensors have one name.
    """
    if isinstance(value, (Tensor, Chunk)):
        if name in tensors:
            raise ValueError(f"two tensors of a checkpoint have the name {name}")
        tensors[name] = value
        return {_TENSOR: name}
    prefix = f"{name}." if name else ""
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: split(each, tensors, f"{prefix}{key}") for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [split(each, tensors, f"{prefix}{index}") for index, each in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {name or 'a state'}, which is a {type(value).__name__}")


def join(value: Any, tensors: Mapping[str, Any]) -> Any:
    """What `split` was given, tuples as lists.

    Raises:
        KeyError: a tensor is missing.
    """
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: join(each, tensors) for key, each in value.items()}
    return [join(each, tensors) for each in value] if isinstance(value, list) else value


def tensor_names(value: Any) -> Iterator[str]:
    """The names of the tensors that `split` has put aside."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            yield value[_TENSOR]
        else:
            for each in value.values():
                yield from tensor_names(each)
    elif isinstance(value, list):
        for each in value:
            yield from tensor_names(each)
