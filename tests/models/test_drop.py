"""What is dropped of an image goes by its place in the batch of all processes, with the statistics of torch's layers.

Numbers are compared with what chance allows: five standard deviations of the mean of so many draws.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ssam_scale import Depth, DescentSamples, Fresh, Savings, Scored, SparseSAM
from ssam_scale.models import drop_by_row
from ssam_scale.models.drop import _CLASSIFIERS
from ssam_scale.perturbation import StagedModel
from ssam_scale.perturbation.row_draws import RowDraws
from ssam_scale.sharding.process_group import ProcessGroup
from tests.support.compiled import counting_graphs
from tests.support.networks import IMAGE, batches, loss_fn, part, small_network

# isort: split
import timm
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from timm.models.mlp_mixer import MixerBlock
from torchvision.ops import StochasticDepth

EVERY = slice(None)
RATE, SEED = 0.3, 5


class Rank(ProcessGroup):
    """A place among processes that are not there: nothing is sent."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def by_row(layer: nn.Module, inputs: Tensor, seed: int = SEED) -> nn.Module:
    model = nn.Sequential(layer).train()
    drop_by_row(model, seed, inputs)
    return model


def run(
    model: nn.Module, x: Tensor, step: int = 0, rank: int = 0, ranks: int = 1, chosen: slice | Tensor = EVERY
) -> Any:
    """A forward of a micro-batch, or of those of its eight images that are chosen, on one of so many processes."""
    return run_windows(model, x, len(x) if isinstance(chosen, slice) else 8, step, rank, ranks, chosen)


def run_windows(
    model: nn.Module,
    x: Tensor,
    images: int,
    step: int = 0,
    rank: int = 0,
    ranks: int = 1,
    chosen: slice | Tensor = EVERY,
) -> Any:
    """The same of so many images, each of which may be several rows."""
    draws = RowDraws(model, x.device, Rank(rank, ranks))
    with draws.telling():
        draws.tell(step, 0, images, chosen)
        return model(x)


