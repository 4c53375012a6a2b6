"""How many kernels perturbing and restoring take at the size of a real network: few, however many tensors it has."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from ssam_scale.masks import NM, Dense, Depth, Mask, Norms, ScoreBased, Scored, flat
from ssam_scale.models import staged
from ssam_scale.perturbation import SparseSAM
from tests.support.pretended_gpu.watch import Watch

MASKS: dict[str, Callable[[], Mask]] = {
    "dense": Dense,
    "cut": lambda: Depth((0.5, 0.5)),
    "tensor": lambda: Scored("tensor", 0.5, score="random"),
    "norm": Norms,
    "element": lambda: Scored("element", 0.5, score="random"),
    "row": lambda: Scored("row", 0.5, score="random"),
    "2:4": lambda: NM(2, 4, score="random", indivisible="unperturbed"),
}
SUBSETS, WHOLE = 90, 40  # launches of masks within tensors, and of those that leave tensors whole


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sixteenth of the weights, in groups of a sixteenth: as many launches as at full size."""
    monkeypatch.setattr(flat, "LIMIT", flat.LIMIT // 16)


def resnet50(dtype: torch.dtype) -> nn.Module:
    """Its 161 tensors, at a quarter of the width, in channels_last and with gradients; its normalization in float32."""
    import timm

    torch.manual_seed(0)
    model: nn.Module = timm.create_model("resnet50", channels=(24, 32, 64, 128), num_classes=250)
    model.to("cuda", dtype, memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    return model


@pytest.mark.parametrize(
    ("mask", "dtype"),
    [
        *((mask, torch.float32) for mask in MASKS if mask not in ("row", "2:4")),
        ("dense", torch.bfloat16),
        # Triton's interpreter takes seconds for them.
        *(pytest.param(mask, torch.float32, marks=pytest.mark.slow) for mask in ("row", "2:4")),
        *(pytest.param(mask, torch.bfloat16, marks=pytest.mark.slow) for mask in ("element", "2:4")),
    ],
    ids=str,
)
def test_perturbing_takes_few_launches_and_no_wait(mask: str, dtype: torch.dtype) -> None:
    network = staged(resnet50(dtype))
    watch = Watch()
    opt = SparseSAM(network, torch.optim.SGD(network.parameters(), lr=0.1), rho=100.0, mask=MASKS[mask]())
    opt._phases = opt._perturbation._phases = watch.phases
    if isinstance(opt.mask, ScoreBased):
        opt.refresh()
    assert len(opt.parameters.by_name) == 161
    before = [p.detach().clone() for p in network.parameters()]
    with watch, opt.perturbed():
        inside = [p.detach().clone() for p in network.parameters()]
    assert not watch.host_waits
    assert watch.total("perturb") <= (SUBSETS if opt.plan.perturbs_subsets or dtype != torch.float32 else WHOLE)
    assert sum(not torch.equal(w, b) for w, b in zip(inside, before, strict=True)) >= len(opt.plan.weights) - 1
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
