"""Parts of a shard hold what booleans would, in less memory."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ssam_scale.masks import (
    Backup,
    BitMask,
    Rows,
    Subset,
    flat,
    masked,
    masked_add_,
    masked_scatter_,
    masked_select,
    masked_squares,
    pack,
    popcount,
    unpack,
)
from ssam_scale.masks.kernels import move
from tests.support.subsets import Given, tensors
from tests.support.triton import interpreted

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.fixture(params=["compiled", "flat", "triton"])
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The way of the CPU, that of any device, and that of a GPU."""
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        if request.param == "flat":
            patch.setattr(move, "streams", lambda tensor: False)
        if request.param == "triton":
            stack.enter_context(interpreted())
        yield


def check(part: Subset, booleans: Tensor, dtype: torch.dtype) -> None:
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
    summands = torch.randn(part.count)
    masked_add_([target], [part], [summands])
    wide = torch.promote_types(dtype, torch.float32)
    expected[booleans] = (expected[booleans].to(wide) + summands).to(dtype)
    # Triton's interpreter cuts bfloat16 off, where a GPU rounds.
    unit = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(target, expected, rtol=unit, atol=0.0)
    [square], whole = masked_squares([source], [part], every=True)
    assert float(square) == pytest.approx(float(source[booleans].double().square().sum()), rel=1e-6)
    assert whole is not None
    assert float(whole) == pytest.approx(float(source.double().square().sum()), rel=1e-6)


