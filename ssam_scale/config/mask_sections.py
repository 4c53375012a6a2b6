"""The sections below `perturbation.mask`: which weights are perturbed, one section for each pattern."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, cast, get_args

from pydantic import Field, field_validator, model_validator

from .section import Section, Share, regular_expression

Sparsity: TypeAlias = Annotated[float, Field(ge=0.0, lt=1.0)]
SampleScore: TypeAlias = Literal["fisher", "gradient"]  # computed from samples
Score: TypeAlias = Literal[SampleScore, "accumulated", "weight", "random"]


class DynamicChoice(Section):
    """SSAM-D: each refresh drops some of the perturbed weights and grows others (arXiv 2210.05177)."""

    drop_rate: Share = Field(
        0.5, description="share dropped by a refresh at the start; falls to 0 along half a cosine over the run"
    )
    drop: Score = Field("gradient", description="score of which the lowest are dropped; choices as of score")
    grow: Score = Field("random", description="score of which the highest are grown; choices as of score")


_SCORE = (
    "the highest are perturbed, by: fisher, gradient (both of samples), accumulated (squared descent gradients of the "
    "steps so far), weight (magnitude), random"
)


class _WithDynamic(Section):
    """Declares `dynamic` before `score`, whose default depends on it."""

    pattern: str
    dynamic: DynamicChoice | None = Field(None, description="null: the weights of the highest scores")


class _ByAnyScore(Section):
    """Declares `score` before the refreshes."""

    pattern: str
    score: Score | None = Field(
        default_factory=lambda data: None if data.get("dynamic") else "fisher",
        description=f"{_SCORE}; null with dynamic",
    )


class RefreshedMask(Section):
    """What the masks have in common that are refreshed by scores."""

    samples: int = Field(
        128,
        ge=1,
        description="images that fisher and gradient scores are of; late in an epoch at most what is left of it",
    )
    labels: Literal["data", "sampled"] = Field(
        "data", description="labels of fisher scores: those of the data, or sampled from what the model predicts"
    )
    refresh_steps: int | None = Field(None, ge=1, description="steps between two refreshes of the mask")
    refresh_epochs: int | None = Field(
        default_factory=lambda data: None if data.get("refresh_steps") else 1,
        ge=1,
        description="epochs between two refreshes of the mask; both null: chosen once and kept",
    )

    @property
    def scores(self) -> tuple[Score, ...]:
        """All that the mask is chosen by."""
        return ()

    @property
    def by_samples(self) -> tuple[SampleScore, ...]:
        """Those of its scores that are computed from samples."""
        return tuple(cast("SampleScore", score) for score in self.scores if score in get_args(SampleScore))

    @property
    def is_refreshed(self) -> bool:
        """Whether it is chosen more than once."""
        return self.refresh_steps is not None or self.refresh_epochs is not None

    @model_validator(mode="after")
    def _one_rhythm(self) -> RefreshedMask:
        if self.refresh_steps is not None and self.refresh_epochs is not None:
            raise ValueError(
                f"refresh_steps {self.refresh_steps} and refresh_epochs {self.refresh_epochs} cannot both be; leave "
                "one of them out, or set it to null"
            )
        return self


class ChosenMask(RefreshedMask, _ByAnyScore):
    """What the masks have in common that are chosen by scores."""

    @property
    def scores(self) -> tuple[Score, ...]:
        """All that the mask is chosen by."""
        return () if self.score is None else (self.score,)

    @model_validator(mode="after")
    def _accumulates(self) -> ChosenMask:
        if self.score == "accumulated" and not self.is_refreshed:
            raise ValueError(
                "score: accumulated needs refreshes, as there is nothing yet when the mask is chosen first; give "
                "refresh_epochs or refresh_steps"
            )
        return self

    @model_validator(mode="after")
    def _labelled(self) -> ChosenMask:
        if self.labels == "sampled" and self.by_samples != ("fisher",):
            named = " and ".join(self.scores) or "none"
            raise ValueError(f"labels: sampled is for score fisher, and the mask is chosen by {named}; use data")
        return self


class BudgetedMask(ChosenMask):
    """What the masks have in common whose sparsity is a choice."""

    sparsity: Sparsity = Field(0.5, description="share of the weights that is not perturbed")
    sparsity_final: Sparsity | None = Field(
        None, description="sparsity at the end of the run, reached along half a cosine; null: it stays the same"
    )

    @model_validator(mode="after")
    def _moving(self) -> BudgetedMask:
        if self.sparsity_final is not None and not self.is_refreshed:
            raise ValueError("sparsity_final: takes refreshes to get there; give refresh_epochs or refresh_steps")
        return self


Allocation: TypeAlias = Literal["global", "uniform", "erk"]
_ALLOCATION = (
    "how densities differ between layers: global (by the scores alone), uniform (not), erk (small layers denser)"
)


class ElementMask(BudgetedMask, _WithDynamic):
    """Single weights: those that score highest, or SSAM-D's dynamic choice."""

    pattern: Literal["element"] = Field(description="single weights")
    allocation: Allocation = Field("global", description=_ALLOCATION)

    @property
    def scores(self) -> tuple[Score, ...]:
        """All that the mask is chosen by."""
        if self.dynamic is None:
            return super().scores
        return tuple(dict.fromkeys((self.dynamic.drop, self.dynamic.grow)))

    @model_validator(mode="after")
    def _one_choice(self) -> ElementMask:
        if self.dynamic is None:
            if self.score is None:
                raise ValueError("score: null is for dynamic; without it, name a score")
            return self
        if self.score is not None:
            raise ValueError("score: leave it out with dynamic, whose drop and grow say what the mask is chosen by")
        if self.allocation != "global":
            raise ValueError(f"allocation: {self.allocation} is for a choice by score; dynamic has global only")
        if not self.is_refreshed:
            raise ValueError("dynamic: drops and grows at refreshes; give refresh_epochs or refresh_steps")
        return self


