"""FSDP2: every parameter is sharded along its first dimension over a group of ranks.

With several such groups that each hold a replica of the weights (HSDP) the mesh has a dimension for the replicas.

The ascent gradient is what FSDP's reduce-scatter leaves in `.grad`, the perturbation is written to the local rows of
each DTensor, and gathered copies are freed so that the next forward gathers the perturbed weights. A parameter group,
below, is FSDP's: the parameters that one `fully_shard` call gathers and frees together.
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

from ssam_scale.torch_compat import (
    fsdp_param_groups,
    reduce_scatter_single,
    reset_iter_state,
    separate_reduce_scatter_group,
)

from .gradient_hooks import OnGradient, divert_gradients
from .interface import AscentReduction, Elements, Shard, WrittenWeights
from .packed_all_gather import RunCounts
from .process_group import ProcessGroup
from .registry import BACKENDS, Backend, MakeOptimizer, Options
from .unsharded import TorchTraining
from .world import World


@dataclass(frozen=True)
class PackedGradient:
    """One parameter's place in the buffer that FSDP reduce-scatters, and which elements of it are sent.

    Attributes:
        numel: elements of the full gradient.
        padded: elements of each rank's shard, with padding.
        lengths: elements of each rank's shard, without.
        full: which elements of the full gradient are sent; None: all of them.
        local: which elements of this rank's shard those are.
        counts: how many elements are sent to each rank.
    """

    numel: int
    padded: int
    lengths: Sequence[int]
    full: Elements | None
    local: Elements | None
    counts: Sequence[int]


class PackedReduceScatter(ReduceScatter):
    """FSDP's reduce-scatter, of the masked elements only; the result is zero elsewhere.

    What each rank is sent is padded to the rank that is sent most. Where not all of the gradients are there (a pass did
    not use a parameter) everything is sent.

    Args:
        usual: FSDP's own, which also allocates.
        gradients: in the order in which FSDP has them.
        rank: of this process in the shard group.
    """

    def __init__(self, usual: Any, gradients: Sequence[PackedGradient], rank: int) -> None:
        self._usual, self._gradients, self._rank = usual, gradients, rank
        self._totals = [sum(counts) for counts in zip(*(g.counts for g in gradients), strict=True)]
        self._starts = [0, *accumulate(g.padded for g in gradients)]

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As FSDP's own."""
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
        """`input_tensor` is the padded shards of all gradients for rank 0, then those for rank 1, and so on."""
        if input_tensor.numel() != self._starts[-1] * len(self._totals):
            return self._usual(output_tensor, input_tensor, group, op, async_op)
        output_tensor.zero_()
        width = max(self._totals)
        if not width:
            return None
        received = input_tensor.new_empty(width)
        reduce_scatter_single(received, self._packed(input_tensor, width), op, group)
        offset = 0
        for g, start in zip(self._gradients, self._starts, strict=False):
            values = received[offset : offset + g.counts[self._rank]]
            offset += len(values)
            shard = output_tensor[start : start + g.lengths[self._rank]]
            if g.full is None:
                shard.copy_(values)
            elif g.local is not None:
                g.local.put(shard, values)
        return None

    def _packed(self, buffer: Tensor, width: int) -> Tensor:
        by_rank = buffer.view(len(self._totals), -1)
        split = []
        for g, start in zip(self._gradients, self._starts, strict=False):
            # Shards are consecutive rows, so that one after the other they are the gradient, and then padding.
            full = by_rank[:, start : start + g.padded].reshape(-1)[: g.numel]
            split.append((full if g.full is None else g.full.take(full)).split(list(g.counts)))
        padding = buffer.new_zeros(width)
        pieces: list[Tensor] = []
        for total, of_rank in zip(self._totals, zip(*split, strict=True), strict=True):
            pieces += [*of_rank, padding[: width - total]]
        return torch.cat(pieces)


_PLACEMENTS: dict[int, tuple[Placement, ...]] = {1: (ShardPlacement(0),), 2: (Replicate(), ShardPlacement(0))}