@pytest.mark.usefixtures("_way")
@given(st.lists(st.booleans(), max_size=70), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_bits_are_booleans(values: list[bool], dtype: torch.dtype) -> None:
    booleans = torch.tensor(values, dtype=torch.bool)
    packed = pack(booleans)
    assert packed.numel() == math.ceil(len(values) / 8)
    assert popcount(packed) == sum(values)
    assert torch.equal(unpack(packed)[: len(values)], booleans)
    check(BitMask(packed, len(values)), booleans, dtype)


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
        (BitMask(pack(booleans), 120), booleans),
        (Rows(rows, 30, 0, 120, torch.device("cpu")), rows.view(4, 1, 1, 1).expand(booleans.shape)),
    ):
        source = torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last)
        values = part.take(source)
        assert torch.equal(values, source[chosen])
        expected = source.clone()
        expected[chosen] = -values
        part.put(source, -values)
        assert torch.equal(source, expected)
        assert source.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_moves_many_tensors_at_once(threads: int) -> None:
    """Large enough together for three of them, and alone for tasks within a tensor; one lies at an odd address."""
    generator = torch.Generator().manual_seed(0)
    sizes, density = [1_500_001, 64, 0, 700_000, 63, 900_005], 0.4
    booleans = [torch.rand(n, generator=generator) < density for n in sizes]
    rows = torch.rand(9000, generator=generator) < density
    booleans.append(rows.repeat_interleave(100)[250:])
    packed = [torch.cat([torch.zeros(1, dtype=torch.uint8), pack(b)])[1:] for b in booleans[:-1]]
    some: list[Subset | None] = [BitMask(p, n) for p, n in zip(packed, sizes, strict=True)]
    some.append(Rows(rows, 100, 250, 899_750, torch.device("cpu")))
    some.append(None)
    booleans.append(torch.ones(1000, dtype=torch.bool))
    sources = [torch.randn(len(b), generator=generator) for b in booleans]
    expected = [s[b] for s, b in zip(sources, booleans, strict=True)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        values = masked_select(sources, some)
        summed = [s.clone() for s in sources]
        masked_add_(summed, some, values)
        written = [torch.zeros_like(s) for s in sources]
        masked_scatter_(written, some, values)
        squares, _ = masked_squares(sources, some)
    finally:
        torch.set_num_threads(before)
    for i, (source, chosen) in enumerate(zip(sources, booleans, strict=True)):
        assert torch.equal(values[i], expected[i])
        assert float(squares[i]) == pytest.approx(float(expected[i].double().square().sum()), rel=1e-6)
        assert torch.equal(summed[i], torch.where(chosen, source + source, source))
        assert torch.equal(written[i], torch.where(chosen, source, 0.0))


def test_values_that_do_not_fit_are_refused_before_anything_is_written() -> None:
    part = BitMask(pack(torch.tensor([True, False, True])), 3)
    target = torch.zeros(3)
    for values in (torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(4)[::2]):
        with pytest.raises(ValueError, match="do not fit 2 of 3 elements"):
            part.put(target, values)
    assert not target.any()


def test_bits_that_stand_for_nothing_are_refused() -> None:
    """Compiled loops go by every bit that is set: one beyond the tensor would write beyond its memory."""
    for packed, numel in ((torch.tensor([8], dtype=torch.uint8), 3), (torch.tensor([1, 0], dtype=torch.uint8), 3)):
        with pytest.raises(ValueError, match="do not stand for 3 elements"):
            BitMask(packed, numel)


@pytest.mark.parametrize("size", [8, 16, 64])
def test_counts_are_those_of_equal_parts(size: int) -> None:
    booleans = torch.rand(100, generator=torch.Generator().manual_seed(0)) < 0.5
    rows = torch.tensor([True, False, True, True, False])
    for part in (BitMask(pack(booleans), 100), Rows(rows, 30, 13, 100, torch.device("cpu"))):
        flags = part.booleans()
        assert part.counts(size) == [int(chunk.sum()) for chunk in flags.split(size)]
        assert part.counts(104) == [part.count] == [int(flags.sum())]
        assert torch.equal(unpack(part.bits)[:100], flags)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@given(given=tensors(wholes=True), compact=st.booleans(), every=st.booleans(), when=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_gpus_kernels_do_what_those_of_any_device_do(
    device: str, given: list[Given], compact: bool, every: bool, when: bool
) -> None:
    """Bit for bit, but for the order of sums and one rounding less of a product."""
    there = [g.tensor.to(device) for g in given]
    booleans = [g.booleans.to(device) for g in given]
    gradients = [g.gradient.to(device) for g in given]
    factors = [0.7 + i % 3 for i in range(len(given))]
    scale: dict[str, Any] = {"alpha": torch.tensor(0.3).to(device), "when": torch.tensor(when).to(device)}
    found = []
    for by_any in (False, True):
        with contextlib.ExitStack() as stack:
            if device == "cpu":
                stack.enter_context(interpreted())
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            if by_any:
                patch.setattr(masked, "_gpu", lambda: None)
            assert (masked._launches([torch.ones(3, device=device)]) is flat) == by_any
            parts = [
                None if g.subset is None else BitMask(pack(b), b.numel()) for g, b in zip(given, booleans, strict=True)
            ]
            zipped = zip(gradients, booleans, parts, strict=True)
            values = [v[b] if compact and part is not None else v for v, b, part in zipped]
            selected = masked_select(there, parts)
            written, added, backup = [torch.zeros_like(t) for t in there], [t.clone() for t in there], Backup()
            masked_scatter_(written, parts, selected)
            squares, _ = masked_squares(there, parts, every=every)
            masked_add_(added, parts, values, factors=factors, backup=backup, **scale)
            found.append((selected, written, squares, [t.clone() for t in added]))
            backup.restore_()
            assert all(torch.equal(a, t) for a, t in zip(added, there, strict=True))
    (selected, written, squares, added), (selected_too, written_too, squares_too, added_too) = found
    assert all(torch.equal(a, b) for a, b in zip(selected + written, selected_too + written_too, strict=True))
    torch.testing.assert_close(squares, squares_too, rtol=1e-6, atol=1e-12, check_dtype=False)
    for gradient, a, b in zip(gradients, added, added_too, strict=True):
        # A unit of the result, which may be rounded the other way (the interpreter cuts off), and of products.
        product = torch.finfo(torch.promote_types(a.dtype, torch.float32)).eps * gradient.to(a.dtype).abs()
        assert ((a - b).abs() <= torch.finfo(a.dtype).eps * b.abs() + product).all()


@pytest.mark.usefixtures("_way")
def test_a_summand_lies_in_memory_in_whatever_order() -> None:
    booleans = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.7
    target, summand = torch.zeros(3, 4), torch.arange(1.0, 13.0).view(4, 3).T
    masked_add_([target], [BitMask(pack(booleans), 12)], [summand])
    assert torch.equal(target, torch.where(booleans, summand, 0.0))


@pytest.mark.gpu
def test_a_gpu_moves_what_the_cpu_moves_without_the_host_waiting() -> None:
    booleans = torch.rand(3000, 7, generator=torch.Generator().manual_seed(0)) < 0.3
    rows = torch.rand(3000, generator=torch.Generator().manual_seed(1)) < 0.3
    source = torch.randn(3000, 7)
    there = source.cuda()
    alpha, yes = torch.tensor(0.5), torch.tensor(True)
    for here, part in (
        (BitMask(pack(booleans), 21000), BitMask(pack(booleans).cuda(), 21000)),
        (Rows(rows, 7, 3, 20990, torch.device("cpu")), Rows(rows, 7, 3, 20990, torch.device("cuda"))),
        (None, None),
    ):
        start = source.numel() - (21000 if here is None else here.numel)
        mine, theirs = source.view(-1)[start:].clone(), there.view(-1)[start:].clone()
        before, gradient = mine.clone(), torch.randn(mine.shape)
        on_device = gradient.cuda(), alpha.cuda(), yes.cuda()
        backup = Backup()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            [values] = masked_select([theirs], [part])
            masked_scatter_([theirs], [part], [values * 2])
            [squares], _ = masked_squares([theirs], [part])
            masked_add_([theirs], [part], [on_device[0]], alpha=on_device[1], when=on_device[2], backup=backup)
            perturbed = theirs.clone()
            backup.restore_()
            masked_scatter_([theirs], [part], [values])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        masked_scatter_([mine], [here], [masked_select([mine], [here])[0] * 2])
        assert float(squares) == pytest.approx(float(masked_squares([mine], [here])[0]), rel=1e-6)
        masked_add_([mine], [here], [gradient], alpha=alpha, when=yes)
        torch.testing.assert_close(perturbed.cpu(), mine, rtol=1e-6, atol=0)
        assert torch.equal(theirs.cpu(), before)
