"""Parts of a shard hold what booleans would, in less memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssam_scale.masks import Bits, Part, Rows, add_, compacted, pack, parts, popcount, unpack

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=["compiled", "in chunks"])
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The way of the CPU, and that of other devices with chunks that are small enough to have several."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in chunks":
            patch.setattr(parts, "_streams", lambda tensor: False)
            patch.setattr(parts, "_CHUNK", 16)
            patch.setattr(parts, "_ROWS_CHUNK", 16)
        yield


def check(part: Part, booleans: Tensor, dtype: torch.dtype) -> None:
    numel = booleans.numel()
    assert (part.count, part.numel) == (int(booleans.sum()), numel)
    assert torch.equal(part.booleans(), booleans)
    source = torch.randn(numel).to(dtype)
    assert torch.equal(part.take(source), source[booleans])
    target, values = source.clone(), torch.randn(part.count).to(dtype)
    part.put(target, values)
    expected = source.clone()
    expected[booleans] = values
    assert torch.equal(target, expected)
    if dtype != torch.float64:
        summands = torch.randn(part.count)
        add_([target], [part], [summands])
        expected[booleans] = (expected[booleans].float() + summands).to(dtype)
        assert torch.equal(target, expected)
    memory = source.clone()
    [front] = compacted([memory], [part])
    assert torch.equal(front, source[booleans])
    assert not part.count or front.data_ptr() == memory.data_ptr()


@pytest.mark.usefixtures("_way")
@given(st.lists(st.booleans(), max_size=70), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_bits_are_booleans(values: list[bool], dtype: torch.dtype) -> None:
    booleans = torch.tensor(values, dtype=torch.bool)
    packed = pack(booleans)
    assert packed.numel() == math.ceil(len(values) / 8)
    assert popcount(packed) == sum(values)
    assert torch.equal(unpack(packed)[: len(values)], booleans)
    check(Bits(packed, len(values)), booleans, dtype)


@pytest.mark.usefixtures("_way")
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(1, 7), st.data())
@settings(max_examples=60, deadline=None)
def test_rows_may_begin_and_end_within_a_shard(keep: list[bool], size: int, data: st.DataObject) -> None:
    whole = torch.tensor(keep).repeat_interleave(size)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    part = Rows(torch.tensor(keep), size, start, stop - start, torch.device("cpu"))
    check(part, whole[start:stop], torch.float32)


@pytest.mark.usefixtures("_way")
def test_the_order_is_row_major_whatever_the_strides() -> None:
    booleans = torch.rand(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = torch.tensor([True, False, False, True])
    for part, chosen in (
        (Bits(pack(booleans), 120), booleans),
        (Rows(rows, 30, 0, 120, torch.device("cpu")), rows.view(4, 1, 1, 1).expand(booleans.shape)),
    ):
        source = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
        values = part.take(source)
        assert torch.equal(values, source[chosen])
        assert torch.equal(compacted([source.clone()], [part])[0], values)
        expected = source.clone()
        expected[chosen] = -values
        part.put(source, -values)
        assert torch.equal(source, expected)
        assert source.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_a_gpu_moves_what_the_cpu_moves_without_the_host_waiting() -> None:
    booleans = torch.rand(3000, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    rows = torch.rand(3000, generator=torch.Generator().manual_seed(1)) < 0.3
    source = torch.randn(3000, 7)
    there = source.cuda()
    for here, part in (
        (Bits(pack(booleans), 21000), Bits(pack(booleans).cuda(), 21000)),
        (Rows(rows, 7, 3, 20990, torch.device("cpu")), Rows(rows, 7, 3, 20990, torch.device("cuda"))),
    ):
        start = source.numel() - here.numel
        mine, theirs = source.view(-1)[start:].clone(), there.view(-1)[start:].clone()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            values = part.take(theirs)
            part.put(theirs, values * 2)
            add_([theirs], [part], [values])
            [front] = compacted([theirs.clone()], [part])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        here.put(mine, here.take(mine) * 2)
        add_([mine], [here], [values.cpu()])
        assert torch.equal(theirs.cpu(), mine)
        assert torch.equal(front.cpu(), here.take(mine))
