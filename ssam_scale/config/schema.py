"""What a run is: one frozen, validated description. Imports nothing of ours.

Every field states its meaning and unit in its description; `ssam-scale train --print-config` prints the
resolved values.
"""

from __future__ import annotations

import math
import pkgutil
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from .augment_sections import Augment
from .deepspeed import problems
from .direction_sections import (
    DescentSection,
    Direction,
    FreshDirection,
    GateSection,
    MomentumDirection,
    PreviousDirection,
)
from .mask_sections import DepthMask, ElementMask, Mask, RefreshedMask
from .parameter_sections import Freeze, ParameterGroup
from .presets import PRESETS
from .section import ImagesPath, Section, Share, UserPath, home, home_in_uri, in_parts, without
from .trajectory_sections import SAFTrajectory, Trajectory

_OF_WEIGHTS = (
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_strict",
    "checkpoint_path",
    "cache_dir",
)


_OF_A_HUB = r"^(https?://(www\.)?huggingface\.co/)?(hf[-_]hub:)?(timm/)?(torchvision\.(models\.)?)?"


class Model(Section):
    """The network, built by timm."""

    name: str = Field(description="timm model name, e.g. resnet50 or vit_base_patch16_224")
    pretrained: bool | UserPath = Field(
        False,
        description="weights to start from: true: timm's own for the name and its tag (resnet50.a1_in1k), from the "
        "hub's cache or the hub; a file of weights (.safetensors, or of torch.save), or a checkpoint's folder",
    )
    num_classes: int = Field(1000, ge=2, le=10**7, description="classes of the classifier head")
    drop_rate: Share = Field(0.0, description="dropout probability before the head")
    drop_path_rate: Share = Field(0.0, description="stochastic depth probability of the last block")
    freeze: tuple[Freeze, ...] = Field((), description="BatchNorm layers that are frozen keep their statistics")
    stages: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="names of the blocks that a cut can come between, in the order in which they run ([layers.0, "
        "layers.1]), of a model that is of no known family; null: its family's. `ssam-scale stages` shows them",
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of timm.create_model")

    @field_validator("name")
    @classmethod
    def _a_model(cls, value: str) -> str:
        name, dot, tag = re.sub(_OF_A_HUB, "", value).partition(".")
        full = f"{name}.{tag}" if dot else name
        if full != value:
            raise ValueError(f"models are named without where they come from: {full}")
        return value

    @model_validator(mode="after")
    def _of_weights_that_are_loaded(self) -> Model:
        name, dot, tag = self.name.partition(".")
        if dot and self.pretrained is not True:
            instead = "" if self.pretrained is False else f", and model.pretrained is {self.pretrained}"
            raise ValueError(
                f"name {self.name}: tag {tag} names weights of the hub{instead}; set model.pretrained=true to start "
                f"from them, or name the network alone: {name}"
            )
        return self

    @field_validator("kwargs")
    @classmethod
    def _nothing_of_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        return without(
            value,
            {
                **{name: f"it is model.{name}" for name in ("num_classes", "drop_rate", "drop_path_rate")},
                "model_name": "it is model.name",
                "in_chans": "images are RGB, of 3 channels",
                **dict.fromkeys(_OF_WEIGHTS, "weights are named by model.pretrained"),
                "features_only": "a classifier is trained",
            },
        )


Interpolation: TypeAlias = Literal["bilinear", "bicubic", "area"]


class Progressive(Section):
    """Training crops that grow, as ffcv-imagenet's do: small ones while the network learns what is coarse."""

    resolution: int = Field(ge=8, le=8192, description="side of the training crop until it grows, pixels")
    from_epoch: int = Field(0, ge=0, description="the last epoch, from 0, of that side")
    to_epoch: int = Field(ge=1, description="the first epoch of data.resolution; between, the side is between")
    multiple_of: int = Field(32, ge=1, le=512, description="what sides between are rounded to a multiple of, pixels")

    @model_validator(mode="after")
    def _grows(self) -> Progressive:
        if self.to_epoch <= self.from_epoch:
            raise ValueError(f"to_epoch {self.to_epoch} must be more than from_epoch {self.from_epoch}")
        return self

    def side(self, epoch: int, largest: int) -> int:
        """Of the crops of an epoch, from 0, pixels; they end with `largest`."""
        if epoch <= self.from_epoch:
            return self.resolution
        if epoch >= self.to_epoch:
            return largest
        grown = (epoch - self.from_epoch) / (self.to_epoch - self.from_epoch)
        side = self.resolution + grown * (largest - self.resolution)
        return min(largest, max(self.resolution, round(side / self.multiple_of) * self.multiple_of))


