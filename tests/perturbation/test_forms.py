"""Every form of a step does the same: batches, closure, by hand; with dropout, BatchNorm, scalers, accumulation."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssam_scale import Depth, Interval, Named, Scored, SparseSAM
from ssam_scale.perturbation.reference import length_of, masked_by, reference_gradient, reference_step
from tests.support.masks import whole_mask
from tests.support.networks import batches, freeze_batchnorm, loss_fn, small_network

RHO = 0.2
Form = Callable[[SparseSAM, nn.Module, list[Any]], None]


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def by_batches(opt: SparseSAM, model: nn.Module, micro: list[Any]) -> None:
    opt.step(loss_fn, *micro)


def by_closure(opt: SparseSAM, model: nn.Module, micro: list[Any]) -> None:
    def closure() -> Tensor:
        opt.zero_grad()
        losses = [loss_fn(model, batch) / len(micro) for batch in micro]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum()

    opt.step(closure)


def by_hand(opt: SparseSAM, model: nn.Module, micro: list[Any]) -> None:
    for batch in micro:  # torch's own accumulation idiom
        (loss_fn(model, batch) / len(micro)).backward()
    with opt.perturbed():
        for batch in micro:
            (loss_fn(model, batch) / len(micro)).backward()
    opt.step()
    opt.zero_grad()


FORMS: dict[str, Form] = {"batches": by_batches, "closure": by_closure, "by hand": by_hand}


@pytest.mark.parametrize("schedule", [None, Interval(2)], ids=["each step", "every second step"])
@pytest.mark.parametrize("parts", [1, 2])
def test_all_forms_drop_the_same_and_update_batchnorm_once(parts: int, schedule: Any) -> None:
    trained = {}
    for name, form in FORMS.items():
        model = small_network("resnet", drop_rate=0.3, drop_path_rate=0.3).train()
        opt = SparseSAM(model, sgd(model.parameters()), rho=RHO, mask=Depth(0.5), schedule=schedule)
        torch.manual_seed(3)
        for images, labels in batches(3, 8):
            torch.rand(7)  # what a loader draws between two steps
            micro = list(zip(images.chunk(parts), labels.chunk(parts), strict=True))
            form(opt, model, micro)
        trained[name] = model.state_dict()
        # Each stage's BatchNorm has seen each micro-batch once.
        assert {int(n) for key, n in trained[name].items() if key.endswith("num_batches_tracked")} == {3 * parts}
    for name in ("closure", "by hand"):
        for key, value in trained["batches"].items():
            torch.testing.assert_close(trained[name][key], value, rtol=0, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")


def scaled(opt: SparseSAM, model: nn.Module, scaler: torch.amp.GradScaler, batch: Any, when: str) -> None:
    """By hand with a GradScaler that unscales at some time."""
    scaler.scale(loss_fn(model, batch)).backward()
    if when == "before":
        scaler.unscale_(opt)
    with opt.perturbed():
        scaler.scale(loss_fn(model, batch)).backward()
    if when == "after":
        scaler.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    scaler.step(opt)
    scaler.update()
    opt.zero_grad()


def vit(seed: int = 0) -> Any:
    return freeze_batchnorm(small_network("vit", seed))


def same(one: nn.Module, other: nn.Module, atol: float = 1e-6) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("when", ["never", "after"])
def test_a_scaler_by_hand_unscales_the_descent_gradient(when: str) -> None:
    model, plain = vit(), vit()
    opt, exact = (SparseSAM(m, sgd(m.parameters()), rho=RHO) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    for batch in batches(2, 8):
        scaled(opt, model, scaler, batch, when)
        exact.step(loss_fn, batch)
    same(model, plain)


def test_gradients_unscaled_too_early_are_refused() -> None:
    model = vit()
    before = copy.deepcopy(model)
    opt = SparseSAM(model, sgd(model.parameters()), rho=RHO)
    with pytest.raises(RuntimeError, match=r"unscale_\(opt\) was called before `with opt.perturbed"):
        scaled(opt, model, torch.amp.GradScaler("cpu", 1024.0), batches(1, 8)[0], "before")
    same(model, before, atol=0)
    off = torch.amp.GradScaler("cpu", enabled=False)  # scales nothing, so it does not matter when
    for when in ("never", "before", "after"):
        opt = SparseSAM(model, sgd(model.parameters()), rho=RHO)
        scaled(opt, model, off, batches(1, 8)[0], when)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_scaler_that_unscales_the_base_optimizer_is_noticed(when: str) -> None:
    model = vit()
    before = copy.deepcopy(model)
    opt, batch = SparseSAM(model, sgd(model.parameters()), rho=RHO), batches(1, 8)[0]

    def step(scaler: torch.amp.GradScaler) -> None:
        scaler.scale(loss_fn(model, batch)).backward()
        if when == "before":
            scaler.unscale_(opt.base_optimizer)
        with opt.perturbed():
            scaler.scale(loss_fn(model, batch)).backward()
        if when == "after":
            scaler.unscale_(opt.base_optimizer)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()

    told = {"before": r"before `with opt.perturbed\(\)`.*call scaler.unscale_\(opt\) after", "after": "once more: call"}
    with pytest.raises(RuntimeError, match=told[when]):
        step(torch.amp.GradScaler("cpu", 1024.0))
    same(model, before, atol=0)
    opt.zero_grad()
    step(torch.amp.GradScaler("cpu", enabled=False))


def test_a_scaler_may_step_the_base_optimizer_alone() -> None:
    model, plain = vit(), vit()
    opt, exact = (SparseSAM(m, sgd(m.parameters()), rho=RHO) for m in (model, plain))
    scaler = torch.amp.GradScaler("cpu", 1024.0)
    for batch in batches(2, 8):
        scaler.scale(loss_fn(model, batch)).backward()
        with opt.perturbed():
            scaler.scale(loss_fn(model, batch)).backward()
        scaler.unscale_(opt.base_optimizer)
        scaler.step(opt.base_optimizer)
        scaler.update()
        opt.zero_grad()
        exact.step(loss_fn, batch)
    same(model, plain)


def test_a_closure_scales_its_loss_and_the_step_unscales() -> None:
    model, plain = vit(), vit()
    scaler = torch.amp.GradScaler("cpu", 65536.0)
    opt = SparseSAM(model, sgd(model.parameters()), rho=RHO, scaler=scaler)
    exact = SparseSAM(plain, sgd(plain.parameters()), rho=RHO)
    for batch in batches(2, 8):

        def closure(batch: Any = batch) -> Tensor:
            loss = loss_fn(model, batch)
            scaler.scale(loss).backward()
            return loss

        opt.step(closure)
        exact.step(loss_fn, batch)
    same(model, plain)

    def unscaled() -> Tensor:
        loss = loss_fn(model, batches(1, 8)[0])
        loss.backward()
        return loss

    fresh = SparseSAM(model, sgd(model.parameters()), rho=RHO, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="the closure called backward on a loss that the scaler has not scaled"):
        fresh.step(unscaled)


def test_a_closure_on_top_of_accumulated_gradients_is_refused() -> None:
    """As of Lightning's `accumulate_grad_batches`: the descent would be by the last micro-batch alone."""
    model = vit()
    opt = SparseSAM(model, sgd(model.parameters()), rho=RHO)
    first, second = batches(2, 8)

    def closure() -> Tensor:
        loss = loss_fn(model, second)
        loss.backward()
        return loss

    loss_fn(model, first).backward()
    with pytest.raises(RuntimeError, match=r"added to gradients that were there before: .* opt.step\(loss_fn, \*bat"):
        opt.step(closure)
    # What clears them, or has none, is as good as ever.
    opt.step(closure)
    loss_fn(model, first).backward()
    by_closure(opt, model, [second])
    opt.base_optimizer.zero_grad(set_to_none=False)
    opt.step(closure)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, Depth(0.5), Named("blocks.3")], ids=["all", "cut", "named"])
