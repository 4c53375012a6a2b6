"""Fused base optimizers: which they are, that they compute the same, and what a loss scaler makes of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale import SparseSAM
from ssam_scale.perturbation import StagedModel
from ssam_scale.perturbation.fused import fit_state, fused_options
from ssam_scale.perturbation.reference import length_of
from tests.support.networks import batches, small_network
from tests.support.ranks import run_ranks
from tests.support.training import Case, check, train

# The same arithmetic in another order of operations; AdamW divides by the root of what it sums.
TOLERANCE = 1e-6
TORCHS: dict[Any, dict[str, Any]] = {
    torch.optim.SGD: {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
    # A large eps: a float error of a vanishing gradient is divided by the root of its second moment.
    torch.optim.Adam: {"lr": 1e-2, "weight_decay": 1e-2, "eps": 1e-3},
    torch.optim.AdamW: {"lr": 1e-2, "weight_decay": 1e-1, "eps": 1e-3},
}


class Own(torch.optim.SGD):
    """Steps in a way of its own, for all that is known."""


def test_torchs_own_optimizers_are_fused_where_torch_can_and_nobody_has_decided() -> None:
    parameters = list(nn.Linear(3, 2).parameters())
    for optimizer in TORCHS:
        assert fused_options(optimizer, parameters) == {"fused": True}
        assert fused_options(optimizer, parameters, {"eps": 1e-3}) == {"fused": True}
        for decided in ({"fused": False}, {"fused": True}, {"foreach": True}, {"differentiable": True}):
            assert fused_options(optimizer, parameters, decided) == {}
    for optimizer in (Own, torch.optim.RAdam, torch.optim.Rprop):
        assert fused_options(optimizer, parameters) == {}
    for unable in (torch.zeros(2, dtype=torch.complex64), torch.zeros(2, device="meta")):
        assert fused_options(torch.optim.SGD, [*parameters, nn.Parameter(unable)]) == {}


@pytest.mark.parametrize("optimizer", TORCHS, ids=lambda optimizer: optimizer.__name__)
def test_a_fused_step_is_the_foreach_step(optimizer: Any) -> None:
    networks = [small_network("resnet").model for _ in range(2)]
    foreach, fused = (
        optimizer(network.parameters(), **TORCHS[optimizer], **how)
        for network, how in zip(networks, ({"foreach": True}, {"fused": True}), strict=True)
    )
    for step in range(5):
        for network in networks:
            generator = torch.Generator().manual_seed(step)
            for p in network.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
        foreach.step()
        fused.step()
    for (name, one), other in zip(networks[0].named_parameters(), networks[1].parameters(), strict=True):
        torch.testing.assert_close(other, one, rtol=TOLERANCE, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize("optimizer", TORCHS, ids=lambda optimizer: optimizer.__name__)
def test_a_loss_scaler_unscales_clips_and_skips_as_before(optimizer: Any) -> None:
    """It hands a fused optimizer `found_inf` and would have it unscale gradients that the step has unscaled already."""
    clip = 0.05  # below the gradient's norm, scaled and unscaled

    def trained(**how: Any) -> tuple[dict[str, Tensor], list[float], list[float]]:
        model = small_network("vit").train()
        base = optimizer(model.parameters(), **TORCHS[optimizer], **how)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        opt = SparseSAM(model, base, rho=0.05, max_grad_norm=clip, scaler=scaler)
        scales, moved = [], []
        for step, batch in enumerate(batches(5, 4)):
            factor = float("inf") if step == 2 else 1.0

            def loss_fn(forward: Any, batch: Any, factor: float = factor) -> Tensor:
                return F.cross_entropy(forward(batch[0]), batch[1]) * factor

            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            opt.step(loss_fn, batch)
            moved.append(float(length_of({name: p.detach() - before[name] for name, p in model.named_parameters()})))
            scales.append(scaler.get_scale())
        return {name: p.detach() for name, p in model.named_parameters()}, scales, moved

    foreach, scales, moved = trained(foreach=True)
    fused, fused_scales, fused_moved = trained(fused=True)
    assert fused_scales == scales == [2.0**10, 2.0**11, 2.0**10, 2.0**10, 2.0**11]
    assert fused_moved[2] == moved[2] == 0.0
    assert min(fused_moved[:2] + fused_moved[3:]) > 0.0
    for name, expected in foreach.items():
        torch.testing.assert_close(fused[name], expected, rtol=0.0, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", TORCHS, ids=lambda optimizer: optimizer.__name__)
def test_state_that_was_loaded_lies_as_the_weights_do(optimizer: Any) -> None:
    """Fused kernels go by the order in memory, and checkpoints hold tensors row by row."""

    def stepped(loads: bool, **how: Any) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(4, 3, 2, 2, generator=generator).to(memory_format=torch.channels_last)
        p = nn.Parameter(weight)
        base = optimizer([p], **TORCHS[optimizer], **how)
        for _ in range(3):
            p.grad = torch.randn(p.shape, generator=generator).to(memory_format=torch.channels_last)
            base.step()
            if loads:
                for entry, value in base.state[p].items():
                    base.state[p][entry] = value.contiguous()
                fit_state(base)
        return p.detach()

    expected = stepped(loads=False, foreach=True)
    torch.testing.assert_close(stepped(loads=True, fused=True), expected, rtol=TOLERANCE, atol=TOLERANCE)


@dataclass(frozen=True)
class Fused(Case):
    """A case whose base optimizer is fused, and the reference's not."""

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        optimizer = super().make_optimizer(model)
        if not isinstance(model, StagedModel):
            return optimizer
        kept = ("lr", "rho", "momentum", "weight_decay", "eps", "params")
        groups = [{key: value for key, value in group.items() if key in kept} for group in optimizer.param_groups]
        return type(optimizer)(groups, **fused_options(type(optimizer), model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "fsdp2", "zero0", "zero1", "zero2", "zero3"])
def test_every_backend_steps_it(backend: str) -> None:
    cases: list[Case] = [Fused("vit", "moving cut"), Fused("vit", "element", optimizer="adamw")]
    if backend in ("ddp", "fsdp2"):
        cases.append(Fused("vit", "dense", optimizer="adamw", scaled=True))
    for case in cases:
        check([case], run_ranks(2, train, backend, [case]), backend)