class Data(Section):
    """Images and how they are read. Files are written by `ssam-scale data`."""

    train: ImagesPath = Field(
        description="training images: a .beton file, or several that are one data set, as a pattern (train-*.beton, "
        "train-{01..16}.beton, {one,other}.beton: shards by their numbers, others as they are named); or, read as they "
        "are, folder: and a folder with one of images per class, wds: and shards of WebDataset"
    )
    val: ImagesPath = Field(description="validation images, likewise")
    subset: int | None = Field(None, ge=1, description="train on this many images, the same random choice in every run")
    batch_size: int = Field(
        ge=1, le=10**7, description="images in one optimizer step over all processes and micro-batches"
    )
    eval_batch_size: int | None = Field(
        None,
        ge=1,
        le=10**7,
        description="images in one evaluation forward over all processes; null: as many as in training",
    )
    resolution: int = Field(224, ge=8, le=8192, description="side of the training crop, pixels")
    progressive: Progressive | None = Field(None, description="crops that are smaller in the first epochs; null: none")
    eval_resolution: int = Field(224, ge=8, le=8192, description="side of the evaluation centre crop, pixels")
    eval_crop_ratio: float = Field(
        0.875,
        gt=0.0,
        le=1.0,
        description="centre crop's share of the image's short side: where torchvision resizes it to eval_resolution / "
        "eval_crop_ratio and cuts out the middle",
    )
    crop_scale: tuple[float, float] = Field((0.08, 1.0), description="area of the random crop, share of the image")
    crop_ratio: tuple[float, float] = Field((0.75, 4.0 / 3.0), description="aspect ratio of the random crop")
    flip: Share = Field(0.5, description="probability of a horizontal flip")
    augment: Augment | None = Field(
        None, description="what is done to the pixels of crops, on the device; null: nothing"
    )
    color_jitter: float = Field(
        0.0,
        ge=0.0,
        le=1.0,
        description="how far from 1 the factors of brightness, contrast and saturation are, at the most, as timm's "
        "color_jitter; after augment",
    )
    erasing: Share = Field(0.0, description="probability that a box of an image becomes noise, as timm's reprob")
    repeats: int = Field(
        1,
        ge=1,
        le=64,
        description="how often an image of an epoch is in it, each time cropped and augmented anew; an epoch is as "
        "long, and has one of so many images",
    )
    eval_flip: bool = Field(False, description="evaluate by the mean logits of each image and its mirror image")
    interpolation: Interpolation = Field(
        "bilinear",
        description="how crops are resized: bilinear or bicubic, by filters that widen as an image shrinks, as "
        "torchvision's and Pillow's do; area: as FFCV's loader does",
    )
    order: Literal["random", "pages"] = Field(
        "random",
        description="random: a shuffle of all images, for files that fit in memory; pages: each process reads pages of "
        "its own, whole and one after another, and images are shuffled within windows of them",
    )
    on_damaged: Literal["stop", "skip"] = Field(
        "stop",
        description="where a training image is not what was written: stop; skip: the next image of the file takes its "
        "place, and a line lists them after the epoch",
    )
    memory: float = Field(
        8.0,
        gt=0.0,
        le=10**6,
        description="GiB of data.train that order pages keeps in memory, of all machines together: the larger, the "
        "more pages each batch is drawn from",
    )
    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] | None = Field(
        None,
        description="loader threads per process; null: the cores it may use; auto: the fewest of them that decode as "
        "fast, within 5%, measured on a batch before training, which takes a second or two",
    )
    mean: tuple[float, float, float] = Field((0.485, 0.456, 0.406), description="channel means of RGB in [0, 1]")
    std: tuple[float, float, float] = Field((0.229, 0.224, 0.225), description="channel deviations of RGB in [0, 1]")

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        of_threads = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1024
        if value is None or value == "auto" or of_threads:
            return value
        raise ValueError("must be a whole number from 1 to 1024, auto or null")

    @field_validator("mean", "std")
    @classmethod
    def _of_shares(cls, value: tuple[float, float, float], info: ValidationInfo) -> tuple[float, float, float]:
        if info.field_name == "std" and min(value) <= 0.0:
            raise ValueError("must be three positive numbers")
        if not 0.0 <= min(value) <= max(value) <= 1.0:
            of_bytes = "; of pixels from 0 to 255, write a 255th of it" if 1.0 < max(value) <= 255.0 else ""
            raise ValueError(f"must be three numbers in [0, 1]{of_bytes}")
        return value

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float], info: ValidationInfo) -> tuple[float, float]:
        if not 0.0 < value[0] <= value[1]:
            raise ValueError("must be two positive numbers, the smaller first")
        if info.field_name == "crop_scale" and value[1] > 1.0:
            raise ValueError("must be shares of the image's area, at most 1")
        if info.field_name == "crop_ratio" and not 0.01 <= value[0] <= value[1] <= 100.0:
            raise ValueError("must be ratios of width to height from 0.01 to 100")
        return value

    @model_validator(mode="after")
    def _grows(self) -> Data:
        if self.progressive is not None and self.progressive.resolution >= self.resolution:
            raise ValueError(
                f"progressive.resolution {self.progressive.resolution} must be less than resolution {self.resolution}, "
                "which it grows to"
            )
        return self

    @model_validator(mode="after")
    def _with_pages(self) -> Data:
        source, _ = in_parts(self.train)
        if source and self.order == "pages":
            raise ValueError(
                f"order: pages is of .beton files, and train is {source}:; use random, or write the images with "
                "`ssam-scale data write`"
            )
        if self.repeats > 1 and self.order == "pages":
            raise ValueError("repeats: an order by pages reads each image once; use order: random")
        return self


