"""What `SparseSAM` promises to a training loop of one's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale import Dense, Depth, Scored, SparseSAM
from ssam_scale.perturbation.reference import reference_step
from ssam_scale.sharding import World
from ssam_scale.sharding.place import place
from tests.support.masks import whole_mask
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.ranks import run_ranks


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    return {name: whole(t.detach()).clone() for name, t in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def sgd(module: nn.Module, **kwargs: Any) -> torch.optim.SGD:
    return torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9, **kwargs)


def closure_of(model: nn.Module, batch: Any) -> Any:
    def closure() -> torch.Tensor:
        loss = loss_fn(model, batch)
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize(
    "mask", [Dense(), Depth((0.5, 0.5)), Scored("element", 0.5)], ids=["dense", "depth", "element"]
)
def test_weights_are_perturbed_by_rho_inside_and_come_back_bit_for_bit(mask: Any) -> None:
    model = freeze_batchnorm(small_network("vit"))
    opt = SparseSAM(model, sgd(model), rho=0.3, mask=mask)
    batch = batches(1, 8)[0]
    if isinstance(mask, Scored):
        opt.refresh(loss_fn, batch)
    before = snapshot(model)
    loss_fn(model, batch).backward()
    with opt.perturbed():
        inside = snapshot(model)
        assert all(p.grad is None for p in model.parameters())
    assert same(before, snapshot(model))
    length = torch.sqrt(sum(((inside[n] - before[n]) ** 2).sum() for n in before))
    # ‖m ⊙ g‖ of the masked norm makes the length exactly ρ; subtracting rounded weights costs a few 1e-6.
    assert length.item() == pytest.approx(0.3, rel=1e-4)
    changed = sum(int((inside[n] != before[n]).sum()) for n in before)
    assert changed <= opt.plan.perturbed  # a weight whose gradient is tiny may round to itself


def _raise_in_descent(world: World, backend: str) -> bool:
    staged = freeze_batchnorm(small_network("resnet"))
    model, base = place(staged, [s.block for s in staged.stages], backend, world, lambda: sgd(staged))
    calls = []

    def failing(forward: Any, batch: Any) -> torch.Tensor:
        loss = loss_fn(forward, batch)
        calls.append(loss)
        if len(calls) == 2:
            raise ArithmeticError("in the descent")
        return loss

    opt = SparseSAM(model, base, rho=0.5, mask=Depth((0.25, 0.25)))
    before = snapshot(staged)
    with pytest.raises(ArithmeticError):
        opt.step(failing, part(batches(1, 8)[0], world.rank, world.size))
    return same(before, snapshot(staged))


@pytest.mark.parametrize(("backend", "size"), [("single", 1), ("ddp", 2), ("fsdp2", 2)])
def test_an_exception_in_the_descent_leaves_the_weights_at_w(backend: str, size: int) -> None:
    if size == 1:
        assert _raise_in_descent(World(), backend)
    else:
        assert run_ranks(size, _raise_in_descent, backend) == [True] * size


def test_rho_zero_is_the_base_optimizer_bit_for_bit() -> None:
    ours, theirs = small_network("resnet"), small_network("resnet")
    opt, base = SparseSAM(ours, sgd(ours), rho=0.0), sgd(theirs)
    for batch in batches(3, 8):
        opt.step(loss_fn, batch)
        closure_of(theirs, batch)()
        base.step()
        base.zero_grad()
    assert same(snapshot(ours), snapshot(theirs))


@pytest.mark.parametrize("mask", [Depth((0.0, 0.0)), Scored("element", 0.0), Scored("tensor", 0.0)])
def test_a_mask_that_keeps_everything_is_dense_sam(mask: Any) -> None:
    ours, theirs = freeze_batchnorm(small_network("vit")), freeze_batchnorm(small_network("vit"))
    sparse, dense = SparseSAM(ours, sgd(ours), rho=0.1, mask=mask), SparseSAM(theirs, sgd(theirs), rho=0.1)
    data = batches(3, 8)
    if isinstance(mask, Scored):
        sparse.refresh(loss_fn, data[0])
    for batch in data:
        sparse.step(loss_fn, batch)
        dense.step(loss_fn, batch)
    assert same(snapshot(ours), snapshot(theirs))


def test_batch_form_closure_and_by_hand_are_the_same_step() -> None:
    models = [small_network("resnet") for _ in range(3)]
    opts = [SparseSAM(m, sgd(m), rho=0.1, mask=Depth((0.5, 0.5))) for m in models]
    for batch in batches(3, 8):
        first = opts[0].step(loss_fn, batch)
        second = opts[1].step(closure_of(models[1], batch))
        closure_of(models[2], batch)()
        with opts[2].perturbed():
            loss_fn(models[2], batch).backward()
        opts[2].step()
        opts[2].zero_grad()
        assert first.item() == second.item()
    # By hand the second pass updates BatchNorm again, which the optimizer cannot know of: compare the weights.
    weights = [dict(m.named_parameters()) for m in models]
    for name, weight in weights[0].items():
        # The prefix of the batch form has the same arithmetic, only once.
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)
        torch.testing.assert_close(weight, weights[2][name], rtol=0, atol=1e-6)


def _flops(model: nn.Module, **kwargs: Any) -> int:
    opt = SparseSAM(model, sgd(model), **kwargs)
    batch = batches(1, 8)[0]
    if isinstance(opt.mask, Scored):
        opt.refresh(loss_fn, batch)
    with FlopCounterMode(display=False) as counter:
        opt.step(loss_fn, batch)
    return counter.get_total_flops()


def test_a_cut_pays_for_the_suffix_only() -> None:
    model = small_network("vit")
    base, dense = _flops(model, rho=0.0), _flops(model, rho=0.1)
    costs = [_flops(model, rho=0.1, mask=Depth((share, share))) for share in (0.25, 0.5, 0.75)]
    assert dense == 2 * base
    assert dense > costs[0] > costs[1] > costs[2] > base
    # Equal blocks: each block moved into the prefix saves one block's forward and backward, and a suffix also saves the
    # gradient towards its input.
    assert costs[0] - costs[1] == costs[1] - costs[2]
    block = (costs[0] - costs[1]) / base
    assert costs[1] / base == pytest.approx(1 + 2 * block, abs=0.05)


@pytest.mark.slow
def test_a_tensor_mask_pays_no_weight_gradient_for_what_it_leaves_alone() -> None:
    model = small_network("vit")
    dense = _flops(model, rho=0.1)
    sparse = _flops(model, rho=0.1, mask=Scored("tensor", 0.8))
    paper = _flops(model, rho=0.1, mask=Scored("tensor", 0.8), norm="dense")
    assert sparse < paper == dense


def test_batchnorm_statistics_are_updated_once_a_step_with_the_batch_at_w() -> None:
    for mask in (Dense(), Depth((0.5, 0.5))):
        model, expected = small_network("resnet"), small_network("resnet")
        opt = SparseSAM(model, sgd(model), rho=0.5, mask=mask)
        batch = batches(1, 8)[0]
        opt.step(loss_fn, batch)
        expected(batch[0])
        for (name, mine), theirs in zip(model.named_buffers(), expected.buffers(), strict=True):
            assert torch.equal(mine, theirs), name
        assert model.model.bn1.num_batches_tracked == 1


def test_accumulation_updates_batchnorm_once_per_micro_batch() -> None:
    model = small_network("resnet")
    opt = SparseSAM(model, sgd(model), rho=0.5, mask=Depth((0.5, 0.5)))
    opt.step(loss_fn, *batches(3, 4))
    assert model.model.bn1.num_batches_tracked == 3
    assert model.model.layer4[1].bn2.num_batches_tracked == 3


def test_refresh_leaves_no_trace_in_the_model() -> None:
    model = small_network("resnet", drop_rate=0.5)
    model.model.layer2.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    before, state = snapshot(model), torch.get_rng_state()
    opt = SparseSAM(model, sgd(model), mask=Scored("element", 0.5))
    opt.refresh(loss_fn, batches(1, 4)[0])
    assert same(before, snapshot(model))
    assert modes == {name: m.training for name, m in model.named_modules()}
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_the_fisher_score_is_the_sum_of_squared_per_sample_gradients() -> None:
    model = small_network("vit").eval()
    images, labels = batches(1, 6)[0]
    per_sample = torch.func.vmap(
        torch.func.grad(lambda p, x, y: F.cross_entropy(torch.func.functional_call(model, p, (x[None],)), y[None])),
        in_dims=(None, 0, 0),
    )({n: p.detach() for n, p in model.named_parameters()}, images, labels)
    scores = {name.removeprefix("model."): (g**2).sum(0) for name, g in per_sample.items()}
    flat = torch.cat([scores[n].reshape(-1) for n, _ in model.model.named_parameters()])
    k = flat.numel() // 2
    expected = torch.zeros_like(flat, dtype=torch.bool)
    expected[flat.sort(descending=True, stable=True).indices[:k]] = True
    opt = SparseSAM(model, sgd(model), mask=Scored("element", 0.5))
    opt.refresh(loss_fn, (images, labels))
    chosen = whole_mask(opt)  # without tensors of which nothing is
    nothing = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.model.named_parameters()}
    mine = torch.cat([m.reshape(-1) for m in (nothing | chosen).values()])
    assert int(mine.sum()) == opt.plan.perturbed == k
    # The two ways of computing a gradient round differently, which may exchange weights right at the threshold.
    assert int((mine != expected).sum()) <= k // 1000


def test_it_is_a_torch_optimizer() -> None:
    model = small_network("vit")
    base = sgd(model)
    opt = SparseSAM(model, base, rho=0.1, mask=Scored("element", 0.5))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=4)
    data = batches(4, 4)
    opt.refresh(loss_fn, data[0])
    for batch in data[:2]:
        opt.step(loss_fn, batch)
        scheduler.step()
    assert base.param_groups[0]["lr"] == pytest.approx(0.025)

    other = small_network("vit", seed=1)
    other.load_state_dict(model.state_dict())
    resumed = SparseSAM(other, sgd(other), rho=0.1, mask=Scored("element", 0.5))
    # Like any torch optimizer's, the state holds references; a file would not.
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for batch in data[2:]:
        opt.step(loss_fn, batch)
        resumed.step(loss_fn, batch)
    assert resumed.steps == 4
    assert same(snapshot(model), snapshot(other))


def test_plain_parameters_of_any_model_will_do() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    opt = SparseSAM(model.parameters(), torch.optim.Adam(model.parameters(), lr=0.05), rho=0.05)
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True)

    def closure() -> torch.Tensor:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(60)]
    assert losses[-1] < 0.1 * losses[0]


def test_frozen_parameters_stay_and_new_groups_join() -> None:
    model = small_network("vit")
    head = list(model.model.head.parameters())
    for p in head:
        p.requires_grad_(False)
    opt = SparseSAM(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), rho=0.1)
    before = [p.clone() for p in head]
    opt.step(loss_fn, batches(1, 4)[0])
    assert all(torch.equal(a, b) for a, b in zip(before, head, strict=True))
    assert all(p.requires_grad for p in model.model.blocks.parameters())
    perturbed = opt.plan.perturbed
    for p in head:
        p.requires_grad_(True)
    opt.add_param_group({"params": head, "lr": 0.2})
    assert opt.plan.perturbed == perturbed + sum(p.numel() for p in head)
    opt.step(loss_fn, batches(1, 4)[0])
    assert not any(torch.equal(a, b) for a, b in zip(before, head, strict=True))


def test_misuse_is_an_error_at_construction() -> None:
    model, other = small_network("vit"), small_network("vit")
    with pytest.raises(ValueError, match="rho is -1"):
        SparseSAM(model, sgd(model), rho=-1)
    with pytest.raises(ValueError, match="not the model's"):
        SparseSAM(model, sgd(other))
    with pytest.raises(ValueError, match="'dense' needs the gradient of the prefix"):
        SparseSAM(model, sgd(model), norm="dense", mask=Depth())
    with pytest.raises(ValueError, match="sparsity is 1"):
        Scored("element", 1.0)
    with pytest.raises(ValueError, match="cut is"):
        Depth((0.6, 0.4))
    with pytest.raises(RuntimeError, match=r"call SparseSAM\.refresh"):
        SparseSAM(model, sgd(model), mask=Scored()).step(loss_fn, batches(1, 4)[0])
    with pytest.raises(TypeError, match="nothing to refresh"):
        SparseSAM(model, sgd(model)).refresh(loss_fn, batches(1, 4)[0])


def test_autocast_around_the_whole_step_sees_the_perturbed_weights() -> None:
    models = [freeze_batchnorm(small_network("vit")) for _ in range(2)]
    opts = [SparseSAM(m, sgd(m), rho=0.5, mask=Depth((0.5, 0.5))) for m in models]

    def inner(forward: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    def outer(forward: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(forward(batch[0]).float(), batch[1])

    for batch in batches(2, 8):
        opts[0].step(inner, batch)
        with torch.autocast("cpu", torch.bfloat16):
            opts[1].step(outer, batch)
    assert same(snapshot(models[0]), snapshot(models[1]))


def test_bf16_autocast_with_a_shared_prefix_stays_near_the_reference() -> None:
    ours, theirs = freeze_batchnorm(small_network("vit")), freeze_batchnorm(small_network("vit"))
    opt, base = SparseSAM(ours, sgd(ours), rho=0.1, mask=Depth((0.5, 0.5))), sgd(theirs.model)

    def in_bf16(forward: Any, batch: Any) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(batch[0])
        return F.cross_entropy(logits.float(), batch[1])

    for batch in batches(3, 8):
        mask = {name: torch.ones(opt.parameters.by_name[name].shape) for name in opt.plan.weights}
        opt.step(in_bf16, batch)
        reference_step(theirs.model, base, in_bf16, batch, rho=0.1, mask=mask, norm="masked")
    moved = [(a - b).norm() for a, b in zip(ours.parameters(), small_network("vit").parameters(), strict=True)]
    apart = [(a - b).norm() for a, b in zip(ours.parameters(), theirs.parameters(), strict=True)]
    # bf16 has 8 bits: gradients agree to about 1%, and so do the ways that the weights went.
    assert torch.stack(apart).norm() < 0.02 * torch.stack(moved).norm()


def test_a_step_after_a_failed_one_is_as_if_it_had_not_been() -> None:
    models = [freeze_batchnorm(small_network("vit")) for _ in range(2)]
    opts = [SparseSAM(m, sgd(m), rho=0.1, mask=Depth((0.5, 0.5))) for m in models]
    first, second = batches(2, 8)

    def failing(forward: Any, batch: Any) -> torch.Tensor:
        loss = loss_fn(forward, batch)
        loss.backward()
        raise MemoryError

    with pytest.raises(MemoryError):
        opts[0].step(failing, first)
    for opt in opts:
        opt.step(loss_fn, second)
    assert same(snapshot(models[0]), snapshot(models[1]))


def test_what_a_shared_prefix_cannot_serve_is_an_error_that_says_so() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, sgd(model), rho=0.1, mask=Depth((0.5, 0.5)))
    batch = batches(1, 4)[0]
    with pytest.raises(ValueError, match="draw the input before `step`"):
        opt.step(lambda forward, b: loss_fn(forward, (b[0].clone(), b[1])), batch)
    with pytest.raises(ValueError, match="called `forward` twice"):
        opt.step(lambda forward, b: loss_fn(forward, b) + loss_fn(forward, b), batch)


def test_param_groups_stay_the_base_optimizers_after_loading() -> None:
    model = small_network("vit")
    base = sgd(model)
    opt = SparseSAM(model, base, rho=0.1)
    base.load_state_dict(base.state_dict())
    assert opt.param_groups is base.param_groups
    opt.param_groups[0]["lr"] = 0.125
    assert base.param_groups[0]["lr"] == 0.125
    assert opt.state is base.state
