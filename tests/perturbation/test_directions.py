"""Directions: where ε's vector comes from, what a step of each costs, remembers and refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale import (
    Depth,
    Fresh,
    Friendly,
    Interval,
    Momentum,
    Norms,
    Previous,
    Scored,
    SparseSAM,
    VaSSO,
)
from ssam_scale.masks import BitMask, Plan, Subset, pack
from ssam_scale.perturbation import Direction
from ssam_scale.perturbation.directions import DIRECTIONS, Kept
from ssam_scale.perturbation.directions.momentum import momentum_entry
from ssam_scale.sharding import World
from ssam_scale.sharding.chunks import gathered
from ssam_scale.sharding.place import place
from ssam_scale.sharding.unsharded import Single
from tests.support.networks import batches, loss_fn, part, small_network
from tests.support.ranks import alone, run_ranks
from tests.support.training import TOLERANCE

RHO, SIZE = 0.1, 8
DIRECTIONS_OF_EACH_KIND: dict[str, Direction] = {
    "fresh": Fresh(0.5, "random"),
    "friendly": Friendly(lmbda=0.6),
    "vasso": VaSSO(theta=0.4),
    "momentum": Momentum(),
    "previous": Previous(),
}
EVERY = pytest.mark.parametrize("direction", DIRECTIONS_OF_EACH_KIND.values(), ids=DIRECTIONS_OF_EACH_KIND)
MASKS = {"dense": lambda: None, "moving cut": lambda: Depth(seed=1), "element": lambda: Scored("element", 0.5, seed=2)}


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def sam(model: nn.Module, direction: Direction, mask: str = "dense", **options: Any) -> SparseSAM:
    opt = SparseSAM(model, sgd(model), rho=RHO, mask=MASKS[mask](), direction=direction, **options)
    if opt.refresh_is_due:
        opt.refresh(loss_fn, *batches(1, SIZE, seed=9))
    return opt


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_every_direction_is_listed_and_tried() -> None:
    assert set(DIRECTIONS) == set(DIRECTIONS_OF_EACH_KIND)
    assert all(isinstance(d, Direction) for d in DIRECTIONS_OF_EACH_KIND.values())


# ---- what a step is


@EVERY
@pytest.mark.parametrize(
    "mask", [name if name == "element" else pytest.param(name, marks=pytest.mark.slow) for name in MASKS]
)
def test_a_resumed_run_is_the_uninterrupted_one(mask: str, direction: Direction) -> None:
    data = batches(6, SIZE)
    model = small_network("vit")
    opt = sam(model, direction, mask)
    for batch in data[:3]:
        opt.step(loss_fn, batch)
    saved = copy.deepcopy({"model": model.state_dict(), "opt": opt.state_dict(), "random": torch.get_rng_state()})
    for batch in data[3:]:
        opt.step(loss_fn, batch)

    again = small_network("vit")
    resumed = sam(again, direction, mask)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    torch.set_rng_state(saved["random"])
    for batch in data[3:]:
        resumed.step(loss_fn, batch)
    assert same(weights(again), weights(model))
    assert resumed.report is not None
    assert opt.report is not None
    assert resumed.report.kind == opt.report.kind


@EVERY
def test_the_forms_by_hand_take_the_same_steps(direction: Direction) -> None:
    if isinstance(direction, Fresh):  # of whose ascent's batch the caller decides
        direction = Fresh()
    ways = {}
    for way in ("batches", "closure", "by hand"):
        model = small_network("vit")
        opt = sam(model, direction, "element")
        for batch in batches(4, SIZE):

            def closure(model: nn.Module = model, opt: SparseSAM = opt, batch: Any = batch) -> Tensor:
                opt.zero_grad()
                loss = loss_fn(model, batch)
                loss.backward()
                return loss

            if way == "batches":
                opt.step(loss_fn, batch)
            elif way == "closure":
                opt.step(closure)
            else:
                if direction.ascends or opt.steps == 0:
                    closure()
                with opt.perturbed():
                    loss_fn(model, batch).backward()
                opt.step()
                opt.zero_grad()
        ways[way] = weights(model)
    assert same(ways["closure"], ways["batches"])
    assert same(ways["by hand"], ways["batches"])


@pytest.mark.parametrize("direction", [Momentum(), Previous()], ids=["momentum", "previous"])
def test_a_free_direction_costs_no_pass(direction: Direction) -> None:
    def flops(**options: Any) -> int:
        model = small_network("resnet")
        opt = SparseSAM(model, sgd(model), **options)
        [batch] = batches(1, SIZE)
        opt.step(loss_fn, batch)
        with FlopCounterMode(display=False) as counter:
            opt.step(loss_fn, batch)
        return counter.get_total_flops()

    base = flops(rho=0.0)
    assert flops(rho=RHO, direction=direction) == base
    assert flops(rho=RHO, direction=direction, mask=Depth(0.5)) == base
    assert flops(rho=RHO) == 2 * base


@pytest.mark.parametrize("direction", [Momentum(), Previous()], ids=["momentum", "previous"])
def test_the_first_step_is_the_base_optimizers(direction: Direction) -> None:
    model = small_network("vit")
    opt = sam(model, direction)
    kinds = []
    for batch in batches(3, SIZE):
        opt.step(loss_fn, batch)
        assert opt.report is not None
        kinds.append((opt.report.kind, opt.report.radius))
    assert kinds == [("base", 0.0), ("free", RHO), ("free", RHO)]


def test_momentum_goes_on_along_the_way_of_the_weights() -> None:
    """ε points where the base optimizer moved: it is −ρ v / ‖v‖, and a step is −lr v."""
    model = nn.Linear(3, 2)
    base = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    opt = SparseSAM(model, base, rho=RHO, direction=Momentum())
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def loss(forward: Any, batch: Tensor) -> Tensor:
        seen.append(weights(model))
        return forward(batch).square().mean()

    seen: list[list[Tensor]] = []
    before = weights(model)
    opt.step(loss, x)
    moved = [after - p for after, p in zip(weights(model), before, strict=True)]
    at = weights(model)
    opt.step(loss, x)
    epsilon = torch.cat([(there - p).flatten() for there, p in zip(seen[-1], at, strict=True)])
    way = torch.cat([m.flatten() for m in moved])
    assert F.cosine_similarity(epsilon, way, dim=0) == pytest.approx(1.0, abs=1e-4)
    assert float(epsilon.norm()) == pytest.approx(RHO, rel=1e-4)


@EVERY
def test_a_rehearsal_leaves_what_is_remembered(direction: Direction) -> None:
    runs = []
    for rehearsed in ((), ("base", "dense", "own")):
        model = small_network("vit")
        opt = sam(model, direction, "moving cut")
        for batch in batches(4, SIZE):
            if rehearsed:
                with opt.rehearsal() as rehearse:
                    for what in rehearsed:
                        rehearse(what, loss_fn, batch)
            opt.step(loss_fn, batch)
        state = gathered(opt._perturbation.source.state_dict())
        runs.append((weights(model), [t for group in state.values() for t in group.values()]))
    assert same(runs[0][0], runs[1][0])
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))


@pytest.mark.parametrize("direction", [Friendly(), VaSSO(theta=0.4), Previous()], ids=["friendly", "vasso", "previous"])
def test_a_gradient_that_is_not_finite_is_not_remembered_or_not_gone_along(direction: Direction) -> None:
    model = nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # which skips steps whose gradient is not finite
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    opt = SparseSAM(model, base, rho=RHO, direction=direction, scaler=scaler)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def loss(forward: Any, batch: Tensor) -> Tensor:
        return forward(batch).square().mean()

    opt.step(loss, x)
    opt.step(loss, x * math.inf)
    assert all(p.isfinite().all() for p in model.parameters())
    opt.step(loss, x)  # the previous gradient was not finite: no perturbation
    opt.step(loss, x)
    assert opt.report is not None
    assert not opt.report.skipped
    # What is no direction is not kept, and then there is nothing to leave out.
    assert opt.skipped == (0 if isinstance(direction, Previous) else 1)
    assert all(t.isfinite().all() for t in _remembered_by(opt).values())


@pytest.mark.parametrize("direction", [Friendly(), VaSSO(theta=0.4)], ids=["friendly", "vasso"])
@pytest.mark.parametrize("mask", ["dense", "element"])
def test_a_mean_begins_as_the_first_gradient_that_is_finite(mask: str, direction: Direction) -> None:
    """Not as zeros where the first steps overflow, as those of float16 do."""
    ends = []
    for overflows in (0, 2):
        model = nn.Linear(3, 2)
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
        opt = SparseSAM(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            rho=RHO,
            mask=None if mask == "dense" else Scored("element", 0.5, score="random", seed=2),
            direction=direction,
            scaler=scaler,
        )
        if opt.refresh_is_due:
            opt.refresh()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

        def loss(forward: Any, batch: Tensor) -> Tensor:
            return forward(batch).square().mean()

        for _ in range(overflows):
            opt.step(loss, x * math.inf)
        for _ in range(3):
            opt.step(loss, x)
        ends.append((dict(model.named_parameters()), _remembered_by(opt)))
    for one, other in zip(*(({**weights, **kept}).values() for weights, kept in ends), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_layers_that_come_later_begin_anew_and_the_others_go_on() -> None:
    model = small_network("vit")
    head, body = [], []
    for name, p in model.named_parameters():
        (head if "head" in name else body).append(p)
    opt = SparseSAM(model, torch.optim.SGD(head, lr=0.05), rho=RHO, direction=Friendly())
    data = batches(3, SIZE)
    opt.step(loss_fn, data[0])
    before = {n: t.clone() for n, t in opt.sparse.state_dict()["friendly_mean"].items()}
    opt.add_param_group({"params": body, "lr": 0.05})
    after = opt.sparse.state_dict()["friendly_mean"]
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert all(t.isnan().all() for name, t in after.items() if name not in before)
    opt.step(loss_fn, data[1])
    assert all(t.isfinite().all() for t in opt.sparse.state_dict()["friendly_mean"].values())


# ---- which samples


def test_those_of_the_highest_loss_are_seen() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    seen: list[Tensor] = []

    def watch(forward: Any, batch: Any) -> Tensor:
        images, labels = batch
        if not torch._C._functorch.is_batchedtensor(images):
            seen.append(images)
        return F.cross_entropy(forward(images), labels, label_smoothing=0.1)

    images, labels = batches(1, SIZE)[0]
    each = F.cross_entropy(model(images), labels, label_smoothing=0.1, reduction="none")
    opt = SparseSAM(model, sgd(model), direction=Fresh(0.25, "highest_loss"))
    opt.step(watch, (images, labels))
    whole, ascent, descent = seen
    assert torch.equal(whole, images)
    assert torch.equal(descent, images)
    assert torch.equal(ascent, images[each.topk(2).indices])


def test_random_ones_are_others_in_each_step_and_leave_the_generator_alone() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    seen: list[Tensor] = []

    def watch(forward: Any, batch: Any) -> Tensor:
        seen.append(batch[1])
        return F.cross_entropy(forward(batch[0]), batch[1])

    images = batches(1, SIZE)[0][0]
    opt = SparseSAM(model, sgd(model), direction=Fresh(0.5, "random"))
    random = torch.get_rng_state()
    for _ in range(3):
        opt.step(watch, (images, torch.arange(SIZE)))
    assert torch.equal(torch.get_rng_state(), random)
    drawn = [tuple(sorted(labels.tolist())) for labels in seen[::2]]
    assert all(len(set(labels)) == SIZE // 2 for labels in drawn)
    assert len(set(drawn)) > 1


def test_a_loss_function_that_cannot_be_taken_sample_by_sample_is_named() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    opt = SparseSAM(model, sgd(model), direction=Fresh(0.5, "highest_loss"))

    def asks(forward: Any, batch: Any) -> Tensor:
        loss = F.cross_entropy(forward(batch[0]), batch[1])
        return loss if loss.item() > 0.0 else loss * 2

    with pytest.raises(ValueError, match=r"choose='highest_loss' asks for the loss of each sample, by torch\.vmap"):
        opt.step(asks, batches(1, SIZE)[0])


# ---- what forwards write


class Counts(nn.Module):
    """Notes the mean of what it is given, as people write running means of their own."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen.copy_(torch.stack([x.detach().mean(), self.seen[1] + 1]))
        return x


