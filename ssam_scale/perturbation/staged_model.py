"""A network as a sequence of stages, so that a prefix can run once and serve both passes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssam_scale.checks import described
from ssam_scale.torch_compat import allow_graphs, compile_module, is_compiled

from .batchnorm import batchnorms, repeating
from .modules import every_module

# What torch allows a code (`torch._dynamo.config.recompile_limit`).
_GRAPHS_OF_A_BLOCK = 8


@runtime_checkable
class Compilable(Protocol):
    """A stage's forward that knows which of its parts to compile beside the block."""

    def compiled(self, **options: Any) -> Callable[[Tensor], Tensor]:
        """The same forward with these parts compiled.

        Args:
            options: of `torch.compile`.
        """


@runtime_checkable
class Traced(Protocol):
    """A stage's forward that was made of the model's by looking at it, and can look again."""

    def check_current(self) -> None:
        """Look again.

        Raises:
            ValueError: the model's forward has become another.
        """


@dataclass(frozen=True)
class Stage:
    """One block with what belongs to it.

    Attributes:
        name: the block's name in the model, e.g. `layer1.0`.
        block: the module of that name: what is sharded and compiled as one unit.
        forward: the stage's part of the model's forward: the output of the stage before to its own.
        owns: prefixes of the names of the parameters that the stage uses beside the block's.
    """

    name: str
    block: nn.Module
    forward: Callable[[Tensor], Tensor]
    owns: tuple[str, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Stage:
        """Of the copied block; a forward that is written as a function runs the copies of the modules that it names.

        Raises:
            TypeError: it names a module that is a global, of which a copy has none.
        """
        return Stage(self.name, copy.deepcopy(self.block, memo), _copied(self.forward, memo), self.owns)


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy also of what functions have in their closures and defaults, which `copy.deepcopy` shares.

    And of functions that are in lists, tuples, dictionaries and objects.
    """
    if isinstance(value, partial):
        keywords = {key: _copied(part, memo) for key, part in value.keywords.items()}
        return partial(_copied(value.func, memo), *[_copied(part, memo) for part in value.args], **keywords)
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, MethodType):
        return MethodType(value.__func__, _copied(value.__self__, memo))
    if type(value) is tuple:
        return tuple(_copied(part, memo) for part in value)
    if type(value) in (list, dict) or _is_plain(value):
        same = memo[id(value)] = copy.copy(value)
        parts: Any = same if type(value) in (list, dict) else vars(same)
        for key, part in list(enumerate(parts) if type(value) is list else parts.items()):
            parts[key] = _copied(part, memo)
        return same
    if not isinstance(value, FunctionType):
        return copy.deepcopy(value, memo)
    for name in value.__code__.co_names:
        if isinstance(value.__globals__.get(name), nn.Module):
            raise TypeError(
                f"the forward of a stage uses the global {name}, which a copy would share with the original; let a "
                "function build the stages of a model that it is given"
            )
    cells = tuple(CellType() for _ in value.__closure__ or ())
    result = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
    memo[id(value)] = result
    for cell, original in zip(cells, value.__closure__ or (), strict=True):
        cell.cell_contents = _copied(original.cell_contents, memo)
    result.__defaults__ = _copied(value.__defaults__, memo)
    result.__kwdefaults__ = _copied(value.__kwdefaults__, memo)
    return result


def _is_plain(value: Any) -> bool:
    """Whether a copy of an object is one of its attributes, because its class says nothing else."""
    if isinstance(value, (type, FunctionType, ModuleType, Tensor, nn.Module)) or not hasattr(value, "__dict__"):
        return False
    cls = type(value)
    own = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__copy__", "__deepcopy__")
    if any(getattr(cls, name, None) is not getattr(object, name, None) for name in own):
        return False
    return not any(vars(base).get("__slots__") for base in cls.__mro__)


def modules_in(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """The modules that a function holds, in closures, defaults, partials and dataclasses, and those in them."""
    if id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[Any] = ()
    if isinstance(value, nn.Module):
        yield value
        inner = value.children()
    elif isinstance(value, partial):
        inner = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or ())
        inner = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
    elif isinstance(value, MethodType):
        inner = (value.__self__,)
    elif isinstance(value, (list, tuple)):
        inner = value
    elif isinstance(value, dict):
        inner = value.values()
    elif is_dataclass(value) and not isinstance(value, type):
        inner = (getattr(value, field.name) for field in fields(value))
    for part in inner:
        yield from modules_in(part, seen)


class StagedModel(nn.Module):
    """A model that can run any consecutive part of itself: `staged(x, start, stop)`.

    The whole model is `staged(x)`; the prefix of a cut is `staged(x, stop=cut)` and the suffix `staged(h, start=cut)`.
    Being one `forward`, it passes unchanged through the wrappers of DDP, FSDP2 and DeepSpeed.

    With activation checkpointing a forward in training mode keeps the input of each stage, and the backward computes
    the stage again, with the same random numbers and without touching BatchNorm's statistics a second time: the
    gradients are the same, bit for bit. Not the last stage's, whose backward comes first: keeping it costs no memory.
    What timm's `set_grad_checkpointing` says of the model counts as asking for it.

    `compile` compiles each block and what stands between blocks for itself, so that the graphs are as many however the
    network is cut.

    Args:
        model: the network; `staged.model` afterwards.
        stages: its stages in order; their forwards, composed, must equal `model.forward`.
        activation_checkpointing: whether stages are computed again in the backward. May be changed between steps.

    Raises:
        ValueError: there is no stage, or `model` is what `torch.compile` returned.
    """

    def __init__(self, model: nn.Module, stages: Sequence[Stage], *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        if not stages:
            raise ValueError("a staged model needs at least one stage")
        if is_compiled(model):
            raise ValueError(
                "the stages of what torch.compile returned would run as they are: give StagedModel the model itself, "
                "and call compile() of the StagedModel"
            )
        self.model = model
        self.stages = tuple(stages)
        self.activation_checkpointing = activation_checkpointing
        self._told = False
        self._compile_options: dict[str, Any] | None = None
        self._forwards: tuple[Callable[[Tensor], Tensor], ...] = tuple(stage.forward for stage in self.stages)
        self._know_modules()

    def _know_modules(self) -> None:
        """Keep the attributes of every module, which each forward asks for one of; by `getattr` that takes longer."""
        self._attributes = [vars(module) for module in every_module(self.model)]

    def compile(self, *, dynamic: bool | None = False, **options: Any) -> None:
        """Compile each stage's block (`nn.Module.compile`), and beside it what its forward says it can.

        As one graph a model would be compiled anew for each cut. Names of parameters stay; copies are compiled, too.
        To be called before `fully_shard`, `DistributedDataParallel` and `deepspeed.initialize`.

        Args:
            dynamic: as `torch.compile` has it, but False: blocks of one class share their code, and from blocks of
                different sizes torch would conclude that sizes vary. Each size of a batch is compiled for itself.
            options: others of `torch.compile`.
        """
        self._compile_options = {"dynamic": dynamic, **options}
        self._compile()

    @property
    def is_compiled(self) -> bool:
        """Whether `compile` was called."""
        return self._compile_options is not None

    def _compile(self) -> None:
        options = self._compile_options
        assert options is not None
        # All blocks are compiled as one code, `Module._call_impl`, and torch's limit is one of graphs of a code.
        allow_graphs(_GRAPHS_OF_A_BLOCK * len(self.stages))
        for stage in self.stages:
            compile_module(stage.block, options)
        self._forwards = tuple(
            stage.forward.compiled(**options) if isinstance(stage.forward, Compilable) else stage.forward
            for stage in self.stages
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without what is compiled and what is known, which refer to this object's modules and not to a copy's."""
        state: dict[str, Any] = super().__getstate__()
        del state["_forwards"], state["_attributes"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forwards = tuple(stage.forward for stage in self.stages)
        self._know_modules()
        if self._compile_options is not None:
            self._compile()

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages `start` to `stop` (exclusive) on the output of stage `start - 1`, the images if `start` is 0.

        Raises:
            TypeError: a prefix ends in something else than a tensor.
            ValueError: no gradient flows through the first stage of a suffix, because it is checkpointed reentrantly.
        """
        if self.model._compiled_call_impl is not None and not self._told:
            self._tell()
        graph = torch.is_grad_enabled()
        again = graph and self.training and (self.activation_checkpointing or self._checkpointed_by_timm())
        layers = batchnorms(self.model) if again else []

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            """Around a stage's forward, and around computing it again."""
            return nullcontext(), repeating(layers)

        for place, run in enumerate(self._forwards[start:stop], start):
            if again and run is not self._forwards[-1]:
                x = checkpoint(run, x, use_reentrant=False, context_fn=contexts)
            else:
                x = run(x)
            if graph and 0 < place == start and isinstance(x, Tensor) and not x.requires_grad:
                self._check_graph(self.stages[place])
        if stop is not None and not isinstance(x, Tensor):
            raise TypeError(
                f"{self.stages[:stop][-1].name}, the last stage before a cut, passes on {described(x)}; a tensor is "
                "needed: make what passes on more one stage with those that take it, or use a mask without a cut"
            )
        return x

    def _tell(self) -> None:
        self._told = True
        if all(stage.block is not self.model for stage in self.stages):
            warnings.warn(
                "compile() of the model inside of a StagedModel compiles nothing, because its stages are called and "
                "not the model: call compile() of the StagedModel",
                stacklevel=3,
            )

    def _checkpointed_by_timm(self) -> bool:
        return any(attributes.get("grad_checkpointing", False) for attributes in self._attributes)

    @staticmethod
    def _check_graph(stage: Stage) -> None:
        if any(p.requires_grad for p in stage.block.parameters()):
            raise ValueError(
                f"no gradient flows through {stage.name}, the first stage behind a cut, whose weights are trained: "
                "reentrant checkpointing computes none where its input has none; use use_reentrant=False, or "
                "StagedModel(…, activation_checkpointing=True)"
            )

    def _check_current(self) -> None:
        """Stages hold modules of the model as it was when they were made, and would not run what has come since.

        Raises:
            ValueError: one has been replaced, or wrapped; or the model's forward has become another.
        """
        self._know_modules()
        modules = set(self.model.modules())
        again = "which the stages would not run: make the StagedModel after that"
        for stage in self.stages:
            found: nn.Module | None = self.model
            for part in stage.name.split(".") if stage.name else ():
                found = None if found is None else getattr(found, part, None)
            if isinstance(found, nn.Module) and found is not stage.block:
                kind = type(found).__name__
                raise ValueError(f"{stage.name} of the model has become another module ({kind}), {again}")
            for module in modules_in(stage.forward, set()):
                if module not in modules and any(True for _ in (*module._parameters, *module._buffers)):
                    kind = type(module).__name__
                    raise ValueError(
                        f"the stage {stage.name} runs a {kind} that the model has not, or not any more; if it has been "
                        f"replaced there, {again.removeprefix('which the stages would not run: ')}"
                    )
            forward: Any = stage.forward
            if isinstance(forward, Traced):
                forward.check_current()

    def stages_of_parameters(self) -> dict[str, tuple[int, ...]]:
        """The indices of the stages that use each parameter, rising, by its name in `model`.

        A tied weight has several, and belongs to the first: perturbing it would change the prefix of every later cut.
        What no stage claims is counted to the first stage for the same reason.

        Raises:
            ValueError: a stage runs a module that is not the model's any more.
        """
        self._check_current()
        claims = [
            (prefix, index) for index, stage in enumerate(self.stages) for prefix in (stage.name, *stage.owns) if prefix
        ]
        uses: dict[int, set[int]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            index = next((i for prefix, i in claims if name == prefix or name.startswith(prefix + ".")), 0)
            uses.setdefault(id(parameter), set()).add(index)
        return {name: tuple(sorted(uses[id(parameter)])) for name, parameter in self.model.named_parameters()}
