"""Masks are what the papers define, written out here with loops and sets."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssam_scale.masks import NM, Annealed, BitMask, Dynamic, Layout, Named, Norms, Rows, ScoreBased, Scored
from ssam_scale.masks.allocation import erk, uniform
from ssam_scale.perturbation import SparseSAM
from ssam_scale.perturbation.reference import reference_step
from ssam_scale.sharding import ProcessGroup
from tests.support.masks import whole_mask
from tests.support.networks import batches, loss_fn, small_network

ALONE = ProcessGroup()
SHAPES = {"conv": (6, 8, 3, 3), "linear": (10, 12), "norm": (6,), "bias": (10,), "scale": ()}
LAYOUT = Layout(
    SHAPES, {"conv": 0, "norm": 0, "linear": 1, "bias": 1, "scale": 1}, 2, {}, frozenset({"conv", "linear"})
)


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}


def chosen(mask: ScoreBased, scores: dict[Any, dict[str, Tensor]], step: int = 0) -> dict[str, Tensor]:
    """Booleans of every parameter after a choice."""
    mask.refresh(LAYOUT, scores, ALONE, step)
    weights = mask.plan(LAYOUT, step).weights
    result = {}
    for name, shape in SHAPES.items():
        part = weights.get(name)
        result[name] = torch.full(shape, name in weights) if part is None else part.booleans().view(shape)
    return result


def live(masks: dict[str, Tensor]) -> set[int]:
    flat = torch.cat([m.reshape(-1) for m in masks.values()])
    return set(flat.nonzero().view(-1).tolist())


def flat(scores: dict[str, Tensor]) -> list[float]:
    return torch.cat([s.reshape(-1) for s in scores.values()]).tolist()


def highest(among: set[int], scores: list[float], k: int) -> set[int]:
    return set(sorted(among, key=lambda i: (-scores[i], i))[:k])


def test_single_weights_are_the_highest_of_all() -> None:
    scores = draw(1)
    everything = set(range(LAYOUT.total))
    for sparsity in (0.0, 0.3, 0.5, 0.99):
        k = int(LAYOUT.total * (1 - sparsity))
        assert live(chosen(Scored("element", sparsity), {"fisher": scores})) == highest(everything, flat(scores), k)


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_a_dynamic_mask_drops_and_grows_and_keeps_its_density(sparsity: float, rate: float) -> None:
    n, steps = LAYOUT.total, 10
    mask = Dynamic(sparsity, steps=steps, drop_rate=rate, drop="gradient", grow="random")
    count = int(n * (1 - sparsity))
    first = draw(2)
    now = live(chosen(mask, {"random": first}))
    assert now == highest(set(range(n)), flat(first), count)
    for step in range(1, steps + 1):
        drop, grow = draw(10 * step), draw(10 * step + 1)
        after = live(chosen(mask, {"gradient": drop, "random": grow}, step))
        decayed = rate * (1 + math.cos(math.pi * step / steps)) / 2
        # As many are dropped as there are others to grow, unlike in the published code, which loses density.
        dropped = min(count - int(count * (1 - decayed)), n - count)
        kept = highest(now, flat(drop), count - dropped)
        grown = highest(set(range(n)) - now, flat(grow), dropped)
        assert after == kept | grown
        assert len(after) == count
        assert not (now - kept) & after, "what is dropped does not return in the same refresh"
        assert mask.turnover == pytest.approx(dropped / count)
        now = after


def test_n_of_m_along_input_features() -> None:
    scores = draw(3)
    masks = chosen(NM(2, 4, others="unperturbed"), {"fisher": scores})
    assert not any(masks[name].any() for name in ("norm", "bias", "scale"))
    for o, group, y, x in product(range(6), range(2), range(3), range(3)):
        place = [(o, 4 * group + i, y, x) for i in range(4)]
        best = sorted(place, key=lambda p: -float(scores["conv"][p]))[:2]
        assert {p for p in place if masks["conv"][p]} == set(best)
    for o, group in product(range(10), range(3)):
        place2 = [(o, 4 * group + i) for i in range(4)]
        best2 = sorted(place2, key=lambda p: -float(scores["linear"][p]))[:2]
        assert {p for p in place2 if masks["linear"][p]} == set(best2)
    assert all(chosen(NM(2, 4), {"fisher": scores})[name].all() for name in ("norm", "bias", "scale"))


def test_of_equal_scores_the_first_of_a_group_win() -> None:
    zeros = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    mask = chosen(NM(1, 4), {"fisher": zeros})["linear"]
    assert torch.equal(mask, torch.tensor([True, False, False, False]).repeat(10, 3))


@pytest.mark.parametrize("pattern", ["row", "tensor", "block"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.8])
def test_larger_units_are_taken_by_their_mean_while_they_fit(pattern: Any, sparsity: float) -> None:
    scores = draw(4)
    units: list[tuple[float, dict[str, list[int]]]] = []  # mean, rows of parameters
    rows = {name: [0] if not shape else list(range(shape[0])) for name, shape in SHAPES.items()}

    def unit(members: dict[str, list[int]]) -> None:
        values = [float(v) for n, r in members.items() for i in r for v in scores[n].reshape(len(rows[n]), -1)[i]]
        units.append((math.fsum(values) / len(values), members))

    if pattern == "row":
        for name in SHAPES:
            for row in rows[name]:
                unit({name: [row]})
    elif pattern == "tensor":
        for name in SHAPES:
            unit({name: rows[name]})
    else:
        for stage in range(2):
            unit({name: rows[name] for name in SHAPES if LAYOUT.stages[name] == stage})
    budget = int(LAYOUT.total * (1 - sparsity))
    expected = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    for _, members in sorted(units, key=lambda u: -u[0]):
        size = sum(len(r) * LAYOUT.numels[n] // len(rows[n]) for n, r in members.items())
        if size <= budget:
            budget -= size
            for name, taken in members.items():
                expected[name].view(len(rows[name]), -1)[taken] = True
    mask = Scored(pattern, sparsity)
    if not any(e.any() for e in expected.values()):
        with pytest.raises(ValueError, match=f"pattern {pattern} and sparsity {sparsity} leaves nothing"):
            chosen(mask, {"fisher": scores})
        return
    actual = chosen(mask, {"fisher": scores})
    for name in SHAPES:
        assert torch.equal(actual[name], expected[name]), name
    if pattern == "row":
        assert all(isinstance(p, Rows) or p is None for p in mask.plan(LAYOUT, 0).weights.values())


@pytest.mark.parametrize("pattern", ["element", "row"])
def test_uniform_and_erk_share_out_the_budget(pattern: Any) -> None:
    budget = int(LAYOUT.total * 0.3)
    masks = chosen(Scored("element", 0.7, allocation="uniform"), {"fisher": draw(5)})
    for name, numel in LAYOUT.numels.items():
        assert abs(int(masks[name].sum()) - 0.3 * numel) < 1
    assert sum(uniform(list(LAYOUT.numels.values()), budget)) == sum(erk(SHAPES, budget)) == budget
    # Densities go as 20 / 432 (conv) to 22 / 120 (linear) to 1 (vectors): of 300, vectors and then linear are full.
    counts = dict(zip(SHAPES, erk(SHAPES, 300), strict=True))
    assert [counts[name] for name in ("linear", "norm", "bias", "scale")] == [120, 6, 10, 1]
    assert counts["conv"] == 300 - 137
    low = dict(zip(SHAPES, erk(SHAPES, 30), strict=True))
    factor = 30 / (20 + 22 + 6 + 10 + 1)
    for name, shape in SHAPES.items():
        assert abs(low[name] - factor * (sum(shape) if shape else 1)) <= 1
    for allocation in ("uniform", "erk"):
        per_layer = chosen(Scored(pattern, 0.5, allocation=allocation), {"fisher": draw(6)})
        assert 0 < sum(int(m.sum()) for m in per_layer.values()) <= LAYOUT.total // 2


def test_an_annealed_sparsity_follows_half_a_cosine() -> None:
    mask = Scored("element", Annealed(0.2, 0.8, 100))
    for step in (0, 25, 50, 100, 200):
        sparsity = 0.8 - 0.6 * (1 + math.cos(math.pi * min(step, 100) / 100)) / 2
        count = sum(int(m.sum()) for m in chosen(mask, {"fisher": draw(step)}, step).values())
        assert count == int(LAYOUT.total * (1 - sparsity))
    assert [Annealed(0.2, 0.8, 100)(step) for step in (0, 100)] == pytest.approx([0.2, 0.8])


@pytest.mark.parametrize("family", ["resnet", "vit"])
def test_sam_on_perturbs_normalization_layers_alone(family: str) -> None:
    model = small_network(family)
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=Norms())
    expected = {
        f"{name}.{p}"
        for name, module in model.model.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm))
        for p in ("weight", "bias")
    }
    assert set(opt.plan.weights) == expected


def test_named_parameters() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=Named(r"blocks\.[23]\..*qkv", "^head"))
    assert set(opt.plan.weights) == {
        *(f"blocks.{b}.attn.qkv.{p}" for b in (2, 3) for p in ("weight", "bias")),
        *("head.weight", "head.bias"),
    }


class TinyGPT(nn.Module):
    """A causal language model in plain torch, whose output weights are its embedding."""

    def __init__(self, words: int = 24, width: int = 32, length: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.place = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, words, bias=False)
        self.output.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return self.output(self.norm(self.blocks(self.embed(words) + self.place, mask=causal, is_causal=True)))


def next_word(forward: Any, words: Tensor) -> Tensor:
    logits = forward(words[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


def sentences(count: int, seed: int) -> Tensor:
    """Each word follows from the one before by one of five rules, which the sentence keeps: learnable, not trivial."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(24, (count, 1), generator=generator)
    stride = torch.randint(1, 6, (count, 1), generator=generator)
    return (first + stride * torch.arange(17)) % 24