@pytest.mark.parametrize("direction", [Fresh(0.5), Momentum(), Fresh(0.5, "highest_loss")], ids=str)
def test_running_statistics_are_those_of_the_whole_batch_where_the_ascent_sees_less(direction: Direction) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Counts(), nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.BatchNorm1d(10, momentum=1.0))
    still = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    opt = SparseSAM(model, still, rho=1e-6, direction=direction)
    for images, labels in batches(2, SIZE):
        opt.step(loss_fn, (images, labels))
        norm: Any = model[3]
        hidden = model[2](images.flatten(1))
        torch.testing.assert_close(norm.running_mean, hidden.mean(0).detach(), rtol=1e-3, atol=1e-4)
        assert float(model[0].seen[0]) == pytest.approx(float(images.mean()), abs=1e-6)
    assert int(norm.num_batches_tracked) == 2
    assert float(model[0].seen[1]) == 2.0


def test_a_shared_prefix_counts_once_where_the_ascent_sees_less() -> None:
    model = small_network("resnet")
    opt = SparseSAM(model, sgd(model), rho=RHO, mask=Depth(0.5), direction=Fresh(0.5))
    for batch in batches(2, SIZE):
        opt.step(loss_fn, batch)
    counts = {int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
    assert counts == {2}


# ---- momentum of every optimizer


def test_what_optimizers_call_their_momentum_is_found() -> None:
    from timm.optim import create_optimizer_v2

    found = {}
    for name in ("sgd", "adamw", "lion", "lamb", "sgdp", "adamp", "adan", "nadamw", "rmsprop", "lars"):
        layer = nn.Linear(4, 4)
        base = create_optimizer_v2(layer, opt=name, lr=0.1, momentum=0.9)
        found[name] = momentum_entry(base)
        opt = SparseSAM(layer, base, rho=RHO, direction=Momentum())
        for _ in range(2):
            opt.step(lambda forward, x: forward(x).square().mean(), torch.randn(3, 4))
        assert opt.report is not None
        assert opt.report.kind == "free", name
    assert found["sgd"] == "momentum_buffer"
    assert found["sgdp"] == "momentum"
    assert found["adamw"] == found["lion"] == found["adamp"] == "exp_avg"


# ---- refusals


def vit(**options: Any) -> SparseSAM:
    model = small_network("vit")
    return SparseSAM(model, sgd(model), **options)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: vit(direction=Fresh), TypeError, "direction is the class Fresh; an instance is needed of Fresh, Mom"),
        (lambda: vit(direction="momentum"), TypeError, r"direction is 'momentum' \(str\); an instance is needed"),
        (lambda: vit(fraction=0.5), TypeError, r"fraction belongs to the direction: direction=Fresh\(fraction=0.5\)"),
        (lambda: Fresh(0.0), ValueError, r"fraction is 0.0; a share in \(0, 1\] is needed"),
        (lambda: Fresh(scope="process"), ValueError, "scope is 'process'; one of global, shard_group, worker, micro_b"),
        (lambda: Fresh(choose="last"), ValueError, "choose is 'last'; one of first, random, highest_loss is needed"),
        (lambda: Friendly(lmbda=2), ValueError, r"lmbda is 2; a share in \[0, 1\] is needed"),
        (lambda: VaSSO(theta=0.0), ValueError, r"theta is 0.0; a share in \(0, 1\] is needed"),
        (lambda: vit(direction=Momentum(), norm="calibrated"), ValueError, "use masked or dense"),
        (lambda: vit(direction=Previous(), norm="dense"), ValueError, "use masked$"),
        (
            lambda: vit(direction=Friendly(), schedule=Interval(2, reuse=0.5)),
            ValueError,
            r"with direction Friendly.* that is along another one; use Fresh\(\)",
        ),
        (
            lambda: SparseSAM(m := nn.Linear(2, 2), torch.optim.SGD(m.parameters(), lr=0.1), direction=Momentum()),
            ValueError,
            "and SGD with momentum 0 keeps none: use SGD with a momentum, or an optimizer of Adam's family",
        ),
        (
            lambda: SparseSAM(m := nn.Linear(2, 2), torch.optim.Adagrad(m.parameters()), direction=Momentum()),
            ValueError,
            "and Adagrad keeps none",
        ),
    ],
)
def test_what_cannot_be_is_said_by_the_constructor(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_cut_goes_with_the_dense_norm_of_momentum_which_is_known() -> None:
    vit(direction=Momentum(), norm="dense", mask=Depth(0.5))
    with pytest.raises(ValueError, match="norm 'dense' needs the gradient of the prefix"):
        vit(norm="dense", mask=Depth(0.5))


# ---- what is kept while masks change


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.lists(st.booleans(), min_size=6, max_size=6)), min_size=1, max_size=6))
def test_kept_numbers_are_those_of_a_dictionary_by_weight(steps: list[tuple[bool, list[bool]]]) -> None:
    model = nn.Linear(3, 2, bias=False)
    parameters = dict(model.named_parameters())
    kept, expected = Kept(Single(model), parameters), {}
    for number, (whole, chosen) in enumerate(steps):
        part_: Subset | None = None if whole else BitMask(pack(torch.tensor(chosen)), 6)
        places = [i for i, has in enumerate(chosen) if has or whole]
        plan = Plan(0, {"weight": part_}, {"weight": len(places)})
        values, unknown = kept.of(plan)
        flat = values[0].flatten().tolist()
        absent = [False] * len(places) if unknown[0] is None else unknown[0].flatten().tolist()
        assert flat == [expected.get(i, 0.0) for i in places]
        assert absent == [i not in expected for i in places]
        new = torch.arange(len(places), dtype=torch.float32) + 10.0 * number
        kept.keep(plan, [new.view_as(values[0])])
        if not whole:  # of the others nothing is kept any more
            expected = {}
        expected.update(zip(places, new.tolist(), strict=True))
        again = Kept(Single(model), parameters)
        again.load_state_dict(kept.state_dict())
        assert (
            again.state_dict()["weight"].nan_to_num(-1.0).tolist()
            == kept.state_dict()["weight"].nan_to_num(-1.0).tolist()
        )


