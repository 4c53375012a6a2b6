"""FSDP2: every parameter is sharded along its first dimension over a group of ranks.

With several such groups that each hold a replica of the weights (HSDP) the mesh has a dimension for the replicas.

The ascent gradient is what FSDP's reduce-scatter leaves in `.grad`, the perturbation is written to the local rows of
each DTensor, and gathered copies are freed so that the next forward gathers the perturbed weights. A parameter group,
below, is FSDP's: the parameters that one `fully_shard` call gathers and frees together.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement

from ssam_scale.torch_compat import (
    fsdp_param_groups,
    reduce_scatter_single,
    reset_iter_state,
    separate_reduce_scatter_group,
)

from .chunks import Chunk, whole
from .gradient_hooks import OnGradient, divert_gradients
from .interface import AscentReduction, Shard, WrittenWeights
from .low_precision import cast_parameters
from .optimizer_trial import Handed
from .packed_reduce_scatter import Asked, Packing, Packings
from .process_group import ProcessGroup
from .registry import BACKENDS, Backend, MakeOptimizer, Options
from .unsharded import TorchTraining
from .world import World


class PackedReduceScatter(ReduceScatter):
    """FSDP's reduce-scatter, of what a packing sends; the result is zero elsewhere.

    Where not all of the gradients are there (a pass did not use a parameter) everything is sent.

    Args:
        usual: FSDP's own, which also allocates.
        packing: what is sent.
        between_copies: the ranks that hold the same shards, over which the result is averaged; None: there are none.
        averages: whether the result is divided by their number.
    """

    def __init__(
        self, usual: Any, packing: Packing, between_copies: dist.ProcessGroup | None = None, averages: bool = True
    ) -> None:
        self._usual, self._packing = usual, packing
        self._between_copies, self._averages = between_copies, averages

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
        if output_tensor.numel() != self._packing.numel:
            self._usual(output_tensor, input_tensor, group, op)
            self._between(output_tensor)
            return None

        def reduce(received: Tensor, packed: Tensor) -> None:
            reduce_scatter_single(received, packed, op, group)
            self._between(received)

        self._packing.reduce_scatter(output_tensor.zero_(), input_tensor, reduce, group)
        return None

    def _between(self, reduced: Tensor) -> None:
        if self._between_copies is not None:
            if self._averages:
                reduced.div_(self._between_copies.size())
            dist.all_reduce(reduced, group=self._between_copies)


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

    weights_replicated = accumulates_in_grad = False
    hands: Handed = "shards"

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
        self._replica = self._mesh.get_local_rank(0) if self._mesh.ndim > 1 else 0
        self.data_parallel_group = ProcessGroup(_group_of_all(self._mesh))
        self.packs_gradients = self.shard_group.size > 1
        self._order = _OrderOfForwards(module, self._state._comm_ctx, fsdp_param_groups(self._state))
        self.packings = Packings(self.shard_group.size, self.shard_group.rank)

    def shards(self, parameters: Sequence[nn.Parameter]) -> list[Shard]:
        """The local rows of each parameter."""
        result = []
        for p in parameters:
            result.append(Shard(_local(p), self._start(p.shape), p.numel()))
        return result

    def masters(self, parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
        """There are none: what is gathered in low precision is cast from the shards."""
        return None

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The local rows of each parameter's `.grad`, which FSDP has reduced."""
        return [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in parameters]

    def resident_gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """The same."""
        return self.gradients(parameters)

    @contextmanager
    def ascent(self, reduction: AscentReduction) -> Iterator[None]:
        """FSDP averages in the backward what gradients there are: packed, over one replica or all, as asked for."""
        kept = {id(p) for p in reduction.keep_gathered}
        kept_groups = [group for group in self._param_groups() if kept and _consists_of(group, kept)]
        packed, unreplicated, between_copies = self._packed(reduction), [], None
        if self._mesh.ndim > 1 and reduction.within_shard_group:
            unreplicated = self._param_groups()
        elif self._mesh.ndim > 1:  # a packed reduction averages over the copies itself, without what it has not sent
            unreplicated, between_copies = [group for group, _ in packed], self._mesh.get_group(0)
        with _without_replicas(unreplicated), _kept_gathered(kept_groups), _packing(packed, between_copies):
            yield
        self._kept_gathered = kept_groups

    def _packed(self, reduction: AscentReduction) -> list[tuple[Any, Packing]]:
        """The parameter groups of whose gradients not everything is needed, and what is."""
        if self.shard_group.size == 1:
            return []
        asked = Asked(reduction)
        packed = []
        for group in self._param_groups():
            trained = [one.sharded_param for one in group.fsdp_params if one.sharded_param.requires_grad]
            gradients = [asked.of(p, p.numel(), self._padded_numel(p.shape)) for p in trained]
            if (packing := self.packings(id(group), gradients)) is not None:
                packed.append((group, packing))
        return packed

    def _padded_numel(self, shape: torch.Size) -> int:
        """Elements of the largest shard. FSDP2 splits like torch.chunk: equal parts, the last ones short or empty."""
        rows, row_size = shape[0] if shape else 1, math.prod(shape[1:])
        return -(-rows // self.shard_group.size) * row_size

    def _start(self, shape: torch.Size) -> int:
        """The place of the first local element in a full tensor."""
        return min(self.shard_group.rank * self._padded_numel(shape), shape.numel())

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Gradients stay unsharded until the last micro-batch, and the root's own weights gathered until its end.

        A backward through a shared prefix comes by the root in its middle, where FSDP would free them, and gather them
        again for the prefix.
        """
        freed = [group for group in fsdp_param_groups(self._state) if group.reshard_after_backward]
        self._root.set_requires_gradient_sync(last)
        try:
            for group in freed:
                group.reshard_after_backward = False
            yield
        finally:
            self._root.set_requires_gradient_sync(True)
            for group in freed:
                group.reshard_after_backward = True
                group.reshard()

    def backward(self, loss: Tensor) -> None:
        """Autograd's, in which FSDP gathers ahead what the backward comes to and nothing else."""
        self._order.forget_frozen_beginning()
        super().backward(loss)

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
        return self._sharded(local, parameter.shape).full_tensor()

    def _sharded(self, local: Tensor, shape: torch.Size) -> DTensor:
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, self._mesh, self._placements, run_check=False, shape=shape, stride=stride)

    def chunk(self, parameter: nn.Parameter, local: Tensor) -> Tensor | Chunk:
        """The local rows; of several replicas one saves them."""
        return self._chunk(parameter.shape, local, partial(self.gather, parameter, local))

    def _chunk(self, shape: torch.Size, local: Tensor, gather: Callable[[], Tensor]) -> Tensor | Chunk:
        if self.shard_group.size == 1:
            return local
        return Chunk(local, self._start(shape), shape, not self._replica, gather)

    def _named(self, value: Any) -> Any:
        """A chunk of what is split like the weights; what an optimizer has split otherwise, in full."""
        if not isinstance(value, DTensor):
            return value
        if value.placements != self._placements:
            return value.full_tensor()
        return self._chunk(value.shape, _local(value), value.full_tensor)

    def _like(self, mine: Any, saved: Any) -> Any:
        """The local rows, of which alone anything is read."""
        if not isinstance(mine, DTensor):
            return whole(saved)
        if mine.placements != self._placements or mine.shape != saved.shape:
            return distribute_tensor(whole(saved), self._mesh, mine.placements, src_data_rank=None)
        own, start = _local(mine), self._start(mine.shape)
        if isinstance(saved, Tensor):
            rows = saved.reshape(-1)[start : start + own.numel()]
        else:
            rows = saved.run(start, own.numel())
        return self._sharded(rows.view(own.shape).to(own.device), mine.shape)

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