class _ByScore(ChosenMask):
    """Masks that always have a score."""

    score: Score = Field("fisher", description=_SCORE)


class RowMask(_ByScore, BudgetedMask):
    """Output channels: slices of a weight along its first dimension."""

    pattern: Literal["row"] = Field(description="output channels, by their mean score")
    allocation: Allocation = Field("global", description=_ALLOCATION)


class _OfWholes(_ByScore, BudgetedMask):
    """What is chosen as a whole may be large beside the budget."""

    independent: bool = Field(
        False,
        description="with score random: each with probability 1 - sparsity, whatever the others are (ESAM, arXiv "
        "2110.03141), and not within a budget, into which small ones nearly always fit and large ones seldom",
    )

    @model_validator(mode="after")
    def _at_random(self) -> _OfWholes:
        if self.independent and self.score != "random":
            raise ValueError(f"independent: is for score random, and score is {self.score}; leave one of them out")
        return self


class TensorMask(_OfWholes):
    """Whole tensors."""

    pattern: Literal["tensor"] = Field(description="whole tensors, by their mean score")


class BlockMask(_OfWholes):
    """Whole blocks of the network."""

    pattern: Literal["block"] = Field(description="all weights of whole blocks, by their mean score")


class NMMask(_ByScore):
    """N of every M consecutive input features of linear layers and convolutions."""

    pattern: Literal["nm"] = Field(description="n of every m consecutive input features (channels)")
    n: int = Field(2, ge=1, description="perturbed weights of each group")
    m: int = Field(4, ge=1, description="weights of a group")
    others: Literal["perturbed", "unperturbed"] = Field(
        "perturbed", description="what becomes of biases, normalization layers and embeddings"
    )
    indivisible: Literal["refused", "perturbed", "unperturbed"] = Field(
        "refused", description="what becomes of weights whose input features do not make groups of m"
    )

    @model_validator(mode="after")
    def _some_of_all(self) -> NMMask:
        if self.n > self.m:
            raise ValueError(f"n: {self.n} of every {self.m} cannot be; n must not be more than m")
        return self