# Each kind: the layer, what it is called with, the dimensions that are dropped as one, and whether it is scaled up.
KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, bool]] = {
    "Dropout": (lambda: nn.Dropout(RATE), (400, 9, 11), 3, True),
    "Dropout, in place": (lambda: nn.Dropout(RATE, inplace=True), (400, 9, 11), 3, True),
    "Dropout1d": (lambda: nn.Dropout1d(RATE), (400, 50, 2), 2, True),
    "Dropout2d": (lambda: nn.Dropout2d(RATE), (400, 50, 2, 2), 2, True),
    "Dropout3d": (lambda: nn.Dropout3d(RATE), (400, 50, 2, 1, 2), 2, True),
    "DropPath": (lambda: DropPath(RATE), (20_000, 2, 2), 1, True),
    "DropPath, not scaled": (lambda: DropPath(RATE, scale_by_keep=False), (20_000, 2, 2), 1, False),
    "StochasticDepth": (lambda: StochasticDepth(RATE, "row"), (20_000, 2, 2), 1, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_so_much_is_dropped_and_the_rest_is_scaled(kind: str) -> None:
    make, shape, of_one, scaled = KINDS[kind]
    model, x = by_row(make(), torch.ones(1, *shape[1:])), torch.rand(shape) + 0.5
    before = x.clone()
    factors = run(model, x) / before
    assert x.equal(before) is not ("in place" in kind)
    one = factors.flatten(of_one) if factors.ndim > of_one else factors[..., None]
    assert torch.allclose(one, one[..., :1].expand_as(one), atol=1e-6)  # what is dropped as one
    kept, n = one[..., 0] != 0, one[..., 0].numel()
    assert torch.allclose(one[..., 0][kept], torch.tensor(1 / (1 - RATE) if scaled else 1.0))
    deviation = math.sqrt(RATE * (1 - RATE))
    assert abs(float(kept.double().mean()) - (1 - RATE)) < 5 * deviation / math.sqrt(n)
    if kept.ndim > 1:  # rows differ by what as many independent draws differ by; a mean of squares deviates by √2
        rows = kept.double().flatten(1)
        expected = deviation**2 / rows.shape[1]
        assert abs(float(rows.mean(1).var()) / expected - 1) < 5 * math.sqrt(2 / len(rows))


@pytest.mark.parametrize("make", [lambda: nn.AlphaDropout(RATE), lambda: nn.FeatureAlphaDropout(RATE)], ids=["1", "2"])
def test_alpha_dropout_keeps_mean_and_variance(make: Callable[[], nn.Module]) -> None:
    x = torch.randn(1000, 200, 1)
    out = run(by_row(make(), x[:1]), x)
    assert abs(float(out.mean())) < 5 / math.sqrt(out.numel())
    assert float(out.var()) == pytest.approx(1.0, abs=5 * math.sqrt(3 / out.numel()))  # heavier tails than a normal's
    dropped = make().train()(torch.zeros(100, 10, 1)).min()  # torch's own value of what is dropped
    assert float(run(by_row(make(), x[:1]), torch.zeros(100, 10, 1)).min()) == pytest.approx(float(dropped), abs=1e-6)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", [PatchDropout, PatchDropoutWithIndices])
def test_patches_are_left_out_behind_the_prefix(kind: type[nn.Module], ordered: bool) -> None:
    x = torch.arange(400.0 * 21).view(400, 21, 1)
    out = run(by_row(kind(0.25, num_prefix_tokens=1, ordered=ordered), x[:1]), x)
    if kind is PatchDropoutWithIndices:
        out, kept = out
        assert torch.equal(out[:, 1:, 0], x[:, 1:, 0].gather(1, kept))
    assert out.shape == (400, 16, 1)
    assert torch.equal(out[:, :1], x[:, :1])
    places = (out[:, 1:, 0] - x[:, 1:2, 0]).long()
    assert all(len(set(row)) == 15 for row in places.tolist())
    assert bool((places.diff(dim=1) > 0).all()) is ordered
    share = torch.bincount(places.flatten(), minlength=20) / 400
    assert bool(((share - 0.75).abs() < 5 * math.sqrt(0.75 * 0.25 / 400)).all())


def test_rows_layers_steps_and_runs_drop_independently() -> None:
    """Correlations of 1,000 elements of all pairs of 125 rows: of independent ones none passes six deviations."""
    x = torch.ones(25, 1000)
    first = nn.Sequential(nn.Dropout(0.5), nn.Dropout(0.5)).train()
    drop_by_row(first, SEED, x[:1])
    draws = RowDraws(first, x.device, ProcessGroup())
    masks = []
    for step in (0, 1):
        with draws.telling():
            draws.tell(step, 0, 25, EVERY)
            masks += [first[0](x), first[1](x)]
    masks += [run(by_row(nn.Dropout(0.5), x[:1], seed=6), x)]
    correlation = torch.corrcoef(torch.cat(masks)).fill_diagonal_(0.0)
    assert float(correlation.abs().max()) < 6 / math.sqrt(1000)
    of_elements = torch.corrcoef(torch.cat(masks).T[:100]).fill_diagonal_(0.0)
    assert float(of_elements.abs().max()) < 6 / math.sqrt(125)


def test_neighbouring_elements_and_rows_are_independent() -> None:
    """Also of many elements, where a weak hash would show its period."""
    kept = (run(by_row(nn.Dropout(0.1), torch.ones(1, 2**17)), torch.ones(16, 2**17)) != 0).double() - 0.9
    bound = 5 * 0.09 / math.sqrt(kept.numel() / 2)
    for distance in (1, 2, 3, 64, 1024, 2**16):
        assert abs(float((kept[:, distance:] * kept[:, :-distance]).mean())) < bound, distance
    for distance in (1, 2, 8):
        assert abs(float((kept[distance:] * kept[:-distance]).mean())) < bound, distance


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_loses_the_same_whoever_sees_it(kind: str) -> None:
    make, shape, *_ = KINDS[kind]
    model, x = by_row(make(), torch.ones(1, *shape[1:])), torch.rand(8, *shape[1:]) + 0.5
    whole = run(model, x.clone(), step=3)
    on_two = [run(model, x.chunk(2)[rank].clone(), step=3, rank=rank, ranks=2) for rank in range(2)]
    assert torch.equal(torch.cat(on_two), whole)
    some = torch.tensor([6, 1, 2])
    assert torch.equal(run(model, x[some], step=3, chosen=some), whole[some])
    windows = x.repeat_interleave(2, 0)  # two rows of each image
    whole = run_windows(model, windows.clone(), 8)
    on_two = [run_windows(model, windows.chunk(2)[rank].clone(), 4, rank=rank, ranks=2) for rank in range(2)]
    assert torch.equal(torch.cat(on_two), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_in_evaluation_and_out_of_steps_layers_are_torchs(kind: str) -> None:
    make, shape, *_ = KINDS[kind]
    x = torch.rand(8, *shape[1:])
    model = by_row(make(), x[:1])
    assert torch.equal(run(model.eval(), x.clone()), x)
    model.train()
    assert isinstance(model[0], type(make()))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = make().train()(x.clone())
        torch.manual_seed(1)
        assert torch.equal(model(x.clone()), expected)
        torch.manual_seed(1)
        assert torch.equal(run_windows(model, x.clone(), 3), expected)  # eight rows are not of three images
    for rate in (0.0, 1.0):
        edge = by_row(nn.Dropout(RATE), x[:1])
        edge[0].p = rate
        assert torch.equal(run(edge, x), x * (1 - rate))


def test_gradients_are_of_what_is_kept() -> None:
    x = torch.randn(6, 40, requires_grad=True)
    out = run(by_row(nn.Dropout(RATE), x[:1].detach()), x)
    out.backward(torch.full_like(out, 2.0))
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * (out != 0) / (1 - RATE))
    low = run(by_row(nn.Dropout(RATE), x[:1].detach()), x.detach().bfloat16())
    assert low.dtype is torch.bfloat16
    assert torch.equal(low != 0, out != 0)


def test_a_layer_that_is_called_twice_drops_something_else_each_time() -> None:
    block = MixerBlock(16, 4, drop_path=0.5).train()  # of timm's, which calls one DropPath for both of its branches
    drop_by_row(block, SEED, torch.ones(1, 4, 16))
    calls: list[Tensor] = []
    block.drop_path.register_forward_hook(lambda _, inputs, output: calls.append((output != 0).flatten(1).any(1)))
    run(block, torch.randn(200, 4, 16))
    run(block, torch.randn(200, 4, 16))
    assert torch.equal(calls[0], calls[2])
    assert torch.equal(calls[1], calls[3])
    assert abs(float((calls[0] ^ calls[1]).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(200)


SMALLEST = {
    "ResNet": "resnet10t",
    "SENet": "legacy_seresnet18",
    "Xception": "legacy_xception",
    "DPN": "dpn48b",
    "EfficientNet": "efficientnet_lite0",
    "FasterNet": "fasternet_t0",
    "GhostNet": "ghostnet_050",
    "LCNetV2": "lcnetv2_small",
    "LowFormer": "lowformer_b0",
    "MobileNetV3": "lcnet_035",
    "MobileNetV5": "mobilenetv5_base",
    "RepGhostNet": "repghostnet_050",
    "SHViT": "shvit_s1",
    "StarNet": "starnet_s050",
}


class Dropouts(TorchFunctionMode):
    """Notes the rate of each dropout that is a function."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.dropout:
            self.rates.append((kwargs or {}).get("p", args[1] if len(args) > 1 else 0.5))
            self.rates = [rate for rate in self.rates if rate]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted(_CLASSIFIERS))
def test_dropout_before_timms_classifiers_is_a_layers(name: str) -> None:
    """Of which there is one, as there was one function, at the same place: before the classifier."""
    with torch.device("meta"):
        model, images = timm.create_model(SMALLEST[name], num_classes=4, drop_rate=RATE), torch.ones(2, 3, 224, 224)
    assert type(model).__name__ == name
    model.train()
    with Dropouts() as before:
        model(images)
    drop_by_row(model, SEED, images)
    assert model.classifier_drop.calls == 1
    order: list[str] = []
    model.classifier_drop.register_forward_hook(lambda *_: order.append("drop"))
    model.get_classifier().register_forward_hook(lambda *_: order.append("classifier"))
    with Dropouts() as after:
        model(images)
    assert (before.rates, after.rates, order) == ([RATE], [RATE], ["drop", "classifier"])


WAYS: dict[str, Callable[[], dict[str, Any]]] = {
    "dense": dict,
    "cut": lambda: {"mask": Depth((0.5, 0.5))},
    "elements": lambda: {"mask": Scored("element", 0.5, score="weight")},
    "no ascent": lambda: {"rho": 0.0},
}
DROPS: dict[str, dict[str, Any]] = {
    "vit": {
        "drop_rate": 0.2,
        "pos_drop_rate": 0.1,
        "proj_drop_rate": 0.2,
        "drop_path_rate": 0.3,
        "patch_drop_rate": 0.25,
    },
    "convnext": {"drop_rate": 0.2, "drop_path_rate": 0.3},
}


def dropping(family: str, **options: Any) -> StagedModel:
    model = small_network(family, **DROPS[family], **options).train()
    drop_by_row(model.model, SEED, torch.zeros(1, 3, IMAGE, IMAGE))
    return model


def trained(model: StagedModel, micro_batches: int, **options: Any) -> tuple[Tensor, Tensor]:
    """The losses of three steps and the weights after them, with a batch of 8 in so many micro-batches."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SparseSAM(model, sgd, **{"rho": 0.1, "norm": "masked", **options})
    if opt.refresh_is_due:
        opt.refresh()
    before = torch.get_rng_state()
    losses = [
        opt.step(loss_fn, *(part(batch, i, micro_batches) for i in range(micro_batches))) for batch in batches(3, 8)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    return torch.stack(losses), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", DROPS)
def test_any_number_of_micro_batches_trains_the_same(family: str, way: str) -> None:
    losses, weights = trained(dropping(family), 1, **WAYS[way]())
    for micro_batches in (2, 4):
        others = trained(dropping(family), micro_batches, **WAYS[way]())
        # fp32: the same arithmetic in another order of summation.
        assert torch.allclose(others[0], losses, rtol=0, atol=1e-6)
        assert torch.allclose(others[1], weights, rtol=0, atol=1e-6)
    other_seed = small_network(family, **DROPS[family]).train()
    drop_by_row(other_seed.model, SEED + 1, torch.zeros(1, 3, IMAGE, IMAGE))
    assert not torch.allclose(trained(other_seed, 1, **WAYS[way]())[1], weights, rtol=0, atol=1e-3)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("way", ["dense", "cut"])
def test_blocks_that_are_computed_again_drop_the_same(way: str, again: bool) -> None:
    model, plain = dropping("vit"), dropping("vit")
    model.activation_checkpointing = again
    found = [trained(each, 1, direction=Fresh(0.5), **WAYS[way]()) for each in (model, plain)]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("choose", ["first", "random", "highest_loss"])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_an_image_loses_the_same_in_a_pass_of_some_images(choose: Any, share_prefix: bool) -> None:
    """The logits of both passes, whose weights are as good as the same."""
    seen: list[tuple[Tensor, Tensor]] = []

    def remembered(forward: Any, batch: Any) -> Tensor:
        logits = forward(batch[0])
        if torch.is_grad_enabled() and logits.requires_grad:
            seen.append((batch[1], logits.detach()))
        return nn.functional.cross_entropy(logits, batch[1] % 10)

    model = dropping("vit")
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SparseSAM(
        model,
        sgd,
        rho=1e-9,
        norm="masked",
        mask=Depth((0.5, 0.5)),
        direction=Fresh(0.5, choose),
        savings=Savings(share_prefix=share_prefix),
    )
    [(images, _)] = batches(1, 8)
    opt.step(remembered, (images, torch.arange(8)))
    (numbers, some), (every, all_of_them) = seen
    assert (len(numbers), every.tolist()) == (4, list(range(8)))
    assert torch.allclose(some, all_of_them[numbers], rtol=0, atol=1e-5)


def test_esams_choice_descends_by_images_that_lose_what_they_lost() -> None:
    losses = [
        trained(dropping("vit"), 1, rho=1e-9, descent=DescentSamples(fraction, "sharpest"))[0][0]
        for fraction in (0.5, 0.999)
    ]
    assert losses[0] == pytest.approx(float(losses[1]), abs=1e-6)


def test_a_copy_drops_the_same_and_is_told_for_itself() -> None:
    model = dropping("vit")
    copied = copy.deepcopy(model)
    assert torch.equal(trained(model, 1)[1], trained(copied, 1)[1])


@pytest.mark.slow
def test_compiled_networks_drop_the_same_in_as_many_graphs() -> None:
    """Where torch's own dropout is drawn by the compiler's kernels, other than without it."""
    graphs = []
    for rate in (0.0, 0.2):  # of blocks that share their code, because they are alike
        model = small_network("vit", proj_drop_rate=rate).train()
        drop_by_row(model.model, SEED, torch.zeros(1, 3, IMAGE, IMAGE))
        plain = copy.deepcopy(model)
        model.compile(backend="aot_eager")
        with counting_graphs() as count:
            compiled = trained(model, 2, mask=Depth(seed=3))
            graphs.append(count())
        for one, other in zip(compiled, trained(plain, 2, mask=Depth(seed=3)), strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)
    assert graphs[0] == graphs[1]
