"""Wrappers and weights that no backend works with, refused before anything is trained and with what would work."""

from __future__ import annotations

import gc
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._composable.contract import _get_registry
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from .process_group import ProcessGroup
from .registry import BACKENDS, Backend


def owner_of(module: nn.Module) -> Backend | None:
    """The backend that a module was placed on, by us or by the user; None: it is a plain module."""
    return next((entry.value for entry in BACKENDS.values() if entry.value.owns(module)), None)


def refuse_unsupported(module: nn.Module) -> None:
    """Refuse a model that trains on silently wrong, or fails somewhere in the middle of a step.

    Args:
        module: what `SparseSAM` is given.

    Raises:
        ValueError: it is such a model; says what would work.
    """
    outer = owner_of(module)
    for name, inner in module.named_modules():
        if isinstance(inner, torch.jit.ScriptModule):
            made = "trace" if isinstance(inner, torch.jit.TopLevelTracedModule) else "script"
            raise ValueError(
                f"{name or 'the model'} is what torch.jit.{made} returned, which takes no hooks: give SparseSAM the "
                "model itself, or what torch.compile makes of it"
            )
        if isinstance(inner, FullyShardedDataParallel):
            raise ValueError(
                "the model is sharded by FullyShardedDataParallel (FSDP1), which is not supported; call fully_shard on "
                "it instead (FSDP2)"
            )
        if name and (owner := owner_of(inner)) is not None and owner is not outer:
            kind, inside = type(module).__name__, type(inner).__name__
            if outer is not None:
                raise ValueError(f"{outer.title} is around {owner.title} ({name}); use one of the two")
            how = f"give SparseSAM the {inside} itself, not what is around it"
            if kind == "OptimizedModule":
                how = f"compile before it is wrapped: {inside}(torch.compile(model))"
            raise ValueError(f"the model is a {kind} around {owner.title} ({name}), which it hides: {how}")
        if isinstance(inner, (nn.Embedding, nn.EmbeddingBag)) and inner.sparse:
            raise ValueError(
                f"{name or 'the model'} is an {type(inner).__name__} with sparse gradients, which cannot be scaled "
                "with the others; build it with sparse=False"
            )
    for name, parameter in module.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ValueError(f"parameter {name} has no shape yet: run the model once before SparseSAM is built")
        if parameter.is_meta:
            raise ValueError(f"parameter {name} is on the meta device: move the model to a real one first")
        if parameter.is_complex():
            raise ValueError(f"parameter {name} is {parameter.dtype}; only real weights can be perturbed")
        if parameter.is_inference():
            raise ValueError(f"parameter {name} was made in torch.inference_mode; build the model outside, to train it")
        if parameter.requires_grad and parameter.element_size() < 2:
            raise ValueError(f"parameter {name} is {parameter.dtype}, too narrow for sums; keep it in bfloat16")
        if isinstance(parameter, DTensor) and (outer is None or outer.title == "DDP"):
            raise ValueError(
                f"parameter {name} is a DTensor over {parameter.device_mesh}; of those that are sharded, weights of "
                "fully_shard alone are supported, and SparseSAM needs the module that it was called on"
            )


def check_alone(module: nn.Module, group: ProcessGroup) -> None:
    """Among several processes, a model that is trained by one of them alone.

    Args:
        module: what `SparseSAM` was given.
        group: over whom its gradients are averaged.

    Raises:
        ValueError: it has been wrapped since, in what would have averaged them; the copies would drift apart.
    """
    if group.size > 1 or not dist.is_initialized() or dist.get_world_size() == 1 or owner_of(module) is not None:
        return
    if "replicate" in (_get_registry(module) or {}):  # DDP by hooks of the module, which both passes run
        return
    # Nothing in a module says what is around it.
    others = [m for m in gc.get_objects() if isinstance(m, nn.Module) and m is not module]
    if isinstance(module, nn.ParameterList):  # whose model is not known, and is called by a closure
        own = set(map(id, module))
        if any(own <= set(map(id, m.parameters())) for m in others if owner_of(m) is not None):
            return
    around = [m for m in others if any(inner is module for inner in m.modules())]
    if owners := [owner for m in around if (owner := owner_of(m)) is not None]:
        raise ValueError(
            f"the model was wrapped in {owners[0].title} after SparseSAM was built from it, which so averages no "
            "gradients: wrap it first, and give SparseSAM what comes of it"
        )
    warnings.warn(
        f"this is one of {dist.get_world_size()} processes, and SparseSAM trains a model that no other shares: wrap it "
        "in DistributedDataParallel or fully_shard it first, if they are to train one model",
        stacklevel=4,
    )