def test_another_optimizers_weights_get_the_gradient_of_the_descent_once(form: str, mask: Any) -> None:
    model, batch = vit(), batches(1, 8)[0]
    names = ("cls_token", "blocks.0.attn.qkv.weight", "blocks.3.mlp.fc1.weight", "head.bias")
    others = {n: p for n, p in model.model.named_parameters() if n in names}
    mine = [p for n, p in model.model.named_parameters() if n not in names]
    opt, seen = SparseSAM(model, sgd(mine), rho=RHO, mask=mask), {}

    hooks = [
        p.register_post_accumulate_grad_hook(lambda p, n=n: seen.setdefault(n, []).append(p.grad.clone()))
        for n, p in others.items()
    ]
    FORMS[form](opt, model, [batch])
    for name, p in others.items():
        # The last time that it was accumulated, it was from nothing, and nothing came on top.
        assert p.grad is not None
        assert torch.equal(p.grad, seen[name][-1])
        assert len(seen[name]) == (1 if form == "batches" else 2)
    for hook in hooks:
        hook.remove()


def test_layers_may_be_frozen_and_unfrozen_between_steps() -> None:
    model, plain = vit(), vit()
    for each in (model, plain):
        each.model.blocks.requires_grad_(False)
    opt, base = SparseSAM(model, sgd(model.parameters()), rho=RHO), sgd(plain.parameters())
    sizes = []
    for step, batch in enumerate(batches(6, 8)):
        for each in (model, plain):
            if step == 2:
                each.model.blocks[2:].requires_grad_(True)
            if step == 4:
                each.model.patch_embed.requires_grad_(False)
                each.model.blocks.requires_grad_(True)
        trained = {n for n, p in model.model.named_parameters() if p.requires_grad}
        assert opt.plan.weights.keys() == trained
        assert opt.density == 1.0
        sizes.append(len(trained))
        opt.step(loss_fn, batch)
        everything = {n: torch.ones_like(p) for n, p in plain.model.named_parameters() if n in trained}
        reference_step(plain.model, base, loss_fn, batch, rho=RHO, mask=everything, norm="masked")
        same(model, plain)
        assert trained == {n for n, p in model.model.named_parameters() if p.requires_grad}
    assert sizes[0] < sizes[2] < sizes[4]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", [None, Depth(0.5)], ids=["all", "cut"])
