"""FSDP2: every parameter is split along its first dimension over a group of processes.

There may be several such groups that each hold all of the weights (HSDP): the mesh has a dimension for the copies then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from .gradient_hooks import Take, taken
from .interface import Elements, Needed, Shard, Written
from .packing import RunCounts
from .registry import Backend, MakeOptimizer, Options, register
from .unsharded import Autograd
from .world import Peers, World


@dataclass(frozen=True)
class Slot:
    """The gradient of one parameter in what FSDP scatters.

    Attributes:
        numel: elements of the whole gradient.
        room: elements that each process is given of it, with padding.
        lengths: elements that each process is given of it, without.
        whole: which elements are sent; None: all of them.
        local: which elements of this process's share those are.
        counts: how many elements are sent to each process.
    """

    numel: int
    room: int
    lengths: Sequence[int]
    whole: Elements | None
    local: Elements | None
    counts: Sequence[int]


class PackedReduceScatter(ReduceScatter):
    """Sends what `slots` say, padded to the process that is sent most; elsewhere the result is zero.

    Where not all of the gradients are there (a pass did not use a parameter) it sends everything.

    Args:
        usual: what FSDP uses otherwise, which allocates as before.
        slots: in the order in which FSDP has them.
        rank: index of this process in the group.
    """

    def __init__(self, usual: Any, slots: Sequence[Slot], rank: int) -> None:
        self._usual, self._slots, self._rank = usual, slots, rank
        self._totals = [sum(counts) for counts in zip(*(slot.counts for slot in slots), strict=True)]
        self._starts = [0, *accumulate(slot.room for slot in slots)]

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As before."""
        result: Tensor = self._usual.allocate(size, dtype=dtype, device=device)
        return result

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """`input_tensor` is the gradients' shares for process 0, then those for process 1, and so on."""
        if input_tensor.numel() != self._starts[-1] * len(self._totals):
            return self._usual(output_tensor, input_tensor, group, op, async_op)
        output_tensor.zero_()
        width = max(self._totals)
        if not width:
            return None
        received = input_tensor.new_empty(width)
        dist.reduce_scatter_single(received, self._packed(input_tensor, width), op=op, group=group)
        taken = 0
        for slot, start in zip(self._slots, self._starts, strict=False):
            values = received[taken : taken + slot.counts[self._rank]]
            taken += len(values)
            share = output_tensor[start : start + slot.lengths[self._rank]]
            if slot.whole is None:
                share.copy_(values)
            elif slot.local is not None:
                slot.local.put(share, values)
        return None

    def _packed(self, gradients: Tensor, width: int) -> Tensor:
        shares = gradients.view(len(self._totals), -1)
        of_slots = []
        for slot, start in zip(self._slots, self._starts, strict=False):
            # Shares are consecutive rows, so that one after the other they are the gradient, and then padding.
            whole = shares[:, start : start + slot.room].reshape(-1)[: slot.numel]
            of_slots.append((whole if slot.whole is None else slot.whole.take(whole)).split(list(slot.counts)))
        padding = gradients.new_zeros(width)
        pieces: list[Tensor] = []
        for total, of_process in zip(self._totals, zip(*of_slots, strict=True), strict=True):
            pieces += [*of_process, padding[: width - total]]
        return torch.cat(pieces)


_LAYOUTS: dict[int, tuple[Placement, ...]] = {1: (ShardPlacement(0),), 2: (Replicate(), ShardPlacement(0))}


