"""Steps on a pretended GPU: every mask, norm and option computes what it does on the CPU, and the host never waits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssam_scale import Depth, Scored, SparseSAM
from tests.support.cases import CASES, each_option_once
from tests.support.networks import batches, loss_fn, small_network
from tests.support.pretended_gpu.watch import Watch
from tests.support.training import BATCH, Case, halved, on

CUDA = torch.device("cuda")
# Batches of images in channels_last are summed in another order than in contiguous ones.
TOLERANCE = 1e-5


def stepped(case: Case, device: torch.device) -> tuple[dict[str, torch.Tensor], Watch]:
    """The weights after three steps on a device, and what was seen of the last two."""
    case = replace(case, scaled=False)
    model = case.make_model().to(device)
    if device.type == "cuda":
        model.to(memory_format=torch.channels_last)
    base = case.make_optimizer(model)
    halved(base)  # notes the learning rates at the start, which a schedule may go by
    opt = case.make_sam(model, base)
    watch = Watch()
    opt._phases = opt._perturbation._phases = watch.phases
    for index, batch in enumerate(batches(3, BATCH)):
        micro_batches = [on(device, part) for part in zip(*(t.chunk(case.accumulation) for t in batch), strict=True)]
        if opt.refresh_is_due:
            opt.refresh(case.loss_fn, *micro_batches, samples=4)
        if index == 0:  # makes the optimizer's state
            opt.step(case.loss_fn, *micro_batches)
            continue
        with watch:
            opt.step(case.loss_fn, *micro_batches)
    return {name: p.detach().cpu() for name, p in model.named_parameters()}, watch


# Triton's interpreter takes seconds for masks within tensors, of which the quick tier has one.
WITHIN_TENSORS = [name for name in CASES if any(mask in name for mask in ("element", "row", "1:4", "dynamic"))]
SAYS_MORE = each_option_once()


def tier_of(name: str) -> list[pytest.MarkDecorator]:
    """The tier of a case's test: later where it takes longer, and where it says nothing that no other says."""
    if name in WITHIN_TENSORS[1:]:
        return [pytest.mark.slow] if name in SAYS_MORE else [pytest.mark.exhaustive]
    return [] if name in [*SAYS_MORE, *WITHIN_TENSORS] else [pytest.mark.slow]


@pytest.mark.parametrize("name", [pytest.param(name, marks=tier_of(name)) for name in CASES])
def test_a_step_is_the_cpus_and_the_host_never_waits(name: str) -> None:
    case = CASES[name]
    on_gpu, watch = stepped(case, CUDA)
    # A gate asks in each of the two steps whether it is open.
    assert sum(watch.host_waits.values()) == (2 if case.gate is not None else 0)
    if case.precision == torch.float32:
        on_cpu, _ = stepped(case, torch.device("cpu"))
        for parameter, expected in on_cpu.items():
            torch.testing.assert_close(on_gpu[parameter], expected, rtol=0, atol=TOLERANCE)


def test_a_step_with_a_grad_scaler_waits_once_for_the_scale() -> None:
    """As torch's `GradScaler.step` does, which has to know whether to step."""
    model = small_network("vit").to(CUDA)
    scaler = torch.amp.GradScaler("cuda", init_scale=8.0)
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler, mask=Depth())
    [batch] = [on(CUDA, batch) for batch in batches(1, BATCH)]
    opt.step(loss_fn, batch)
    with Watch() as watch:
        opt.step(loss_fn, batch)
    assert sum(watch.host_waits.values()) == 1
    assert all("sharding/unsharded.py" in place for _, place in watch.host_waits)  # scaler.step


class Waits:
    """A loss function that asks for a value, as people write them."""

    def __call__(self, forward: object, batch: object) -> torch.Tensor:
        loss = loss_fn(forward, batch)
        self.seen = loss.item()
        return loss


def test_a_wait_in_a_step_is_seen_with_its_place() -> None:
    model = small_network("vit").to(CUDA)
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    [batch] = [on(CUDA, batch) for batch in batches(1, BATCH)]
    with Watch() as watch:
        opt.step(Waits(), batch)
    assert sum(watch.host_waits.values()) == 2  # in both passes
    assert {what for what, _ in watch.host_waits} == {"_local_scalar_dense"}
    assert all("test_steps.py" in place for _, place in watch.host_waits)


def test_a_parameter_left_on_the_cpu_is_refused_as_on_a_gpu() -> None:
    model = small_network("vit").to(CUDA)
    model.model.head.cpu()
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1))
    [batch] = [on(CUDA, batch) for batch in batches(1, BATCH)]
    with pytest.raises(RuntimeError, match="on the same device"):
        opt.step(loss_fn, batch)


@pytest.mark.parametrize("unit", ["element", "row", "tensor"])
def test_a_refresh_waits_as_often_for_many_samples_as_for_few(unit: str) -> None:
    """Choosing a mask needs values on the host, but not for each sample."""
    waits = []
    for samples in (4, 16):
        model = small_network("vit").to(CUDA)
        opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=Scored(unit, 0.5))
        [batch] = [on(CUDA, batch) for batch in batches(1, BATCH)]
        with Watch() as watch:
            opt.refresh(loss_fn, batch, samples=samples)
        waits.append(sum(watch.host_waits.values()))
    assert waits[0] == waits[1] > 0
