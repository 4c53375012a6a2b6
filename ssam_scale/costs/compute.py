"""Predicted compute time of a step, from the measured times of its stages: pure functions.

A stage's backward is measured three times: as it is, without the gradients of its weights, and without the gradient of
its input. The difference to the first is what leaving that gradient out saves. From these, nothing is needed of a
mask but which stages it runs again and which share of each stage's weights needs a gradient; the prediction never sees
the time of the step that it predicts.

A pass of few images takes longer than its share: launching kernels costs as much, however little each has to do. So
stages are measured in passes of several sizes, and an ascent on a part of the batch takes the time of its own number of
images.

Frozen weights have no gradient, and no backward goes before the first stage that has another.

Assumptions: between two sizes that were measured the time grows evenly, a pass of fewer images than were ever measured
takes as long as the smallest that was, and one of more in proportion to the largest; the gradients of a stage's weights
cost in proportion to their number; perturbing costs the same for each perturbed weight, whichever they are; nothing
else takes time.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property

from ssam_scale.perturbation.reference import first_samples

# Of work in proportion to the images, so many that any share of them is whole.
_MANY = 1 << 40


@dataclass(frozen=True)
class StageTimes:
    """Seconds that one stage takes.

    Attributes:
        forward: its forward.
        backward: its backward, with the gradients of its weights and of its input.
        no_weights: its backward without the gradients of its weights.
        no_input: its backward without the gradient of its input.
    """

    forward: float
    backward: float
    no_weights: float
    no_input: float

    @property
    def of_weights(self) -> float:
        """What the gradients of the weights cost; a difference of measured times, so at least 0 and at most all."""
        return min(max(self.backward - self.no_weights, 0.0), self.backward)

    @property
    def of_input(self) -> float:
        """What the gradient of the stage's input costs beyond those of the weights; bounded likewise."""
        return min(max(self.backward - self.no_input, 0.0), self.backward - self.of_weights)

    def backward_for(self, kept: float, *, first: bool) -> float:
        """The backward of an ascent.

        Args:
            kept: share of the stage's weights whose gradient is computed.
            first: whether nothing before this stage needs a gradient, so that its input needs none.
        """
        whole = self.backward - (1.0 - kept) * self.of_weights
        return whole - self.of_input if first else whole