@pytest.mark.slow
def test_fsam_a_fisher_mask_trains_a_language_model() -> None:
    """FSAM (arXiv 2210.05497): nothing here knows about images."""
    torch.manual_seed(0)
    model, twin = TinyGPT(), TinyGPT()
    twin.load_state_dict(model.state_dict())
    # With AdamW's usual eps, a gradient that vanishes but for rounding (a key's bias has one) moves as far as any.
    base, other = (torch.optim.AdamW(m.parameters(), lr=1e-2, eps=1e-3) for m in (model, twin))
    opt = SparseSAM(model, base, rho=0.05, mask=Scored("element", 0.9, every=10))
    total = sum(p.numel() for p in model.parameters())
    first = float(next_word(model, sentences(64, 999)).detach())
    assert first > 0.9 * math.log(24)
    for step in range(120):
        batch = sentences(16, step)
        if opt.refresh_is_due:
            opt.refresh(next_word, batch)
        assert opt.plan.perturbed == int(total * (1 - 0.9))
        if step < 12:  # over one refresh
            mask = {name: m.float() for name, m in whole_mask(opt).items()}
            reference_step(twin, other, next_word, batch, rho=0.05, mask=mask, norm="masked")
        opt.step(next_word, batch)
        if step == 11:
            for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
                # 12 steps of at most 1e-2 each, which divide float32 rounding errors by as little as eps.
                torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-5)
    assert float(next_word(model, sentences(64, 999)).detach()) < 0.6 * first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scored("element", 1.0), r"sparsity is 1\.0; a share in \[0, 1\) is needed"),
        (lambda: Scored("element", -0.1), r"sparsity is -0\.1"),
        (lambda: Annealed(0.5, 1.5, 10), r"sparsity is 1\.5"),
        (lambda: Annealed(0.5, 0.6, 0), "steps is 0"),
        (lambda: Scored("elements"), "pattern is 'elements'; one of element, row, tensor, block is needed"),  # type: ignore[arg-type]
        (lambda: Scored(score="fischer"), "score is 'fischer'; one of fisher, "),  # type: ignore[arg-type]
        (lambda: Scored("tensor", allocation="erk"), "allocation 'erk' shares out single weights or rows"),
        (lambda: Scored(every=0), "every is 0"),
        (lambda: NM(5, 4), "n is 5 and m is 4; 0 < n <= m is needed"),
        (lambda: NM(0, 4), "n is 0 and m is 4"),
        (lambda: NM(1, 2, others="dense"), "others is 'dense'; one of perturbed, unperturbed"),  # type: ignore[arg-type]
        (lambda: Dynamic(0.5, steps=0), "steps is 0"),
        (lambda: Dynamic(0.5, steps=9, drop_rate=1.5), r"drop_rate is 1\.5"),
        (lambda: Named(), "no pattern of parameter names"),
        (lambda: Named("("), r"'\(' is not a regular expression"),
    ],
)
def test_masks_that_cannot_be_are_refused_when_they_are_made(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (NM(2, 4), r"conv1\.weight has 3 input features, which do not make groups of 4 \(1 of 22 weights\)"),
        (NM(1, 5, indivisible="perturbed"), "no weight of a linear layer or convolution that takes a 1:5 mask"),
        (Named("layer9"), r"pattern 'layer9' matches none of the 65 parameters: conv1\.weight, bn1\.weight, "),
    ],
)
def test_masks_that_do_not_fit_a_model_are_refused_when_they_meet(mask: Any, message: str) -> None:
    model = small_network("resnet")
    with pytest.raises(ValueError, match=message):
        SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=mask)