class Loss(Section):
    """What is minimised, and the mixing of labels."""

    name: Literal["cross_entropy", "binary_cross_entropy"] = Field(
        "cross_entropy",
        description="cross_entropy: of the softmax; binary_cross_entropy: of each class by itself, the mean over "
        "classes (as timm's bce_loss: ResNet strikes back, DeiT III)",
    )
    target_threshold: float | None = Field(
        None,
        ge=0.0,
        lt=1.0,
        description="binary_cross_entropy: targets above it are 1 and the others 0, after mixing (timm's "
        "bce_target_thresh); null: they are as mixed",
    )
    class_weights: tuple[Annotated[float, Field(ge=0.0, le=1e6)], ...] | Literal["balanced"] | None = Field(
        None,
        description="a factor on the loss of each class, in the order of labels; balanced: training images / (classes "
        "x images of the class), as scikit-learn's; the mean is over images, whatever their weights, so that it is the "
        "same for any number of processes; null: 1",
    )
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0, description="mass spread over all classes")
    mixup: float = Field(0.0, ge=0.0, description="alpha of mixup's Beta distribution; 0 turns it off")
    cutmix: float = Field(
        0.0,
        ge=0.0,
        description="alpha of CutMix's Beta distribution; 0 turns it off; with mixup one of them, as likely",
    )

    @field_validator("class_weights", mode="before")
    @classmethod
    def _numbers_or_balanced(cls, value: Any) -> Any:
        def is_weight(item: Any) -> bool:
            return isinstance(item, (int, float)) and not isinstance(item, bool) and 0.0 <= item <= 1e6

        if isinstance(value, (list, tuple)) and all(map(is_weight, value)):
            return tuple(value)
        if value in (None, "balanced"):
            return value
        raise ValueError("must be a list of numbers from 0 to 1e+06, one for each class, or balanced or null")

    @model_validator(mode="after")
    def _of_classes_by_themselves(self) -> Loss:
        if self.target_threshold is not None and self.name != "binary_cross_entropy":
            raise ValueError(f"target_threshold is of binary_cross_entropy, and name is {self.name}")
        if isinstance(self.class_weights, tuple) and not any(self.class_weights):
            raise ValueError("class_weights are all 0")
        return self


class Optimizer(Section):
    """The base optimizer, built by timm's factory."""

    name: str = Field("sgd", description="timm optimizer name, e.g. sgd, adamw, lamb, lion")
    lr: float = Field(gt=0.0, le=1000.0, description="peak learning rate")
    weight_decay: float = Field(0.0, ge=0.0, le=1000.0, description="weight decay of weights")
    decay_norm_and_bias: bool = Field(False, description="apply weight decay to biases and normalization layers too")
    momentum: float = Field(0.9, ge=0.0, lt=1.0, description="momentum of optimizers that have one")
    layer_decay: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="factor on the learning rate from each layer to the one before it, so that the first are trained "
        "least (BEiT, arXiv 2106.08254; layers as timm groups them); null: none",
    )
    groups: tuple[ParameterGroup, ...] = Field((), description="Their weight decay is of biases, too")
    clip_grad_norm: float | None = Field(None, gt=0.0, description="largest norm of the descent gradient")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the optimizer")

    @field_validator("kwargs")
    @classmethod
    def _nothing_of_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        return without(
            value,
            {
                **{name: f"it is optimizer.{name}" for name in ("lr", "weight_decay", "momentum")},
                "opt": "it is optimizer.name",
                "filter_bias_and_bn": "it is optimizer.decay_norm_and_bias, which says the opposite",
                "layer_decay": "it is optimizer.layer_decay",
                **dict.fromkeys(
                    ("params", "model_or_params", "param_group_fn"),
                    "all parameters of the model are trained; others by model.freeze, and groups by optimizer.groups",
                ),
                "learning_rate": "it is optimizer.lr",
            },
        )


class Schedule(Section):
    """The learning rate over time, built by timm's scheduler factory and updated every step."""

    name: Literal["cosine", "step", "poly", "tanh"] = Field("cosine", description="shape after the warm-up")
    warmup_epochs: float = Field(0.0, ge=0.0, le=10**6, description="epochs of linear warm-up")
    warmup_lr: float = Field(0.0, ge=0.0, description="learning rate at the first step of the warm-up")
    min_lr: float = Field(0.0, ge=0.0, description="learning rate that the decay ends at")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of the scheduler")

    @field_validator("kwargs")
    @classmethod
    def _nothing_of_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        always = "it follows from the run"
        return without(
            value,
            {
                **{name: f"it is schedule.{name}" for name in ("warmup_epochs", "warmup_lr", "min_lr")},
                "sched": "it is schedule.name",
                "warmup_t": "it is schedule.warmup_epochs",
                **dict.fromkeys(("t_initial", "num_epochs"), "it is train.epochs, or train.max_steps"),
                **dict.fromkeys(("optimizer", "warmup_prefix", "step_on_epochs", "updates_per_epoch"), always),
            },
        )


Norm: TypeAlias = Literal["dense", "masked", "calibrated"]


class Savings(Section):
    """Savings for what a mask leaves alone, each by itself."""

    elide: bool = Field(True, description="no ascent gradient of what is not perturbed is computed")
    share_prefix: bool = Field(True, description="blocks before the first perturbed one run once a step")
    pack: bool = Field(True, description="only perturbed values of ascent gradients and weights are sent")
    keep_gathered: bool = Field(
        False, description="fsdp2, zero3: weights left alone stay gathered between the passes, which takes their memory"
    )
    graph_ascent: bool = Field(
        False,
        description="single and ddp, on a GPU: an ascent on part of the batch (`direction.fraction`) runs the network "
        "as CUDA graphs, captured for each cut, which keep their memory",
    )


# The names of the files, which are not imported: a new schedule is one file.
_SCHEDULES = [m.name for m in pkgutil.iter_modules([str(Path(__file__).parents[1] / "perturbation/schedules/radius")])]
if TYPE_CHECKING:
    RhoSchedule: TypeAlias = str
