"""Stages of any model by the names of its blocks, and what a model and its stages are held against each other by."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale import Depth, SparseSAM, Stage, StagedModel
from ssam_scale.errors import UserError
from ssam_scale.models import check_stages, stages_of
from tests.support.networks import IMAGE, SMALL, batches, loss_fn, small_network

# isort: split
import timm
import torchvision

WIDTH = 12


class Blocks(nn.Module):
    """A stem, four blocks in a holder, and a head; what differs between models is how the holder calls them."""

    def __init__(self, holder: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, WIDTH))
        self.trunk = (holder or InSequence)()
        self.norm, self.head = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 5)

    def forward(self, images: Tensor, scale: float = 1.0) -> Tensor:
        x = self.trunk(self.stem(images))
        x = F.dropout(self.norm(x), 0.2, self.training)
        return self.head(x) * scale


class InSequence(nn.Module):
    """Blocks that a loop calls, each in a residual connection that is not its own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(4))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("shift", torch.arange(1.0, WIDTH + 1))
        self.rate = 0.1

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        for block in self.blocks:
            x = x + F.dropout(block(x), self.rate, self.training)
            x = x + self.shift
        return x


class AllSeePositions(InSequence):
    def forward(self, x: Tensor) -> Tensor:
        positions = x * self.scale
        for block in self.blocks:
            x = block(x + positions)
        return x


class ABlockTwice(InSequence):
    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[1]):
            x = block(x)
        return x


class OneLeftOut(InSequence):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[:3]:
            x = block(x)
        return x


class OneScale(InSequence):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * self.scale
        return x


class Branching(InSequence):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if x.sum() > 0:
                x = block(x)
        return x


class InPlace(InSequence):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.mul_(2.0))
        return x


class Pairs(InSequence):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x[0]


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        x = x if isinstance(x, Tensor) else x[0]
        return self.linear(x), x


class OtherNoise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + float(np.random.default_rng().random())


class Noisy(InSequence):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[2] = OtherNoise()


NAMES = [f"trunk.blocks.{i}" for i in range(4)]
SHAPE = (6, 3, 4, 4)


def blocks(holder: type[nn.Module] | None = None) -> Blocks:
    torch.manual_seed(0)
    return Blocks(holder)


def test_a_model_of_no_family_is_parted_behind_what_its_blocks_are_added_to() -> None:
    model = blocks()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    stages = stages_of(model, NAMES, images=SHAPE)
    assert [stage.name for stage in stages] == NAMES
    assert [stage.owns for stage in stages] == [("stem", "trunk.scale"), (), (), ("head", "norm")]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_cut_anywhere_computes_the_model(training: bool) -> None:
    model = blocks()
    staged = StagedModel(model, stages_of(model, NAMES, images=torch.randn(SHAPE))).train(training)
    x = torch.randn(SHAPE)
    for cut in range(5):
        results = []
        for run in (model, lambda x, cut=cut: staged(staged(x, stop=cut), start=cut)):
            torch.manual_seed(1)
            results.append(run(x))
        assert torch.equal(*results)


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("resnet", ["layer1", "layer2", "layer3", "layer4"]),
        ("vit", ["blocks.0", "blocks.1", "blocks.2", "blocks.3"]),
        ("swinv2", ["layers.0.blocks.1", "layers.1", "layers.2"]),
        ("torchvision vit", [f"encoder.layers.encoder_layer_{i}" for i in range(3)]),
    ],
)
def test_a_cut_by_names_steps_as_one_of_the_family(family: str, names: list[str]) -> None:
    _, _, options = SMALL[family]
    by_family, model = small_network(family, **options), small_network(family, **options).model
    by_name = StagedModel(model, stages_of(model, names, images=(4, 3, IMAGE, IMAGE)))
    of_family = [stage.name for stage in by_family.stages]
    # The same cut of both: by names there may be fewer.
    first = next(i for i, name in enumerate(of_family) if name.startswith(names[-1]))
    cuts = (first / len(of_family), (len(names) - 1) / len(names))
    for staged, cut in zip((by_family, by_name), cuts, strict=True):
        opt = SparseSAM(staged, torch.optim.SGD(staged.parameters(), lr=0.1), rho=0.1, mask=Depth(cut))
        torch.manual_seed(0)
        for batch in batches(2, 8):
            opt.step(loss_fn, batch)
    for name, p in by_name.model.named_parameters():
        assert torch.equal(p, by_family.model.get_parameter(name)), name


