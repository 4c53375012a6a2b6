"""Lists of tensors, subsets of them and whole ones, are read, written and added to as by boolean indexing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
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
    flat,
    masked_add_,
    masked_scatter_,
    masked_select,
    masked_squares,
    pack,
)
from ssam_scale.masks.kernels import move
from tests.support.subsets import Given, tensors
from tests.support.triton import interpreted


@pytest.fixture(params=["as they come", "triton"])
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Subsets with and without compiled loops; and a GPU's kernels."""
    with interpreted() if request.param == "triton" else contextlib.nullcontext():
        yield


@pytest.mark.usefixtures("_way")
@settings(max_examples=80, deadline=None)
@given(tensors(wholes=True))
def test_selecting_and_scattering_are_boolean_indexing(given: list[Given]) -> None:
    sources, subsets = [g.tensor for g in given], [g.subset for g in given]
    values = masked_select(sources, subsets)
    for g, value in zip(given, values, strict=True):
        assert torch.equal(value, g.tensor if g.subset is None else g.tensor[g.booleans])
    targets = [g.tensor.clone() for g in given]
    masked_scatter_(targets, subsets, [-value for value in values])
    for g, target in zip(given, targets, strict=True):
        assert torch.equal(target, torch.where(g.booleans, -g.tensor, g.tensor))


@pytest.mark.usefixtures("_way")
@settings(max_examples=80, deadline=None)
@given(tensors(wholes=True), st.booleans())
def test_squares_are_those_of_the_elements_and_of_everything(given: list[Given], every: bool) -> None:
    squares, whole = masked_squares([g.tensor for g in given], [g.subset for g in given], every=every)
    assert squares.dtype in (torch.float32, *(g.tensor.dtype for g in given if g.tensor.dtype == torch.float64))
    for g, square in zip(given, squares, strict=True):
        assert float(square) == pytest.approx(float(g.tensor[g.booleans].double().square().sum()), rel=1e-6)
    assert (whole is not None) == every
    for g, square in zip(given, [] if whole is None else whole, strict=every):
        assert float(square) == pytest.approx(float(g.tensor.double().square().sum()), rel=1e-6)


@pytest.mark.usefixtures("_way")
@settings(max_examples=120, deadline=None)
@given(tensors(wholes=True), st.booleans(), st.booleans(), st.sampled_from([None, True, False]))
def test_adding_is_exact_to_a_rounding_and_undone_to_the_bit(
    given: list[Given], scaled: bool, compact: bool, when: bool | None
) -> None:
    targets, subsets = [g.tensor.clone() for g in given], [g.subset for g in given]
    values = [g.gradient[g.booleans] if compact and g.subset is not None else g.gradient for g in given]
    factors = [0.7 + i % 3 for i in range(len(given))]
    backup = Backup()
    masked_add_(
        targets,
        subsets,
        values,
        alpha=torch.tensor(0.3) if scaled else None,
        factors=factors if scaled else None,
        when=None if when is None else torch.tensor(when),
        backup=backup,
    )
    for i, (g, target) in enumerate(zip(given, targets, strict=True)):
        product = (0.3 * factors[i] if scaled else 1.0) * g.gradient.double()
        summed = g.tensor.double() + product
        expected = g.tensor.double() if when is False else torch.where(g.booleans, summed, g.tensor.double())
        unit = max(torch.finfo(g.tensor.dtype).eps, torch.finfo(torch.float32).eps)
        # Of the sum half a unit of its size; of the product, in float32 at least, one and a half of its.
        most = unit * expected.abs() + 1.5 * torch.finfo(torch.float32).eps * product.abs()
        assert ((target.double() - expected).abs() <= most).all()
        assert torch.equal(target[~g.booleans], g.tensor[~g.booleans])
    backup.restore_()
    for g, target in zip(given, targets, strict=True):
        assert torch.equal(target, g.tensor)
        assert target.stride() == g.tensor.clone().stride()


@pytest.mark.usefixtures("_way")
@settings(max_examples=60, deadline=None)
@given(tensors(wholes=True), st.booleans(), st.sampled_from([None, True, False]))
def test_what_is_added_to_a_source_is_rounded_into_the_tensor(
    given: list[Given], compact: bool, when: bool | None
) -> None:
    """Of weights that are rounded masters; the sum is float32 before it is rounded."""
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(g.tensor.shape, generator=generator) for g in given]
    targets = [g.tensor.clone().copy_(source) for source, g in zip(sources, given, strict=True)]
    before = [target.clone() for target in targets]
    values = [g.gradient[g.booleans] if compact and g.subset is not None else g.gradient for g in given]
    backup = Backup()
    masked_add_(
        targets,
        [g.subset for g in given],
        values,
        alpha=torch.tensor(0.5),
        when=None if when is None else torch.tensor(when),
        backup=backup,
        sources=sources,
    )
    for g, source, target, was in zip(given, sources, targets, before, strict=True):
        summed = (source + 0.5 * g.gradient.float()).to(target.dtype)
        expected = was if when is False else torch.where(g.booleans, summed, was)
        torch.testing.assert_close(target, expected, rtol=torch.finfo(target.dtype).eps, atol=0)
        assert torch.equal(target[~g.booleans], was[~g.booleans])
    backup.restore_()
    assert all(torch.equal(target, was) for target, was in zip(targets, before, strict=True))


