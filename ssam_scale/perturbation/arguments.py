"""What `SparseSAM` is given by mistake, said in one sentence before it fails somewhere inside or means nothing."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ssam_scale.checks import check_number, described
from ssam_scale.config.direction_sections import Scope
from ssam_scale.masks import Depth, Mask
from ssam_scale.sharding import Sharding

from .descent_samples import DescentSamples
from .directions import Ascending, Direction, Fresh
from .gate import Gate
from .staged_model import StagedModel

if TYPE_CHECKING:
    from .resolved_step import StepOptions

_LABELS = {"y", "label", "labels", "target", "targets"}


def module_of(model: nn.Module | Iterable[nn.Parameter]) -> nn.Module:
    """The model, or a module that holds the parameters that were given in its place.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"model is the class {model.__name__}; an instance is needed")
    parameters = list(model) if isinstance(model, Iterable) and not isinstance(model, (str, bytes, Tensor)) else None
    if parameters is None or not all(isinstance(p, nn.Parameter) for p in parameters):
        raise TypeError(f"model is {described(model)}; a torch.nn.Module is needed, or the parameters of one")
    return nn.ParameterList(parameters)


def check_optimizer(optimizer: Any, options: Mapping[str, Any] | None = None) -> None:
    """Refuse what cannot be a base optimizer.

    Args:
        optimizer: what was given as one.
        options: what was given for it, if it is a class.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it is one that needs more than one gradient a step, or gradients of another kind.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer):
        name = optimizer.__name__
        given = ", ".join(f"{key}={value!r}" for key, value in (options or {"lr": 0.1}).items())
        raise TypeError(
            f"base_optimizer is the class {name}; an instance is needed: {name}(model.parameters(), {given})"
        )
    methods = (getattr(optimizer, name, None) for name in ("step", "zero_grad"))
    if not hasattr(optimizer, "param_groups") or not all(map(callable, methods)):
        raise TypeError(f"base_optimizer is {described(optimizer)}; a torch.optim.Optimizer is needed")
    # By its name, because what is around another optimizer is of many classes.
    inner = optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    kind = type(inner).__name__
    if hasattr(optimizer, "base_optimizer") and hasattr(optimizer, "perturbed"):
        raise ValueError("base_optimizer is a SparseSAM already; give it the optimizer that is to step")
    if hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step"):
        raise ValueError(f"base_optimizer is a {kind}, which perturbs weights itself; give the optimizer inside of it")
    if isinstance(inner, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the loss several times in a step, at points of its own; use SGD or AdamW")
    if kind == "SparseAdam":
        raise ValueError("SparseAdam steps sparse gradients, which cannot be scaled with others; use Adam or AdamW")
    if getattr(inner, "is_second_order", False):
        raise ValueError(f"{kind} differentiates the gradient again, of which a step has no graph; use AdamW")
    if getattr(inner, "_overlap_with_ddp", False):
        raise ValueError(f"{kind} with overlap_with_ddp=True steps in the backward, which both passes run; use False")
    if any(group.get("differentiable") for group in optimizer.param_groups):
        raise ValueError(
            f"{kind} with differentiable=True steps in a graph, which a perturbation has none of; use False"
        )
    if "rho" in getattr(optimizer, "defaults", {}):
        raise ValueError(
            f"{kind} has a rho of its own in its parameter groups, which is no radius; use AdamW, or another without"
        )
    # Of the class: a learning-rate scheduler puts another function in the place of the instance's.
    if not _takes(getattr(type(optimizer), "step", optimizer.step), 1):
        raise ValueError(f"{kind}.step needs a closure, and would evaluate the loss itself; use SGD or AdamW")


def check_not_stepped_in_backward(parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights that a hook of the backward steps: both passes of a step would, and the descent be from there.

    Args:
        parameters: that are trained, by name.

    Raises:
        ValueError: there is one, as far as a hook can be told from others.
    """
    for name, parameter in parameters.items():
        hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
        if hasattr(parameter, "_in_backward_optimizers") or any(map(_has_optimizer, hooks.values())):
            raise ValueError(
                f"parameter {name} has a hook that steps an optimizer in the backward, which both passes of a step run "
                "and after which no gradient is there to perturb along: remove the hook, and let SparseSAM step"
            )


