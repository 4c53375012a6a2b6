"""What masks are chosen by: scores of every weight, the same bit for bit however the weights are spread.

A score is float32 and shaped like the local shards. Those from gradients take one backward a sample, on one process;
the additions are made in the order of the samples, whichever process computed them, and each by one process alone: so
on the CPU, with as many threads, one process and any number of them get the same bits under every backend. (Except for
ZeRO stage 3 on one process, where kernels find weights at other addresses if a tensor is no multiple of 64 bytes.)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from ssam_scale.sharding import Sharding

from .batchnorm import evaluation_mode
from .loss import Forward, LossFn
from .rng import hashed, uniform_
from .samples import dealt_samples

_TOGETHER = 2**24  # elements whose squares are in memory at once: 64 MiB, or one tensor


class AccumulatedFisher:
    """Σₖ (1 − decay) · decayᵏ · g² over the gradients g of the last steps: Adam's second moment (arXiv 1412.6980).

    Where a sum over samples of squared gradients is the diagonal of the empirical Fisher matrix, this squares the mean
    gradient of a batch, at weights that have changed since. It is not divided by 1 − decayᵗ, which would change no
    order. Under DDP all processes have the same; where weights are spread, each has that of its shards.

    Args:
        sharding: where the weights live.
        parameters: what to score.
        decay: share of the old value in the new one, in [0, 1).

    Attributes:
        scores: float32, shaped like the local shards; zero before the first step.

    Raises:
        ValueError: the decay is out of its range.
    """

    def __init__(self, sharding: Sharding, parameters: Sequence[nn.Parameter], decay: float = 0.99) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}; a number in [0, 1) is needed")
        self._sharding, self._parameters, self._decay = sharding, list(parameters), decay
        self.scores = [
            torch.zeros_like(shard.weight, dtype=torch.float32) for shard in sharding.shards(self._parameters)
        ]

    @torch.no_grad()
    def update(self, gradients: Sequence[Tensor], inverse_scale: Tensor | float = 1.0) -> None:
        """Take in the gradients of one step. Collective where weights are spread; never waits for the device.

        Where any of them, on any process of a copy of the weights, is not finite, everything stays what it was.

        Args:
            gradients: of the parameters, shaped like their local shards, of any floating dtype, already reduced; not
                written to. `Sharding.gradients` returns them.
            inverse_scale: 1 / what the loss was scaled by; float32 of shape (), or a number.
        """
        if not self.scores:
            return
        # The squares overflow before the gradients do.
        largest = [g for g in gradients if g.numel()]
        norms = list(torch._foreach_norm(largest, math.inf, dtype=torch.float32)) if largest else []
        worst = torch.stack(norms).amax() if norms else self.scores[0].new_zeros(())
        bad = (~(worst * inverse_scale).square().isfinite()).float()
        good = self._sharding.shard_group.all_reduce(bad) == 0.0
        share = (1.0 - self._decay) * good
        for some in self._groups():
            squares = list(torch._foreach_mul([gradients[i].float() for i in some], inverse_scale))
            torch._foreach_mul_(squares, squares)
            # Zeros, if anything is not finite: which no product with a float makes of what is not a number.
            torch._foreach_mul_([s.view(torch.int32) for s in squares], good.to(torch.int32))
            torch._foreach_mul_(squares, share)
            scores = [self.scores[i] for i in some]
            torch._foreach_mul_(scores, 1.0 - share)
            torch._foreach_add_(scores, squares)

    def _groups(self) -> Iterator[list[int]]:
        some: list[int] = []
        size = 0
        for index, score in enumerate(self.scores):
            if some and size + score.numel() > _TOGETHER:
                yield some
                some, size = [], 0
            some.append(index)
            size += score.numel()
        yield some

    def whole(self) -> list[Tensor]:
        """Copies of the scores, shaped like the whole parameters: the same under every backend. Collective."""
        return [self._sharding.gather(p, score).clone() for p, score in zip(self._parameters, self.scores, strict=True)]

    def load(self, whole: Sequence[Tensor]) -> None:
        """Take back what `whole` returned, under any backend and number of processes.

        Raises:
            ValueError: it is of other parameters.
        """
        theirs = [tuple(w.shape) for w in whole]
        mine = [tuple(self._sharding.full_shape(p)) for p in self._parameters]
        if theirs != mine:
            other = next((i for i, (a, b) in enumerate(zip(theirs, mine, strict=False)) if a != b), None)
            what = f"{len(theirs)} tensors" if other is None else f"shape {theirs[other]} at {other}"
            has = f"{len(mine)}" if other is None else f"{mine[other]}"
            raise ValueError(f"the saved accumulated scores have {what}, these have {has}")
        for p, score, saved in zip(self._parameters, self.scores, whole, strict=True):
            score.copy_(self._sharding.scatter(p, saved))


def check_chunk(sharding: Sharding, parameters: Sequence[nn.Parameter], chunk: int) -> None:
    """Refuse a chunk that cannot work.

    Raises:
        ValueError: `chunk` is below 1, or above 1 where a process has only parts of the weights.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; at least 1 is needed")
    if chunk > 1 and any(isinstance(p, DTensor) or p.shape != sharding.full_shape(p) for p in parameters):
        raise ValueError(
            f"chunk is {chunk} but a process has only parts of the weights (FSDP2, ZeRO stage 3), and gathers them for "
            "one sample at a time; use 1"
        )