def test_a_step_of_weights_that_are_all_frozen_is_another_optimizers(form: str, mask: Any) -> None:
    """A head that is trained alone at first, by an optimizer of its own."""
    model, plain = vit(), vit()
    for each in (model, plain):
        each.model.requires_grad_(False)
        each.model.head.requires_grad_(True)
    body = [p for p in model.parameters() if not p.requires_grad]
    opt = SparseSAM(model, sgd(body), rho=RHO, mask=mask)
    own, head = sgd(model.model.head.parameters()), sgd(plain.model.head.parameters())
    for batch in batches(2, 8):
        assert opt.density == 0.0
        FORMS[form](opt, model, [batch])
        assert opt.report is not None
        assert (opt.report.kind, opt.report.density) == ("base", 0.0)
        loss_fn(plain, batch).backward()
        for each in (own, head):
            each.step()
            each.zero_grad()
        same(model, plain, atol=0)
    model.model.requires_grad_(True)
    assert opt.density > 0.0
    FORMS[form](opt, model, [batch])
    assert opt.report.kind != "base"


@pytest.mark.parametrize("pattern", ["element", "row", "tensor"])
def test_a_chosen_mask_goes_on_when_layers_are_frozen_and_unfrozen(pattern: Any) -> None:
    model, batch = vit(), batches(1, 8)[0]
    opt = SparseSAM(model, sgd(model.parameters()), rho=RHO, mask=Scored(pattern, 0.5, score="weight"))
    opt.refresh()
    before = set(opt.plan.weights)
    model.model.blocks[3].requires_grad_(False)
    opt.step(loss_fn, batch)
    assert set(opt.plan.weights) == {n for n in before if not n.startswith("blocks.3.")}
    model.model.blocks[3].requires_grad_(True)
    opt.step(loss_fn, batch)
    assert set(opt.plan.weights) == before
    opt.refresh()
    opt.step(loss_fn, batch)


