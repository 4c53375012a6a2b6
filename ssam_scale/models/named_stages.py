"""Stages of any model, by the names of its blocks: its forward is traced, and parted where one value passes.

The modules that hold blocks are traced through (`torch.fx`); all others stay calls of the modules that they are. Behind
each block the forward is parted at the first place where nothing is alive but one value, which is what the next stage
takes; a residual connection around a block is part of its stage. Where more than one value passes, such as positions
that every block sees, there is no such place, and the model is refused.

A trace takes what a forward asks of plain attributes as it is then: it is made in training and in evaluation mode, and
made again when the stages are looked at anew, to be compared. What a forward decides by values of tensors cannot be
traced.
"""

from __future__ import annotations

import difflib
import re
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from ssam_scale.errors import UserError
from ssam_scale.perturbation.staged_model import Stage

from .check_stages import IMAGES, check_stages

Forward = Callable[[nn.Module, Tensor], Tensor]


def named_stages(model: nn.Module, names: Sequence[str], images: Tensor | Sequence[int] | None = IMAGES) -> list[Stage]:
    """The stages of any model: one for each of the blocks that are named.

    Args:
        model: of one input; not changed.
        names: of its blocks, in the order in which they run.
        images: a batch that the model takes, on which it is held against its stages (`check_stages`); or the shape of a
            random one. None: it is not.

    Raises:
        UserError: the model has not these blocks, its forward cannot be traced or parted around them, or the stages
            are not the model.
    """
    _check_names(model, names)
    trace = _Trace(model, tuple(names), {mode: _parted(model, names, mode) for mode in (True, False)})
    owned = [_owned(model, parts) for parts in zip(*trace.parts.values(), strict=True)]
    _check_owned(model, names, owned)
    stages = [
        Stage(name, model.get_submodule(name), _TracedPart(trace, i), tuple(sorted(owned[i] - {name})))
        for i, name in enumerate(names)
    ]
    if images is not None:
        check_stages(model, stages, images)
    return stages


@dataclass(frozen=True)
class _Part:
    """What a forward does for one stage.

    Attributes:
        forward: of the model, as a function of it and of the stage's input: modules are looked up when it is called.
        code: of that function.
        targets: names of the modules that it calls, and of the parameters and buffers that it reads.
    """

    forward: Forward
    code: str
    targets: frozenset[str]


@dataclass(frozen=True, eq=False)
class _Trace:
    """A model's forward in parts, by whether it is in training mode."""

    model: nn.Module
    names: tuple[str, ...]
    parts: dict[bool, tuple[_Part, ...]]

    def check(self) -> None:
        """Trace again, and compare.

        Raises:
            ValueError: the forward has become another.
        """
        for mode, parts in self.parts.items():
            try:
                now = _parted(self.model, self.names, mode)
            except UserError as error:
                raise ValueError(f"the model's stages are not what they were: {error}") from error
            for name, part, new in zip(self.names, parts, now, strict=True):
                if part.code != new.code:
                    raise ValueError(
                        f"the forward of {type(self.model).__name__} at {name} has become another, by an attribute "
                        "that was changed or by what was added; make the StagedModel after that"
                    )


@dataclass(frozen=True, eq=False)
class _TracedPart:
    """The forward of a stage of a traced model."""

    trace: _Trace
    index: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.trace.parts[self.trace.model.training][self.index].forward(self.trace.model, x)

    def check_current(self) -> None:
        """See `_Trace.check`; all stages have the same trace, which is looked at once."""
        if self.index == 0:
            self.trace.check()


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse what are not different blocks of a model.

    Raises:
        UserError: see above.
    """
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names) or not names:
        raise UserError(f"names of blocks are needed, such as ['layers.0', 'layers.1'], and not {names!r}")
    known = dict(model.named_modules())
    for place, name in enumerate(names):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)}" if near else ""
            raise UserError(f"{type(model).__name__} has no module {name!r}{hint}")
        if name in names[:place]:
            raise UserError(f"the block {name} is named twice")
        for other in names:
            if other.startswith(f"{name}."):
                raise UserError(f"{other} is within {name}: one of them can be a block")


class _Called(nn.Module):
    """Calls a model with one input, so that its other arguments have their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


