"""The highest of scores that are spread over processes, and means of units that are."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from ssam_scale.masks import score_keys, selection
from ssam_scale.masks.selection import greedy_units, top_k, unit_means
from ssam_scale.sharding import ProcessGroup, World
from ssam_scale.sharding.place import sharding_of
from tests.support.ranks import run_ranks

ALONE = ProcessGroup()

both_ways = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "chunked"])


@contextmanager
def reading(compiled: bool, chunk: int = score_keys.CHUNK) -> Iterator[None]:
    """Scores in CPU memory are read by compiled loops or as those on other devices, in several threads and chunks."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_keys, "CHUNK", chunk)
        patch.setattr(selection, "CHUNK", chunk)
        if not compiled:
            patch.setattr(selection, "keys_of", score_keys.ChunkedKeys)
            patch.setattr(selection, "_add_compiled", selection._add_chunked)
        torch.set_num_threads(3)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def pack(bits: Sequence[bool]) -> Tensor:
    packed = torch.zeros((len(bits) + 7) // 8, dtype=torch.uint8)
    for i, bit in enumerate(bits):
        packed[i // 8] |= int(bit) << i % 8
    return packed


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    bits = (packed.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return bits.bool().reshape(-1)[: like.numel()].reshape(like.shape)


def by_sorting(
    scores: Sequence[Sequence[float]], k: Sequence[int], segments: Sequence[int], live: Sequence[Sequence[bool]]
) -> list[Tensor]:
    """The definition: sort a segment's candidates, the highest first, equal ones by position."""
    masks = [[False] * len(s) for s in scores]
    for segment, count in enumerate(k):
        places = [(t, i) for t, s in enumerate(scores) for i in range(len(s)) if segments[t] == segment and live[t][i]]
        for t, i in sorted(places, key=lambda place: -scores[place[0]][place[1]])[:count]:
            masks[t][i] = True
    return [pack(m) for m in masks]


numbers = st.floats(width=32, allow_nan=False) | st.sampled_from(
    [0.0, -0.0, 1.0, 2.0**-149, -(2.0**-149), -1.0, 3.4e38, math.inf, -math.inf]
)


def as_float32(values: list[float]) -> list[float]:
    return torch.tensor(values, dtype=torch.float32).tolist()


@both_ways
@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(numbers, max_size=30).map(as_float32), min_size=1, max_size=5), st.data())
def test_equals_sorting(compiled: bool, values: list[list[float]], data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, 1, 2, 40]))
    segments = data.draw(st.lists(st.integers(0, count - 1), min_size=len(values), max_size=len(values)))
    live = [[True] * len(v) for v in values]
    if masked := data.draw(st.booleans()):
        live = [data.draw(st.lists(st.booleans(), min_size=len(v), max_size=len(v))) for v in values]
    available = [sum(sum(bits) for bits, s in zip(live, segments, strict=True) if s == n) for n in range(count)]
    k = [data.draw(st.integers(0, a)) for a in available]
    with reading(compiled, chunk=8):
        masks = top_k(
            [torch.tensor(v) for v in values],
            k,
            ALONE,
            segments=None if count == 1 else segments,
            candidates=[pack(bits) for bits in live] if masked else None,
        )
    expected = by_sorting(values, k, segments, live)
    assert all(m.dtype == torch.uint8 and torch.equal(m, e) for m, e in zip(masks, expected, strict=True))


