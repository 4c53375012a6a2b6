"""Predicted compute time of a step, from the measured times of its stages: pure functions.

A stage's backward is measured three times: as it is, without the gradients of its weights, and without the gradient of
its input. The difference to the first is what leaving that gradient out saves. From these, nothing is needed of a
mask but which stages it runs again and which share of each stage's weights needs a gradient; the prediction never sees
the time of the step that it predicts.

Assumptions: half of a batch costs half of the time; the gradients of a stage's weights cost in proportion
to their number; perturbing costs the same for each perturbed weight, whichever they are; nothing else takes time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


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
class StepTimes:
    """Seconds of a step's parts.

    Attributes:
        stages: of each stage, the loss being in the last.
        optimizer: of the base optimizer's step and of dropping gradients.
        perturb: of perturbing one weight and putting it back.
    """

    stages: tuple[StageTimes, ...]
    optimizer: float
    perturb: float


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

    @property
    def first(self) -> int:
        """The first stage that the ascent's backward goes through; of a shape with an ascent."""
        return next(i for i, share in enumerate(self.kept) if share > 0.0)


def pass_seconds(times: StepTimes) -> float:
    """The forward and backward of a whole pass; the images need no gradient."""
    return sum(s.forward + s.backward_for(1.0, first=i == 0) for i, s in enumerate(times.stages))


def base_seconds(times: StepTimes) -> float:
    """A step of the base optimizer alone."""
    return pass_seconds(times) + times.optimizer


def suffix_share(times: StepTimes, cut: int) -> float:
    """The share t of a pass's compute that lies from stage `cut` on, forward and backward as in the base step."""
    seconds = [s.forward + s.backward_for(1.0, first=i == 0) for i, s in enumerate(times.stages)]
    return sum(seconds[cut:]) / sum(seconds)


def ascent_forward(times: StepTimes, shape: StepShape) -> float:
    """The ascent's forward."""
    if not shape.ascends:
        return 0.0
    return shape.scores * sum(s.forward for s in times.stages) + shape.fraction * sum(
        s.forward for s in times.stages[shape.cut :]
    )


def ascent_backward(times: StepTimes, shape: StepShape) -> float:
    """The ascent's backward."""
    if not shape.ascends:
        return 0.0
    first = shape.first
    return shape.fraction * sum(
        times.stages[i].backward_for(shape.kept[i], first=i == first) for i in range(first, len(times.stages))
    )


def predicted_ascent_seconds(times: StepTimes, shape: StepShape) -> float:
    """Everything that the step pays beyond the base optimizer's step; negative where its descent spares more."""
    spared = (1.0 - shape.descent) * pass_seconds(times)
    return ascent_forward(times, shape) + ascent_backward(times, shape) + times.perturb * shape.perturbed - spared


def predicted_over_base(times: StepTimes, shapes: Sequence[StepShape]) -> float:
    """The mean time of steps of these shapes over the base optimizer's."""
    base = base_seconds(times)
    return 1.0 + sum(predicted_ascent_seconds(times, shape) for shape in shapes) / (len(shapes) * base)