def test_what_is_unfrozen_after_a_mask_was_chosen_is_said_once_and_chosen_from_at_the_next_refresh() -> None:
    model, batch = vit(), batches(1, 8)[0]
    model.model.blocks[0].requires_grad_(False)
    opt = SparseSAM(model, sgd(model.parameters()), rho=RHO, mask=Scored("tensor", 0.1, score="weight"))
    opt.refresh()
    opt.step(loss_fn, batch)
    model.model.blocks[0].requires_grad_(True)
    with pytest.warns(UserWarning, match=r"\(the first: blocks.0.norm1.weight\) were frozen, .* call opt.refresh"):
        opt.step(loss_fn, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss_fn, batch)
        assert not any(name.startswith("blocks.0.") for name in opt.plan.weights)
        opt.refresh()
        opt.step(loss_fn, batch)
    assert any(name.startswith("blocks.0.") for name in opt.plan.weights)


def test_a_group_that_is_put_in_anothers_place_gets_a_radius() -> None:
    """It was a KeyError: 'rho'."""
    model, changed = vit(), vit()
    for net in (model, changed):
        base = torch.optim.SGD(net.parameters(), lr=0.1)
        opt = SparseSAM(net, base, rho=0.1)
        for number, batch in enumerate(batches(2, 4)):
            if number and net is changed:
                base.param_groups[0] = {key: value for key, value in base.param_groups[0].items() if key != "rho"}
            opt.step(loss_fn, batch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), changed.parameters(), strict=True))


def test_what_is_unfrozen_without_a_group_is_said_once() -> None:
    model = vit()
    model.model.blocks.requires_grad_(False)
    base = sgd([p for p in model.parameters() if p.requires_grad])
    opt, batch = SparseSAM(model, base, rho=RHO), batches(1, 8)[0]
    model.model.blocks[0].requires_grad_(True)
    with pytest.warns(UserWarning, match="parameters that require gradients now .*blocks.0.norm1.weight.* in no param"):
        opt.step(loss_fn, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(loss_fn, batch)
        base.add_param_group({"params": list(model.model.blocks[0].parameters())})  # past ours
        assert any(name.startswith("blocks.0") for name in opt.plan.weights)
        assert opt.radii == [RHO, RHO]
        opt.step(loss_fn, batch)


def test_a_layer_that_was_replaced_is_refused_until_the_optimizer_has_it() -> None:
    model = vit()
    opt, batch = SparseSAM(model, sgd(model.parameters()), rho=RHO), batches(1, 8)[0]
    model.model.head = nn.Linear(32, 10)
    with pytest.raises(ValueError, match=r"2 of the optimizer's parameters are not the model's.*replaced"):
        opt.step(loss_fn, batch)


@pytest.mark.parametrize("rho", [0.0, RHO])
@pytest.mark.parametrize("mask", [None, Depth(0.5)])
def test_a_step_walks_the_network_by_none_of_its_generators(
    mask: Any, rho: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = small_network("resnet").train(), batches(1, 8)[0]
    opt = SparseSAM(model, sgd(model.parameters()), rho=rho, mask=mask)
    opt.step(loss_fn, batch)

    def walk(*_: Any, **__: Any) -> None:
        pytest.fail("a walk by generators takes five times as long")

    for name in ("modules", "parameters", "buffers"):
        monkeypatch.setattr(nn.Module, name, walk)
        monkeypatch.setattr(nn.Module, f"named_{name}", walk)
    opt.step(loss_fn, batch)


def test_a_layer_that_moves_to_its_neighbour_is_noticed() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 10)))
    opt = SparseSAM(model, sgd(model.parameters()), rho=RHO)
    last: Any = model[0][1]
    del model[0][1]
    model[1].insert(0, last)
    assert list(opt.plan.weights) == [name for name, _ in model.named_parameters()]


def test_an_evaluation_between_steps_changes_nothing() -> None:
    model, plain = vit(), vit()
    opt, other = (SparseSAM(m, sgd(m.parameters()), rho=RHO) for m in (model, plain))
    for batch in batches(2, 8):
        model.eval()
        with torch.no_grad():
            model(batch[0])
        model.train()
        by_hand(opt, model, [batch])
        other.step(loss_fn, batch)
    same(model, plain)


