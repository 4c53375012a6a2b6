"""Whether a model is its stages, one after another: on a batch, bit for bit, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ssam_scale.checks import described
from ssam_scale.errors import UserError
from ssam_scale.perturbation.staged_model import Stage, StagedModel

IMAGES = (2, 3, 224, 224)
"""The shape of a batch of images: normalization over a batch needs two."""


def check_stages(model: nn.Module, stages: Sequence[Stage], images: Tensor | Sequence[int] = IMAGES) -> None:
    """Hold a model against its stages: outputs in both modes, gradients and statistics in training mode.

    With the same random numbers, and on the model's device. The model is left as it was: modes, statistics, gradients
    and the random state.

    Args:
        model: whose stages they are.
        stages: in order.
        images: a batch that the model takes; or the shape of a random one, float32.

    Raises:
        UserError: they are not the same, and which is the first stage that differs; a stage changes its input, or
            passes on something else than a tensor, or uses a weight that is counted to another.
    """
    batch = images if isinstance(images, Tensor) else _random(model, images)
    with _left_as_it_was(model, batch.device):
        statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
        for training in (True, False):
            model.train(training)
            mode = "training" if training else "evaluation"
            try:
                expected = _seen(model, model, stages, batch, statistics)
            except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{type(model).__name__} does not take a batch of shape {tuple(batch.shape)} in {mode} mode: "
                    f"{_reason(error)}"
                ) from error
            where = _difference(expected, _seen(model, model, stages, batch, statistics), model, stages)
            if where is not None:
                raise UserError(
                    f"{type(model).__name__} is not the same twice in {mode} mode ({where}), so that stages cannot be "
                    "compared with it: it draws from another generator than torch's, keeps something, or is not "
                    "deterministic on this device"
                )
            found = _seen(model, lambda x: _one_after_another(stages, x), stages, batch, statistics)
            where = _difference(expected, found, model, stages)
            if where is not None:
                raise UserError(
                    f"{type(model).__name__} is not its stages one after another: in {mode} mode they differ {where}"
                )
        model.train()
        _restore(model, statistics)
        _check_uses(model, stages, batch)


def _random(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """A batch of this shape, where and of the precision that the model's weights are."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(0)).to(like)


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            _restore(model, statistics)