else:
    RhoSchedule = Literal[tuple(_SCHEDULES)]


if TYPE_CHECKING:
    PresetName: TypeAlias = str
else:
    PresetName = Literal[tuple(PRESETS)]


class Perturbation(Section):
    """The ascent step of SAM: how far, and which weights."""

    preset: PresetName | None = Field(
        None,
        description="a named method, whose settings are taken where nothing else is said (`ssam-scale methods`)",
    )
    rho: float = Field(gt=0.0, le=1000.0, description="radius of the perturbation")
    rho_schedule: RhoSchedule = Field(
        "constant",
        description="rho over the run: constant; cosine: along half of one; lr: in step with the learning rate; and "
        "what else `ssam-scale list schedules` shows",
    )
    rho_final: float = Field(0.0, ge=0.0, description="share of rho at the cosine's end, or where the rate is 0")
    norm: Norm = Field(
        "masked",
        description="what the gradient is divided by: the norm of all of it (the papers), or of the masked part; "
        "calibrated: of the masked part, shortened to the length that dense would give",
    )
    calibrate_every: int | None = Field(
        100,
        ge=1,
        description="steps between two dense ascents that measure the masked share of the gradient: of norm "
        "calibrated (more often at first), and for the metric kappa of masks of single weights and rows; null: only "
        "where they must be",
    )
    adaptive: bool = Field(False, description="perturb weights in proportion to their magnitude (ASAM)")
    direction: Direction = Field(
        FreshDirection.model_validate({"source": "fresh"}),
        description="where the direction of the perturbation comes from",
    )
    interval: int = Field(
        1, ge=1, description="steps from one ascent to the next; those between are the base optimizer's"
    )
    reuse: float = Field(
        0.0,
        ge=0.0,
        description="with an interval above 1: how much of what the last ascent brought is added to the gradients "
        "between, relative to them (alpha of LookSAM)",
    )
    gap: float = Field(
        0.0,
        ge=0.0,
        le=100.0,
        description="how much of what the plain gradient has orthogonal to the descent's is taken off that (alpha of "
        "GSAM)",
    )
    descent: DescentSection | None = Field(None, description="null: the descent goes by all images of each micro-batch")
    loss_budget: float | None = Field(
        None,
        gt=0.0,
        le=1e6,
        description="by how much the loss may rise along the perturbation, to first order, before that is shortened; "
        "rho is the longest it can be (LE-SAM); null: it is as long as rho says",
    )
    gate: GateSection | None = Field(None, description="null: every step of the interval and window perturbs")
    savings: Savings = Savings.model_validate({})
    window: tuple[Share, Share] = Field(
        (0.0, 1.0), description="part of the run that has ascents: shares of its steps, [first, last]"
    )
    mask: Mask | None = Field(None, description="which weights are perturbed; null: all of them (dense SAM)")

    @property
    def ascent_fraction(self) -> float:
        """Share of each micro-batch that an ascent sees; 1 where there is none."""
        return getattr(self.direction, "fraction", 1.0)

    @field_validator("window")
    @classmethod
    def _not_empty(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] >= value[1]:
            raise ValueError("must be two shares, the smaller first")
        return value

    @model_validator(mode="after")
    def _affordable(self) -> Perturbation:
        ascends = not isinstance(self.direction, (MomentumDirection, PreviousDirection))
        if self.norm == "dense" and isinstance(self.mask, DepthMask) and ascends:
            raise ValueError(
                "norm: dense needs the gradient of the prefix, and pattern depth computes none; use masked, or "
                "calibrated for the same length"
            )
        if self.rho_final and self.rho_schedule == "constant":
            moving = " or ".join(name for name in _SCHEDULES if name != "constant")
            raise ValueError(f"rho_final {self.rho_final} needs a rho_schedule, {moving}; constant has no end")
        if self.reuse and self.interval == 1:
            raise ValueError(
                f"reuse {self.reuse} needs an interval above 1: with an ascent in each step none is between"
            )
        if self.norm != "masked" and not isinstance(self.direction, FreshDirection):
            known = "masked, or dense" if isinstance(self.direction, MomentumDirection) else "masked"
            if not (self.norm == "dense" and isinstance(self.direction, MomentumDirection)):
                raise ValueError(
                    f"norm: {self.norm} divides by a length that direction.source {self.direction.source} never "
                    f"knows; use {known}"
                )
        direction = self.direction
        whole = isinstance(direction, FreshDirection) and direction.scope == "global" and direction.fraction == 1.0
        if self.gate is not None and not whole:
            raise ValueError(
                "gate looks at the plain gradient of the whole batch: use direction.source fresh with fraction 1 and "
                "scope global"
            )
        if self.gate is not None and self.reuse:
            raise ValueError("gate has no ascents in fixed steps that reuse could go by; use one of them")
        self._check_descent()
        if self.loss_budget is not None and self.norm != "masked":
            raise ValueError(
                f"loss_budget says how far a step goes by the norm of what is perturbed, and norm is {self.norm}; use "
                "masked, or leave loss_budget out"
            )
        if self.loss_budget is not None and not isinstance(self.direction, FreshDirection):
            raise ValueError(
                "loss_budget goes by how the loss rises along its own gradient, and direction.source is "
                f"{self.direction.source}; use fresh"
            )
        for key in ("reuse", "gap"):
            if getattr(self, key) and not whole:
                raise ValueError(
                    f"{key} compares the descent's gradient with that of the same images, which is known only with "
                    "direction.source fresh, fraction 1 and scope global; use one of them"
                )
            if getattr(self, key) and self.adaptive:
                raise ValueError(
                    f"{key} knows the gradient by the perturbation, which adaptive distorts; use one of them"
                )
        return self

    def _check_descent(self) -> None:
        """Refuse a choice of the descent's images that nothing tells."""
        if self.descent is None:
            return
        if isinstance(self.direction, (MomentumDirection, PreviousDirection)):
            raise ValueError(
                "descent is of images that an ascent helps to choose, and direction.source "
                f"{self.direction.source} has none; use fresh, friendly or vasso"
            )
        if self.descent.choose == "sharpest" and self.direction.fraction < 1.0:
            raise ValueError(
                "descent.choose sharpest compares each image's loss with that in the ascent, which sees "
                f"{self.direction.fraction} of them; use direction.fraction 1, or choose highest_loss"
            )
        for key in ("reuse", "gap", "gate"):
            if getattr(self, key):
                raise ValueError(
                    f"{key} goes by the gradients of both passes together, and with descent they are of other images; "
                    "use one of them"
                )


