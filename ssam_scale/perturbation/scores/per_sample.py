"""Scores of samples: of every weight the squared, or the summed, gradients of single samples.

They take one forward and backward a sample, on one process; the additions are made in the order of the samples,
whichever process computed them, and each by one process alone. So on the CPU, with as many threads, one process and any
number of them get the same bits under every backend. (Except for ZeRO stage 3 on one process, where kernels find
weights at other addresses if a tensor is no multiple of 64 bytes.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ssam_scale.config.mask_sections import SampleScore
from ssam_scale.perturbation.batchnorm import evaluation_mode
from ssam_scale.perturbation.loss import LossFn
from ssam_scale.perturbation.rng import hashed
from ssam_scale.sharding import Sharding

from .registry import ScoreRequest, register_score
from .samples import round_robin_samples
from .sharded_sums import ShardedSums

_RETRY = 2.0**8  # what the scale of a loss that overflowed is divided by


def per_sample_scores(
    sharding: Sharding,
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[nn.Parameter],
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    kinds: Sequence[SampleScore] = ("fisher",),
    samples: int | None = None,
    scale: float = 1.0,
    seed: int = 0,
) -> dict[SampleScore, list[Tensor]]:
    """Σ over samples of the squared per-sample gradient (`fisher`), and |Σ of the per-sample gradients| (`gradient`).

    With the labels of the data, `fisher` is the empirical Fisher of arXiv 2210.05177, equation 9, as a sum; with
    `sampled_label_loss` it is an estimate of the true one. `gradient` is the size of the gradient of the summed loss.

    Runs in evaluation mode, with batches of one sample, which are spread over the processes (`round_robin_samples`).
    Leaves no trace in the model and none in the random state; gradients are cleared before and after. Each process
    holds one full float32 gradient of `parameters` at a time, and adds up an equal slice of all of them. Collective.

    Args:
        sharding: where the weights live.
        optimizer: whose gradients are cleared.
        parameters: what to score; all of them require a gradient.
        loss_fn: loss of a batch of one sample, given the forward to use. It finds torch's random state to be a function
            of `seed` and the sample's place in the order of all of them.
        batches: this process's, as `round_robin_samples` takes them; the same number and sizes on every process.
        kinds: which scores; the passes serve all of them.
        samples: how many to use, the first in the order of all processes' samples; None: all.
        scale: the loss is multiplied by it, which keeps gradients of float16 passes from becoming zero, and the
            gradients are divided by it; a power of 2 changes no score by that. A backend's own scale is divided out
            too. While a score is not finite and a scale above 1 may be to blame, all passes are made again with a
            smaller one.
        seed: of the random states.

    Returns:
        By kind, of each parameter: float32 shaped like its local shard, on its device. What the loss does not depend
        on has 0.

    Raises:
        ValueError: as `round_robin_samples`, on every process and before any pass.
    """
    group = sharding.data_parallel_group
    own, total = round_robin_samples(group, batches, samples)
    passes = _SamplePasses(sharding, optimizer, parameters, loss_fn, seed)
    backend_scale = sharding.loss_scale()
    while True:
        sums = ShardedSums(sharding, parameters, kinds)
        with passes.prepared():
            for number, sample in enumerate(own):
                gradients = passes.gradients(sample, number * group.size + group.rank, scale)
                sums.add(gradients, min(group.size, total - number * group.size), 1.0 / (scale * backend_scale))
        if scale * backend_scale <= 1.0 or sums.finite():
            return {kind: sums.on_shards(kind) for kind in kinds}
        scale /= min(_RETRY, scale * backend_scale)


class _SamplePasses:
    """Forward and backward of single samples, and a context around them all that leaves the model as it was."""

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
    def prepared(self) -> Iterator[None]:
        """Evaluation mode; gradients are captured, in full, before any reduction."""
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

    def gradients(self, sample: Any, index: int, scale: float) -> dict[int, Tensor]:
        """The full float32 gradients of one sample, by index of the parameter, where there is one.

        Args:
            sample: a batch of one.
            index: its place in the order of the samples of all processes.
            scale: factor on the loss.
        """
        sharding = self._sharding
        self._gradients = {}
        with _random_state(self._seed, index), torch.enable_grad(), sharding.micro_batch(last=False):
            sharding.backward(self._loss_fn(sharding.ascent_module, sample) * scale)
        sharding.clear_gradients(self._optimizer)
        return self._gradients

    def _take(self, index: int, gradient: Tensor) -> None:
        gradient = gradient.detach().float()
        known = self._gradients.get(index)
        self._gradients[index] = gradient if known is None else known + gradient


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


@register_score("fisher", "sum over samples of the squared gradient: the empirical Fisher", "arXiv 2210.05177, eq. 9")
def fisher(request: ScoreRequest) -> list[Tensor]:
    """The score of the same name."""
    return _requested(request)["fisher"]


@register_score("gradient", "magnitude of the gradient, summed over samples", "arXiv 2210.05177, sec. 4.3")
def gradient(request: ScoreRequest) -> list[Tensor]:
    """The score of the same name."""
    return _requested(request)["gradient"]


def _requested(request: ScoreRequest) -> dict[SampleScore, list[Tensor]]:
    """Both scores, as far as they are wanted: the passes over the samples are made once for both."""
    if request.of_samples is None:
        if request.loss_fn is None:
            raise ValueError(f"{request.wanted_of_samples[0]} scores need a loss function and batches of samples")
        request.of_samples = per_sample_scores(
            request.sharding,
            request.optimizer,
            list(request.parameters.values()),
            request.loss_fn,
            request.batches,
            kinds=request.wanted_of_samples,
            samples=request.samples,
            scale=request.scale,
            seed=request.seed,
        )
    return request.of_samples