@torch.no_grad()
def _restore(model: nn.Module, statistics: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        if name in statistics:
            buffer.copy_(statistics[name])


@dataclass
class _Seen:
    """What a forward and its backward left.

    Attributes:
        blocks: what each block put out, in the order of their calls, by its number.
        outputs: of the model.
        gradients: by the parameter's name.
        statistics: buffers afterwards, by name.
    """

    blocks: list[tuple[int, list[Any]]] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    statistics: dict[str, Tensor] = field(default_factory=dict)


def _seen(
    model: nn.Module,
    forward: Callable[[Tensor], Any],
    stages: Sequence[Stage],
    batch: Tensor,
    statistics: dict[str, Tensor],
) -> _Seen:
    """Run a forward, and in training mode a backward, from a known state."""
    seen = _Seen()
    _restore(model, statistics)
    torch.manual_seed(0)

    def hook(number: int) -> Callable[..., None]:
        # Copies, because what follows a block may change its output in place.
        return lambda *call: seen.blocks.append((number, [_copied(leaf) for leaf in tree_leaves(call[-1])]))

    hooks = [stage.block.register_forward_hook(hook(i)) for i, stage in enumerate(stages)]
    try:
        with torch.set_grad_enabled(model.training):
            outputs = tree_leaves(forward(batch.detach().clone()))
    finally:
        for handle in hooks:
            handle.remove()
    seen.outputs = [_copied(leaf) for leaf in outputs]
    seen.statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    differentiable = [leaf for leaf in outputs if isinstance(leaf, Tensor) and leaf.requires_grad]
    if differentiable and trained:
        seen.gradients = dict(zip(trained, _gradients(differentiable, list(trained.values())), strict=True))
    return seen


def _copied(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Of a random weighting of outputs, the same each time; None for what is not used."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in outputs]
    return torch.autograd.grad(outputs, inputs, weights, allow_unused=True)


def _one_after_another(stages: Sequence[Stage], x: Any) -> Any:
    """What the stages make of a batch.

    Raises:
        UserError: one fails, changes its input in place, or passes on no tensor.
    """
    for number, stage in enumerate(stages):
        version = x._version
        try:
            after = stage.forward(x)
        except (AssertionError, AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"the stage {stage.name} fails: {_reason(error)}") from error
        if number > 0 and x._version != version:
            raise UserError(
                f"the stage {stage.name} changes its input in place, which both passes of a step would use; build it "
                "with inplace=False"
            )
        if number < len(stages) - 1 and not isinstance(after, Tensor):
            raise UserError(f"the stage {stage.name} passes on {described(after)}, and a cut needs a tensor")
        x = after
    return x


def _difference(one: _Seen, other: _Seen, model: nn.Module, stages: Sequence[Stage]) -> str | None:
    """Where they differ first, in words; None where they do not."""
    nothing: tuple[int, list[Any]] = (len(stages) - 1, [])
    for (number, expected), (found, leaves) in zip_longest(one.blocks, other.blocks, fillvalue=nothing):
        if number != found:
            return f"first at {stages[number].name}: other blocks run, or in another order"
        if (size := _largest(expected, leaves)) is not None:
            return f"first at {stages[number].name}, by up to {size}"
    if (size := _largest(one.outputs, other.outputs)) is not None:
        return f"first behind {stages[-1].name}, by up to {size}"
    owners = StagedModel(model, stages).stages_of_parameters()
    different = []
    for name, gradient in one.gradients.items():
        if (size := _largest([gradient], [other.gradients.get(name)])) is not None:
            different.append((owners[name][0], name, size))
    if different:  # what is wrong behind a block reaches all before it
        number, name, size = max(different)
        return f"first at {stages[number].name} in the backward: the gradient of {name}, by up to {size}"
    for name, buffer in one.statistics.items():
        if (size := _largest([buffer], [other.statistics.get(name)])) is not None:
            return f"in the statistics {name}, by up to {size}"
    return None


def _largest(one: Sequence[Any], other: Sequence[Any]) -> str | None:
    """The largest difference between values, in words; None where all are the same, bit for bit."""
    for expected, found in zip_longest(one, other):
        if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
            if expected is not found and expected != found:
                return f"{described(expected)} for {described(found)}"
        elif expected.shape != found.shape or expected.dtype != found.dtype:
            return f"{tuple(expected.shape)} of {expected.dtype} for {tuple(found.shape)} of {found.dtype}"
        elif not bool(((expected == found) | ((expected != expected) & (found != found))).all()):
            return f"{float((expected.double() - found.double()).abs().max()):.3g}"
    return None


def _check_uses(model: nn.Module, stages: Sequence[Stage], batch: Tensor) -> None:
    """Run each stage by itself, and see which weights it uses: a cut leaves those of others alone.

    Raises:
        UserError: a weight is used by a stage that it does not belong to.
    """
    owners = StagedModel(model, stages).stages_of_parameters()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return
    x: Any = batch.detach().clone()
    for number, stage in enumerate(stages):
        with torch.enable_grad():
            after = stage.forward(x.detach())
        leaves = [leaf for leaf in tree_leaves(after) if isinstance(leaf, Tensor) and leaf.requires_grad]
        gradients = _gradients(leaves, list(trained.values())) if leaves else ()
        for name, gradient in zip(trained, gradients, strict=False):
            if gradient is not None and number not in owners[name]:
                raise UserError(
                    f"the stage {stage.name} uses {name}, which is counted to {stages[owners[name][0]].name}: name it "
                    "in what the stage owns; no other stage may use it"
                )
        x = after


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