class Sharding(Section):
    """Where the weights live."""

    backend: Literal["auto", "single", "ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"] = Field(
        "auto",
        description="auto: single on one process, ddp on several; zero0 to zero3: stages of DeepSpeed's ZeRO. Without "
        "a launcher there is one process, and the backend is single",
    )
    replicas: int = Field(
        1,
        ge=1,
        description="copies of the weights that fsdp2 keeps: 1 shards over all processes, n over n groups (HSDP)",
    )
    timeout_seconds: float = Field(
        600.0,
        ge=1.0,
        le=7 * 86400.0,
        description="how long a process waits for the others, in training, evaluation and saving, before the run ends "
        "with a line that names who has not come; more than the longest that one of them may take by itself",
    )
    deepspeed: dict[str, Any] = Field(
        default_factory=dict,
        description="sections of DeepSpeed's configuration, for the backends zero0 to zero3; with backend auto, its "
        "stage of ZeRO is the backend",
    )

    def backend_on(self, processes: int, *, launched: bool = True) -> str:
        """The backend on so many processes.

        `auto` is `single` on one process and `ddp` on several. One process that no launcher started has nobody to share
        with and can join nobody: it is `single` there, which computes the same, unless replicas or settings of
        DeepSpeed's own were asked for, which would be left out.
        """
        alone = processes == 1 and not launched and self.replicas == 1 and not self.deepspeed
        return "single" if alone else self.backend if self.backend != "auto" else "ddp" if processes > 1 else "single"

    @model_validator(mode="after")
    def _only_fsdp_replicates(self) -> Sharding:
        if self.replicas > 1 and self.backend != "fsdp2":
            raise ValueError(f"replicas: is for the backend fsdp2, and backend is {self.backend}")
        return self


class EarlyStop(Section):
    """Ends a run before its length where its evaluations do not improve any more; schedules are those of the whole."""

    metric: Literal["top1", "top5", "loss"] = Field(
        "top1", description="of evaluations: of the averaged weights if there are any; accuracies are in percent"
    )
    patience: int = Field(
        ge=1,
        le=10**6,
        description="evaluations in a row without an improvement after which the run stops, each eval_epochs epochs "
        "after the one before",
    )
    min_delta: float = Field(0.0, ge=0.0, le=1e6, description="an improvement is by more than this")

    def improves(self, value: float, best: float | None) -> bool:
        """Whether a value of the metric is an improvement on the best one, if there is any; no number never is."""
        if not math.isfinite(value) or best is None:
            return math.isfinite(value)
        return (best - value if self.metric == "loss" else value - best) > self.min_delta