@dataclass(frozen=True)
class PassTimes:
    """Seconds that the stages of a pass take.

    Attributes:
        images: that it sees.
        stages: of each stage, the loss being in the last.
    """

    images: int
    stages: tuple[StageTimes, ...]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of a step's parts.

    Attributes:
        passes: that were measured, of different sizes, the smallest first.
        optimizer: of the base optimizer's step and of dropping gradients.
        perturb: of perturbing one weight and putting it back.
        images: of each micro-batch of the step; a mean where processes have not all as many.
        micro_batches: of the step.
        trained: of each stage, the share of its weights that is not frozen; None: all of all of them.
    """

    passes: tuple[PassTimes, ...]
    optimizer: float
    perturb: float
    images: float
    micro_batches: int = 1
    trained: tuple[float, ...] | None = None

    @classmethod
    def proportional(cls, stages: tuple[StageTimes, ...], optimizer: float = 0.0, perturb: float = 0.0) -> StepTimes:
        """Of work in proportion to the images, as FLOPs are.

        Args:
            stages: of the whole step.
            optimizer: see above.
            perturb: see above.
        """
        nothing = (StageTimes(0.0, 0.0, 0.0, 0.0),) * len(stages)
        return cls((PassTimes(0, nothing), PassTimes(_MANY, stages)), optimizer, perturb, _MANY)

    @property
    def fewest(self) -> int:
        """Images of the smallest pass that was measured."""
        return self.passes[0].images

    @cached_property
    def stages(self) -> tuple[StageTimes, ...]:
        """Of each stage, what the micro-batches of a step take together."""
        return self._of(self.images)

    @property
    def descended(self) -> tuple[float, ...]:
        """Of each stage, the share of its weights whose gradient a descent computes."""
        return (1.0,) * len(self.passes[0].stages) if self.trained is None else self.trained

    def part(self, fraction: float) -> tuple[StageTimes, ...]:
        """The same if of each micro-batch a pass sees only this share."""
        return self._of(self.images_in(fraction))

    def images_in(self, fraction: float) -> float:
        """How many images of a micro-batch a pass sees, if it sees this share."""
        return self.images if fraction == 1.0 else first_samples(round(self.images), fraction)

    def _of(self, images: float) -> tuple[StageTimes, ...]:
        sizes = [each.images for each in self.passes]
        above, times = bisect.bisect_left(sizes, images), self.micro_batches
        if above == len(sizes):
            return self._sum((self.passes[-1], times * images / sizes[-1]))
        if above == 0:
            return self._sum((self.passes[0], times))
        share = (images - sizes[above - 1]) / (sizes[above] - sizes[above - 1])
        return self._sum((self.passes[above - 1], times * (1.0 - share)), (self.passes[above], times * share))

    @staticmethod
    def _sum(*weighted: tuple[PassTimes, float]) -> tuple[StageTimes, ...]:
        parts = [[[weight * part for part in astuple(stage)] for stage in times.stages] for times, weight in weighted]
        return tuple(StageTimes(*map(sum, zip(*stages, strict=True))) for stages in zip(*parts, strict=True))


@dataclass(frozen=True)
class StepShape:
    """What one step perturbs, as far as it costs time.

    Attributes:
        cut: the first stage that the ascent runs.
        kept: of each stage, the share of its weights whose gradient the ascent computes; all 0: there is no ascent
            pass.
        perturbed: number of perturbed weights.
        fraction: share of the batch in the ascent.
        scores: forwards of the whole batch that choose samples, of the ascent or of the descent.
        descent: share of the batch in the descent.
    """

    cut: int
    kept: tuple[float, ...]
    perturbed: int
    fraction: float = 1.0
    scores: int = 0
    descent: float = 1.0

    @property
    def ascends(self) -> bool:
        """Whether there is an ascent pass."""
        return any(self.kept)


def _backwards(stages: Sequence[StageTimes], kept: Sequence[float]) -> list[float]:
    """Of each stage, its backward; what lies before the first with a weight's gradient has none, as have the images."""
    first = next(i for i, share in enumerate(kept) if share > 0.0)
    return [0.0] * first + [stages[i].backward_for(kept[i], first=i == first) for i in range(first, len(stages))]


def pass_seconds(times: StepTimes, fraction: float = 1.0) -> float:
    """The forward and backward of a whole pass over this share of the batch, for all that is trained."""
    stages = times.part(fraction)
    return sum(s.forward for s in stages) + sum(_backwards(stages, times.descended))


def base_seconds(times: StepTimes) -> float:
    """A step of the base optimizer alone."""
    return pass_seconds(times) + times.optimizer


def suffix_share(times: StepTimes, cut: int) -> float:
    """The share t of a pass's compute that lies from stage `cut` on, forward and backward as in the base step."""
    backwards = _backwards(times.stages, times.descended)
    seconds = [s.forward + backward for s, backward in zip(times.stages, backwards, strict=True)]
    return sum(seconds[cut:]) / sum(seconds)


def ascent_forward(times: StepTimes, shape: StepShape) -> float:
    """The ascent's forward."""
    if not shape.ascends:
        return 0.0
    chosen = shape.scores * sum(s.forward for s in times.stages)
    return chosen + sum(s.forward for s in times.part(shape.fraction)[shape.cut :])


def ascent_backward(times: StepTimes, shape: StepShape) -> float:
    """The ascent's backward."""
    if not shape.ascends:
        return 0.0
    return sum(_backwards(times.part(shape.fraction), shape.kept))


def predicted_ascent_seconds(times: StepTimes, shape: StepShape) -> float:
    """Everything that the step pays beyond the base optimizer's step; negative where its descent spares more."""
    spared = pass_seconds(times) - pass_seconds(times, shape.descent)
    return ascent_forward(times, shape) + ascent_backward(times, shape) + times.perturb * shape.perturbed - spared


def predicted_over_base(times: StepTimes, shapes: Sequence[StepShape]) -> float:
    """The mean time of steps of these shapes over the base optimizer's."""
    base = base_seconds(times)
    return 1.0 + sum(predicted_ascent_seconds(times, shape) for shape in shapes) / (len(shapes) * base)
