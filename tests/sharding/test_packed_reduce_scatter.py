"""Reduce-scatter of masked elements only: who sums up what, and the same sums as those of everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssam_scale.masks import BitMask, Rows, pack
from ssam_scale.sharding import World
from ssam_scale.sharding.packed_reduce_scatter import Packings, ScatteredGradient, Shares
from tests.support.ranks import run_ranks

needs = st.lists(st.integers(0, 50), min_size=1, max_size=9)


@given(needs, st.integers(0, 5))
def test_every_rank_gets_what_it_needs_and_all_sum_up_as_many(counts: list[int], spare: int) -> None:
    capacity, ranks = max(counts) + spare, range(len(counts))
    shares = Shares.of(counts, capacity)
    assert all(need <= has <= capacity for need, has in zip(counts, shares.counts, strict=True))
    assert sum(shares.counts) == len(counts) * shares.width
    passed = [[shares.between(one, other) for other in ranks] for one in ranks]
    assert [sum(row) for row in passed] == [shares.width] * len(counts)
    assert [sum(column) for column in zip(*passed, strict=True)] == list(shares.counts)
    moved = sum(passed[one][other] for one in ranks for other in ranks if one != other) / len(counts)
    assert shares.passed_on == pytest.approx(moved)
    assert shares.moved or moved == 0.0


@given(needs)
def test_little_more_is_summed_up_than_is_needed(counts: list[int]) -> None:
    shares = Shares.of(counts, max(counts))
    assert len(counts) * shares.width <= max(1.01 * sum(counts), sum(counts) + len(counts) - 1)


def test_ranks_that_need_about_as_many_pass_nothing_on() -> None:
    assert Shares.of([1000, 998, 999], 2000) == Shares(1000, (1000, 1000, 1000), moved=False)
    assert Shares.of([0, 0], 10).width == 0
    assert Shares.of([10, 0, 2], 20) == Shares(4, (10, 0, 2), moved=True)


# --- On three ranks, whose shards are of different lengths

ROWS = [7, 2, 9, 1]  # of parameters with four elements a row


def gradients_of(kind: str) -> list[ScatteredGradient]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, rows in enumerate(ROWS):
        numel, padded = 4 * rows, -(-rows // 3) * 4
        keep = torch.rand(rows, generator=generator) < 0.5
        full: Any = None
        if kind == "elements":
            full = BitMask(pack(torch.rand(numel, generator=generator) < 0.4), numel)
        elif kind == "rows":
            full = Rows(keep, 4, 0, numel, torch.device("cpu"))
        elif kind == "first rows" and index in (0, 2):  # all of what is needed is the first rank's
            full = Rows(torch.arange(rows) < 2, 4, 0, numel, torch.device("cpu"))
        asked = kind not in ("some", "first rows") or index in (0, 2)
        found.append(ScatteredGradient(numel, padded, asked, full))
    return found


def scattered(world: World, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's shards by a reduce-scatter of everything, and of what is needed; and what is needed of them."""
    gradients = gradients_of(kind)
    numel = sum(g.padded for g in gradients)
    buffer = torch.randn(3 * numel, generator=torch.Generator().manual_seed(world.rank))
    usual, packed = torch.empty(numel), torch.zeros(numel)
    dist.reduce_scatter_single(usual, buffer.clone())
    packings = Packings(3, world.rank)
    packing = packings("buffer", gradients)
    assert packing is not None
    assert packings("buffer", gradients_of(kind) if kind == "some" else gradients) is packing
    packing.reduce_scatter(packed, buffer, dist.reduce_scatter_single, None)
    needed = []
    for g in gradients:
        flags = torch.zeros(3 * g.padded, dtype=torch.bool)
        if g.asked:
            flags[: g.numel] = True if g.full is None else g.full.booleans()
        needed.append(flags.view(3, -1)[world.rank])
    return usual, packed, torch.cat(needed)


def all_kinds(world: World) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    return {kind: scattered(world, kind) for kind in ("elements", "rows", "some", "first rows")}


@pytest.mark.slow
def test_what_is_needed_is_summed_as_everything_is() -> None:
    for found in run_ranks(3, all_kinds):
        for kind, (usual, packed, needed) in found.items():
            same = (packed - usual).abs() <= 1e-6  # of three numbers near 1, which ranks add in different orders
            assert bool(same[needed].all()), kind
            # Where something else is there, it is the sum, too.
            assert bool(((packed == 0.0) | same)[~needed].all()), kind
        assert found["elements"][2].any()


def test_a_packing_is_remembered_for_the_mask_that_it_was_made_for() -> None:
    packings, first, second = Packings(3, 0), gradients_of("elements"), gradients_of("elements")
    made = packings("buffer", first)
    assert packings("buffer", first) is made
    assert packings("buffer", second) is not made  # another mask, though it happens to be of the same elements
    assert packings("buffer", [ScatteredGradient(g.numel, g.padded, True, None) for g in first]) is None