class Train(Section):
    """How long, how precisely, from where."""

    epochs: int | None = Field(
        None, ge=1, le=10**6, description="passes over the training images; null: max_steps says how long the run is"
    )
    max_steps: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="optimizer steps of the run, in the place of epochs: it may end within one, and is evaluated and "
        "saved there; learning rate, radius, window and masks end with it; null: epochs says how long the run is",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto",
        description="where processes compute: cuda: each on its own GPU; cpu; auto: on GPUs if this machine has any, "
        "which torch must be able to use",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32",
        description="bf16, fp16: autocast, weights stay fp32, and bf16 is what FSDP2 and ZeRO 3 gather them in; fp16 "
        "with loss scaling",
    )
    accumulation: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="micro-batches whose gradients make one step; null: the fewest that max_micro_batch allows, 1 "
        "without it",
    )
    max_micro_batch: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="most images of one micro-batch on one process, which chooses the accumulation for any number of "
        "processes; auto: what the device's memory holds, found before training; null: no limit, "
        "and a run that goes on with fewer processes keeps the size it had",
    )
    activation_checkpointing: bool = Field(
        False,
        description="keep the input of each block only and compute the block again in the backward: the same "
        "gradients, less memory, one more forward a pass",
    )
    compile: bool = Field(
        False,
        description="compile the network with torch.compile, block by block, which a moving cut needs; a minute or "
        "several before the first steps",
    )
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0, description="decay per step of the averaged weights")
    ema_warmup: bool = Field(
        True,
        description="let that decay rise from 0 (timm's use_warmup), so that a short run's average is not of the "
        "weights it began with",
    )
    on_nonfinite: Literal["stop", "skip", "rollback"] = Field(
        "stop",
        description="where a loss is not finite: stop: end the run; skip: leave out each step whose loss or gradient "
        "is not, which waits for the device once a step; rollback: go back to the newest checkpoint, and on with the "
        "rest of its epoch in another order",
    )
    max_skips: int = Field(10, ge=1, description="steps in a row that skip leaves out before it ends the run")
    max_rollbacks: int = Field(
        3, ge=1, description="how often a run goes back before it ends, however often it is resumed"
    )
    seed: int = Field(0, ge=0, le=2**64 - 1, description="seed of weights, order, augmentation and masks")
    eval_epochs: int = Field(1, ge=1, description="epochs between two evaluations; the last epoch is always evaluated")
    early_stop: EarlyStop | None = Field(None, description="null: the run has its whole length")

    @field_validator("max_micro_batch", mode="before")
    @classmethod
    def _number_or_auto(cls, value: Any) -> Any:
        if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
            return value
        raise ValueError("must be a whole number of at least 1, auto or null")

    @model_validator(mode="after")
    def _of_one_length(self) -> Train:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("epochs is missing, or max_steps: one of them says how long the run is")
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(
                f"epochs {self.epochs} and max_steps {self.max_steps} both say how long the run is; leave one of them "
                "out, or set it to null (train.epochs=null)"
            )
        return self

    @model_validator(mode="after")
    def _chosen_once(self) -> Train:
        if self.accumulation is not None and self.max_micro_batch == "auto":
            raise ValueError(
                f"max_micro_batch auto chooses the accumulation, and accumulation is {self.accumulation}; leave one of "
                "them out"
            )
        return self


class Checkpoint(Section):
    """What survives the process."""

    directory: UserPath = Field(Path("checkpoints"), description="folder of this run's checkpoints")
    every_epochs: int = Field(1, ge=1, description="epochs between two checkpoints; the last epoch is always saved")
    every_steps: int | None = Field(
        None, ge=1, description="steps between two checkpoints within an epoch, counted since the run began; null: none"
    )
    every_minutes: float | None = Field(
        10.0,
        gt=0.0,
        le=10**6,
        description="minutes of training that may be lost at the most: a checkpoint is written so often, also within "
        "epochs; null: none by time",
    )
    format: Literal["auto", "whole", "sharded"] = Field(
        "auto",
        description="whole: full tensors, gathered and written by the first process; sharded: each process writes what "
        "it holds of them; auto: whole unless a copy would take more than half of the memory that is free on the first "
        "process's host",
    )
    keep: int = Field(2, ge=1, description="how many checkpoints are kept, the newest, beside those of the next two")
    keep_best: Literal["top1", "top5", "loss"] | None = Field(
        None, description="keep the checkpoint with the best evaluation by this, too; null: whatever it was"
    )
    keep_every: int | None = Field(
        None, ge=1, description="keep those of every so many epochs, too, such as after 10, 20, 30; null: none"
    )
    resume: str | None = Field(None, description="auto: the newest in directory if any; or the path of a checkpoint")

    @field_validator("resume")
    @classmethod
    def _home(cls, value: str | None) -> str | None:
        return value if value is None or not (value.startswith("~") or "$" in value) else str(home(Path(value)))


def _named(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; give a name, or leave the key out")
    if len(value) > 250:  # what MLflow's databases hold
        raise ValueError(f"has {len(value):,} characters; at most 250 are kept")
    return value


Name = Annotated[str, AfterValidator(_named)]


class Tracking(Section):
    """Where a run is recorded. `tracking: null`: nowhere, which is the same as no trackers."""

    trackers: tuple[Literal["mlflow", "tensorboard", "wandb"], ...] = Field(
        ("mlflow",),
        description="what records the run, as `ssam-scale list trackers` says; commands that compare runs or find one "
        "by its name read MLflow",
    )
    uri: Annotated[str, AfterValidator(home_in_uri)] = Field("sqlite:///mlflow.db", description="MLflow tracking URI")
    experiment: Name = Field("ssam_scale", description="MLflow experiment")
    run_name: Name | None = Field(None, description="MLflow run name; null: made from the method and the model")
    group: Name | None = Field(
        None, description="tag that runs share which belong together, for `ssam-scale compare --group`"
    )
    log_every: int = Field(50, ge=1, description="steps between two records of loss, learning rate and phase times")
    probe_every: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        "auto",
        description="steps between two probes, which measure the saving over dense SAM inside the run; auto: so that "
        "they take 1% of the time; null: none",
    )
    cost_times: UserPath | None = Field(
        None,
        description="times that `ssam-scale cost --save-times FILE` has measured on this kind of machine: what the "
        "cost model predicts by them stands beside what probes measure",
    )
    log_model: bool = Field(
        True,
        description="store the trained network as a model of MLflow, which `mlflow.pytorch.load_model` loads: its "
        "averaged weights if there are any",
    )
    system_metrics: bool = Field(
        True,
        description="record in MLflow and Weights & Biases what each machine does (processor, memory, disk, network, "
        "GPUs) every ten seconds",
    )

    @field_validator("trackers")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for name in value if value.count(name) > 1]:
            raise ValueError(f"names {twice[0]} twice")
        return value

    @property
    def store(self) -> str | None:
        """The MLflow store that the run is recorded in; None: it is in none."""
        return self.uri if "mlflow" in self.trackers else None