def gradients_of(
    network: nn.Module, parameters: Sequence[nn.Parameter], loss_fn: LossFn, samples: Sequence[Any], scale: float
) -> list[dict[int, Tensor]]:
    """The gradients of every sample, by `torch.func.vmap`; the sums in them are made in another order than alone.

    Args:
        network: with whole weights.
        parameters: of it.
        loss_fn: of a batch of one sample, given the forward to use; must not draw random numbers.
        samples: batches of one sample, of the same structure and shapes.
        scale: factor on the loss.

    Returns:
        Of every sample: whole float32 gradients by index of the parameter, views of one tensor for all samples.

    Raises:
        RuntimeError: `loss_fn` draws random numbers or branches on values, or `vmap` does not know an operation in it.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    flat = [tree_flatten(sample) for sample in samples]
    structure = flat[0][1]
    is_tensor = [isinstance(leaf, Tensor) for leaf in flat[0][0]]
    places = [0 if tensor else None for tensor in is_tensor]
    stacked = [torch.stack([leaves[i] for leaves, _ in flat]) if t else flat[0][0][i] for i, t in enumerate(is_tensor)]

    def loss(weights: dict[str, Tensor], leaves: list[Any]) -> Tensor:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return functional_call(network, weights, args, kwargs)

        return loss_fn(forward, tree_unflatten(leaves, structure)) * scale

    weights = {names[id(p)]: p.detach() for p in parameters}
    per_sample = vmap(grad(loss), in_dims=(None, places))(weights, stacked)
    whole = [per_sample[names[id(p)]].float() for p in parameters]
    return [{index: g[i] for index, g in enumerate(whole)} for i in range(len(samples))]


Kind: TypeAlias = Literal["fisher", "gradient"]

_BUCKET = 2**24  # elements that are sent together: 64 MiB
_RETRY = 2.0**8  # what the scale of a loss that overflowed is divided by


def per_sample_scores(
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    kinds: Sequence[Kind] = ("fisher",),
    samples: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
    chunk: int = 1,
) -> dict[Kind, list[Tensor]]:
    """Σ over samples of the squared per-sample gradient (`fisher`), and |Σ of the per-sample gradients| (`gradient`).

    With the labels of the data, `fisher` is the empirical Fisher of arXiv 2210.05177, equation 9, as a sum; with
    `sampled_label_loss` it is an estimate of the true one. `gradient` is the size of the gradient of the summed loss.

    Runs in evaluation mode, with batches of one sample, which are dealt out to the processes (`dealt_samples`). Leaves
    no trace in the model and none in the random state; gradients are cleared before and after. Each process holds one
    whole float32 gradient of `parameters` at a time, and sums up an equal share of them. Collective.

    Args:
        sharding: where the weights live.
        optimizer: whose gradients are cleared.
        parameters: what to score; all of them require a gradient.
        loss_fn: loss of a batch of one sample, given the forward to use. It finds torch's random state to be a function
            of `seed` and the sample's place in the order of all of them.
        batches: this process's, as `dealt_samples` takes them; the same number and sizes on every process.
        kinds: which scores; the passes serve all of them.
        samples: how many to use, the first in the order of all processes' samples; None: all.
        scale: the loss is multiplied by it, which keeps gradients of float16 passes from becoming zero, and the
            gradients are divided by it; a power of 2 changes no score by that. A backend's own scale is divided out
            too. While a score is not finite and a scale above 1 may be to blame, all passes are made again with a
            smaller one.
        seed: of the random states.
        chunk: samples that a process computes gradients of together (`gradients_of`), for a loss that draws no random
            numbers, where processes have whole weights: less time for `chunk` times the memory of a float32 gradient.
            The last bits then depend on it. On a CPU it does not pay for a ResNet-50 (0.94 to 1.03 times as fast); a
            ViT-S/16 is 1.2 to 1.35 times as fast with 4 to 8 (96 px, 1 and 2 threads).

    Returns:
        By kind, of each parameter: float32 shaped like its local shard, on its device. What the loss does not depend
        on has 0.

    Raises:
        ValueError: as `dealt_samples` and `check_chunk`, on every process and before any pass.
    """
    check_chunk(sharding, parameters, chunk)
    own, total = dealt_samples(sharding.data_parallel_group, batches, samples)
    passes = _Passes(sharding, optimizer, parameters, loss_fn, seed)
    outer = sharding.loss_scale() if chunk == 1 else 1.0
    while True:
        sums = _Sums(sharding, parameters, kinds)
        with passes.around():
            for turn, gradients in enumerate(passes.gradients(own, scale, chunk)):
                computing = min(sharding.data_parallel_group.size, total - turn * sharding.data_parallel_group.size)
                sums.add(gradients, computing, 1.0 / (scale * outer))
        if scale * outer <= 1.0 or sums.finite():
            return {kind: sums.on_shards(kind) for kind in kinds}
        scale /= min(_RETRY, scale * outer)


class _Passes:
    """Backwards of one sample each; around all of them a context that leaves the model as it was."""

    def __init__(
        self,
        sharding: Sharding,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        loss_fn: LossFn,
        seed: int,
    ) -> None:
        self._sharding, self._optimizer, self._parameters = sharding, optimizer, parameters
        self._loss_fn, self._seed = loss_fn, seed
        self._gradients: dict[int, Tensor] = {}

    @contextmanager
    def around(self) -> Iterator[None]:
        """Evaluation mode, and gradients are taken instead of used."""
        self._sharding.clear_gradients(self._optimizer)
        try:
            with (
                evaluation_mode(self._sharding.network),
                self._sharding.capture_gradients(self._parameters, self._take),
            ):
                yield
        finally:
            self._gradients = {}
            self._sharding.clear_gradients(self._optimizer)
            self._sharding.reshard()

    def gradients(self, samples: Sequence[Any], scale: float, chunk: int) -> Iterator[dict[int, Tensor]]:
        """Of every sample, this process's whole gradients, float32; by index of the parameter, where there is one."""
        sharding = self._sharding
        if chunk > 1:
            for begin in range(0, len(samples), chunk):
                some = samples[begin : begin + chunk]
                yield from gradients_of(sharding.network, self._parameters, self._loss_fn, some, scale)
            return
        for turn, sample in enumerate(samples):
            self._gradients = {}
            index = turn * sharding.data_parallel_group.size + sharding.data_parallel_group.rank
            with _random_state(self._seed, index), torch.enable_grad(), sharding.micro_batch(last=False):
                sharding.backward(self._loss_fn(sharding.ascent_module, sample) * scale)
            sharding.clear_gradients(self._optimizer)
            yield self._gradients

    def _take(self, index: int, gradient: Tensor) -> None:
        gradient = gradient.detach().float()
        known = self._gradients.get(index)
        self._gradients[index] = gradient if known is None else known + gradient