def test_a_mask_of_blocks_or_norms_needs_some() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="pattern 'block' needs a model in stages"):
        SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=Scored("block"))
    with pytest.raises(ValueError, match="no normalization layer"):
        SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=Norms())


def test_a_refresh_that_fails_changes_nothing() -> None:
    model = small_network("vit")
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.1), mask=Scored("element", 0.5))
    batch = batches(1, 4)[0]
    opt.refresh(loss_fn, batch)
    plan, before = opt.plan, {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="need a loss function"):
        opt.refresh()
    with pytest.raises(ValueError, match="4"):
        opt.refresh(loss_fn, batch, samples=9)
    with pytest.raises(FloatingPointError, match=r"fisher scores of .* are not finite"):
        opt.refresh(lambda forward, batch: loss_fn(forward, batch) * math.nan, batch)
    assert opt.plan is plan
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())
    assert model.training
    opt.step(loss_fn, batch)


def test_storage_is_a_bit_a_weight_for_single_weights_and_nothing_for_coarser_patterns() -> None:
    scores = {"fisher": draw(7)}
    for mask in (Scored("element", 0.5), NM(2, 4)):
        chosen(mask, scores)
        for name, part in mask.plan(LAYOUT, 0).weights.items():
            if part is not None:
                assert isinstance(part, BitMask)
                assert part.packed.nbytes == math.ceil(LAYOUT.numels[name] / 8)
    for pattern in ("tensor", "block"):
        coarse = Scored(pattern, 0.2)  # type: ignore[arg-type]
        chosen(coarse, scores)
        assert set(coarse.plan(LAYOUT, 0).weights.values()) == {None}