UNTRACKED: dict[str, Any] = {"trackers": []}
"""What `tracking: null` is short for."""


def _tracked(value: Tracking | None) -> Tracking:
    return Tracking.model_validate(UNTRACKED) if value is None else value


if TYPE_CHECKING:
    MaybeTracking: TypeAlias = Tracking
else:
    MaybeTracking = Annotated[Tracking | None, AfterValidator(_tracked)]


class Sharpness(Section):
    """How sharp the minimum is, measured beside evaluations; nothing of training changes."""

    every_epochs: int = Field(1, ge=1, description="epochs between two measurements; after the last one, too")
    images: int = Field(
        512,
        ge=1,
        le=10**7,
        description="training images that it is of, all where there are fewer: the same ones each time, not augmented",
    )
    rho: float = Field(
        0.05, gt=0.0, le=1000.0, description="radius of the gap, the loss at w + rho g / |g| less that at w"
    )
    eigenvalues: int = Field(
        1, ge=0, le=100, description="how many of the largest eigenvalues of the Hessian; some dozen gradients' time"
    )
    probes: int = Field(
        0, ge=0, le=10**4, description="random vectors by which the trace of the Hessian is estimated; 0: it is not"
    )
    micro_batch: int = Field(
        32, ge=1, le=10**6, description="images of one pass on one process; no result depends on it, but memory does"
    )


