"""Whether a base optimizer steps what a backend hands it to the same place as whole tensors: tried, on small ones.

FSDP2 hands an optimizer DTensors, whose operators communicate, and some of which raise. ZeRO 1 to 3 hand it flat pieces
of several parameters together. One that treats every element alike (SGD, AdamW, Lion) cannot tell; one that looks at
norms, rows, matrices or signs of whole tensors (LAMB, AdamP, Muon, the cautious variants) may fail, wait for ever, or
train on something else without a word. Nothing in an optimizer says which it is, and for DTensors it changes with the
version of PyTorch. So a twin of the optimizer, of the same class and with the same settings, steps small tensors whole,
and another one steps what the backend would hand it of these: they must come to the same.
"""

from __future__ import annotations

import copy
import gc
import math
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from .process_group import ProcessGroup
from .world import default_store

Handed: TypeAlias = Literal["tensors", "shards", "pieces"]
"""What a base optimizer is given to step: whole tensors, DTensors (FSDP2), or flat pieces (ZeRO 1 to 3)."""

Groups: TypeAlias = list[list[Tensor]]
"""Tensors by parameter group."""

# The largest difference to whole tensors, as a share of the way that a tensor has gone. Another order of summation
# makes 1e-5 (LARS), a cube root that comes out differently in its last place 1e-6 (MADGRAD). What is computed from a
# part of a tensor is another way altogether, because the gradients here range from 0.1 to 10; and Muon, which
# orthogonalises in bfloat16 and rounds otherwise on shards, is off by 2%, and with a ViT's gradients by 10%.
_TOLERANCE = 1e-3
_LR = 0.01  # in the place of one that may be 0 at first
# Only where a process that fails cannot let go of those that wait for it: a trial takes less than a second.
_PATIENCE = timedelta(seconds=60)
_ALIKE = "SGD, AdamW, Lion or another that treats every weight alike"


def check_steps(
    optimizer: torch.optim.Optimizer, handed: Handed, group: ProcessGroup, dimensions: Sequence[Iterable[int]]
) -> None:
    """Refuse an optimizer that would step what a backend hands it to another place than whole tensors.

    Nothing of it is changed, and no generator either. Where it cannot be tried (it cannot be copied, or does not step
    small tensors on the CPU) there is a warning. Collective for `shards`.

    Args:
        optimizer: with the settings that it will step with.
        handed: what it will be given.
        group: the processes that share the weights.
        dimensions: by parameter group, how many dimensions its parameters have.

    Raises:
        ValueError: it is such a one; says why, and what would work.
    """
    if handed == "tensors" or (dist.is_initialized() and dist.get_backend() == "fake"):
        return  # with nobody to communicate with, nothing is trained
    try:
        if handed == "shards":
            why = _differs_on_shards(optimizer, group, dimensions)
            what, others = "shards of FSDP2", "DDP"
        else:
            why = _differs_on_pieces(optimizer, dimensions)
            what, others = "flat pieces of tensors, which ZeRO stages 1 to 3 hand it,", "DDP or ZeRO stage 0"
    except _UntriedError as error:
        warnings.warn(
            f"whether {_named(optimizer)} steps {handed} of tensors to the same place as whole ones cannot be tried: "
            f"{error}",
            stacklevel=3,
        )
        return
    if why:
        raise ValueError(
            f"{_named(optimizer)}, as it is set up, does not step {what} to the same place as whole tensors: {why}; "
            f"use {_ALIKE}, or {others}"
        )


class _UntriedError(Exception):
    """A trial that says nothing of the optimizer; says why."""


def _named(optimizer: Any) -> str:
    """Its class, and those of the optimizers inside of it."""
    kind, *inner = dict.fromkeys(type(each).__name__ for each in _with_inner(optimizer))
    return f"{kind} ({', '.join(inner)})" if inner else str(kind)


