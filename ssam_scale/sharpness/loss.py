"""The mean loss of a network over fixed images, as a function of its weights: values, gradient, Hessian's products."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssam_scale.errors import UserError
from ssam_scale.sharding import World

from .vectors import Vectors

BatchLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From logits (images, classes) and labels (images,) to the mean loss of these images, of shape ()."""


class MeanLoss:
    """L(w): the mean loss over images that processes share, each of which holds all weights and sees its own images.

    The network is in evaluation mode from here on: BatchNorm normalises by its running statistics, nothing is dropped.
    So L is a function of the weights alone, and of no batch or process. Its weights are never written to. Weights that
    require no gradient are constants. Numbers are computed as exactly as the network's dtype allows: without autocast,
    without TF32, and with the plain kernel of `scaled_dot_product_attention`, as fused ones have no second derivative.

    Args:
        network: with the weights w, on the processes' device.
        batches: images and labels of this process: of any sizes, on which nothing depends but the memory that one
            takes. On any device.
        criterion: the mean loss of a batch.
        world: the processes. All methods are collective.
        asked: called before each pass over the images, on every process; what it raises ends the measurement.

    Attributes:
        vectors: vectors of as many numbers as there are weights, in the order of `network.parameters()`.
        images: how many there are, of all processes.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Sequence[tuple[Tensor, Tensor]],
        criterion: BatchLoss,
        world: World | None = None,
        asked: Callable[[], object] = lambda: None,
    ) -> None:
        self._world = world or World()
        self._network, self._batches, self._criterion, self._asked = network.eval(), batches, criterion, asked
        self._named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        if not self._named:
            raise ValueError("the network has no weights that require a gradient")
        first = next(iter(self._named.values()))
        self.vectors = Vectors(sum(p.numel() for p in self._named.values()), self._world, first.dtype)
        count = torch.tensor(sum(len(labels) for _, labels in batches), device=self._world.device)
        self.images = int(self._world.sum(count))

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """The weights w by name, which are not to be written to."""
        return self._named

    @torch.no_grad()
    def values(self, displacements: Iterable[Tensor | None]) -> list[float]:
        """L(w + d) of each displacement d, of shape (weights,); None: L(w)."""
        found = []
        for displacement in displacements:
            self._asked()
            moved: Mapping[str, Tensor] = self._named
            if displacement is not None:
                pieces = self._pieces(displacement.to(self._world.device))
                moved = {name: p + d for (name, p), d in zip(self._named.items(), pieces, strict=True)}
            found.append(self._over_batches(lambda loss: loss, moved))
        if not found:
            return []
        total: list[float] = self._world.sum(torch.stack(found)).tolist()
        return [value / self.images for value in total]

    def value(self, displacement: Tensor | None = None) -> float:
        """L(w + d), d of shape (weights,); without one L(w)."""
        return self.values([displacement])[0]

    def gradient(self) -> Tensor:
        """This process's run of ∇L(w)."""
        return self._mean(lambda loss, weights: torch.autograd.grad(loss, weights, materialize_grads=True))

    def hessian_product(self, run: Tensor) -> Tensor:
        """This process's run of H v, of which it has the run of v: H the Hessian of L at w.

        By differentiating the inner product of gradient and v (Pearlmutter, "Fast exact multiplication by the Hessian",
        1994): two backward passes, and the memory of both, for each batch.

        Raises:
            UserError: an operation of the network has no second derivative in PyTorch.
        """
        directions = self._pieces(self.vectors.whole(run))

        def product(loss: Tensor, weights: Sequence[Tensor]) -> Sequence[Tensor]:
            first = torch.autograd.grad(loss, weights, create_graph=True, materialize_grads=True)
            _check_differentiable(first)
            # A gradient that is constant, as that of what the loss is linear in, has no derivative to ask for.
            curved = [(g, v) for g, v in zip(first, directions, strict=True) if g.requires_grad]
            if not curved:
                return [torch.zeros_like(p) for p in weights]
            gradients, along = zip(*curved, strict=True)
            return torch.autograd.grad(gradients, weights, along, materialize_grads=True)

        try:
            return self._mean(product)
        except (NotImplementedError, RuntimeError) as error:
            if not isinstance(error, NotImplementedError) and "is not implemented" not in str(error):
                raise
            raise UserError(
                f"{type(self._network).__name__} has an operation without a second derivative in PyTorch "
                f"({str(error).splitlines()[0]}); the gap needs none: ask for 0 eigenvalues and 0 probes"
            ) from error

    def _mean(self, derive: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor]]) -> Tensor:
        """This process's run of the mean over all images of what is derived of the summed loss of each batch."""
        self._asked()
        weights = list(self._named.values())
        total = torch.zeros(self.vectors.size, dtype=self.vectors.dtype, device=self._world.device)
        pieces = self._pieces(total)

        def add(loss: Tensor) -> Tensor:
            derived = derive(loss, weights)
            with torch.no_grad():
                torch._foreach_add_(pieces, list(derived))
            return loss.detach()

        self._over_batches(add, self._named)
        return self.vectors.summed(total.div_(self.images))

    def _over_batches(self, use: Callable[[Tensor], Tensor], weights: Mapping[str, Tensor]) -> Tensor:
        """The sum over this process's batches of what is made of the sum of their images' losses, in float64."""
        total = torch.zeros((), dtype=torch.float64, device=self._world.device)
        with _exact():
            for images, labels in self._batches:
                given = images.to(self._world.device, self.vectors.dtype), labels.to(self._world.device)
                logits = functional_call(self._network, dict(weights), (given[0],))
                total += use(self._criterion(logits, given[1]) * len(labels))
        return total

    def _pieces(self, vector: Tensor) -> list[Tensor]:
        """Of each weight tensor its part of a vector of shape (weights,), as a view."""
        parts: Iterator[Tensor] = iter(vector.split([p.numel() for p in self._named.values()]))
        return [part.view(p.shape) for part, p in zip(parts, self._named.values(), strict=True)]


def _check_differentiable(gradients: Sequence[Tensor]) -> None:
    """Refuse gradients whose derivative autograd takes for zero, in a function that is for one backward only.

    Raises:
        NotImplementedError: they are such.
    """
    seen: set[Any] = set()
    nodes = [gradient.grad_fn for gradient in gradients]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise NotImplementedError("a function that is marked once_differentiable")
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]


@contextmanager
def _exact() -> Iterator[None]:
    """Inside, every kernel computes in its dtype, the same each time, and can be differentiated twice."""
    cudnn, products = torch.backends.cudnn, torch.get_float32_matmul_precision()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if torch.cuda.is_available():
            stack.enter_context(cudnn.flags(cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False))
            stack.callback(torch.set_float32_matmul_precision, products)
            torch.set_float32_matmul_precision("highest")
        yield