class Config(Section):
    """One run."""

    model: Model
    data: Data
    loss: Loss = Loss.model_validate({})
    optimizer: Optimizer
    schedule: Schedule = Schedule.model_validate({})
    perturbation: Perturbation | None = Field(None, description="null: the base optimizer alone")
    trajectory: Trajectory | None = Field(
        None,
        description="a loss term by outputs of earlier weights, with a perturbation or without; null: none",
    )
    sharding: Sharding = Sharding.model_validate({})
    train: Train
    checkpoint: Checkpoint = Checkpoint.model_validate({})
    tracking: MaybeTracking = Tracking.model_validate({})
    sharpness: Sharpness | None = Field(None, description="null: it is not measured in training")

    @model_validator(mode="after")
    def _divisible(self) -> Config:
        if self.data.batch_size % (self.train.accumulation or 1):
            raise ValueError(
                f"data.batch_size {self.data.batch_size} is not a multiple of "
                f"train.accumulation {self.train.accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _all_begins(self) -> Config:
        epochs = self.train.epochs
        if epochs is not None and (late := self.too_late(epochs, f"train.epochs {epochs}")) is not None:
            raise ValueError(late)
        return self

    def too_late(self, epochs: float, length: str) -> str | None:
        """What is to begin in an epoch that a run does not come to, in a line; None: all begins.

        Args:
            epochs: of the run. Those of `train.max_steps` are known with the images.
            length: the same in words, with the key that says it.
        """
        warmup, grows, term = self.schedule.warmup_epochs, self.data.progressive, self.trajectory
        if warmup >= epochs and warmup > 0:
            return f"schedule.warmup_epochs {warmup} must be less than {length}"
        for number, frozen in enumerate(self.model.freeze):
            if frozen.until_epoch is not None and frozen.until_epoch >= epochs:
                return (
                    f"model.freeze.{number}.until_epoch {frozen.until_epoch} must be less than {length}, or no epoch "
                    "trains them; null says so"
                )
        if grows is not None and grows.to_epoch >= epochs:
            return (
                f"data.progressive.to_epoch {grows.to_epoch} must be less than {length}, or no epoch has crops of "
                f"data.resolution {self.data.resolution}"
            )
        if term is not None and term.start_epoch >= epochs:
            return f"trajectory.start_epoch {term.start_epoch} must be less than {length}, or no epoch has the term"
        return None

    @model_validator(mode="after")
    def _a_weight_for_each_class(self) -> Config:
        weights, classes = self.loss.class_weights, self.model.num_classes
        if isinstance(weights, tuple) and len(weights) != classes:
            raise ValueError(f"loss.class_weights has {len(weights)} numbers, and model.num_classes is {classes}")
        return self

    @model_validator(mode="after")
    def _stops_by_what_is_measured(self) -> Config:
        stop, classes = self.train.early_stop, self.model.num_classes
        if stop is not None and stop.metric == "top5" and classes <= 5:
            raise ValueError(
                f"train.early_stop.metric top5: of model.num_classes {classes} all are among the best five; use top1 "
                "or loss"
            )
        return self

    @model_validator(mode="after")
    def _chosen_among_what_is_always_trained(self) -> Config:
        mask = self.perturbation.mask if self.perturbation is not None else None
        for number, frozen in enumerate(self.model.freeze):
            key = f"model.freeze.{number}.until_epoch"
            if frozen.until_epoch is None:
                continue
            if isinstance(mask, RefreshedMask) and mask.scores and not isinstance(mask, DepthMask):
                raise ValueError(
                    f"{key} {frozen.until_epoch}: perturbation.mask.pattern {mask.pattern} is chosen among what is "
                    "trained, and a run does not choose anew where that changes; use depth, norm or named, or null"
                )
        return self

    @model_validator(mode="after")
    def _one_term_of_each_image(self) -> Config:
        term = self.trajectory
        if not isinstance(term, SAFTrajectory):
            return self
        descent = self.perturbation.descent if self.perturbation is not None else None
        fraction = self.perturbation.ascent_fraction if self.perturbation is not None else 1.0
        if descent is not None and descent.choose == "random" and fraction < 1.0:
            raise ValueError(
                "trajectory.kind saf remembers what a step puts out for every image, and no pass sees all of them with "
                f"perturbation.direction.fraction {fraction} and perturbation.descent.choose random; use mesa, or "
                "choose highest_loss"
            )
        if self.data.on_damaged == "skip":
            raise ValueError(
                "trajectory.kind saf remembers the outputs of each image once an epoch, and data.on_damaged skip shows "
                "another one in the place of a damaged one; use mesa, or stop"
            )
        if self.data.repeats > 1:
            raise ValueError(
                "trajectory.kind saf remembers the outputs of each image once an epoch, and data.repeats shows some "
                "several times and others not at all; use mesa, or data.repeats: 1"
            )
        for key in ("mixup", "cutmix"):
            if getattr(self.loss, key):
                raise ValueError(
                    f"trajectory.kind saf remembers the outputs of single images, and loss.{key} "
                    f"{getattr(self.loss, key)} mixes each with another one in each epoch; use mesa, or 0"
                )
        return self

    @model_validator(mode="after")
    def _agrees_with_deepspeeds(self) -> Config:
        """Every key at once, because people bring whole files."""
        if self.sharding.deepspeed and (found := problems(self.sharding.deepspeed, self)):
            raise ValidationError.from_exception_data(
                "Config",
                [
                    InitErrorDetails(
                        type=PydanticCustomError("deepspeed", "{text}", {"text": problem.text}),
                        loc=("sharding", "deepspeed", *problem.path),
                        input=None,
                    )
                    for problem in found
                ],
            )
        return self

    @model_validator(mode="after")
    def _gathered_outside_of_what_is_compiled(self) -> Config:
        if self.train.compile and self.sharding.backend == "zero3":
            raise ValueError(
                "train.compile: sharding.backend zero3 gathers the weights of each layer in hooks, which compiled "
                "blocks do not wait for; use fsdp2, or zero2"
            )
        return self

    @model_validator(mode="after")
    def _scaled(self) -> Config:
        if self.train.precision == "fp16" and self.sharding.backend.startswith("zero"):
            raise ValueError(
                f"train.precision fp16 needs loss scaling, which sharding.backend {self.sharding.backend} leaves to "
                "DeepSpeed's own fp16; use bf16, or the backends ddp or fsdp2"
            )
        return self

    @model_validator(mode="after")
    def _savings_of_fsdp(self) -> Config:
        if self.perturbation is None:
            return self
        savings, sharding = self.perturbation.savings, self.sharding
        if savings.keep_gathered and sharding.backend not in ("fsdp2", "zero3"):
            raise ValueError(
                "perturbation.savings.keep_gathered is for sharding.backend fsdp2 or zero3, and it is "
                f"{sharding.backend}"
            )
        return self

    @model_validator(mode="after")
    def _graphs_of_small_ascents(self) -> Config:
        if self.perturbation is None or not self.perturbation.savings.graph_ascent:
            return self
        key, backend = "perturbation.savings.graph_ascent", self.sharding.backend
        if backend not in ("auto", "single", "ddp"):
            raise ValueError(f"{key} is for sharding.backend single or ddp, and it is {backend}")
        if self.train.compile:
            raise ValueError(f"{key} is for a network that is not compiled, and train.compile is true; use one of them")
        if self.perturbation.ascent_fraction == 1.0:
            raise ValueError(
                f"{key} is for an ascent on part of the batch; lower perturbation.direction.fraction, or leave it off"
            )
        return self

    @model_validator(mode="after")
    def _scope_of_sharding(self) -> Config:
        direction = self.perturbation.direction if self.perturbation is not None else None
        if not isinstance(direction, FreshDirection):
            return self
        key, backend = f"perturbation.direction.scope: {direction.scope}", self.sharding.backend
        if direction.scope == "shard_group" and self.sharding.replicas == 1:
            raise ValueError(
                f"{key} needs sharding.replicas above 1 (and backend fsdp2): without, a shard group is all processes "
                "or one, which are the scopes global and worker"
            )
        if direction.scope == "worker" and backend in ("fsdp2", "zero3"):
            raise ValueError(
                f"{key} perturbs all weights on each process by itself, and with sharding.backend {backend} none holds "
                "them; use micro_batch, or backend ddp, zero1 or zero2"
            )
        return self

    @property
    def method(self) -> str:
        """What runs are compared by: `base`, `sam`, `ssam-<pattern>`, `ssam-dynamic`; and of other directions than a
        fresh gradient `msam`, `f-sam`, `msam-<pattern>` and so on. With a loss term `saf`, `mesa`, `sam+mesa`."""
        if self.trajectory is not None:
            ascent = self._ascent
            return self.trajectory.kind if ascent == "base" else f"{ascent}+{self.trajectory.kind}"
        return self._ascent

    @property
    def _ascent(self) -> str:
        if self.perturbation is None:
            return "base"
        mask, source = self.perturbation.mask, self.perturbation.direction.source
        own = {"momentum": "msam", "previous": "s2-sam", "friendly": "f-sam", "vasso": "vasso"}.get(source)
        if mask is None:
            return own or "sam"
        dynamic = isinstance(mask, ElementMask) and mask.dynamic is not None
        return f"{own or 'ssam'}-{'dynamic' if dynamic else mask.pattern}"