_ROOT = "model."


class _Tracer(fx.Tracer):
    """Traces through the modules that hold blocks, and through no other."""

    def __init__(self, blocks: Sequence[str]) -> None:
        super().__init__()
        self.record_stack_traces = True
        self.holders = {name.rsplit(".", depth)[0] for name in blocks for depth in range(1, name.count(".") + 1)}
        self._through = {"model", *(f"{_ROOT}{name}" for name in self.holders)}

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        """Whether it stays a call."""
        return name not in self._through


def _parted(model: nn.Module, names: Sequence[str], training: bool) -> tuple[_Part, ...]:
    """The forward in a mode, traced and parted.

    Raises:
        UserError: it cannot be.
    """
    tracer = _Tracer(names)
    with _in_mode([model, *(model.get_submodule(name) for name in tracer.holders)], training):
        graph = _traced(tracer, model)
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = node.target.removeprefix(_ROOT)
    nodes = list(graph.nodes)
    calls = _calls(model, nodes, names)
    parts, taken, begin = [], nodes[0], 1
    for place, (name, call) in enumerate(zip(names, calls, strict=True)):
        if place == len(names) - 1:
            parts.append(_part(model, taken, nodes[begin:], None))
            break
        end, given = _place_behind(nodes, call, calls[place + 1], name, names[place + 1])
        parts.append(_part(model, taken, nodes[begin : end + 1], given))
        taken, begin = given, end + 1
    return tuple(parts)


@contextmanager
def _in_mode(modules: Sequence[nn.Module], training: bool) -> Iterator[None]:
    """Say of modules, and not of what is in them, that they are in a mode."""
    were = [module.training for module in modules]
    try:
        for module in modules:
            module.training = training
        yield
    finally:
        for module, was in zip(modules, were, strict=True):
            module.training = was


def _traced(tracer: fx.Tracer, model: nn.Module) -> fx.Graph:
    """The graph of a model's forward.

    Raises:
        UserError: something in it cannot be traced; says where.
    """
    try:
        return tracer.trace(_Called(model))
    except Exception as error:
        # Whatever a forward does with what stands for a tensor fails in its own way.
        reason = str(error).splitlines()[0].partition(". ")[0] if str(error) else type(error).__name__
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_of_tracing(Path(f.filename))]
        where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name})" if frames else ""
        raise UserError(
            f"the forward of {type(model).__name__} cannot be parted between these blocks, because it cannot be traced"
            f"{where}: {reason}; build a StagedModel from stages of your own"
        ) from error


def _calls(model: nn.Module, nodes: Sequence[fx.Node], names: Sequence[str]) -> list[int]:
    """Where in a graph each block is called.

    Raises:
        UserError: one is not called, or more than once, or before one that is named earlier.
    """
    places = {name: [i for i, node in enumerate(nodes) if _is_call_of(node, name)] for name in names}
    for name, found in places.items():
        if len(found) != 1:
            times = f"{len(found)} times" if found else "never"
            raise UserError(f"{name} is called {times} by the forward of {type(model).__name__}; a block runs once")
    ordered = sorted(names, key=lambda name: places[name])
    for name, one in zip(names, ordered, strict=True):
        if name != one:
            raise UserError(
                f"{one} runs before {name}: name the blocks in the order in which they run, {', '.join(ordered[:4])}"
                f"{', …' if len(ordered) > 4 else ''}"
            )
    return [places[name][0] for name in names]


def _is_call_of(node: fx.Node, name: str) -> bool:
    return node.op == "call_module" and node.target == name


