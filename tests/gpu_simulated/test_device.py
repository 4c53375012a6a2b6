"""The pretended GPU itself: it computes, it is strict where CUDA is, and what watches it sees what it should."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from ssam_scale.errors import UserError
from ssam_scale.models import check_compiler
from tests.support.pretended_gpu.watch import Watch, launches_of

DEVICES = 8


def test_it_is_a_cuda_device_with_values() -> None:
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == DEVICES
    x = torch.randn(5, 3, device="cuda:1")
    assert x.device == torch.device("cuda", 1)
    assert torch.equal((x @ x.T).relu().cpu(), (x.cpu() @ x.cpu().T).relu())


def test_backwards_and_autocast_run_on_it() -> None:
    layer = torch.nn.Linear(4, 2).cuda()
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(torch.ones(3, 4, device="cuda"))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.device.type == "cuda"
    assert torch.equal(layer.weight.grad.cpu(), torch.full((2, 4), 3.0))


def test_tensors_of_two_devices_do_not_mix() -> None:
    on_gpu = torch.ones(3, device="cuda")
    for other in (torch.ones(3), torch.ones(3, device="cuda:1")):
        with pytest.raises(RuntimeError, match="on the same device"):
            on_gpu + other
        with pytest.raises(RuntimeError, match="on the same device"):
            torch.mm(on_gpu[None], other[:, None])
    assert (on_gpu + torch.tensor(1.0)).sum().item() == 6.0  # a number may come from the host


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.index_put_((x > 0,), torch.ones((), device="cuda")),
        lambda x: torch.tensor([1.0, 2.0], device="cuda"),
        lambda x: torch.equal(x, x),
    ],
    ids=[
        "item",
        "bool",
        "to the host",
        "boolean index",
        "nonzero",
        "masked_select",
        "index_put",
        "from the host",
        "equal",
    ],
)
def test_the_host_is_seen_to_wait(wait: object) -> None:
    x = torch.randn(4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
            wait(x)  # type: ignore[operator]
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_wait_is_not_seen_to() -> None:
    x = torch.randn(4, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.where(x > 0, x, 0.0).sum()
        torch.nonzero_static(x > 0, size=4)
        x.to("cpu", non_blocking=True)
        torch.ones(3).to("cuda", non_blocking=True)
        x.index_select(0, torch.zeros(2, dtype=torch.int64, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_launches_are_counted_by_phase() -> None:
    x = torch.randn(8, device="cuda")
    with Watch() as watch:
        with watch.phases("one"):
            x.view(2, 4).mul_(2.0)
        with watch.phases("other"):
            torch._foreach_add_([x, x.clone()], 1.0)
    assert watch.total("one") == 1
    assert dict(watch.launches["other"]) == {"clone": 1, "_foreach_add_": 1}


def test_a_foreach_launches_as_often_as_its_tables_are_filled() -> None:
    small, large = [torch.empty(1)] * 1000, [torch.empty(_ := 65_536 * 321, device="meta")]
    assert launches_of("_foreach_mul_", (small, 2.0)) == -(-1000 // 110)
    assert launches_of("_foreach_add_", (small, small)) == -(-1000 // 64)
    assert launches_of("_foreach_mul_", (large, 2.0)) == 2


def test_a_stream_that_does_not_wait_is_a_race() -> None:
    def write_and_read(waits: bool) -> list[str]:
        x, side = torch.zeros(4, device="cuda"), torch.cuda.Stream()
        with Watch(races=True) as watch:
            x.add_(1.0)
            if waits:
                side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                y = x * 2.0
            if waits:
                torch.cuda.current_stream().wait_event(side.record_event())
            y.add_(1.0)
        return watch.races

    assert write_and_read(waits=True) == []
    races = write_and_read(waits=False)
    assert len(races) == 2
    assert "mul.Tensor" in races[0] or "mul" in races[0]


def test_a_wait_of_the_host_orders_everything() -> None:
    x, side = torch.zeros(4, device="cuda"), torch.cuda.Stream()
    with Watch(races=True) as watch:
        with torch.cuda.stream(side):
            x.add_(1.0)
        torch.cuda.synchronize()
        x.mul_(2.0)
    assert watch.races == []
    assert [how for how, _ in watch.host_waits] == ["torch.cuda.synchronize"]


def test_nothing_can_be_compiled_for_it_and_that_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without Triton."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    with pytest.raises(
        UserError, match=r"no code for cuda here \(Triton is not installed\); it needs Triton, "
    ) as refused:
        check_compiler(torch.device("cuda"))
    assert "\n" not in str(refused.value)
