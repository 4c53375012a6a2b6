"""Masked select, scatter, add and sum of squares over lists of tensors, of each of which a subset or all takes part.

What torch's functions of these names do with boolean masks, without index tensors as large as the tensors: on the CPU
by compiled loops (`kernels.move`), on a GPU by Triton's kernels (`kernels.gpu`), elsewhere by few large launches
(`flat`), and of whole tensors by torch's own
functions for lists.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ssam_scale.torch_compat import foreach_clone

from . import flat
from .backup import Backup
from .kernels import move
from .kernels.move import Move, spans_of_all

if TYPE_CHECKING:
    from .subset import Subset

Subsets: TypeAlias = "Sequence[Subset | None]"


@dataclass
class _Ways:
    """Places in a list of tensors, by what moves their elements.

    Attributes:
        whole: all elements, by torch's functions for lists.
        compiled: compiled loops, on row-major tensors.
        copied: compiled loops, on row-major copies, one after the other, so that these never exist together.
        flat: few large launches; on a GPU Triton's.
    """

    whole: list[int] = field(default_factory=list)
    compiled: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    flat: list[int] = field(default_factory=list)


def _ways(tensors: Sequence[Tensor], subsets: Subsets, *, computes: bool = False) -> _Ways:
    """Those of each tensor: to move elements, or to compute with them, which compiled loops do in float32 only."""
    ways = _Ways()
    for i, (t, subset) in enumerate(zip(tensors, subsets, strict=True)):
        if subset is None:
            ways.whole.append(i)
        elif subset.spans is None or (computes and t.dtype != torch.float32):
            ways.flat.append(i)
        else:
            (ways.compiled if t.is_contiguous() else ways.copied).append(i)
    return ways


def masked_select(tensors: Sequence[Tensor], subsets: Subsets) -> list[Tensor]:
    """Copies of the elements of each tensor that its subset has, of shape (its count,); None is all of the tensor."""
    ways, values = _ways(tensors, subsets), list(tensors)
    for i in ways.whole:
        values[i] = torch.empty_like(tensors[i])
    _foreach_copy_([values[i] for i in ways.whole], [tensors[i] for i in ways.whole])
    for i in (*ways.compiled, *ways.copied):
        values[i] = tensors[i].new_empty(_of(subsets, i).count)
    move.take([_move(tensors[i], _of(subsets, i), values[i]) for i in ways.compiled])
    for i in ways.copied:
        move.take([_move(tensors[i].reshape(-1), _of(subsets, i), values[i])])
    if ways.flat:
        sources, parts = [tensors[i] for i in ways.flat], [_of(subsets, i) for i in ways.flat]
        found = _launches(sources).select(sources, parts)
        for i, value in zip(ways.flat, found, strict=True):
            values[i] = value
    return values


def masked_scatter_(tensors: Sequence[Tensor], subsets: Subsets, values: Sequence[Tensor]) -> None:
    """Write `values`, as `masked_select` returns them, to the elements of each tensor that its subset has."""
    ways = _ways(tensors, subsets)
    _foreach_copy_([tensors[i] for i in ways.whole], [values[i] for i in ways.whole])
    move.put([_move(tensors[i], _of(subsets, i), values[i]) for i in ways.compiled])
    for i in ways.copied:
        copy = tensors[i].reshape(-1)
        move.put([_move(copy, _of(subsets, i), values[i])])
        tensors[i].copy_(copy.view(tensors[i].shape))
    if ways.flat:
        targets, parts = [tensors[i] for i in ways.flat], [_of(subsets, i) for i in ways.flat]
        _launches(targets).scatter_(targets, parts, [values[i] for i in ways.flat])


def masked_squares(tensors: Sequence[Tensor], subsets: Subsets, *, every: bool = False) -> tuple[Tensor, Tensor | None]:
    """Σ x² of the elements of each tensor that its subset has, of shape (number of tensors,).

    In float32; in float64 where a tensor is.

    Args:
        tensors: at least one.
        subsets: of each; None: all of it.
        every: whether to return Σ x² of all elements of each tensor, too, as the second result; else that is None.
    """
    if all(subset is None for subset in subsets):
        squares = torch.stack(flat.foreach_norm(tensors)).square_()
        return squares, squares if every else None
    ways = _ways(tensors, subsets, computes=True)
    norms: dict[int, Tensor] = {}  # of each tensor's subset
    whole: dict[int, Tensor] = {}  # of all of it, where that is known
    for places in (ways.compiled, *([i] for i in ways.copied)):
        parts = [_of(subsets, i) for i in places]
        spans = [s.spans for s in parts if s.spans is not None]
        sums = torch.from_numpy(move.squares([tensors[i].reshape(-1) for i in places], spans)).sqrt_().float()
        norms.update(zip(places, sums[:, 0].unbind(), strict=True))
        whole.update((i, norm) for i, norm, s in zip(places, sums[:, 1], spans, strict=True) if s.bits is not None)
    if ways.flat:
        sources, parts = [tensors[i] for i in ways.flat], [_of(subsets, i) for i in ways.flat]
        found = _launches(sources).norms(sources, parts)
        norms.update(zip(ways.flat, found, strict=True))
    others = [i for i in range(len(tensors)) if i not in whole] if every else ways.whole
    if others:
        whole.update(zip(others, flat.foreach_norm([tensors[i] for i in others]), strict=True))
        norms.update((i, whole[i]) for i in ways.whole)

    def squared(of: dict[int, Tensor]) -> Tensor:
        return torch.stack([of[i] for i in range(len(tensors))]).square_()

    return squared(norms), squared(whole) if every else None


def inner_product(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """⟨x, y⟩ over all tensors together, of shape (): float32, of float64 tensors float64.

    Args:
        tensors: at least one, of one floating dtype.
        others: of the same shapes.
    """
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return torch.stack([(x * y).sum(dtype=wide) for x, y in flat.together(tensors, others)]).sum()


def masked_add_(
    tensors: Sequence[Tensor],
    subsets: Subsets,
    values: Sequence[Tensor],
    *,
    alpha: Tensor | None = None,
    factors: Sequence[float] | None = None,
    when: Tensor | None = None,
    backup: Backup | None = None,
    sources: Sequence[Tensor] | None = None,
) -> None:
    """Add values, or α · factor · values, to the elements of each tensor that its subset has.

    Computed in the more precise dtype and at least in float32, and rounded once to that of the tensor; the product is
    rounded, too, but not where all of a tensor is added to on another device than the CPU.

    Args:
        tensors: of any floating dtype.
        subsets: of each; None: all of it.
        values: of each, as `masked_select` returns them; or shaped like the tensor, of which the subset's are added.
        alpha: of shape (), float32; None: 1.
        factors: of each tensor, beside α; None: 1.
        when: bool of shape (); if False, nothing is added, whatever the values are. None: True.
        backup: keeps the elements as they were. None: nothing is kept.
        sources: what is added to instead, float32 and shaped like the tensors; these become the sums, rounded.
    """
    if when is not None and when.is_cpu and not when:
        return
    if sources is not None:
        _back_up(tensors, subsets, backup)
        for some in _at_once(tensors):
            targets, parts = [tensors[i] for i in some], [subsets[i] for i in some]
            sums = [s.reshape(-1) for s in masked_select([sources[i] for i in some], parts)]
            masked_add_(
                sums,
                [None] * len(some),
                _selected([values[i] for i in some], parts),
                alpha=alpha,
                factors=None if factors is None else [factors[i] for i in some],
                when=when,
            )
            rounded = [s.to(t.dtype) for s, t in zip(sums, targets, strict=True)]
            shaped = [r if p else r.view(t.shape) for r, t, p in zip(rounded, targets, parts, strict=True)]
            masked_scatter_(targets, parts, shaped)
        return
    tensors, values = _in_memory(tensors, subsets, values)
    ways = _ways_to_add(tensors, subsets, values)
    if ways.compiled or ways.copied:
        known = {f: 1.0 if alpha is None else float(alpha * f) for f in set(factors or (1.0,))}
        scales = [known[f] for f in factors or (1.0,) * len(tensors)]
        moves = [_addition(tensors[i], subsets[i], values[i]) for i in ways.compiled]
        move.add(moves, [scales[i] for i in ways.compiled], backup)
        for i in ways.copied:
            _back_up([tensors[i]], [subsets[i]], backup)
            copy = tensors[i].reshape(-1)
            move.add([_addition(copy, subsets[i], values[i].reshape(-1))], [scales[i]])
            tensors[i].copy_(copy.view(tensors[i].shape))
    if ways.whole:
        targets = [tensors[i] for i in ways.whole]  # of one dtype
        if backup is not None:
            backup.keep(partial(torch._foreach_copy_, targets, foreach_clone(targets)))
        for factor, same in flat.by_kind([1.0 if factors is None else factors[i] for i in ways.whole]).items():
            scale = None if alpha is None else alpha * factor
            _foreach_add_([targets[k] for k in same], [values[ways.whole[k]] for k in same], scale, when)
    for some, add_ in _launches_to_add(tensors, subsets, ways.flat):
        add_(
            [tensors[i] for i in some],
            [subsets[i] for i in some],
            [values[i] for i in some],
            alpha=alpha,
            factors=None if factors is None else [factors[i] for i in some],
            when=when,
            backup=backup,
        )


def _launches(tensors: Sequence[Tensor]) -> Any:
    """The module with the functions for tensors, of which there is one: `kernels.gpu`, or `flat`."""
    gpu = _gpu() if _is_on_gpu(tensors[0]) else None
    return gpu if gpu is not None and gpu.takes(tensors) else flat


def _launches_to_add(
    tensors: Sequence[Tensor], subsets: Subsets, places: Sequence[int]
) -> Iterator[tuple[list[int], Callable[..., None]]]:
    """What adds to which of them; to all elements of a tensor that is `flat`'s."""
    if some := [i for i in places if subsets[i] is not None]:
        yield some, _launches([tensors[i] for i in some]).add_
    if others := [i for i in places if subsets[i] is None]:
        yield others, flat.add_


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda and not isinstance(tensor, FakeTensor)