def test_a_product_is_rounded_to_float32_and_then_the_sum() -> None:
    """As torch rounds `w + alpha * g`; the same on every process, whatever part of a tensor it has."""
    generator = torch.Generator().manual_seed(0)
    w, g, alpha = (*torch.randn(2, 1000, generator=generator), torch.tensor(0.1))
    booleans = torch.rand(1000, generator=generator) < 0.5
    for part, chosen in ((None, torch.ones_like(booleans)), (BitMask(pack(booleans), 1000), booleans)):
        target = w.clone()
        masked_add_([target], [part], [g], alpha=alpha, factors=[0.7])
        assert torch.equal(target, torch.where(chosen, w + (alpha * 0.7) * g, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("compiled", [True, False])
def test_all_of_a_whole_tensor_is_added_to(dtype: torch.dtype, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its length is to a processor's vectors, and in one order of memory or two."""
    if not compiled:
        monkeypatch.setattr(move, "streams", lambda tensor: False)
    torch.manual_seed(0)
    shapes = [(5,), (16,), (1001,), (2, 3, 4, 5), (3, 7, 1, 1)]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    wide = torch.promote_types(dtype, torch.float32)
    for order in (torch.contiguous_format, torch.channels_last):
        gradients = [torch.randn(shape).to(dtype) for shape in shapes]
        gradients = [g.to(memory_format=order) if g.ndim == 4 else g for g in gradients]
        for other in (torch.contiguous_format, torch.channels_last):
            targets = [w.to(memory_format=other, copy=True) if w.ndim == 4 else w.clone() for w in weights]
            masked_add_(targets, [None] * 5, gradients, alpha=torch.tensor(0.25), when=torch.tensor(True))
            for target, w, g in zip(targets, weights, gradients, strict=True):
                assert torch.equal(target, (w.to(wide) + 0.25 * g.to(wide)).to(dtype))


def some() -> tuple[list[Tensor], list[Any], list[Tensor]]:
    """Weights in several tasks of compiled loops: bits, rows, all, and one that is copied to be row-major."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator) for n in (200_000, 90_000, 150_000)]
    weights.append(torch.randn(6, 4, 5, 5, generator=generator).to(memory_format=torch.channels_last))
    parts = [
        BitMask(pack(torch.rand(200_000, generator=generator) < 0.5), 200_000),
        Rows(torch.rand(900, generator=generator) < 0.5, 100, 0, 90_000, torch.device("cpu")),
        None,
        BitMask(pack(torch.rand(600, generator=generator) < 0.5), 600),
    ]
    return weights, parts, [torch.randn(w.shape, generator=generator) for w in weights]


def interrupted(*, tasks: int) -> Callable[[Callable[[slice], None], Any], None]:
    """What `in_threads` does in one thread until it is interrupted, after so many tasks."""

    def in_threads(work: Callable[[slice], None], all_tasks: Any) -> None:
        work(slice(0, tasks))
        raise KeyboardInterrupt

    return in_threads


@pytest.mark.parametrize("tasks", [0, 1, 3, 200])
def test_compiled_loops_that_are_interrupted_are_undone_to_the_bit(tasks: int) -> None:
    weights, parts, gradients = some()
    before = [w.clone() for w in weights]
    backup = Backup()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(move, "in_threads", interrupted(tasks=tasks))
        with pytest.raises(KeyboardInterrupt):
            masked_add_(weights, parts, gradients, alpha=torch.tensor(0.5), backup=backup)
    assert any(not torch.equal(w, b) for w, b in zip(weights, before, strict=True)) == (tasks > 0)
    backup.restore_()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("groups", [0, 1, 2])
def test_groups_that_are_interrupted_are_undone_to_the_bit(groups: int) -> None:
    weights, parts, gradients = some()
    before = [w.clone() for w in weights]
    backup, written = Backup(), 0

    def write(self: Any, group: Any, vector: Tensor) -> None:
        nonlocal written
        if written == groups:
            raise KeyboardInterrupt
        written += 1
        usual(self, group, vector)

    usual = flat._Grouped.write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat._Grouped, "write", write)
        with pytest.raises(KeyboardInterrupt):
            flat.add_(weights, parts, gradients, alpha=torch.tensor(0.5), backup=backup, limit=1 << 16)
    backup.restore_()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))


def test_memory_is_kept_for_the_next_time_and_given_back_when_asked_to() -> None:
    weights, parts, gradients = some()
    before = [w.clone() for w in weights]
    backup = Backup()
    assert backup.nbytes == 0
    perturbed = sum(w.numel() if p is None else p.count for w, p in zip(weights[:3], parts, strict=False))
    masked_add_(weights, parts, gradients, backup=backup)
    backup.release()  # not now
    assert backup.nbytes == 4 * perturbed
    backup.restore_()
    masked_add_(weights[:1], parts[:1], gradients[:1], backup=backup)
    assert backup.nbytes == 4 * perturbed
    # Twice without restoring between: what the first has kept stays.
    masked_add_(weights[1:], parts[1:], gradients[1:], backup=backup)
    backup.restore_()
    assert all(torch.equal(w, b) for w, b in zip(weights, before, strict=True))
    backup.release()
    assert backup.nbytes == 0