def test_reuse_goes_along_the_gradient_whatever_radii_groups_have() -> None:
    model, batch = vit(), batches(1, 8)[0]
    named = dict(model.model.named_parameters())
    groups = [
        {"params": [p for i, p in enumerate(named.values()) if i % 2 == k], "rho": r} for k, r in ((0, 0.3), (1, 0.03))
    ]
    opt = SparseSAM(model, sgd(groups), schedule=Interval(2, reuse=0.5))
    mask = whole_mask(opt)
    _, gradient = reference_gradient(model.model, loss_fn, batch)
    opt.step(loss_fn, batch)
    assert opt._looksam is not None
    across = {name: g.double() for name, g in opt._looksam.state_dict()["reused"].items()}
    along = sum(float((across[name] * g.double()).sum()) for name, g in masked_by(gradient, mask).items())
    # g_v is what the gradient at the top has across the one at w. ε of unequal radii is not along it.
    assert abs(along) <= 1e-5 * float(length_of(across)) * float(length_of(gradient))
    assert float(length_of(across)) > 0


def test_copies_of_stages_that_are_functions_run_their_own_weights() -> None:
    from tests.support.networks import tied_network

    original = tied_network()
    copied = copy.deepcopy(original)
    with torch.no_grad():
        for p in original.parameters():
            p.zero_()
    images = batches(1, 4)[0][0]
    assert not original(images).any()
    assert torch.equal(copied(images), copied.model(images))
    assert copied(images).any()


LAYER = nn.Linear(4, 4)


def test_copies_of_stages_find_modules_in_closures_defaults_partials_and_lists_but_not_in_globals() -> None:
    from ssam_scale.perturbation import Stage, StagedModel

    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    held = [model[1]]

    def third(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    forwards = [lambda x, layer=model[0]: layer(x), lambda x: held[0](x), functools.partial(third, model[2])]
    staged = StagedModel(model, [Stage(str(i), model[i], f) for i, f in enumerate(forwards)])
    copied = copy.deepcopy(staged)
    x = torch.randn(2, 4)
    expected = staged(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copied(x), expected)
    assert not staged(x).any()
    with pytest.raises(TypeError, match="the forward of a stage uses the global LAYER"):
        copy.deepcopy(StagedModel(LAYER, [Stage("", LAYER, lambda x: LAYER(x))]))


def test_copies_of_stages_find_functions_in_objects_and_containers() -> None:
    from ssam_scale.perturbation import Stage, StagedModel

    class Called:
        def __init__(self, function: Any) -> None:
            self.function, self.itself = function, self

        def __call__(self, x: Tensor) -> Tensor:
            return self.function(x)

        def method(self, x: Tensor) -> Tensor:
            return self.itself(x)

    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
    held = {"a list": [lambda x: model[2](x)], "a tuple": (lambda x: model[3](x),)}
    forwards = [
        Called(lambda x: model[0](x)),
        Called(lambda x: model[1](x)).method,
        lambda x: held["a list"][0](x),
        lambda x: held["a tuple"][0](x),
    ]
    staged = StagedModel(model, [Stage(str(i), model[i], f) for i, f in enumerate(forwards)])
    copied = copy.deepcopy(staged)
    x = torch.randn(2, 4)
    expected = staged(x)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(copied(x), expected)
    assert not staged(x).any()
    opt = SparseSAM(copied, sgd(copied.parameters()), rho=RHO, mask=Depth(0.5))
    opt.step(lambda forward, batch: forward(batch).pow(2).mean(), x)
    assert all(p.grad is None for p in model.parameters())
    assert not any(p.any() for p in model.parameters())


@pytest.mark.parametrize("family", ["resnet", "convnext", "vit"])
def test_what_timm_says_of_checkpointing_counts(family: str) -> None:
    plain = small_network(family).train()
    model = copy.deepcopy(plain)
    model.model.set_grad_checkpointing(True)
    runs = {}
    for name, each in (("timm's", model), ("none", plain)):
        calls = []
        hook = each.stages[0].block.register_forward_pre_hook(lambda *a, calls=calls: calls.append(1))
        opt = SparseSAM(each, sgd(each.parameters()), rho=RHO, mask=Depth(0.5))
        opt.step(loss_fn, batches(1, 8)[0])
        runs[name] = len(calls)
        hook.remove()
    assert runs["timm's"] == 2 * runs["none"]
    same(model, plain, atol=0)
