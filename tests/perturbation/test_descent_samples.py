"""A descent by some samples of the batch: which they are, what it costs, and what does not go with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale import Depth, DescentSamples, Fresh, Friendly, Gate, Interval, Momentum, Previous, SparseSAM
from tests.support.networks import batches, loss_fn, small_network

SIZE = 8


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))


def each_loss(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Watch:
    """A loss function that notes the images, and the weights, of each of its calls by a pass."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.images: list[Tensor] = []
        self.weights: list[list[Tensor]] = []

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        images, labels = batch
        if not torch._C._functorch.is_batchedtensor(images):
            self.images.append(images)
            self.weights.append([p.detach().clone() for p in self.model.parameters()])
        return F.cross_entropy(forward(images), labels)


def test_the_sharpest_are_those_whose_loss_the_perturbation_raises_most() -> None:
    model, batch = linear(), batches(1, SIZE)[0]
    here, watch = each_loss(model, batch), Watch(model)
    SparseSAM(model, sgd(model), rho=0.5, descent=DescentSamples(0.25)).step(watch, batch)
    ascent, all_there, descent = watch.images
    assert torch.equal(ascent, batch[0])
    assert torch.equal(all_there, batch[0])
    perturbed = linear()
    with torch.no_grad():
        for p, there in zip(perturbed.parameters(), watch.weights[1], strict=True):
            p.copy_(there)
    rises = each_loss(perturbed, batch) - here
    assert torch.equal(descent, batch[0][rises.topk(2).indices])
    # So it is not those of the highest loss, which would be a weaker test.
    assert set(rises.topk(2).indices.tolist()) != set(here.topk(2).indices.tolist())


def test_those_of_the_highest_loss_at_w_take_no_forward_of_their_own_where_the_ascent_sees_all() -> None:
    model, batch = linear(), batches(1, SIZE)[0]
    here, watch = each_loss(model, batch), Watch(model)
    SparseSAM(model, sgd(model), rho=0.5, descent=DescentSamples(0.5, "highest_loss")).step(watch, batch)
    ascent, descent = watch.images
    assert torch.equal(ascent, batch[0])
    assert torch.equal(descent, batch[0][here.topk(4).indices])


def test_both_passes_share_the_forward_that_chooses() -> None:
    model, batch = linear(), batches(1, SIZE)[0]
    here, watch = each_loss(model, batch), Watch(model)
    direction, descent = Fresh(0.25, "highest_loss"), DescentSamples(0.5, "highest_loss")
    SparseSAM(model, sgd(model), direction=direction, descent=descent).step(watch, batch)
    assert [len(images) for images in watch.images] == [8, 2, 4]
    assert torch.equal(watch.images[1], batch[0][here.topk(2).indices])
    assert torch.equal(watch.images[2], batch[0][here.topk(4).indices])


def test_random_ones_are_others_in_each_step_and_leave_the_generator_alone() -> None:
    model = linear()
    watch, batch = Watch(model), batches(1, SIZE)[0]
    opt = SparseSAM(model, sgd(model), descent=DescentSamples(0.5, "random"))
    random = torch.get_rng_state()
    for _ in range(3):
        opt.step(watch, batch)
    assert torch.equal(torch.get_rng_state(), random)
    drawn = [frozenset(int((batch[0] == x).flatten(1).all(1).nonzero()) for x in seen) for seen in watch.images[1::2]]
    assert all(len(each) == SIZE // 2 for each in drawn)
    assert len(set(drawn)) > 1


def flops(**options: Any) -> int:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), **options)
    with FlopCounterMode(display=False) as counter:
        opt.step(loss_fn, batches(1, SIZE)[0])
    return counter.get_total_flops()


def test_the_descent_costs_its_share_and_the_choice_a_forward() -> None:
    base, dense = flops(rho=0.0), flops()
    with FlopCounterMode(display=False) as counter:
        loss_fn(small_network("vit"), batches(1, SIZE)[0])
    forward = counter.get_total_flops()
    assert flops(descent=DescentSamples(0.5, "highest_loss")) == dense - base // 2
    assert flops(descent=DescentSamples(0.5)) == dense - base // 2 + forward
    both = {"direction": Fresh(0.5, "highest_loss"), "descent": DescentSamples(0.5, "highest_loss")}
    assert flops(**both) == dense // 2 + forward
    # A prefix runs once more, for the samples of the descent, which the ascent does not know yet.
    assert flops(mask=Depth(0.5), descent=DescentSamples(0.5)) < flops(descent=DescentSamples(0.5))


