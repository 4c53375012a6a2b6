"""The network in a small ascent as CUDA graphs: one launch for its forward and one for its backward.

A pass of few images gives a GPU less to do than the host takes to say it. What is launched is always the same for one
cut and one number of images, so it is captured once, by `torch.cuda.make_graphed_callables`, and replayed. The loss
function, reductions between processes and the perturbation stay outside.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

from .modules import every_module
from .rng import RandomState

# More than a moving cut takes, which is one for each stage that it may begin at: the least recently used goes.
_KEPT = 64
_WARM_UPS = 3

_Run = Callable[..., Any]  # of images, and of what is like the parameters


class AscentGraphs:
    """Runs a network, or its end behind a cut, by replaying what an earlier ascent of the same form has launched.

    A form is where the network begins, the shape of what goes in, the precision, the modes of its modules, and which of
    its parameters require a gradient; and where all of them lie, because a graph reads and writes the same memory each
    time. The gradients that a backward leaves lie in such memory, too, until the next ascent; whoever adds up those of
    several has to copy them.

    What cannot be captured (a host that waits for values, a module that writes to its buffers) runs as it is, and the
    reason is warned of once.

    Args:
        network: what ascents are run on, in whole or in part.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._modules, self._buffers = list(every_module(network)), list(network.buffers())
        self._parameters = dict(network.named_parameters())
        self._runs: OrderedDict[Hashable, _Run | None] = OrderedDict()
        self._told = False

    def __call__(self, x: Tensor, **options: int) -> Any:
        """What the network puts out, with a graph of autograd.

        Args:
            x: what goes in.
            options: of the network's forward: `start`, where it has stages.
        """
        form = self._form(x, options)
        if form in self._runs:
            self._runs.move_to_end(form)
        else:
            self._runs[form] = self._captured(x, options)
            if len(self._runs) > _KEPT:
                self._runs.popitem(last=False)
        run = self._runs[form]
        return self._network(x, **options) if run is None else run(x, *self._parameters.values())

    def _form(self, x: Tensor, options: dict[str, int]) -> Hashable:
        kind = x.device.type
        return (
            *options.items(),
            (x.shape, x.stride(), x.dtype, x.requires_grad),
            (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            tuple(module.training for module in self._modules),
            tuple((t.data_ptr(), t.requires_grad) for t in (*self._parameters.values(), *self._buffers)),
        )

    def _captured(self, x: Tensor, options: dict[str, int]) -> _Run | None:
        """What replays the network; None where it cannot be captured."""

        kind = x.device.type
        precision = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

        def run(x: Tensor, *weights: Tensor) -> Any:
            named = dict(zip(self._parameters, weights, strict=True))
            # What autocast remembers of the weights would not be made anew from weights that have changed.
            with torch.autocast(kind, *precision, cache_enabled=False):
                return functional_call(self._network, named, (x,), options)

        def alike() -> tuple[Tensor, ...]:
            """In the place of the parameters, whose own nodes of autograd's graph belong to the stream of training."""
            return tuple(t.detach().requires_grad_(t.requires_grad) for t in (x.clone(), *self._parameters.values()))

        random, written = RandomState.now(x.device), [b._version for b in self._buffers]
        try:
            with torch.autocast(kind, enabled=False):  # in which no backward belongs
                _warm_up(run, alike())
                # Its own warm-up would leave nodes behind that belong to another stream than that of the capture.
                graphed: _Run = torch.cuda.make_graphed_callables(
                    run, alike(), num_warmup_iters=0, allow_unused_input=True
                )
        except RuntimeError as error:
            self._tell(str(error).splitlines()[0])
            return None
        finally:
            random.restore()
        if written != [b._version for b in self._buffers]:
            self._tell("a module writes to its buffers")
            return None
        return graphed

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(f"savings.graph_ascent: the ascent runs without CUDA graphs: {reason}", stacklevel=2)


def _warm_up(run: _Run, inputs: tuple[Tensor, ...]) -> None:
    """What libraries do in their first passes (choosing algorithms, asking for memory), which no graph may hold."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            outputs = [out for out in tree_leaves(run(*inputs)) if out.requires_grad]
            wanted = [t for t in inputs if t.requires_grad]
            torch.autograd.grad(outputs, wanted, [torch.zeros_like(out) for out in outputs], allow_unused=True)
    torch.cuda.current_stream().wait_stream(stream)