def _has_optimizer(hook: Any) -> bool:
    """Whether a function names an optimizer, or a container of some, in its closure, defaults, globals or object."""
    held: list[Any] = []
    while isinstance(hook, partial):
        held += [*hook.args, *hook.keywords.values()]
        hook = hook.func
    if (owner := getattr(hook, "__self__", None)) is not None:
        held += [owner, *getattr(owner, "__dict__", {}).values()]
    if isinstance(function := getattr(hook, "__func__", hook), FunctionType):
        scope = inspect.getclosurevars(function)
        held += [*scope.nonlocals.values(), *scope.globals.values(), *(function.__defaults__ or ())]
    for value in held:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        if any(isinstance(each, torch.optim.Optimizer) for each in (value, *inner)):
            return True
    return False


def check_no_others(others: Mapping[str, Any], base_optimizer: Any) -> None:
    """Refuse keywords that `SparseSAM` does not have; those of the SAMs that build the base optimizer themselves.

    Raises:
        TypeError: there is one.
    """
    check_optimizer(base_optimizer, others)
    if others:
        name = next(iter(others))
        if name in ("fraction", "scope"):
            raise TypeError(f"{name} belongs to the direction: direction=Fresh({name}={others[name]!r})")
        of = type(base_optimizer).__name__
        raise TypeError(
            f"SparseSAM has no argument {name}; what is the base optimizer's is given to it: {of}(…, {name}=…)"
        )


def check_together(
    options: StepOptions, mask: Mask | None, adaptive: bool, gap: float, gate: Gate | None, *, reuses: bool
) -> None:
    """Refuse options of `SparseSAM` that do not go together; `reuses`: whether its schedule reuses ascents (LookSAM).

    Raises:
        TypeError: the gap is no number, or the gate no gate.
        ValueError: they do not.
    """
    norm, direction = options.norm, options.direction
    check_number("gap", gap, "at least 0", lambda alpha: 0.0 <= alpha < math.inf)
    if gate is not None and not isinstance(gate, Gate):
        raise TypeError(f"gate is {described(gate)}; Gate(steps) is needed, or None")
    if norm == "dense" and isinstance(mask, Depth) and direction.ascends:
        raise ValueError(
            "norm 'dense' needs the gradient of the prefix, which a Depth mask never computes; use 'masked', or "
            "'calibrated' for the same length"
        )
    whole = isinstance(direction, Fresh) and direction.fraction == 1.0 and direction.scope == "global"
    for what, asked in (("reuse between ascents", reuses), ("gap", gap > 0.0)):
        if asked and adaptive:
            raise ValueError(f"{what} knows the gradient by the perturbation, which adaptive distorts")
        if asked and not whole:
            raise ValueError(
                f"{what} compares the descent's gradient with that of the same samples, which it knows by the "
                f"perturbation: with direction {direction} that is along another one; use Fresh()"
            )
    if gate is not None and not whole:
        raise ValueError(
            "a gate looks at the plain gradient of the whole batch, by which steps that do not perturb go: with "
            f"direction {direction} there is none; use Fresh()"
        )
    if gate is not None and reuses:
        raise ValueError("a gate has no ascents in fixed steps that others could reuse; use one of them")
    if options.descent is not None:
        _check_descent(options.descent, direction, {"reuse": reuses, "gap": gap > 0.0, "gate": gate is not None})
    if options.loss_budget is not None and norm != "masked":
        raise ValueError(
            f"loss_budget says how far a step goes by the norm of what is perturbed, whatever else it would be divided "
            f"by: with norm {norm!r} use no loss_budget, or norm 'masked'"
        )
    if options.loss_budget is not None and not isinstance(direction, Fresh):
        raise ValueError(
            f"loss_budget goes by how the loss rises along its own gradient, which direction {direction} is not; use "
            "Fresh()"
        )


def _check_descent(descent: DescentSamples, direction: Direction, others: Mapping[str, bool]) -> None:
    """Refuse a choice of the descent's samples that nothing tells.

    Raises:
        ValueError: it is such.
    """
    if not isinstance(direction, Ascending):
        raise ValueError(
            f"descent {descent} is of samples that an ascent helps to choose, and direction {direction} has none; use "
            "Fresh(), Friendly() or VaSSO()"
        )
    if descent.choose == "sharpest" and direction.fraction < 1.0:
        raise ValueError(
            "descent choose='sharpest' compares each sample's loss with that in the ascent, which sees "
            f"{direction.fraction} of them: give the direction fraction=1.0, or choose='highest_loss'"
        )
    for name, asked in others.items():
        if asked:
            raise ValueError(
                f"{name} goes by the gradients of both passes together, and with descent {descent} they are of other "
                "samples; use one of them"
            )