# ---- sharded


def _remembered_by(opt: SparseSAM) -> dict[str, Tensor]:
    [kept] = gathered(opt._perturbation.source.state_dict()).values()
    return kept


def remembered(world: World, backends: list[Any]) -> list[dict[str, Tensor]]:
    """Weights and what is remembered after steps, whole, by backend and direction."""
    results = []
    for backend in backends:
        for direction in (Friendly(lmbda=0.6), VaSSO(theta=0.4), Previous()):
            model = small_network("vit")
            blocks = [stage.block for stage in model.stages]
            placed, base = place(model, blocks, backend, world, lambda m=model: sgd(m), batch_size=SIZE // world.size)
            mask = Scored("element", 0.5, score="random", seed=5)
            opt = SparseSAM(placed, base, rho=RHO, mask=mask, direction=direction)
            opt.refresh()
            for batch in batches(4, SIZE):
                opt.step(loss_fn, part(batch, world.rank, world.size))
            kept = _remembered_by(opt)
            named = opt.parameters.by_name
            shards = opt.sharding.shards(list(named.values()))
            whole = {n: opt.sharding.gather(p, s.weight) for (n, p), s in zip(named.items(), shards, strict=True)}
            results.append(whole | {f"{n}|kept": v.reshape(whole[n].shape).nan_to_num() for n, v in kept.items()})
    return results


@pytest.mark.slow
def test_what_is_remembered_is_the_same_on_every_backend() -> None:
    backends = ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"]
    expected = alone(remembered, ["single"])
    [first, second] = run_ranks(2, remembered, backends)
    for i, found in enumerate(first):
        for name, value in expected[i % len(expected)].items():
            bound = 10 * TOLERANCE if name.endswith("kept") else TOLERANCE  # a gradient has entries above 1
            assert float((found[name] - value).abs().max()) <= bound, (backends[i // len(expected)], name)
            assert torch.equal(found[name], second[i][name]), (backends[i // len(expected)], name)


def test_norms_alone_go_along_the_momentum() -> None:
    opt = vit(direction=Momentum(), mask=Norms())
    for batch in batches(2, SIZE):
        opt.step(loss_fn, batch)
    assert opt.report is not None
    assert (opt.report.kind, set(opt.report.plan.weights) < set(opt.parameters.by_name)) == ("free", True)


# ---- GSAM


def test_the_gap_is_narrowed_by_what_is_orthogonal_to_the_descent() -> None:
    """⟨g', g_s⟩ stays ‖g_s‖², and what is taken off is α times what g has beside."""
    model = nn.Linear(4, 3, bias=False)
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    for gap in (0.0, 0.5):
        base = torch.optim.SGD(model.parameters(), lr=0.0)
        base.register_step_pre_hook(lambda *_: seen.append(model.weight.grad.clone()))
        SparseSAM(model, base, rho=0.3, gap=gap).step(lambda forward, b: forward(b).exp().mean(), x)
    model(x).exp().mean().backward()
    sharp, narrowed, plain = (g.flatten() for g in (*seen, model.weight.grad))
    beside = plain - plain @ sharp / (sharp @ sharp) * sharp
    torch.testing.assert_close(narrowed, sharp - 0.5 * beside)
    assert float(narrowed @ sharp) == pytest.approx(float(sharp @ sharp), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gap": -1.0}, "gap is -1.0; at least 0 is needed"),
        ({"gap": 0.5, "adaptive": True}, "gap knows the gradient by the perturbation, which adaptive distorts"),
        (
            {"gap": 0.5, "direction": Momentum()},
            r"with direction Momentum\(\) that is along another one; use Fresh\(\)",
        ),
        ({"gap": 0.5, "direction": Fresh(scope="worker")}, "gap compares the descent's gradient with that of the same"),
        ({"gap": 0.5, "direction": Fresh(0.5)}, "gap compares the descent's gradient with that of the same samples"),
        ({"schedule": Interval(3, reuse=0.5), "direction": Fresh(0.5)}, "reuse between ascents compares the descent's"),
    ],
)
def test_a_gap_needs_the_plain_gradient(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vit(**options)


# ---- losses that are scaled, groups that are left alone, weights that have no gradient


class Growing(torch.amp.GradScaler):
    """Scales by twice as much in each step."""

    def __init__(self) -> None:
        super().__init__("cpu", init_scale=4.0, growth_factor=2.0, growth_interval=1)


@pytest.mark.parametrize("direction", [Friendly(lmbda=0.6), VaSSO(theta=0.3), Previous()], ids=str)
@pytest.mark.parametrize("form", ["batches", "closure"])
def test_what_is_remembered_does_not_depend_on_the_losses_scale(form: str, direction: Direction) -> None:
    ends = []
    for scaler in (None, Growing()):
        model = small_network("vit").double()
        opt = SparseSAM(model, sgd(model), rho=RHO, direction=direction, scaler=scaler)
        for images, labels in batches(5, SIZE):
            batch = images.double(), labels

            def closure(opt: SparseSAM = opt, model: Any = model, batch: Any = batch, scaler: Any = scaler) -> Tensor:
                opt.zero_grad()
                loss = loss_fn(model, batch)
                (loss if scaler is None else scaler.scale(loss)).backward()
                return loss

            if form == "batches":
                opt.step(loss_fn, batch)
            else:
                opt.step(closure)
        ends.append(weights(model))
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-7)


def test_by_hand_a_mean_of_gradients_of_unknown_scale_is_refused() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), direction=Friendly())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_fn(model, batches(1, SIZE)[0])).backward()
    with (
        pytest.raises(RuntimeError, match="which a scaler multiplies by another factor in another step"),
        opt.perturbed(),
    ):
        pass


def test_a_free_directions_only_pass_counts_in_every_step() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), nn.BatchNorm1d(10))
    opt = SparseSAM(model, sgd(model), rho=RHO, direction=Momentum(), schedule=Interval(3))
    for batch in batches(5, SIZE):
        with opt.perturbed():
            loss_fn(model, batch).backward()
        opt.step()
        opt.zero_grad()
    norm: Any = model[2]
    assert int(norm.num_batches_tracked) == 5