class _Sums:
    """Sums over samples, of which every process holds an equal share, whatever it holds of the weights.

    The parameters, one after the other, make buckets; of each, every process sums up one run.
    """

    def __init__(self, sharding: Sharding, parameters: Sequence[nn.Parameter], kinds: Sequence[Kind]) -> None:
        self._sharding, self._parameters, self._group = sharding, parameters, sharding.data_parallel_group
        self._numels = [shard.numel for shard in sharding.shards(parameters)]
        self._buckets: list[list[int]] = []
        size = _BUCKET
        for index, numel in enumerate(self._numels):
            if size + numel > _BUCKET:
                self._buckets.append([])
                size = 0
            self._buckets[-1].append(index)
            size += numel
        self._sums: dict[Kind, list[Tensor]] = {kind: [] for kind in kinds}  # of every bucket

    def _runs(self, bucket: list[int]) -> list[int]:
        """How many elements of a bucket each process sums up: equally many, the last ones fewer or none."""
        total = sum(self._numels[index] for index in bucket)
        each = -(-total // self._group.size)
        return [max(0, min(each, total - rank * each)) for rank in range(self._group.size)]

    def add(self, gradients: dict[int, Tensor], computing: int, factor: float) -> None:
        """Add one sample of each of the first `computing` processes, in their order. Collective.

        Args:
            gradients: whole float32 gradients of this process's sample by index of the parameter; emptied.
            computing: processes whose sample counts.
            factor: on the gradients.
        """
        device = next(iter(gradients.values())).device if gradients else None
        for number, bucket in enumerate(self._buckets):
            runs = self._runs(bucket)
            flat = torch.cat([self._flat(gradients.pop(i, None), i, device) for i in bucket])
            own, counts = runs[self._group.rank], self._group.rank < computing
            received = [own if rank < computing else 0 for rank in range(self._group.size)]
            sent = runs if counts else [0] * self._group.size
            parts = self._group.all_to_all(flat if counts else flat[:0], sent, received)
            for kind, sums in self._sums.items():
                if number == len(sums):
                    sums.append(parts[0].new_zeros(own))
                for part in parts[:computing]:
                    part = part if factor == 1.0 else part * factor
                    # Two operations that round correctly. What fuses them may fuse for some elements only, by place.
                    sums[number].add_(part.square() if kind == "fisher" else part)

    def _flat(self, gradient: Tensor | None, index: int, device: torch.device | None) -> Tensor:
        if gradient is None:
            return torch.zeros(self._numels[index], device=device or self._parameters[index].device)
        return gradient.reshape(-1)

    def finite(self) -> bool:
        """Whether every sum is. Collective."""
        return all(
            self._group.all_gather_object(all(bool(s.isfinite().all()) for sums in self._sums.values() for s in sums))
        )

    def on_shards(self, kind: Kind) -> list[Tensor]:
        """The scores in the places of this process's shards; forgets the sums. Collective."""
        scores = []
        shards = self._sharding.shards(self._parameters)
        sums = self._sums.pop(kind)
        for bucket in self._buckets:
            runs, own = self._runs(bucket), sums.pop(0)
            whole = torch.cat(self._group.all_gather(F.pad(own, (0, runs[0] - len(own)))))[: sum(runs)]
            for index, piece in zip(bucket, whole.split([self._numels[i] for i in bucket]), strict=True):
                parameter = self._parameters[index]
                local = self._sharding.scatter(parameter, piece.reshape(self._sharding.full_shape(parameter)))
                score = torch.empty_like(shards[index].weight, dtype=torch.float32)
                scores.append(score.copy_(local).abs_())
        return scores


@contextmanager
def _random_state(seed: int, index: int) -> Iterator[None]:
    """Torch's random state of sample `index` inside, and what it was before afterwards."""
    on_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    own = hashed(seed, index)
    with torch.random.fork_rng([torch.cuda.current_device()] if on_cuda else []):
        torch.random.default_generator.manual_seed(own)
        if on_cuda:
            torch.cuda.manual_seed(own)
        yield


def sampled_labels(logits: Tensor) -> Tensor:
    """Labels drawn from a classifier's own distribution, softmax(logits), by torch's random state.

    Args:
        logits: of shape (samples, classes), any floating dtype.

    Returns:
        int64 of shape (samples,).
    """
    return torch.multinomial(logits.detach().float().softmax(1), 1).squeeze(1)


def sampled_label_loss(forward: Forward, batch: Sequence[Any]) -> Tensor:
    """Mean cross-entropy of labels that are drawn from the model: a loss function for `gradient_scores`.

    The squared gradients are then one draw a sample from the true Fisher information, the expectation over the model's
    own labels, instead of the empirical one (arXiv 1905.12558 tells them apart).

    Args:
        forward: of a classifier that returns logits of shape (samples, classes).
        batch: whose first element is the input; labels, if there are any, are not looked at.
    """
    logits = forward(batch[0]).float()
    return F.cross_entropy(logits, sampled_labels(logits))


def weight_scores(sharding: Sharding, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """|w|: float32, shaped like the local shards."""
    return [shard.weight.detach().abs().float() for shard in sharding.shards(parameters)]


def random_scores(sharding: Sharding, parameters: Sequence[nn.Parameter], seed: int) -> list[Tensor]:
    """Uniform random numbers in [0, 1): float32, shaped like the local shards.

    Each is a function of the seed, the parameter's index in `parameters` and the place in the whole parameter: element
    number i is output number i of SplitMix64 (doi 10.1145/2660193.2660195), of which the 24 highest bits are kept. So
    they are the same however the weights are spread and on any device.

    Args:
        sharding: where the weights live.
        parameters: what to score.
        seed: of the numbers.
    """
    scores = []
    for index, shard in enumerate(sharding.shards(parameters)):
        score = torch.empty_like(shard.weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        uniform_(score.view(-1), shard.start, hashed(seed, index))
        scores.append(score)
    return scores