def check_scope(scope: Scope, sharding: Sharding) -> None:
    """Refuse an ascent by a part of the batch that the model's sharding does not let anybody climb by.

    Args:
        scope: of the direction.
        sharding: of the model.

    Raises:
        ValueError: it is such; says which scopes there are.
    """
    processes, sharers = sharding.data_parallel_group.size, sharding.shard_group.size
    if processes == 1:
        return  # what all of these are then
    alone = sharding.weights_replicated and (sharers == 1 or sharding.reduces_whole)
    if scope in ("worker", "micro_batch") and sharding.weights_replicated and not alone:
        raise ValueError(
            f"direction scope {scope!r} perturbs all weights on each process by itself, and here, in low precision, "
            "each knows exactly only the weights that it steps: use float32 weights"
        )
    if scope == "worker" and not alone:
        raise ValueError(
            "direction scope 'worker' perturbs all weights on each process by itself, and here no process holds all "
            "weights: use scope 'micro_batch', or 'shard_group' with replicas, or DDP"
        )
    if scope == "shard_group" and (sharding.weights_replicated or sharers == processes):
        group = "each process is one: use scope 'worker'" if sharding.weights_replicated else "there is only one"
        raise ValueError(f"direction scope 'shard_group' is for FSDP2 with replicas of the weights; here {group}")


def check_scaler(scaler: Any) -> None:
    """Refuse what is no `GradScaler`, torch's or one of its interface.

    Raises:
        TypeError: it is none.
    """
    if isinstance(scaler, type) or not all(hasattr(scaler, name) for name in ("scale", "unscale_", "step", "update")):
        raise TypeError(f"scaler is {described(scaler)}; a torch.amp.GradScaler is needed, or None")


def check_mask(mask: Any) -> None:
    """Refuse what is no mask.

    Raises:
        TypeError: it is none.
    """
    if isinstance(mask, type):
        raise TypeError(f"mask is the class {mask.__name__}; an instance is needed: {mask.__name__}(…)")
    if not callable(getattr(mask, "plan", None)) or not callable(getattr(mask, "check", None)):
        raise TypeError(
            f"mask is {described(mask)}; an instance of one of ssam_scale.masks is needed, such as Depth() or "
            'Scored("element", 0.5), or None for all weights'
        )


def check_stages(network: nn.Module, mask: Mask) -> None:
    """Refuse a mask with a cut on a `StagedModel` that something is around: nothing can run a part of it there.

    Raises:
        ValueError: it is such a model.
    """
    in_blocks = getattr(mask, "pattern", None) == "block"
    if not (isinstance(mask, Depth) or in_blocks) or isinstance(network, StagedModel):
        return
    for name, module in network.named_modules():
        if isinstance(module, StagedModel):
            named = "a mask of pattern 'block'" if in_blocks else f"a {type(mask).__name__} mask"
            how = "give SparseSAM the StagedModel itself, or wrap what is around it in stages of its own"
            if type(network).__name__ == "OptimizedModule":
                how = "compile its stages instead: staged.compile()"
            raise ValueError(
                f"{named} runs parts of a StagedModel, and a {type(network).__name__} is around it ({name}): {how}"
            )


def check_closure(closure: Any) -> None:
    """Refuse what `step` cannot call without arguments.

    Raises:
        TypeError: it is such.
    """
    forms = "opt.step(loss_fn, batch), or opt.step(closure) with a function of no arguments that calls backward"
    if not callable(closure):
        raise TypeError(f"step was given {described(closure)}; call {forms}")
    if not _takes(closure.forward if isinstance(closure, nn.Module) else closure, 0):
        name = getattr(closure, "__name__", type(closure).__name__)
        raise TypeError(f"step was given {name}({', '.join(_names(closure) or [])}) and no batch for it; call {forms}")


def check_batches(batches: Sequence[Any]) -> None:
    """Refuse inputs and labels where micro-batches belong.

    Raises:
        TypeError: they are such.
    """
    if not all(isinstance(batch, Tensor) for batch in batches):
        return
    if len(kinds := {(batch.dtype, batch.ndim) for batch in batches}) > 1:
        shown = " and ".join(
            sorted(f"{str(dtype).removeprefix('torch.')} of {ndim} dimensions" for dtype, ndim in kinds)
        )
        raise TypeError(
            f"step was given {len(batches)} micro-batches of different kinds ({shown}): what belongs together is one "
            "batch, opt.step(loss_fn, (inputs, labels))"
        )