@functools.cache
def _gpu() -> Any:
    """The module of the kernels that Triton compiles, which come with torch where it is for GPUs; or None."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .kernels import gpu

    try:
        gpu.check()
    except Exception as error:
        warnings.warn(
            f"Triton compiles nothing here ({type(error).__name__}: {error}): masks of elements and rows take several "
            "times longer by torch's own kernels",
            stacklevel=2,
        )
        return None
    return gpu


_AT_ONCE = 1 << 24  # elements of which there are float32 copies at one time


def _at_once(tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Places in a list of tensors, the next few together."""
    some: list[int] = []
    count = 0
    for i, t in enumerate(tensors):
        if some and count + t.numel() > _AT_ONCE:
            yield some
            some, count = [], 0
        some.append(i)
        count += t.numel()
    if some:
        yield some


def _selected(values: Sequence[Tensor], subsets: Subsets) -> list[Tensor]:
    """Values as vectors, as `masked_select` returns them where they are shaped like their tensor."""
    some = [
        i for i, (v, subset) in enumerate(zip(values, subsets, strict=True)) if subset and v.numel() != subset.count
    ]
    found = [v.reshape(-1) for v in values]
    for i, picked in zip(some, masked_select([values[i] for i in some], [subsets[i] for i in some]), strict=True):
        found[i] = picked
    return found