@pytest.mark.parametrize(
    "options",
    [
        {"descent": DescentSamples(0.5)},
        {"descent": DescentSamples(0.5, "highest_loss"), "direction": Fresh(0.5, "highest_loss")},
        {"descent": DescentSamples(0.5, "highest_loss"), "direction": Fresh(0.25), "mask": Depth(0.5)},
        {"descent": DescentSamples(0.5), "mask": Depth(0.5)},
    ],
    ids=["esam", "k-sam", "part behind a cut", "esam behind a cut"],
)
def test_running_statistics_are_those_of_a_forward_of_all_samples_at_w(options: dict[str, Any]) -> None:
    model, plain, batch = small_network("resnet"), small_network("resnet"), batches(1, SIZE)[0]
    plain(batch[0])
    SparseSAM(model, sgd(model), **options).step(loss_fn, batch)
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(found, expected), name


def test_a_step_without_an_ascent_goes_by_all_samples() -> None:
    model, batch = linear(), batches(1, SIZE)[0]
    watch = Watch(model)
    opt = SparseSAM(model, sgd(model), descent=DescentSamples(0.5), schedule=Interval(2))
    for _ in range(2):
        opt.step(watch, batch)
    assert [len(images) for images in watch.images] == [8, 8, 4, 8]


def test_what_a_rehearsal_measures_is_the_step_and_changes_nothing() -> None:
    weights = []
    for rehearsed in (False, True):
        model = small_network("resnet")
        opt = SparseSAM(model, sgd(model), descent=DescentSamples(0.5))
        for batch in batches(2, SIZE):
            if rehearsed:
                with opt.rehearsal() as rehearse:
                    for what in ("base", "dense", "own"):
                        rehearse(what, loss_fn, batch)
            opt.step(loss_fn, batch)
        weights.append([t.clone() for t in model.state_dict().values()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"direction": Momentum()}, r"direction Momentum\(\) has none; use Fresh\(\), Friendly\(\) or VaSSO\(\)"),
        ({"direction": Previous()}, r"direction Previous\(\) has none"),
        ({"direction": Fresh(0.5)}, r"choose='sharpest' compares each sample's loss .* sees 0\.5 of them"),
        ({"direction": Friendly(0.5)}, r"give the direction fraction=1\.0, or choose='highest_loss'"),
        ({"gap": 0.5}, "gap goes by the gradients of both passes together"),
        ({"gate": Gate(10)}, "gate goes by the gradients of both passes together"),
        ({"schedule": Interval(5, reuse=0.5)}, "reuse goes by the gradients of both passes together"),
    ],
    ids=str,
)
def test_what_tells_of_no_samples_is_refused(options: dict[str, Any], said: str) -> None:
    model = linear()
    with pytest.raises(ValueError, match=said):
        SparseSAM(model, sgd(model), descent=DescentSamples(0.5), **options)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: DescentSamples(1.0), ValueError, r"fraction is 1\.0; a share in \(0, 1\) is needed"),
        (lambda: DescentSamples(0.0), ValueError, r"fraction is 0\.0"),
        (lambda: DescentSamples("half"), TypeError, "fraction is 'half'"),  # type: ignore[arg-type]
        (lambda: DescentSamples(0.5, "first"), ValueError, "one of sharpest, highest_loss, random"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_choice_of_samples(make: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_what_is_no_descent_samples() -> None:
    model = linear()
    with pytest.raises(TypeError, match=r"descent is 0\.5 \(float\); DescentSamples\(…\) is needed, or None"):
        SparseSAM(model, sgd(model), descent=0.5)  # type: ignore[arg-type]


def test_forms_by_hand_run_the_callers_passes() -> None:
    model, (images, labels) = linear(), batches(1, SIZE)[0]
    opt = SparseSAM(model, sgd(model), descent=DescentSamples(0.5))
    F.cross_entropy(model(images), labels).backward()
    said = r"see what the caller gives them, .*: call opt\.step\(loss_fn, batch\)"
    with pytest.raises(RuntimeError, match=said), opt.perturbed():
        pass
    with pytest.raises(RuntimeError, match=r"opt\.step\(closure\) runs the caller's passes"):
        opt.step(lambda: F.cross_entropy(model(images), labels))


def test_a_loss_function_that_cannot_be_taken_sample_by_sample_is_named() -> None:
    model = linear()

    def asks(forward: Any, batch: Any) -> Tensor:
        loss = F.cross_entropy(forward(batch[0]), batch[1])
        return loss if loss.item() > 0.0 else loss * 2

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"descent choose='sharpest' asks for the loss of each sample, by torch\.vmap"):
        SparseSAM(model, sgd(model), descent=DescentSamples(0.5)).step(asks, batches(1, SIZE)[0])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