def test_samples_of_the_highest_loss_leave_the_passes_the_same_random_numbers() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    drawn: list[float] = []

    def draws(forward: Any, batch: Any) -> Tensor:
        if not torch._C._functorch.is_batchedtensor(batch[0]):
            drawn.append(float(torch.rand(())))
        return F.cross_entropy(forward(batch[0]), batch[1])

    SparseSAM(model, sgd(model), direction=Fresh(0.5, "highest_loss")).step(draws, batches(1, SIZE)[0])
    assert drawn[-1] == drawn[-2]


class WithUnused(nn.Module):
    """Has a layer that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.unused, self.last = nn.Linear(3 * 32 * 32, 8), nn.Linear(4, 4), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x.flatten(1))))


@pytest.mark.parametrize(
    "options", [{"gap": 0.6}, {"schedule": Interval(2, reuse=0.5)}, {"direction": Previous()}], ids=str
)
def test_a_layer_without_a_gradient_is_left_alone(options: dict[str, Any]) -> None:
    model = WithUnused()
    before = model.unused.weight.detach().clone()
    opt = SparseSAM(model, sgd(model), rho=RHO, **options)
    for batch in batches(4, SIZE):
        opt.step(loss_fn, batch)
    assert torch.equal(model.unused.weight, before)


@pytest.mark.parametrize("options", [{"gap": 0.6}, {"schedule": Interval(2, reuse=0.5)}], ids=str)
def test_a_group_whose_radius_is_0_in_a_step_keeps_its_own_gradient(options: dict[str, Any]) -> None:
    """As one whose own radius is 0: schedules fall to 0 where a learning rate does."""
    ends = []
    for still in (True, False):
        model = small_network("vit")
        every = list(model.parameters())
        other = {"params": every[1::2], "rho": RHO if still else 0.0, "still": still}
        groups = [{"params": every[::2], "rho": RHO}, other]
        base = torch.optim.SGD(groups, lr=0.05)
        inner = options.get("schedule", lambda step, group: 1.0)

        class Still:
            """Leaves a group alone."""

            def __call__(self, step: int, group: Any, inner: Any = inner) -> float:
                return 0.0 if group.get("still") else inner(step, group)

            def reuse_at(self, step: int, inner: Any = inner) -> float:
                return getattr(inner, "reuse_at", lambda step: 0.0)(step)

            def ever_reuses(self, inner: Any = inner) -> bool:
                return hasattr(inner, "ever_reuses")

        opt = SparseSAM(model, base, norm="dense", **{**options, "schedule": Still()})
        for batch in batches(3, SIZE):
            opt.step(loss_fn, batch)
        ends.append(weights(model))
        assert all(w.isfinite().all() for w in ends[-1])
    assert max(float((a - b).abs().max()) for a, b in zip(*ends, strict=True)) <= TOLERANCE


@pytest.mark.parametrize("direction", [Momentum(), Previous()], ids=["momentum", "previous"])
def test_a_mask_that_is_chosen_later_and_a_step_without_anything_do_not_break_it(direction: Direction) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    from ssam_scale import Window

    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), mask=Scored("element", 0.5), direction=direction, schedule=Window(2))
    get_optimizer_state_dict(model, opt.base_optimizer)
    for batch in batches(2, SIZE):
        opt.step(loss_fn, batch)
    opt.refresh(loss_fn, *batches(1, SIZE))
    for batch in batches(2, SIZE):
        opt.step(loss_fn, batch)
    assert opt.report is not None
    assert opt.report.kind == "free"


@pytest.mark.parametrize("form", ["no backward", "an unknown scaler", "accumulated"])
def test_a_closure_of_a_free_direction_is_looked_at_too(form: str) -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=RHO, direction=Momentum())
    batch, scaler = batches(1, SIZE)[0], torch.amp.GradScaler("cpu", init_scale=4.0)
    opt.step(loss_fn, batch)

    def closure() -> Tensor:
        loss = loss_fn(model, batch)
        if form == "an unknown scaler":
            scaler.scale(loss).backward()
        elif form == "accumulated":
            loss.backward()
        return loss

    if form == "accumulated":
        loss_fn(model, batch).backward()
    with pytest.raises(
        RuntimeError, match=r"the closure (returned a loss and left|scales its loss|added to gradients)"
    ):
        opt.step(closure)


def test_a_gap_by_hand_wants_both_gradients_in_one_unit() -> None:
    model = small_network("vit")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    opt = SparseSAM(model, sgd(model), rho=RHO, gap=0.5)
    batch = batches(1, SIZE)[0]
    scaler.scale(loss_fn(model, batch)).backward()

    def unscaled_inside() -> None:
        with opt.perturbed():
            scaler.scale(loss_fn(model, batch)).backward()
            scaler.unscale_(opt)

    with pytest.raises(RuntimeError, match=r"call scaler\.unscale_\(opt\) after the block"):
        unscaled_inside()


def test_by_hand_there_is_no_part_of_a_batch() -> None:
    opt = vit(direction=Fresh(0.5))
    with pytest.raises(RuntimeError, match=r"the direction's fraction is 0\.5: call opt\.step\(loss_fn, batch\)"):
        opt.step(lambda: None)
    with pytest.raises(ValueError, match=r"choose 'random' says which samples"):
        Fresh(choose="random")


def test_a_layer_that_is_frozen_for_a_while_keeps_its_mean() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=RHO, direction=Friendly())
    data = batches(3, SIZE)
    opt.step(loss_fn, data[0])
    [head] = [p for name, p in model.named_parameters() if name.endswith("head.weight")]
    before = _remembered_by(opt)
    [name] = [name for name, p in opt.parameters.by_name.items() if p is head]
    head.requires_grad_(False)
    opt.step(loss_fn, data[1])
    head.requires_grad_(True)
    assert opt.parameters.by_name[name] is head
    assert torch.equal(_remembered_by(opt)[name], before[name])


def test_a_group_that_keeps_no_momentum_is_refused_and_not_there() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    model = nn.Sequential(first, second)
    opt = SparseSAM(model, torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9), direction=Momentum())
    with pytest.raises(ValueError, match="SGD with momentum 0 keeps none"):
        opt.add_param_group({"params": list(second.parameters()), "momentum": 0})
    assert len(opt.param_groups) == 1
    opt.step(lambda forward, x: forward(x).square().mean(), torch.randn(3, 2))