def _place_behind(nodes: Sequence[fx.Node], call: int, following: int, name: str, next_: str) -> tuple[int, fx.Node]:
    """The first place behind a block's call, and before the next one's, where only one value is alive; and the value.

    Raises:
        UserError: there is none; says what is alive behind the block.
    """
    index = {node: i for i, node in enumerate(nodes)}
    for place in range(call, following):
        alive = _alive(nodes, index, place)
        if len(alive) == 1:
            return place, alive[0]
    passing = [_described(node) for node in _alive(nodes, index, call)]
    count = f"{len(passing)} values pass ({', '.join(passing)})" if passing else "nothing passes"
    raise UserError(f"from {name} to {next_} {count}, and a cut needs one tensor: there is no place for one between")


def _described(node: fx.Node) -> str:
    """What a value of a graph is, in a few words, and the line that computes it."""
    if node.op == "call_module":
        return f"{node.target}'s output"
    lines = re.findall(r'File "(.*)", line (\d+)', node.stack_trace or "")
    of_model = [(Path(file), line) for file, line in lines if not _is_of_tracing(Path(file))]
    return f"{node.name} of {of_model[-1][0].name}:{of_model[-1][1]}" if of_model else node.name


def _is_of_tracing(file: Path) -> bool:
    """Whether a line of this file says nothing of the model that is traced."""
    torchs = Path(torch.__file__).parent
    return file == Path(__file__) or any(file.is_relative_to(torchs / part) for part in ("fx", "nn/modules"))


def _alive(nodes: Sequence[fx.Node], index: Mapping[fx.Node, int], place: int) -> list[fx.Node]:
    """What is computed up to a place of a graph, and used behind it; not what can be read again."""
    return [
        node for node in nodes[: place + 1] if node.op != "get_attr" and any(index[user] > place for user in node.users)
    ]


def _part(model: nn.Module, taken: fx.Node, nodes: Sequence[fx.Node], given: fx.Node | None) -> _Part:
    """Some nodes of a graph as a function.

    Args:
        model: whose graph it is.
        taken: stands for the part's input.
        nodes: of the part, in order.
        given: its output; None: the graph's own, which is the last of the nodes.
    """
    graph = fx.Graph()
    known = {taken: graph.placeholder("x")}
    targets = set()

    def of_part(node: fx.Node) -> fx.Node:
        """The part's own node; what was read in an earlier one is read again."""
        if node not in known:
            assert node.op == "get_attr"
            known[node] = graph.node_copy(node)
            targets.add(str(node.target))
        return known[node]

    for node in nodes:
        if node.op == "output":
            graph.output(fx.node.map_arg(node.args[0], of_part))
        elif node.op != "get_attr":
            known[node] = graph.node_copy(node, of_part)
            if node.op == "call_module":
                targets.add(str(node.target))
    if given is not None:
        graph.output(of_part(given))
    # torch writes the function, as a method that looks modules up by their names: it is as good for the model itself.
    written = fx.GraphModule(model, graph)
    return _Part(type(written).forward, written.code, frozenset(targets))


def _owned(model: nn.Module, parts: Sequence[_Part]) -> set[str]:
    """Names of the parameters, and of the modules that have some, which the stage of these parts uses."""
    targets = frozenset().union(*(part.targets for part in parts))
    modules = dict(model.named_modules(remove_duplicate=False))
    own = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name for name in targets if name in own or (name in modules and any(True for _ in modules[name].parameters()))
    }


def _check_owned(model: nn.Module, names: Sequence[str], owned: Sequence[set[str]]) -> None:
    """A weight that two stages use could not be perturbed with either of them.

    Raises:
        UserError: there is one.
    """
    first: dict[str, str] = {}
    for name, targets in zip(names, owned, strict=True):
        for target in targets:
            if target in first:
                raise UserError(
                    f"{target} of {type(model).__name__} is used in two stages, {first[target]} and {name}: a stage "
                    "has to have its weights for itself"
                )
            first[target] = name