def test_copies_run_their_own_modules_and_are_compiled_by_their_blocks() -> None:
    model = blocks()
    staged = StagedModel(model, stages_of(model, NAMES, images=SHAPE)).eval()
    other = copy.deepcopy(staged)
    with torch.no_grad():
        for p in other.model.parameters():
            p.zero_()
    x = torch.randn(SHAPE)
    assert not other(x).any()
    assert torch.equal(staged(x), model(x))
    other.compile(backend="eager")
    assert not other(x).any()


REFUSED: dict[str, tuple[Callable[[], nn.Module], Sequence[str], str]] = {
    "no such module": (blocks, [*NAMES, "trunk.blocks.44"], "no module 'trunk.blocks.44'; nearest: trunk.blocks"),
    "no names": (blocks, [], r"names of blocks are needed, such as \['layers.0', 'layers.1'\], and not \[\]"),
    "one text": (blocks, "trunk", "names of blocks are needed"),
    "twice": (blocks, [*NAMES, NAMES[0]], r"the block trunk\.blocks\.0 is named twice"),
    "within": (blocks, ["trunk", "trunk.blocks.0"], r"trunk\.blocks\.0 is within trunk: one of them"),
    "order": (
        blocks,
        [NAMES[1], NAMES[0], *NAMES[2:]],
        r"trunk\.blocks\.0 runs before trunk\.blocks\.1: .* trunk\.blocks\.0, trunk\.blocks\.1, ",
    ),
    "several values": (
        lambda: blocks(AllSeePositions),
        NAMES,
        r"from trunk\.blocks\.0 to trunk\.blocks\.1 2 values pass "
        r"\(mul of test_named_stages.py:\d+, trunk\.blocks\.0's output\), and a cut needs one tensor",
    ),
    "called twice": (lambda: blocks(ABlockTwice), NAMES, r"trunk\.blocks\.1 is called 2 times by the forward of Bl"),
    "never called": (lambda: blocks(OneLeftOut), NAMES, r"trunk\.blocks\.3 is called never"),
    "a list of them": (blocks, ["trunk.blocks"], r"trunk\.blocks is called never"),
    "one weight for all": (
        lambda: blocks(OneScale),
        NAMES,
        r"trunk\.scale of Blocks is used in two stages, trunk\.blocks\.1 and trunk\.blocks\.2",
    ),
    "values decide": (
        lambda: blocks(Branching),
        NAMES,
        r"cannot be traced \(test_named_stages.py:\d+, forward\): symbolically traced variables cannot be used",
    ),
    "in place": (lambda: blocks(InPlace), NAMES, r"the stage trunk\.blocks\.1 changes its input in place"),
    "pairs": (lambda: blocks(Pairs), NAMES, r"the stage trunk\.blocks\.0 passes on a tuple of Tensor"),
    "other random numbers": (
        lambda: blocks(Noisy),
        NAMES,
        r"Blocks is not the same twice in training mode \(first at trunk\.blocks\.2, by up to .*another generator",
    ),
    "other images": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(7, 7), nn.Linear(7, 7)),
        ["1", "2"],
        r"Sequential does not take a batch of shape \(6, 3, 4, 4\) in training mode: mat1 and mat2",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_parted_between_its_blocks_is_refused_in_a_line(what: str) -> None:
    make, names, message = REFUSED[what]
    with pytest.raises(UserError, match=message) as refused:
        stages_of(make(), names, images=SHAPE)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: timm.create_model("test_byobnet", num_classes=5), [f"stages.{i}" for i in range(4)]),
        (lambda: timm.create_model("test_vit_relpos", num_classes=5), [f"blocks.{i}" for i in range(9)]),
        (lambda: torchvision.models.regnet_y_400mf(), [f"trunk_output.block{i}" for i in range(1, 5)]),
    ],
    ids=["a ByobNet", "a ViT with relative positions", "torchvision's RegNet"],
)
def test_models_of_other_families(make: Callable[[], nn.Module], names: list[str]) -> None:
    torch.manual_seed(0)
    assert len(stages_of(make(), names, images=(2, 3, 160, 160))) == len(names)