class _Drawn(Section):
    """Declares `draw` before the refreshes, whose default depends on it."""

    pattern: str
    policy: Literal["fixed", "rotate"] = Field("rotate", description="rotate draws the cut anew each step")
    cut: tuple[Share, Share] = Field(
        (0.0, 1.0), description="depth of the cut as a share of the blocks: [lowest, highest], or one number"
    )
    draw: Literal["uniform", "annealed", "cost"] = Field(
        "uniform",
        description="how policy rotate draws the cut: uniform; annealed: uniform in a range that moves; cost: by the "
        "Fisher mass of what is perturbed over the time of the ascent",
    )
    cut_final: tuple[Share, Share] | None = Field(
        None, description="with draw annealed, cut at the end of the run, reached along half a cosine"
    )

    @field_validator("cut", "cut_final", mode="before")
    @classmethod
    def _range(cls, value: Any) -> Any:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return (value, value)
        return tuple(value) if isinstance(value, list) else value


class DepthMask(RefreshedMask, _Drawn):
    """The suffix of the network from a cut on; the prefix before it runs once and serves both passes."""

    pattern: Literal["depth"] = Field(description="all weights from a depth of the network on")
    samples: int = Field(
        128, ge=1, description="with draw cost, images of the Fisher mass; late in an epoch at most what is left of it"
    )
    labels: Literal["data", "sampled"] = Field(
        "data", description="labels of the Fisher mass: those of the data, or sampled from what the model predicts"
    )
    refresh_steps: int | None = Field(
        None, ge=1, description="with draw cost, steps between two measurements of the Fisher mass"
    )
    refresh_epochs: int | None = Field(
        default_factory=lambda data: 1 if data.get("draw") == "cost" and not data.get("refresh_steps") else None,
        ge=1,
        description="with draw cost, epochs between two measurements of the Fisher mass; both null: measured once",
    )

    @property
    def scores(self) -> tuple[Score, ...]:
        """What the draws are by."""
        return ("fisher",) if self.draw == "cost" else ()

    @model_validator(mode="after")
    def _consistent(self) -> DepthMask:
        for key, cut in (("cut", self.cut), ("cut_final", self.cut_final or (0.0, 1.0))):
            low, high = cut
            if low > high:
                raise ValueError(f"{key}: the lowest depth {low} lies above the highest {high}; write [{high}, {low}]")
        low, high = self.cut
        if self.policy == "fixed" and low != high:
            raise ValueError(
                f"cut: policy fixed takes one depth, given [{low}, {high}]; use policy: rotate for a range"
            )
        if self.policy == "fixed" and self.draw != "uniform":
            raise ValueError(f"draw: {self.draw} is for policy rotate; policy fixed draws nothing")
        return self

    @model_validator(mode="after")
    def _drawn(self) -> DepthMask:
        if self.draw == "annealed" and self.cut_final is None:
            raise ValueError("draw: annealed moves from cut to cut_final; give cut_final")
        if self.draw != "annealed" and self.cut_final is not None:
            raise ValueError(f"cut_final: is for draw annealed, and draw is {self.draw}")
        if self.draw != "cost" and self.is_refreshed:
            key = "refresh_steps" if self.refresh_steps is not None else "refresh_epochs"
            raise ValueError(f"{key}: is for draw cost, and draw is {self.draw}, which measures nothing")
        if self.draw != "cost" and self.labels != "data":
            raise ValueError(f"labels: {self.labels} is for draw cost, and draw is {self.draw}")
        return self


class NormMask(Section):
    """The normalization layers alone (SAM-ON, arXiv 2306.04226)."""

    pattern: Literal["norm"] = Field(description="weights and biases of normalization layers")


class NamedMask(Section):
    """Whole parameters, by name."""

    pattern: Literal["named"] = Field(description="parameters whose names match")
    parameters: tuple[str, ...] = Field(
        min_length=1, description="regular expressions, each searched for anywhere in a name; one match is enough"
    )

    @field_validator("parameters")
    @classmethod
    def _compiled(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(regular_expression, value))


Mask: TypeAlias = Annotated[
    ElementMask | RowMask | TensorMask | BlockMask | NMMask | DepthMask | NormMask | NamedMask,
    Field(discriminator="pattern"),
]