def _differs_on_pieces(optimizer: torch.optim.Optimizer, dimensions: Sequence[Iterable[int]]) -> str:
    """What is different where two processes step half of the elements each, in one row; empty: nothing."""
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    start = _start(dimensions, 2, device)
    whole, gradients = _reference(optimizer, start)
    halves = []
    for half in range(2):
        try:
            with _aside(device):
                twin = _Twin(optimizer, [_half(tensors, half) for tensors in start])
                for given in gradients:
                    halves_of_weights = twin.step([_half(tensors, half) for tensors in given])
                halves.append(halves_of_weights)
        except Exception as error:  # whatever an optimizer of somebody else raises
            return _short(error)
    joined = [
        _like(torch.cat([*first, *second]), tensors) if tensors else []
        for first, second, tensors in zip(*halves, whole, strict=True)
    ]
    share = _share_of_way(joined, whole, start)
    return f"it goes by more than single weights, and is off by {share:.0%} of the way" if share > _TOLERANCE else ""


def _half(tensors: Sequence[Tensor], half: int) -> list[Tensor]:
    """The first or the second half of all elements, in one row."""
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    middle = flat.numel() // 2 + 1
    return [flat[:middle] if half == 0 else flat[middle:]]


def _like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def _differs_on_shards(
    optimizer: torch.optim.Optimizer, group: ProcessGroup, dimensions: Sequence[Iterable[int]]
) -> str:
    """What is different where every process steps its shards; empty: nothing. Collective.

    In the host's memory, over connections of its own: an optimizer may raise on one process and communicate on another,
    and a process that closes them lets go of the others, which would wait for it otherwise.
    """
    try:
        # By far the most runs have one of these.
        if type(optimizer).__module__.startswith("torch.optim.") and not _differs_on_pieces(optimizer, dimensions):
            return ""
    except _UntriedError:
        pass
    if group.size == 1:
        return ""
    start = _start(dimensions, group.size, torch.device("cpu"))
    try:
        reference, untried = _reference(optimizer, start), None
    except _UntriedError as error:
        reference, untried = None, str(error)
    said = group.all_gather_object(untried)  # also waits for processes that come late
    if reference is None or any(said):
        raise _UntriedError(next(filter(None, said)))
    own = dist.new_group(group.ranks, timeout=_PATIENCE, backend="gloo")
    assert own is not None
    notes = _Notes(own.group_name, group)
    if why := _step_shards(optimizer, own, start, *reference):
        notes.leave(why)
    dist.destroy_process_group(own)
    if not why:
        return ""
    del own
    gc.collect()  # connections are closed when nothing knows of them any more
    return notes.first()


def _step_shards(
    optimizer: torch.optim.Optimizer, group: dist.ProcessGroup, start: Groups, whole: Groups, gradients: list[Groups]
) -> str:
    """What is different on this process, or where another one has let go of it; empty: nothing."""
    try:
        # DTensor remembers by the mesh how it communicates, and takes meshes of one name for the same.
        mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=(f"optimizer_trial_{group.group_name}",))
        with _aside(torch.device("cpu")):
            twin = _Twin(optimizer, [[_shard(tensor, mesh) for tensor in tensors] for tensors in start])
            for given in gradients:
                shards = twin.step([[_shard(tensor, mesh) for tensor in tensors] for tensors in given])
        found = [[shard.full_tensor() for shard in tensors] for tensors in shards]  # type: ignore[attr-defined]
        share = torch.tensor(_share_of_way(found, whole, start))
        dist.all_reduce(share, op=dist.ReduceOp.MAX, group=group)
    except Exception as error:  # whatever an optimizer of somebody else raises
        return _short(error)
    return f"with DTensors it is off by {float(share):.0%} of the way" if share > _TOLERANCE else ""