def _in_memory(
    tensors: Sequence[Tensor], subsets: Subsets, values: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same; whole tensors that both lie in memory in one order, and not row by row, as vectors."""
    targets, summands = list(tensors), list(values)
    for i, (t, subset, value) in enumerate(zip(tensors, subsets, values, strict=True)):
        if subset is not None or t.ndim < 2 or (t.is_contiguous() and value.is_contiguous()):
            continue
        if t.stride() == value.stride() and t.is_contiguous(memory_format=_CHANNELS_LAST.get(t.ndim, _ROW_MAJOR)):
            targets[i], summands[i] = (x.as_strided((t.numel(),), (1,)) for x in (t, value))
    return targets, summands


_ROW_MAJOR = torch.contiguous_format
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _ways_to_add(tensors: Sequence[Tensor], subsets: Subsets, values: Sequence[Tensor]) -> _Ways:
    ways = _Ways()
    for i, (t, subset, value) in enumerate(zip(tensors, subsets, values, strict=True)):
        alike, single = t.is_contiguous() and value.is_contiguous(), t.dtype == value.dtype == torch.float32
        if single and move.streams(t) and (subset is None or subset.spans is not None):
            (ways.compiled if alike else ways.copied).append(i)
        # `_fused_sgd_` of torch 2.13.0 leaves most weights of two bytes as they are on a CPU where there is no
        # momentum, and takes a learning rate on the device in float32 only.
        elif subset is None and alike and single:
            ways.whole.append(i)
        else:
            ways.flat.append(i)
    return ways


def _addition(t: Tensor, subset: Subset | None, value: Tensor) -> Move:
    if subset is None:
        return t, spans_of_all(t.numel()), value
    assert subset.spans is not None
    return t, subset.spans, value


def _back_up(tensors: Sequence[Tensor], subsets: Subsets, backup: Backup | None) -> None:
    if backup is not None:
        backup.keep(partial(masked_scatter_, tensors, subsets, masked_select(tensors, subsets)))


def _foreach_add_(tensors: list[Tensor], values: list[Tensor], alpha: Tensor | None, when: Tensor | None) -> None:
    """Add α · values to tensors of one dtype, in one pass over them, rounded once."""
    if alpha is None and when is None:
        torch._foreach_add_(tensors, values)
        return
    # What torch's SGD does with a learning rate and a GradScaler's verdict that lie on the device.
    alpha = alpha if alpha is not None else torch.ones((), device=tensors[0].device)
    torch._fused_sgd_(
        tensors,
        values,
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=alpha,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=None if when is None else torch.logical_not(when).float(),
    )


def _foreach_copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy all; those of one dtype together, which others would keep from it."""
    for same in flat.by_kind([(t.dtype, s.dtype) for t, s in zip(targets, sources, strict=True)]).values():
        torch._foreach_copy_([targets[k] for k in same], [sources[k] for k in same])


def _of(subsets: Subsets, place: int) -> Subset:
    subset = subsets[place]
    assert subset is not None
    return subset


def _move(t: Tensor, subset: Subset, values: Tensor) -> Move:
    assert subset.spans is not None
    return t, subset.spans, values