def check_samples_first(batch: Any) -> None:
    """Refuse a batch of which nobody can tell the first samples.

    Raises:
        TypeError: something in it holds what cannot be cut, or there is no tensor.
        ValueError: the first dimensions of its tensors are not of one size.
    """
    leaves = tree_leaves(batch)
    kinds = "tensors, in tuples, lists or dictionaries of them"
    for leaf in leaves:
        if isinstance(leaf, (Tensor, str, bytes)):
            continue
        if isinstance(leaf, (Mapping, Sequence)) or is_dataclass(leaf) or hasattr(leaf, "shape"):
            raise TypeError(
                f"with a fraction below 1 the ascent sees the first samples of {kinds}; in the batch is "
                f"{described(leaf)}: give its tensors, such as dict(batch)"
            )
    shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    if not shapes:
        raise TypeError(
            f"with a fraction below 1 the ascent sees the first samples of {kinds}; {described(batch)} has none"
        )
    if len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            "with a fraction below 1 the ascent sees the first samples of each tensor in the batch, whose first "
            f"dimension counts samples; here tensors have the shapes {', '.join(map(str, shapes))}: put samples first, "
            "and what is not of samples beside the batch"
        )


def check_loss_fn(loss_fn: Any, network: nn.Module) -> None:
    """Refuse a loss function that cannot be called as `loss_fn(forward, batch)`.

    Raises:
        TypeError: it cannot.
    """
    form = "it is called as loss_fn(forward, batch), with what to call in the place of the model, for each batch"
    if not callable(loss_fn):
        raise TypeError(f"the loss function is {described(loss_fn)}; {form}")
    called = loss_fn.forward if isinstance(loss_fn, nn.Module) else loss_fn
    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    taken = _names(called)
    if taken is not None and len(taken) > 1 and taken[1].lower() in _LABELS:
        raise TypeError(
            f"the loss function {name}({', '.join(taken)}) takes outputs and labels; {form}: "
            "lambda forward, batch: criterion(forward(batch[0]), batch[1])"
        )
    if not _takes(called, 2):
        raise TypeError(f"the loss function {name}({', '.join(taken or [])}) does not take two arguments; {form}")
    if isinstance(network, nn.ParameterList):
        raise TypeError(
            "SparseSAM was given parameters, and nothing that a loss function could call: give it the model, or use "
            "the form with a closure that calls the model and backward itself"
        )


def check_loss(loss: Any) -> Tensor:
    """What a loss function returned, if it is a mean loss that a backward can begin at.

    Raises:
        TypeError: it is no tensor, or one of complex numbers.
        ValueError: it has several elements, or no graph.
    """
    if not isinstance(loss, Tensor):
        hint = ", and nothing beside it" if isinstance(loss, (tuple, list, dict)) else ""
        raise TypeError(f"the loss function returned {described(loss)}; the mean loss as a tensor is needed{hint}")
    if loss.numel() != 1:
        raise ValueError(
            f"the loss function returned a tensor of shape {tuple(loss.shape)}; the mean over the batch is needed"
        )
    if loss.is_complex():
        raise TypeError(f"the loss function returned {described(loss)}, of complex numbers; a real loss is needed")
    if not loss.requires_grad:
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "the step is within torch.inference_mode, which records no graph for a backward: leave that for it"
            )
        raise ValueError(
            "the loss that the loss function returned depends on no trained weight by a graph: it has been detached, "
            "or computed under torch.no_grad, or not by the `forward` that it was given"
        )
    return loss.reshape(())


def explained(error: RuntimeError) -> Exception | None:
    """What an error of autograd's means that comes of a loss function that calls backward itself; None: another."""
    if "appears to not have been used in the graph" in str(error):
        return ValueError(
            "the loss function differentiates by weights that the ascent keeps no graph of, as they lie before the "
            "cut: use a mask without a cut, or switch savings.share_prefix off"
        )
    return ValueError(CALLS_BACKWARD) if "backward through the graph a second time" in str(error) else None


CALLS_BACKWARD = (
    "the graph of the loss is gone: the loss function calls backward itself, which SparseSAM does for each pass; let "
    "it return the loss, or use the form with a closure, which calls backward"
)


def _takes(function: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # a builtin, of which nothing is known
        return True
    return True


def _names(function: Callable[..., Any]) -> list[str] | None:
    """The names of its arguments; None: nothing is known of them."""
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