class FSDP2(TorchTraining):
    """A root module on which `fully_shard` was called.

    The step writes to the local shards without FSDP's knowledge, so a module that still holds unsharded weights (the
    root keeps them between forwards, and one whose forward raised) would go on computing with old ones: `publish`
    reshards every module.

    Raises:
        ValueError: `module` is only a part of what is sharded, or a parameter is not split along dimension 0, over the
            one or the last of two mesh dimensions.
    """

    weights_replicated = False

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
        # trainable there; in an ascent those of a whole group may be frozen.
        self._state._lazy_init()
        if not self._state._is_root:
            raise ValueError(
                "the model is a part of a larger FSDP2 model: give the root that fully_shard was called on"
            )
        self._kept_gathered: list[Any] = []  # parameter groups that stay gathered while the weights are perturbed
        self.reshard()  # after a forward without a backward the root shows its unsharded weights as its parameters
        meshes = set()
        for name, p in module.named_parameters():
            if not isinstance(p, DTensor):
                raise ValueError(f"parameter {name} is not sharded; call fully_shard without ignored_params")
            if p.placements != _PLACEMENTS.get(p.device_mesh.ndim):
                raise ValueError(
                    f"parameter {name} is {p.placements} on mesh {tuple(p.device_mesh.shape)}; supported are "
                    "(Shard(0),) on one dimension and (Replicate(), Shard(0)) on two"
                )
            meshes.add(p.device_mesh)
        if len(meshes) != 1:
            raise ValueError(f"the model's parameters lie on {len(meshes)} meshes; supported is one")
        self._mesh: DeviceMesh = meshes.pop()
        self._placements = _PLACEMENTS[self._mesh.ndim]
        self.shard_group = ProcessGroup(self._mesh.get_group(self._mesh.ndim - 1))
        self.data_parallel_group = ProcessGroup(_group_of_all(self._mesh))
        self.packs_gradients = self.shard_group.size > 1
        self._counts = RunCounts()

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local rows of each parameter."""
        result = []
        for p in parameters:
            start = min(self.shard_group.rank * self._padded_numel(p), p.numel())
            result.append(Shard(_local(p), start, p.numel()))
        return result

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local rows of each parameter's `.grad`, which FSDP has reduced."""
        return [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in parameters]

    @contextmanager
    def ascent(self, reduction: AscentReduction) -> Iterator[None]:
        """FSDP averages in the backward what gradients there are: packed, over one replica or all, as asked for."""
        kept = {id(p) for p in reduction.keep_gathered}
        kept_groups = [group for group in self._param_groups() if kept and _consists_of(group, kept)]
        unreplicated = self._param_groups() if reduction.within_shard_group and self._mesh.ndim > 1 else []
        with _without_replicas(unreplicated), _kept_gathered(kept_groups), _packing(self._packed(reduction)):
            yield
        self._kept_gathered = kept_groups

    def _packed(self, reduction: AscentReduction) -> list[tuple[Any, list[PackedGradient]]]:
        """The parameter groups of whose gradients not everything is needed, and what is."""
        elements = {
            id(p): (local, full)
            for p, local, full in zip(reduction.parameters, reduction.local, reduction.full, strict=True)
            if full is not None
        }
        if not elements or self.shard_group.size == 1:
            return []
        packed = []
        for group in self._param_groups():
            trained = [fsdp_param.sharded_param for fsdp_param in group.fsdp_params]
            trained = [p for p in trained if p.requires_grad]
            if any(id(p) in elements for p in trained):
                packed.append((group, [self._packed_gradient(p, *elements.get(id(p), (None, None))) for p in trained]))
        return packed

    def _packed_gradient(
        self, parameter: nn.Parameter, local: Elements | None, full: Elements | None
    ) -> PackedGradient:
        numel, padded, size = parameter.numel(), self._padded_numel(parameter), self.shard_group.size
        starts = [min(rank * padded, numel) for rank in range(size + 1)]
        lengths = [end - start for start, end in pairwise(starts)]
        runs = list(zip(range(size), starts, lengths, strict=False))
        return PackedGradient(numel, padded, lengths, full, local, self._counts(full, runs))

    def _padded_numel(self, parameter: nn.Parameter) -> int:
        """Elements of the largest shard. FSDP2 splits like torch.chunk: equal parts, the last ones short or empty."""
        rows, row_size = parameter.shape[0] if parameter.ndim else 1, math.prod(parameter.shape[1:])
        return -(-rows // self.shard_group.size) * row_size

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients stay unsharded until the last micro-batch."""
        self._root.set_requires_gradient_sync(last)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    @contextmanager
    def capture_gradients(self, parameters: Sequence[nn.Parameter], on_gradient: OnGradient) -> Iterator[None]:
        """Takes them away from the unsharded parameters where the backward accumulates: FSDP has nothing to reduce."""
        fsdp_params = list(self._fsdp_params())
        if not all(hasattr(one, "_unsharded_param") for one in fsdp_params):  # there is none before the first forward
            for module in self._root.modules():  # type: ignore[attr-defined]
                if isinstance(module, FSDPModule):
                    module.unshard()
                    module.reshard()
        unsharded = {id(one.sharded_param): one._unsharded_param for one in fsdp_params}
        with divert_gradients([unsharded[id(p)] for p in parameters], on_gradient):
            yield

    def _param_groups(self) -> list[Any]:
        """Every `FSDPParamGroup`: what FSDP gathers and frees together."""
        return [group for state in self._state._state_ctx.all_states for group in fsdp_param_groups(state)]

    def _fsdp_params(self) -> Iterator[Any]:
        """Every `FSDPParam`: what FSDP knows of one parameter."""
        for group in self._param_groups():
            yield from group.fsdp_params

    def clear_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Drop `.grad`, and the unsharded gradients that an interrupted accumulation has left."""
        super().clear_gradients(optimizer)
        self.publish()
        for one in self._fsdp_params():
            one.unsharded_accumulated_grad = None
            if hasattr(one, "_unsharded_param"):  # there is none before the first forward
                one._unsharded_param.grad = None

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        """The DTensor's shape."""
        return parameter.shape

    def gather(self, parameter: nn.Parameter, local: Tensor) -> Tensor:
        """An all-gather over the shard group."""
        sharded = DTensor.from_local(
            local,
            self._mesh,
            self._placements,
            run_check=False,
            shape=parameter.shape,
            stride=torch.empty(parameter.shape, device="meta").stride(),
        )
        return sharded.full_tensor()

    def scatter(self, parameter: nn.Parameter, full: Tensor) -> Tensor:
        """The local rows."""
        start = self.shards([parameter])[0].start
        local = _local(parameter)
        return full.reshape(-1)[start : start + local.numel()].reshape(local.shape)

    def resident(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local rows of each parameter."""
        return [_local(p) for p in parameters]

    def publish(self, written: WrittenWeights | None = None) -> None:
        """Reshard every module but those that an ascent kept gathered: the next forward gathers the rest anew."""
        if not self._kept_gathered:
            self.reshard()
            return
        for group in self._param_groups():
            if group not in self._kept_gathered:
                group.reshard()
            elif group.is_unsharded:
                for one in group.fsdp_params:  # whether a gradient is wanted is only noted when a group is gathered
                    one.to_unsharded()

    def reshard(self) -> None:
        """Reshard every module. FSDP's `reshard` would not do: it leaves those whose forward raised."""
        self._kept_gathered = []
        reset_iter_state(self._root)


def _consists_of(group: Any, parameters: Set[int]) -> bool:
    """Whether a parameter group has no other trained parameters than these, given by identity."""
    sharded = [one.sharded_param for one in group.fsdp_params]
    return all(id(p) in parameters or not p.requires_grad for p in sharded)


@contextmanager
def _kept_gathered(groups: Sequence[Any]) -> Iterator[None]:
    """Forwards and backwards inside do not reshard the parameter groups."""
    before = [(group, group.post_forward_mesh_info, group.reshard_after_backward) for group in groups]
    try:
        for group in groups:
            group.post_forward_mesh_info, group.reshard_after_backward = None, False
        yield
    finally:
        for group, *settings in before:
            group.post_forward_mesh_info, group.reshard_after_backward = settings


@contextmanager
def _packing(packed: Sequence[tuple[Any, Sequence[PackedGradient]]]) -> Iterator[None]:
    """Backwards inside reduce-scatter, of each parameter group, no more than the elements given with it."""
    before = [(group, group._reduce_scatter_comm) for group, _ in packed]
    try:
        for group, gradients in packed:
            group._reduce_scatter_comm = PackedReduceScatter(
                group._reduce_scatter_comm, gradients, group.mesh_info.shard_mesh_rank
            )
        yield
    finally:
        for group, usual in before:
            group._reduce_scatter_comm = usual


@contextmanager
def _without_replicas(groups: Sequence[Any]) -> Iterator[None]:
    """Forwards and backwards inside know of one replica of the parameter groups only: plain FSDP and not HSDP.

    `set_requires_all_reduce(False)` is for accumulation: it leaves no `.grad`, and its sums, in which parameters cannot
    be told apart, are added to what the next backward reduces.
    """
    before = [(group, group.mesh_info, group.post_forward_mesh_info) for group in groups]
    try:
        for group, hybrid, after_forward in before:
            plain = FSDPMeshInfo(hybrid.mesh, shard_mesh_dim=hybrid.shard_mesh_dim)
            if (apart := separate_reduce_scatter_group(hybrid)) is not None:
                plain.reduce_scatter_process_group = apart
            group.mesh_info = plain
            if after_forward is hybrid:
                group.post_forward_mesh_info = plain
        yield
    finally:
        for group, *settings in before:
            group.mesh_info, group.post_forward_mesh_info = settings


def _group_of_all(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All ranks of `mesh`, in the order of the default group where these are all that there are."""
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


BACKENDS.register(
    "fsdp2",
    "every parameter is sharded by rows; with replicas, in several copies (HSDP)",
    "PyTorch fully_shard, arXiv 2304.11277",
)(
    Backend(
        owns=lambda module: any(isinstance(m, FSDPModule) for m in module.modules()),
        sharding=FSDP2,
        place=_place,
        has_replicas=True,
    )
)
