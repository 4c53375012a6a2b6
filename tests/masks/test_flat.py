"""Few large launches move what boolean indexing would, whatever the shapes, strides, dtypes, masks and groups."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ssam_scale.masks import Backup, BitMask, Subset, flat, pack
from tests.support.subsets import Given, tensors

LIMITS = [8, 16, 40, 1 << 23]


def subsets(given: list[Given]) -> list[Subset]:
    return [g.subset for g in given if g.subset is not None]


@settings(max_examples=80, deadline=None)
@given(tensors(), st.sampled_from(LIMITS))
def test_selecting_and_scattering_are_boolean_indexing(given: list[Given], limit: int) -> None:
    sources = [g.tensor for g in given]
    values = flat.select(sources, subsets(given), limit)
    for g, value in zip(given, values, strict=True):
        assert torch.equal(value, g.tensor[g.booleans])
    targets = [g.tensor.clone() for g in given]
    flat.scatter_(targets, subsets(given), [-value for value in values], limit)
    for g, target in zip(given, targets, strict=True):
        assert torch.equal(target, torch.where(g.booleans, -g.tensor, g.tensor))
        assert target.stride() == g.tensor.clone().stride()


@settings(max_examples=60, deadline=None)
@given(tensors(), st.sampled_from(LIMITS))
def test_norms_are_those_of_the_elements(given: list[Given], limit: int) -> None:
    norms = flat.norms([g.tensor for g in given], subsets(given), limit)
    for g, norm in zip(given, norms, strict=True):
        assert norm.shape == ()
        assert norm.dtype == (torch.float64 if g.tensor.dtype == torch.float64 and g.booleans.any() else torch.float32)
        assert float(norm) == pytest.approx(float(g.tensor[g.booleans].double().norm()), rel=1e-6)


@settings(max_examples=100, deadline=None)
@given(
    tensors(wholes=True),
    st.sampled_from(LIMITS),
    st.sampled_from(["one", "alpha", "factors"]),
    st.booleans(),
    st.sampled_from([None, True, False]),
)
def test_adding_rounds_once_and_can_be_undone(
    given: list[Given], limit: int, scaled: str, compact: bool, when: bool | None
) -> None:
    targets = [g.tensor.clone() for g in given]
    values = [g.gradient[g.booleans] if compact and g.subset is not None else g.gradient for g in given]
    factors = [0.5 + i % 3 for i in range(len(given))] if scaled == "factors" else None
    alpha = None if scaled == "one" else torch.tensor(0.25)  # of which products are exact
    backup = Backup()
    flat.add_(
        targets,
        [g.subset for g in given],
        values,
        alpha=alpha,
        factors=factors,
        when=None if when is None else torch.tensor(when),
        backup=backup,
        limit=limit,
    )
    for i, (g, target) in enumerate(zip(given, targets, strict=True)):
        wide = torch.promote_types(torch.promote_types(g.tensor.dtype, g.gradient.dtype), torch.float32)
        scale = (1.0 if alpha is None else 0.25) * (1.0 if factors is None else factors[i])
        summed = (g.tensor.to(wide) + scale * g.gradient.to(wide)).to(g.tensor.dtype)
        expected = g.tensor if when is False else torch.where(g.booleans, summed, g.tensor)
        assert torch.equal(target, expected)
    backup.restore_()
    for g, target in zip(given, targets, strict=True):
        assert torch.equal(target, g.tensor)


def test_what_is_not_added_may_be_anything() -> None:
    """A gradient that is not finite, and one of what no mask has."""
    w, g = torch.randn(20), torch.randn(20)
    g[3] = torch.nan
    booleans = torch.arange(20) % 3 == 1
    part = BitMask(pack(booleans), 20)
    target = w.clone()
    flat.add_([target], [part], [g], alpha=torch.tensor(1.0), limit=8)
    assert torch.equal(target, torch.where(booleans, w + g, w))
    g[:] = torch.inf
    for subset in (part, None):
        target = w.clone()
        flat.add_([target], [subset], [g], alpha=torch.tensor(torch.nan), when=torch.tensor(False), limit=8)
        assert torch.equal(target, w)


def test_values_are_in_row_major_order_in_one_memory() -> None:
    sources = [torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last), torch.randn(7), torch.randn(50)]
    masks = [torch.rand(t.shape) < 0.5 for t in sources]
    values = flat.select(sources, [BitMask(pack(m), t.numel()) for t, m in zip(sources, masks, strict=True)], 16)
    first = values[0].data_ptr()
    for value, source, mask in zip(values, sources, masks, strict=True):
        assert torch.equal(value, source.contiguous()[mask])
        assert value.data_ptr() == first
        first += value.nbytes


def test_memory_is_that_of_a_group() -> None:
    """No tensor that is made is larger than a group: eight bytes an element, for indices."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            before = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            result = func(*args, **(kwargs or {}))
            for t in tree_leaves(result):
                if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in before:
                    largest = max(largest, t.nbytes)
            return result

    ws = [torch.randn(n) for n in (5000, 300, 12_345, 7, 4000)]
    parts = [BitMask(pack(torch.rand(len(w)) < 0.9), len(w)) for w in ws]
    for part in parts:
        part.counts(1024)
    gradients, alpha, backup = [torch.randn_like(w) for w in ws], torch.tensor(0.1), Backup()
    with Watch():
        flat.norms(gradients, parts, 1024)
        flat.add_(ws, parts, gradients, alpha=alpha, backup=backup, limit=1024)
        backup.restore_()
    assert 0 < largest <= 8 * 1024