class _OrderOfForwards:
    """What a backward gathers ahead: FSDP's order of the forwards before it, kept to what the backward comes to.

    FSDP notes the parameter groups in the order in which forwards use them, by which the backward of each gathers the
    one before it, and forgets them all at the end of a backward. But a forward without a graph has no backward; and
    that of a shared prefix comes after the ascent's, as a part of the descent's: a forward that goes on from the output
    of an earlier one goes on with its order, too.

    Args:
        root: the FSDP2 root.
        context: its `FSDPCommContext`.
        own: the root's own parameter groups, which stay gathered from the suffix's backward to the prefix's.
    """

    def __init__(self, root: nn.Module, context: Any, own: Sequence[Any]) -> None:
        self._context, self._own = context, own
        self._start = 0  # of the forward under way
        self._end = 0  # of its backward, which goes on into what its input came from
        self._used: list[tuple[weakref.ref[Tensor], list[Any]]] = []  # by forwards whose output there still is
        root.register_forward_pre_hook(self._before, prepend=True)  # FSDP's own hook replaces the inputs
        root.register_forward_hook(self._after)

    def _before(self, root: nn.Module, inputs: Sequence[Any]) -> None:
        order = self._context.post_forward_order
        self._used = [(output, used) for output, used in self._used if output() is not None]
        if torch.is_grad_enabled() and not order:  # what is there has not been through a backward yet
            for output, used in self._used:
                for group in used if any(x is output() for x in inputs) else []:
                    group._post_forward_indices.append(len(order))
                    order.append(group)
        self._start = len(order)
        self._end = 0 if any(isinstance(x, Tensor) and x.requires_grad for x in inputs) else self._start

    def _after(self, root: nn.Module, inputs: Any, output: Any) -> None:
        order = self._context.post_forward_order
        if not torch.is_grad_enabled():
            for group in reversed(order[self._start :]):
                group._post_forward_indices.pop()
            del order[self._start :]
        elif isinstance(output, Tensor) and output.requires_grad:
            used = [group for group in order[self._start :] if group not in self._own]
            self._used.append((weakref.ref(output), used))

    def forget_frozen_beginning(self) -> None:
        """A backward that ends where weights begin to be trained has no use for what ran before in the forward."""
        order = self._context.post_forward_order
        trains = (any(one.sharded_param.requires_grad for one in group.fsdp_params) for group in order[self._end :])
        unused = next((self._end + index for index, trained in enumerate(trains) if trained), 0)
        if unused:
            for group in set(order):
                group._post_forward_indices[:] = [i - unused for i in group._post_forward_indices if i >= unused]
            del order[:unused]


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
def _packing(packed: Sequence[tuple[Any, Packing]], between_copies: dist.ProcessGroup | None) -> Iterator[None]:
    """Backwards inside reduce, of each parameter group, no more than its packing sends; between copies too."""
    before = [(group, group._reduce_scatter_comm) for group, _ in packed]
    try:
        for group, packing in packed:
            # FSDP sums where it was given a number to divide by, and has divided by it.
            averages = group.gradient_divide_factor is None
            group._reduce_scatter_comm = PackedReduceScatter(
                group._reduce_scatter_comm, packing, between_copies, averages
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
    policy = MixedPrecisionPolicy()
    if cast_parameters(module, options.precision):
        # Autocast casts what layers are given.
        policy = MixedPrecisionPolicy(options.precision, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in options.blocks:
        if block is not module:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    root = fully_shard(module, mesh=mesh, mp_policy=policy)
    if policy.param_dtype is not None:
        _keep_float32(root, {id(p) for p in cast_parameters(module, options.precision)})
    return module, make_optimizer()


def _keep_float32(root: FSDPModule, cast: Set[int]) -> None:
    """Gather the parameters of an FSDP2 root in float32, except those, given by identity, that its policy casts.

    A policy is for all parameters of a `fully_shard` call, and a call of their own for those that stay float32 would
    double the number of collectives. FSDP gathers several dtypes together, but it reduces only one: gradients
    accumulate in float32, as autocast makes them. Collective.
    """
    sharded = [module for module in root.modules() if isinstance(module, FSDPModule)]  # type: ignore[attr-defined]
    params = {
        module: [one for group in fsdp_param_groups(module._get_fsdp_state()) for one in group.fsdp_params]
        for module in sharded
    }
    for one in chain(*params.values()):
        if id(one.sharded_param) not in cast:
            # FSDP asks each parameter for its dtypes, and again in every `unshard()`.
            one.init_dtype_attrs = partial(_without_cast, one.init_dtype_attrs)
    root._get_fsdp_state()._lazy_init()
    for module, own in params.items():
        module.unshard()  # there is no unsharded parameter before
        for one in own:
            one._unsharded_param.grad_dtype = torch.float32
        module.reshard()


def _without_cast(init_dtypes: Callable[[MixedPrecisionPolicy], None], policy: MixedPrecisionPolicy) -> None:
    init_dtypes(replace(policy, param_dtype=None))


BACKENDS.register(
    "fsdp2",
    "every parameter is sharded by rows; with replicas, in several copies (HSDP)",
    "PyTorch fully_shard, arXiv 2304.11277",
)(
    Backend(
        title="FSDP2",
        owns=lambda module: any(isinstance(m, FSDPModule) for m in module.modules()),
        sharding=FSDP2,
        place=_place,
        hands="shards",
        has_replicas=True,
    )
)