def test_a_forward_that_becomes_another_is_refused_and_a_new_head_is_run() -> None:
    model = blocks()
    staged = StagedModel(model, stages_of(model, NAMES, images=SHAPE))
    model.head = nn.Linear(WIDTH, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SparseSAM(staged, base, rho=0.1, mask=Depth(0.5))
    batch = torch.randn(SHAPE), torch.randint(3, SHAPE[:1])
    opt.step(loss_fn, batch)
    assert staged(batch[0]).shape == (6, 3)
    model.trunk.rate = 0.5
    with pytest.raises(ValueError, match=r"the forward of Blocks at trunk\.blocks\.0 has become another"):
        SparseSAM(staged, base)


def right(model: Blocks) -> list[Stage]:
    return stages_of(model, NAMES, images=SHAPE)


def changed(stages: list[Stage], number: int, **changes: Any) -> list[Stage]:
    fields = {"name": "", "block": None, "forward": None, "owns": ()} | vars(stages[number])
    return [*stages[:number], Stage(**{**fields, **changes}), *stages[number + 1 :]]


def doubled(stage: Stage) -> Callable[[Tensor], Tensor]:
    return lambda x: stage.forward(x) * (1 + 2**-20)


def in_backward(stage: Stage) -> Callable[[Tensor], Tensor]:
    """The same, but no gradient goes through it."""
    return lambda x: stage.forward(x.detach())


WRONG: dict[str, tuple[Callable[[list[Stage]], list[Stage]], str]] = {
    "a block's input": (
        lambda s: changed(s, 1, forward=lambda x: s[1].forward(x + 1)),
        r"in training mode they differ first at trunk\.blocks\.1, by up to",
    ),
    "what follows a block": (
        lambda s: changed(s, 1, forward=doubled(s[1])),
        r"in training mode they differ first at trunk\.blocks\.2, by up to",
    ),
    "what follows the last": (
        lambda s: changed(s, 3, forward=doubled(s[3])),
        r"in training mode they differ first behind trunk\.blocks\.3, by up to",
    ),
    "the backward": (
        lambda s: changed(s, 2, forward=in_backward(s[2])),
        r"differ first at trunk\.blocks\.1 in the backward: the gradient of trunk\.blocks\.1\.0",
    ),
    "order": (lambda s: [s[0], s[2], s[1], s[3]], r"differ first at trunk\.blocks\.1: other blocks run"),
    "one too few": (lambda s: [s[0], s[1], s[3]], r"differ first at trunk\.blocks\.3, by up to"),
    "what a stage owns": (
        lambda s: changed(s, 3, owns=("norm",)),
        r"the stage trunk\.blocks\.3 uses head\.weight, which is counted to trunk\.blocks\.0: name it",
    ),
    "an error": (
        lambda s: changed(s, 2, forward=lambda x: s[2].forward(x[:, :2])),
        r"the stage trunk\.blocks\.2 fails: The size of tensor a \(2\) must match",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_stages_that_are_not_the_model_are_told_with_the_first_that_differs(what: str) -> None:
    model = blocks()
    wrong, message = WRONG[what]
    check_stages(model, right(model), SHAPE)
    with pytest.raises(UserError, match=message):
        check_stages(model, wrong(right(model)), SHAPE)


def test_stages_that_are_right_in_one_mode_only_are_told() -> None:
    model = blocks()
    stages = right(model)
    run = stages[2].forward
    with pytest.raises(UserError, match=r"in evaluation mode they differ first behind trunk\.blocks\.3"):
        check_stages(
            model,
            changed(stages, 3, forward=lambda x: stages[3].forward(x) * (1 if model.training else 2)),
            SHAPE,
        )
    assert stages[2].forward is run