@both_ways
@pytest.mark.parametrize("ties", [False, True])
def test_many_chunks_equal_torch_sort(compiled: bool, ties: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    scores = [
        torch.randn(shape, generator=generator).square() for shape in [(700, 301), (3,), (64, 3, 7, 7), (90_001,)]
    ]
    if ties:
        scores = [(s * 4).round() for s in scores]
    flat = torch.cat([s.reshape(-1) for s in scores])
    k = len(flat) // 2
    expected = torch.zeros(len(flat), dtype=torch.bool)
    expected[torch.sort(flat, descending=True, stable=True).indices[:k]] = True
    with reading(compiled, chunk=2**14):
        masks = top_k(scores, [k], ALONE)
    chosen = [unpack(m, s) for m, s in zip(masks, scores, strict=True)]
    assert torch.equal(torch.cat([c.reshape(-1) for c in chosen]), expected)


@both_ways
def test_a_processor_that_flushes_denormals_chooses_the_same(compiled: bool) -> None:
    scores = torch.arange(40) * torch.tensor(1, dtype=torch.int32).view(torch.float32)
    torch.set_flush_denormal(True)
    try:
        with reading(compiled):
            [mask] = top_k([scores], [10], ALONE)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(unpack(mask, scores), torch.arange(40) >= 30)


@both_ways
def test_scores_that_do_not_lie_in_one_piece(compiled: bool) -> None:
    scores = torch.arange(60.0).reshape(6, 10).t()
    with reading(compiled):
        [mask] = top_k([scores], [7], ALONE)
    assert torch.equal(unpack(mask, scores), scores >= 53)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        ([5, 3], "k of segment 0 is 5; 0 to 4 can be chosen"),
        ([4, -1], "k of segment 1 is -1; 0 to 3 can be chosen"),
    ],
)
def test_budgets_out_of_range_are_named(k: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k([torch.ones(4), torch.ones(3)], k, ALONE, segments=[0, 1])


def test_what_cannot_be_given() -> None:
    with pytest.raises(ValueError, match="k is 1; 0 to 0 can be chosen"):
        top_k([], [1], ALONE)
    assert top_k([], [0], ALONE) == []
    with pytest.raises(ValueError, match="k is 5; 0 to 2 can be chosen"):
        top_k([torch.ones(4)], [5], ALONE, candidates=[pack([True, False, True, False])])
    with pytest.raises(TypeError, match="float32 is needed"):
        top_k([torch.ones(4, dtype=torch.bfloat16)], [1], ALONE)


@pytest.mark.gpu
@pytest.mark.parametrize("ties", [False, True])
def test_a_gpu_chooses_and_averages_as_the_cpu_does(ties: bool) -> None:
    generator = torch.Generator().manual_seed(4)
    scores = [torch.randn(shape, generator=generator) for shape in [(1500, 1000), (3,), (0,), (96, 3, 7, 7)]]
    if ties:
        scores = [(s * 2).round() for s in scores]
    live = [torch.randint(256, ((s.numel() + 7) // 8,), generator=generator, dtype=torch.uint8) for s in scores]
    live[1] &= 7
    on_gpu = [s.cuda() for s in scores]
    for k, segments, candidates in (
        ([700_000], None, None),
        ([300_000], None, live),
        ([1000, 1, 0, 7000], [0, 1, 2, 3], None),
    ):
        expected = top_k(scores, k, ALONE, segments=segments, candidates=candidates)
        given = None if candidates is None else [c.cuda() for c in candidates]
        masks = top_k(on_gpu, k, ALONE, segments=segments, candidates=given)
        assert all(m.is_cuda and torch.equal(m.cpu(), e) for m, e in zip(masks, expected, strict=True))
    numels, sizes = [s.numel() for s in scores], [1000, 3, 1, 147]
    expected = unit_means(scores, [0] * 4, numels, sizes, ALONE)
    assert all(map(torch.equal, unit_means(on_gpu, [0] * 4, numels, sizes, ALONE), expected))


SHAPES = [(5, 3), (1,), (4, 2, 2), (2,), (7,)]
SIZE = sum(math.prod(shape) for shape in SHAPES)


def _scores(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    if kind == "ties":
        return [torch.randint(3, shape, generator=generator).float() for shape in SHAPES]
    if kind == "equal":
        return [torch.zeros(shape) for shape in SHAPES]
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def _dead(kind: str) -> list[Tensor]:
    return [s <= 0.0 for s in _scores("random" if kind != "random" else "ties")]


def _budgets(k: int) -> list[int]:
    return [min(k, math.prod(shape)) for shape in SHAPES]


def _on_shards(world: World) -> dict[str, list[list[Tensor]]]:
    model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in SHAPES])
    fully_shard(model)
    sharding, parameters = sharding_of(model), list(model.parameters())
    result: dict[str, list[list[Tensor]]] = {}

    def select(kind: str, what: str, k: list[int], **options: Any) -> None:
        local = [sharding.scatter(p, s).reshape(-1) for p, s in zip(parameters, _scores(kind), strict=True)]
        masks = [unpack(m, s) for m, s in zip(top_k(local, k, sharding.shard_group, **options), local, strict=True)]
        result.setdefault(f"{kind} {what}", []).append(masks)

    for kind in ("ties", "equal", "random"):
        dead = [sharding.scatter(p, d) for p, d in zip(parameters, _dead(kind), strict=True)]
        candidates = [pack(d.reshape(-1).tolist()) for d in dead]
        for k in range(SIZE + 1):
            select(kind, "all", [k])
        for k in range(int(sum(d.sum() for d in _dead(kind))) + 1):
            select(kind, "some", [k], candidates=candidates)
        for k in range(17):
            select(kind, "each", _budgets(k), segments=range(len(SHAPES)))
    with pytest.raises(ValueError, match=f"k is {SIZE + 1}; 0 to {SIZE} can be chosen"):
        select("ties", "too many", [SIZE + 1])
    return result


UNITS = [(7, 30), (1, 700), (50, 1), (3, 128), (2, 5)]  # number and size, by tensor
NUMELS = [n * size for n, size in UNITS]
SIZES = [size for _, size in UNITS]


def _unit_scores() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(numel, generator=generator) ** 3 for numel in NUMELS]


def _with_cuts(world: World) -> list[dict[str, Any]]:
    draw = random.Random(3)  # the same cuts on every process
    result = []
    for case in range(40):
        starts, local = [], []
        for scores in _unit_scores():
            cuts = sorted(draw.randint(0, scores.numel()) for _ in range(world.size - 1))
            edges = [0, *cuts, scores.numel()]
            starts.append(edges[world.rank])
            local.append(scores[edges[world.rank] : edges[world.rank + 1]])
        k = draw.randint(0, sum(NUMELS))
        with reading(compiled=case % 2 == 0, chunk=64):
            means = unit_means(local, starts, NUMELS, SIZES, ProcessGroup(dist.group.WORLD))
            masks = top_k([s.round() for s in local], [k], ProcessGroup(dist.group.WORLD))
        result.append({"means": means, "k": k, "masks": [unpack(m, s) for m, s in zip(masks, local, strict=True)]})
    return result


def _on_rank(world: World) -> tuple[Any, Any]:
    return _on_shards(world), _with_cuts(world)


@pytest.fixture(
    scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def ranks(request: pytest.FixtureRequest) -> list[tuple[Any, Any]]:
    """What `_on_rank` returned on each of some processes."""
    return run_ranks(request.param, _on_rank)


def joined(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The whole tensors whose shards each process has."""
    return [torch.cat(list(shards)) for shards in zip(*parts, strict=True)]


@pytest.mark.slow
def test_shards_uneven_or_empty_choose_what_one_process_chooses(ranks: list[tuple[Any, Any]]) -> None:
    shards = [on_shards for on_shards, _ in ranks]
    assert len(shards[0]) == 9
    for name in shards[0]:
        kind, what = name.split()
        scores = [s.reshape(-1).tolist() for s in _scores(kind)]
        live = [d.reshape(-1).tolist() if what == "some" else [True] * d.numel() for d in _dead(kind)]
        segments = list(range(len(SHAPES))) if what == "each" else [0] * len(SHAPES)
        for k, parts in enumerate(zip(*(rank[name] for rank in shards), strict=True)):
            expected = by_sorting(scores, _budgets(k) if what == "each" else [k], segments, live)
            masks = [pack(m.tolist()) for m in joined(parts)]
            assert all(torch.equal(a, b) for a, b in zip(masks, expected, strict=True)), (name, k)


@pytest.mark.slow
def test_flat_runs_cut_anywhere_give_the_same_bits(ranks: list[tuple[Any, Any]]) -> None:
    scores = _unit_scores()
    rounded = [s.round() for s in scores]
    expected = unit_means(scores, [0] * len(UNITS), NUMELS, SIZES, ALONE)
    cases = list(zip(*(with_cuts for _, with_cuts in ranks), strict=True))
    assert len(cases) == 40
    for case in cases:
        for rank in case:
            assert all(torch.equal(a, b) for a, b in zip(rank["means"], expected, strict=True))
        masks = joined([rank["masks"] for rank in case])
        whole = top_k(rounded, [case[0]["k"]], ALONE)
        assert all(torch.equal(m, unpack(w, m)) for m, w in zip(masks, whole, strict=True))


@both_ways
@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.integers(1, 40).flatmap(
            lambda size: st.lists(
                st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=size, max_size=size),
                min_size=1,
                max_size=5,
            )
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([8, 2**20]),
)
def test_means_are_the_means(compiled: bool, tensors: list[list[list[float]]], chunk: int) -> None:
    scores = [torch.tensor(rows) for rows in tensors]
    numels, sizes = [s.numel() for s in scores], [s.shape[1] for s in scores]
    with reading(compiled, chunk):
        means = unit_means(scores, [0] * len(scores), numels, sizes, ALONE)
    for score, size, mean in zip(scores, sizes, means, strict=True):
        assert mean.dtype == torch.float64
        resolution = float(score.abs().max()) * 2.0 ** (math.ceil(math.log2(size)) - 62)
        for row, m in zip(score.tolist(), mean.tolist(), strict=True):
            exact = math.fsum(row) / size
            assert abs(m - exact) <= resolution + 2.0**-51 * abs(exact)


def test_means_of_nothing_and_of_zeros() -> None:
    means = unit_means([torch.zeros(4), torch.zeros(0)], [0, 0], [4, 0], [2, 0], ALONE)
    assert [m.tolist() for m in means] == [[0.0, 0.0], []]
    assert unit_means([], [], [], [], ALONE) == []
    with pytest.raises(ValueError, match="a tensor of 4 elements is not made of units of 3"):
        unit_means([torch.zeros(4)], [0], [4], [3], ALONE)


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 50)), max_size=12), st.integers(0, 200))
def test_greedy_units_fit_and_each_was_taken_in_its_turn_or_did_not_fit(drawn: list[tuple[float, int]], k: int) -> None:
    means = torch.tensor([mean for mean, _ in drawn], dtype=torch.float64)
    chosen = greedy_units(means, torch.tensor([numel for _, numel in drawn], dtype=torch.int64), k)
    left = k
    for i in sorted(range(len(drawn)), key=lambda i: -drawn[i][0]):  # the definition, one after the other
        assert bool(chosen[i]) == (drawn[i][1] <= left)
        left -= drawn[i][1] if chosen[i] else 0
    assert left >= 0