class FSDP2(Autograd):
    """A root module on which `fully_shard` was called.

    The step writes to the local shards behind FSDP's back, so a module that still holds gathered weights (the root
    keeps them between forwards, and a unit whose forward raised) would go on computing with old ones: `publish` frees
    every gathered copy.

    Raises:
        ValueError: `module` is only a part of what is sharded, or a parameter is not split along dimension 0, over the
            one or the last of two mesh dimensions.
    """

    def __init__(self, module: nn.Module) -> None:
        self.network = self.ascent_module = self.descent_module = module
        if not isinstance(module, FSDPModule):
            inside = next(name for name, m in module.named_modules() if isinstance(m, FSDPModule))
            raise ValueError(
                f"submodule {inside} is sharded by FSDP2 but the model itself is not: call fully_shard on it too"
            )
        self._root: FSDPModule = module
        self._state = module._get_fsdp_state()
        # FSDP would do this in the first forward, and would take the dtype to reduce in from the parameters that are
        # trainable there; in an ascent those of a whole unit may be frozen.
        self._state._lazy_init()
        if not self._state._is_root:
            raise ValueError(
                "the model is a part of a larger FSDP2 model: give the root that fully_shard was called on"
            )
        self._staying: list[Any] = []  # units that stay gathered while the weights are perturbed
        self.forget_copies()  # after a forward without a backward the root shows its gathered weights as its parameters
        meshes = set()
        for name, p in module.named_parameters():
            if not isinstance(p, DTensor):
                raise ValueError(f"parameter {name} is not sharded; call fully_shard without ignored_params")
            if p.placements != _LAYOUTS.get(p.device_mesh.ndim):
                raise ValueError(
                    f"parameter {name} is {p.placements} on mesh {tuple(p.device_mesh.shape)}; supported are "
                    "(Shard(0),) on one dimension and (Replicate(), Shard(0)) on two"
                )
            meshes.add(p.device_mesh)
        if len(meshes) != 1:
            raise ValueError(f"the model's parameters lie on {len(meshes)} meshes; supported is one")
        self._mesh: DeviceMesh = meshes.pop()
        self._layout = _LAYOUTS[self._mesh.ndim]
        self._over = self._mesh.ndim - 1  # the mesh dimension that one copy of the weights is spread over
        self.shards_each = self._mesh.size(self._over)
        self.shard_index = self._mesh.get_local_rank(self._over)
        self.packs = self.shards_each > 1
        self._counts = RunCounts()
        self.peers = Peers(_group_of_all(self._mesh))

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local rows of each parameter."""
        result = []
        for p in parameters:
            start = min(self.shard_index * self._rows_each(p), p.numel())
            result.append(Shard(_local(p), start, p.numel()))
        return result

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local rows of each parameter's reduced gradient."""
        return [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in parameters]

    @contextmanager
    def ascent(self, needed: Needed) -> Iterator[None]:
        """FSDP averages gradients in the backward, those that there are, over as many processes as it is told of."""
        kept = {id(p) for p in needed.kept}
        staying = [unit for unit in self._units() if kept and _consists_of(unit, kept)]
        alone = self._units() if needed.within_shard_group and self._over else []
        with _within_shard_groups(alone), _gathered_to_stay(staying), _scattering(self._packed(needed)):
            yield
        self._staying = staying

    def _packed(self, needed: Needed) -> list[tuple[Any, list[Slot]]]:
        """The units of whose gradients not everything is needed, and what is."""
        parts = {
            id(p): (local, whole)
            for p, local, whole in zip(needed.parameters, needed.parts, needed.whole, strict=True)
            if whole is not None
        }
        if not parts or self.shards_each == 1:
            return []
        packed = []
        for unit in self._units():
            trained = [one.sharded_param for one in unit.fsdp_params if one.sharded_param.requires_grad]
            if any(id(p) in parts for p in trained):
                packed.append((unit, [self._slot(p, *parts.get(id(p), (None, None))) for p in trained]))
        return packed

    def _slot(self, parameter: nn.Parameter, local: Elements | None, whole: Elements | None) -> Slot:
        """What is sent of a parameter's gradient."""
        numel, room = parameter.numel(), self._rows_each(parameter)
        starts = [min(process * room, numel) for process in range(self.shards_each + 1)]
        lengths = [end - start for start, end in pairwise(starts)]
        runs = list(zip(range(self.shards_each), starts, lengths, strict=False))
        return Slot(numel, room, lengths, whole, local, self._counts(whole, runs))

    def _rows_each(self, parameter: nn.Parameter) -> int:
        """Elements of the largest shard. FSDP2 splits like torch.chunk: equal parts, the last ones short or empty."""
        rows, row_size = parameter.shape[0] if parameter.ndim else 1, math.prod(parameter.shape[1:])
        return -(-rows // self.shards_each) * row_size

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients stay unsharded until the last micro-batch."""
        self._root.set_requires_gradient_sync(last)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @contextmanager
    def watched(self, parameters: Sequence[nn.Parameter], take: Take) -> Iterator[None]:
        """Takes them away from the whole parameters that the backward accumulates in: FSDP finds nothing to reduce."""
        kept = list(self._kept())
        if not all(hasattr(one, "_unsharded_param") for one in kept):  # there is none before the first forward
            for module in self._root.modules():  # type: ignore[attr-defined]
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.reshard()
        whole = {id(one.sharded_param): one._unsharded_param for one in kept}
        with taken([whole[id(p)] for p in parameters], take):
            yield

    def _units(self) -> list[Any]:
        """What FSDP gathers and frees together."""
        return [unit for state in self._state._state_ctx.all_states for unit in state._fsdp_param_groups]

    def _kept(self) -> Iterator[Any]:
        """What FSDP keeps of each parameter."""
        for unit in self._units():
            yield from unit.fsdp_params

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad`, and what an accumulation that was broken off has left unsharded."""
        super().clear_gradients(optimizer)
        self.publish()
        for one in self._kept():
            one.unsharded_accumulated_grad = None
            if hasattr(one, "_unsharded_param"):  # there is none before the first forward
                one._unsharded_param.grad = None

    def sum_over_shards(self, value: Tensor) -> Tensor:
        """An all-reduce over the processes of one copy."""
        dist.all_reduce(value, group=self._mesh.get_group(self._over))
        return value

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-gather over the processes of one copy."""
        spread = DTensor.from_local(
            local,
            self._mesh,
            self._layout,
            run_check=False,
            shape=parameter.shape,
            stride=torch.empty(parameter.shape, device="meta").stride(),
        )
        return spread.full_tensor()

    def scatter(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """The local rows."""
        start = self.shards([parameter])[0].start
        local = _local(parameter)
        return whole.reshape(-1)[start : start + local.numel()].reshape(local.shape)

    def exposed(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local rows of each parameter."""
        return [_local(p) for p in parameters]

    def publish(self, written: Written | None = None) -> None:
        """Free every gathered copy but those that an ascent kept: the next forward gathers the rest anew."""
        if not self._staying:
            self.forget_copies()
            return
        for unit in self._units():
            if unit not in self._staying:
                unit.reshard()
            elif unit.is_unsharded:
                for one in unit.fsdp_params:  # whether a gradient is wanted is only noted when a unit is gathered
                    one.to_unsharded()

    def forget_copies(self) -> None:
        """Free every gathered copy. `reshard` would not do: it leaves those of a forward that raised."""
        self._staying = []
        self._root.reset_iter_state()


def _consists_of(unit: Any, parameters: Set[int]) -> bool:
    """Whether a unit has no other trained parameters than these, given by identity."""
    sharded = [one.sharded_param for one in unit.fsdp_params]
    return all(id(p) in parameters or not p.requires_grad for p in sharded)


@contextmanager
def _gathered_to_stay(units: Sequence[Any]) -> Iterator[None]:
    """What forwards and backwards inside gather of `units` they do not free."""
    before = [(unit, unit.post_forward_mesh_info, unit.reshard_after_backward) for unit in units]
    try:
        for unit in units:
            unit.post_forward_mesh_info, unit.reshard_after_backward = None, False
        yield
    finally:
        for unit, *settings in before:
            unit.post_forward_mesh_info, unit.reshard_after_backward = settings


@contextmanager
def _scattering(packed: Sequence[tuple[Any, Sequence[Slot]]]) -> Iterator[None]:
    """Backwards inside send no more than `packed` of the units named there."""
    before = [(unit, unit._reduce_scatter_comm) for unit, _ in packed]
    try:
        for unit, slots in packed:
            unit._reduce_scatter_comm = PackedReduceScatter(
                unit._reduce_scatter_comm, slots, unit.mesh_info.shard_mesh_rank
            )
        yield
    finally:
        for unit, usual in before:
            unit._reduce_scatter_comm = usual


@contextmanager
def _within_shard_groups(units: Sequence[Any]) -> Iterator[None]:
    """Forwards and backwards inside know of one copy of the weights only.

    `set_requires_all_reduce(False)` is for accumulation: it leaves no `.grad`, and its sums, in which parameters cannot
    be told apart, are added to what the next backward reduces.
    """
    before = [(unit, unit.mesh_info, unit.post_forward_mesh_info) for unit in units]
    try:
        for unit, every, after_forward in before:
            one = FSDPMeshInfo(every.mesh, shard_mesh_dim=every.shard_mesh_dim)
            one.reduce_scatter_process_group = every.reduce_scatter_process_group
            unit.mesh_info = one
            if after_forward is every:
                unit.post_forward_mesh_info = one
        yield
    finally:
        for unit, *settings in before:
            unit.mesh_info, unit.post_forward_mesh_info = settings


def _group_of_all(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All processes of `mesh`, in the order of their ranks where these are all that there are."""
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    return mesh._flatten().get_group()


def _local(tensor: Tensor) -> Tensor:
    assert isinstance(tensor, DTensor)
    with torch.no_grad():
        return tensor.to_local()


def _place(
    module: nn.Module, make_optimizer: MakeOptimizer, world: World, options: Options
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`fully_shard` each block and then `module` itself over all ranks, in place.

    Raises:
        ValueError: the number of ranks is not a multiple of the number of replicas.
    """
    replicas = options.replicas
    if world.size % replicas:
        raise ValueError(
            f"{world.size} processes cannot hold {replicas} replicas; use a multiple of {replicas} processes"
        )
    if replicas == 1:
        mesh = dist.init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    else:
        shape = (replicas, world.size // replicas)
        mesh = dist.init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    for block in options.blocks:
        if block is not module:
            fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    return module, make_optimizer()


register(
    Backend(
        "fsdp2",
        "every parameter is sharded by rows; with replicas, in several copies (HSDP)",
        "PyTorch fully_shard, arXiv 2304.11277",
        owns=lambda module: any(isinstance(m, FSDPModule) for m in module.modules()),
        sharding=FSDP2,
        place=_place,
        has_replicas=True,
    )
)