def _shard(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """This process's rows, as `fully_shard` splits them: like `torch.chunk`, the last ones short or empty."""
    parts, rank = tensor.chunk(mesh.size()), mesh.get_local_rank()
    own = parts[rank] if rank < len(parts) else tensor[:0]
    made: DTensor = DTensor.from_local(
        own.clone(), mesh, [ShardPlacement(0)], run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return made


class _Notes:
    """What processes leave in the launcher's store of why they have let go.

    Args:
        name: of the trial; no other has it.
        group: the processes.
    """

    def __init__(self, name: str, group: ProcessGroup) -> None:
        self._store = default_store()
        self._keys = [f"ssam_scale/optimizer_trial/{name}/{rank}" for rank in range(group.size)]
        self._own = self._keys[group.rank]

    def leave(self, why: str) -> None:
        """Say why, unless another has: then this process was let go of."""
        if not self._left():
            self._store.set(self._own, why)

    def first(self) -> str:
        """What was said, of several the first process's."""
        return str(self._store.get(self._left()[0]).decode())

    def _left(self) -> list[str]:
        return [key for key in self._keys if self._store.check([key])]


# ---- what is stepped


def _start(dimensions: Sequence[Iterable[int]], shards: int, device: torch.device) -> Groups:
    """Weights of every kind that networks have, by how many processes they go to: even and uneven parts, and none."""
    generator = torch.Generator().manual_seed(0)
    even = shards * max(2, math.ceil(32 / shards))
    kinds: dict[int, list[tuple[int, ...]]] = {
        0: [(1,)],
        1: [(even,), (even + 1,), (1,)],
        2: [(even, 32), (even + 1, 34), (1, 40)],
        3: [(1, 18, 32), (1, 1, 32), (even + 1, 3, 5)],
    }

    def shapes(dimension: int) -> list[tuple[int, ...]]:
        kernel = (3,) * (dimension - 2)
        return kinds.get(dimension) or [(even, 3, *kernel), (even + 1, 1, *kernel), (1, 4, *kernel)]

    return [
        [torch.randn(shape, generator=generator).to(device) for d in sorted(set(of_group)) for shape in shapes(d)]
        for of_group in dimensions
    ]


_GRADIENTS = ("any", "small", "large", "turning rows", "turning", "any", "turning rows")
"""One a step. As many as Lookahead takes to step its slow weights, and one more."""


def _gradient(kind: str, weight: Tensor, generator: torch.Generator) -> Tensor:
    """One of a kind, of elements from 0.1 to 10.

    Those of weights before a normalization only turn them, whole or row by row. AdamP (2006.08217, equation 12) looks
    for a cosine below 0.1 / √n.
    """
    drawn = torch.randn(weight.shape, generator=generator).to(weight.device)
    drawn *= torch.logspace(-1, 1, weight.numel(), device=weight.device).view(weight.shape)
    if kind in ("small", "large"):
        return drawn * {"small": 1e-3, "large": 30.0}[kind]
    if kind == "any" or weight.ndim < 2:
        return drawn
    rows = len(weight) if kind == "turning rows" else 1
    one, of = drawn.view(rows, -1), nn.functional.normalize(weight.reshape(rows, -1))
    turning = one - (one * of).sum(1, keepdim=True) * of
    cosine = 0.05 / math.sqrt(of.shape[1])
    return (turning + cosine * turning.norm(dim=1, keepdim=True) * of).view(weight.shape)


def _reference(optimizer: torch.optim.Optimizer, start: Groups) -> tuple[Groups, list[Groups]]:
    """Where whole tensors are stepped to, and the gradients of each step.

    Raises:
        _UntriedError: they are not.
    """
    generator, gradients = torch.Generator().manual_seed(1), []
    weights = start
    device = next((tensor.device for tensors in start for tensor in tensors), torch.device("cpu"))
    try:
        with _aside(device):
            twin = _Twin(optimizer, start)
            for kind in _GRADIENTS:
                gradients.append([[_gradient(kind, weight, generator) for weight in tensors] for tensors in weights])
                weights = twin.step(gradients[-1])
    except Exception as error:  # whatever an optimizer of somebody else raises
        raise _UntriedError(_short(error)) from error
    pairs = [pair for tensors in zip(weights, start, strict=True) for pair in zip(*tensors, strict=True)]
    if not all(bool(weight.isfinite().all()) for weight, _ in pairs) or all(torch.equal(*pair) for pair in pairs):
        raise _UntriedError("a copy of it does not step other weights")
    return weights, gradients


def _share_of_way(found: Groups, expected: Groups, start: Groups) -> float:
    """The largest difference of a tensor to what is expected, as a share of the way from its start."""
    largest = 0.0
    for groups in zip(found, expected, start, strict=True):
        for one, other, before in zip(*groups, strict=True):
            if (apart := float((one - other).norm())) != 0.0:
                way = float((other - before).norm())
                largest = max(largest, apart / way if way and math.isfinite(apart) else math.inf)
    return largest


# ---- who steps


class _Twin:
    """A copy of an optimizer, without its state, over other parameters.

    Args:
        optimizer: is not changed, nor are its parameters.
        tensors: by parameter group; are copied.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, tensors: Groups) -> None:
        self._parameters = [[nn.Parameter(tensor.clone()) for tensor in group] for group in tensors]
        self._optimizer = _copied(optimizer)
        for group, parameters in zip(self._optimizer.param_groups, self._parameters, strict=True):
            group["params"][:] = parameters  # in place: an optimizer around another has the same list
            if group.get("lr") is not None:
                group["lr"] = torch.full_like(lr, _LR) if isinstance(lr := group["lr"], Tensor) else _LR
            if group.get("capturable") and all(p.device.type == "cpu" for p in parameters):
                group["capturable"] = False  # which is for GPUs
        if callable(train := getattr(self._optimizer, "train", None)):  # schedule-free ones ask for it
            train()

    def step(self, gradients: Groups) -> Groups:
        """Where one step leads from where the last one has led."""
        for parameters, own in zip(self._parameters, gradients, strict=True):
            for parameter, gradient in zip(parameters, own, strict=True):
                parameter.grad = gradient.clone()
        self._optimizer.step()
        return [[parameter.detach().clone() for parameter in parameters] for parameters in self._parameters]


def _copied(optimizer: Any) -> Any:
    """A copy of an optimizer and of those inside of it, without state, hooks and what was put around its `step`.

    Not by `copy.deepcopy` alone, by which a torch optimizer keeps its state and loses what is not in it.
    """
    every = _with_inner(optimizer)
    if ending := [each for each in every if hasattr(type(each), "__del__")]:
        raise TypeError(f"a {type(ending[0]).__name__} that ends frees what another may use")
    stand_in = nn.Parameter(torch.empty(0))  # without a gradient, wherever parameters are remembered
    memo: dict[int, Any] = {id(p): stand_in for each in every for group in each.param_groups for p in group["params"]}
    for each in every:
        memo[id(each)] = object.__new__(type(each))
        memo[id(each.state)] = defaultdict(dict)
    for each in every:
        for name, value in vars(each).items():
            if name in ("step", "zero_grad"):  # of a learning-rate scheduler, which counts steps
                continue
            if isinstance(value, nn.Module):
                raise TypeError(f"it holds a network ({name}), which would be copied as well")
            hooks = name.startswith("_optimizer_") and name.endswith("_hooks")
            vars(memo[id(each)])[name] = OrderedDict() if hooks else copy.deepcopy(value, memo)
    return memo[id(optimizer)]


def _with_inner(optimizer: Any) -> list[Any]:
    """An optimizer and those that it is around."""
    found = [optimizer]
    for each in found:
        for value in vars(each).values():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            inner = [one for one in held if isinstance(one, torch.optim.Optimizer)]
            found += [one for one in inner if all(one is not other for other in found)]
    return found


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Without gradients, warnings, compiling, and a change to what is drawn afterwards."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(torch.no_grad())
        warnings.simplefilter("ignore")
        if "torch._dynamo" in sys.modules:  # what is compiled would take longer than all else
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        torch.manual_seed(0)
        yield


def _short(error: Exception) -> str:
    said = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {said}"[:160] if said else type(error).__name__
