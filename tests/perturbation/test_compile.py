"""A network compiled with `torch.compile`: as exact, and compiled a few times however the cut moves."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssam_scale import Depth, Fresh, Scored, SparseSAM
from ssam_scale.masks import Refreshed
from ssam_scale.models import staged
from ssam_scale.perturbation import Stage, StagedModel
from ssam_scale.sharding import World
from tests.support.compiled import ENDS, FORMS, Compiled, counting_graphs
from tests.support.networks import IMAGE, batches, loss_fn, part, small_network
from tests.support.training import BATCH, TOLERANCE, largest_difference, train

pytestmark = pytest.mark.slow

# What torch allows a code by itself (`torch._dynamo.config.recompile_limit`).
TORCHS_LIMIT = 8


@pytest.mark.parametrize(("accumulation", "compiler"), [(1, "inductor"), (2, "aot_eager")])
def test_a_moving_cut_equals_the_reference_and_is_compiled_once_for_each_form_of_input(
    accumulation: int, compiler: str
) -> None:
    case = Compiled("vit", "moving cut", accumulation=accumulation, compiler=compiler)
    with counting_graphs() as graphs:
        [result] = train(World(), "single", [case])
        assert graphs() == FORMS[accumulation] + ENDS[accumulation]
    # Fused kernels round elsewhere than the operators one by one: like another order of summation.
    assert largest_difference(case.plain(), result) <= TOLERANCE


def trained(case: Compiled, steps: int = 4) -> dict[str, Any]:
    """Weights and statistics after some steps, their losses, and what is computed in evaluation mode."""
    model = case.make_model()
    opt = case.make_sam(model, case.make_optimizer(model))
    if isinstance(opt.mask, Refreshed):
        opt.refresh(case.loss_fn, batches(1, 4, seed=7)[0])
    losses = []
    for batch in batches(steps, BATCH):
        losses.append(opt.step(case.loss_fn, *[part(batch, i, case.accumulation) for i in range(case.accumulation)]))
    model.eval()
    with torch.no_grad():
        outputs = model(batches(1, 6)[0][0])
    return {**model.state_dict(), "losses": torch.stack(losses), "outputs": outputs}


@pytest.mark.parametrize(
    "case",
    [
        Compiled("resnet", "moving cut", statistics=True),
        Compiled("resnet", "fixed cut", statistics=True, again=True),
        Compiled("vit", "element", direction=Fresh(0.5)),
        Compiled("vit", "moving cut", again=True, precision=torch.bfloat16),
        Compiled("convnext", "moving cut", accumulation=2, again=True),
        Compiled("vit", "row", norm="dense", optimizer="adamw"),
    ],
    ids=str,
)
def test_nothing_changes_but_what_fused_kernels_round(case: Compiled) -> None:
    """`aot_eager` runs torch's own operators in the graphs that would be compiled: the same bits, also of statistics,
    where what a step switches (gradients, statistics, random states, modes) is seen by the graphs."""
    compiled, plain = (trained(replace(case, compiler=compiler)) for compiler in ("aot_eager", "none"))
    assert compiled.keys() == plain.keys()
    assert not [name for name, value in plain.items() if not torch.equal(value, compiled[name])]


def graphs_of(model: nn.Module, opt: SparseSAM, steps: int) -> int:
    """How many graphs so many steps take."""
    with counting_graphs() as graphs:
        for batch in batches(steps, 4):
            if opt.refresh_is_due:
                opt.refresh(loss_fn, batch)
            opt.step(loss_fn, batch)
        return int(graphs())


def sam(model: nn.Module, mask: Any) -> SparseSAM:
    return SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.01), rho=0.05, mask=mask)


@pytest.mark.parametrize(("family", "most"), [("vit", 4), ("resnet", 26), ("convnext", 13)])
def test_the_graphs_do_not_depend_on_where_the_cut_is(family: str, most: int) -> None:
    """One for each different block and form of input; twice as many with BatchNorm, whose statistics the descent leaves
    alone. A ViT has one kind of block, this ResNet seven, by size and by what is beside them."""
    model = small_network(family).train()
    # Else what goes beyond the limit is not compiled, without a word.
    with torch._dynamo.config.patch(recompile_limit=TORCHS_LIMIT, fail_on_recompile_limit_hit=True):
        model.compile(backend="eager")
        depth = len(model.stages)
        every_cut = [sam(model, Depth((cut / depth, cut / depth))) for cut in range(depth)]
        with counting_graphs() as graphs:
            for opt in every_cut:
                opt.step(loss_fn, batches(1, 4)[0])
            first = graphs()
            for opt in every_cut:
                opt.step(loss_fn, batches(1, 4)[0])
            assert graphs() == first <= most


@pytest.mark.exhaustive
def test_as_one_graph_it_would_meet_torchs_limit() -> None:
    """Why `StagedModel.compile` is by blocks."""
    model = small_network("vit").train()
    nn.Module.compile(model, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=TORCHS_LIMIT):
        assert graphs_of(model, sam(model, Depth(seed=3)), 12) == TORCHS_LIMIT


@pytest.mark.parametrize("pattern", ["tensor", "row"])
def test_a_mask_that_is_refreshed_asks_for_no_further_graphs(pattern: Any) -> None:
    model = small_network("vit").train()
    model.compile(backend="eager")
    few, many = (graphs_of(model, sam(model, Scored(pattern, 0.5, score="random", every=1)), steps) for steps in (1, 6))
    assert many <= few + 1  # a block of which by chance nothing is perturbed


@pytest.mark.exhaustive  # a minute or two of a compiler
@pytest.mark.parametrize("again", [False, True])
def test_what_is_dropped_at_random_is_the_same_in_both_passes(again: bool) -> None:
    """Compiled kernels draw random numbers of their own, from a seed that they take from torch's random state."""
    model = small_network("vit", proj_drop_rate=0.3, drop_path_rate=0.3).train()
    model.activation_checkpointing = again
    model.compile()
    losses: list[float] = []

    def remembered(forward: Any, batch: Any) -> Tensor:
        loss = loss_fn(forward, batch)
        losses.append(loss.item())
        return loss

    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=0.0), rho=1e-9, mask=Depth((0.5, 0.5)))
    [batch] = batches(1, 8)
    for micro_batches in ([batch], [part(batch, 0, 2), part(batch, 1, 2)]):  # a shared prefix, and one that runs twice
        losses.clear()
        for _ in range(2):
            opt.step(remembered, *micro_batches)
        n = len(micro_batches)
        for step in (losses[: 2 * n], losses[2 * n :]):
            assert step[:n] == pytest.approx(step[n:], abs=1e-6)
        assert abs(losses[0] - losses[2 * n]) > 1e-3


def test_a_tensor_mask_that_stays_compiles_each_block_for_its_own_tensors() -> None:
    case = Compiled("vit", "tensor", compiler="aot_eager")
    with counting_graphs() as graphs:
        [result] = train(World(), "single", [case])
        # For each of four blocks one that leaves out the gradients of its unperturbed tensors; one for the descent; and
        # one for the refresh, which is in evaluation mode, one sample a batch. Stem and head: these three forms each.
        assert graphs() <= 4 + 2 + 2 * 3
    assert largest_difference(case.plain(), result) <= TOLERANCE


def test_a_deep_copy_is_compiled_and_computes_with_its_own_weights() -> None:
    model = small_network("vit").eval()
    model.compile(backend="eager")
    copied = copy.deepcopy(model)
    images = batches(1, 2)[0][0]
    with torch.no_grad():
        for p in copied.parameters():
            p.mul_(1.1)
        with counting_graphs() as graphs:
            outputs = copied(images)
            assert graphs() > 0
        fresh = small_network("vit").eval()
        fresh.load_state_dict(copied.state_dict())
        assert torch.equal(outputs, fresh(images))


def test_names_of_parameters_stay() -> None:
    model = small_network("resnet")
    names = list(model.state_dict())
    model.compile(backend="eager")
    model(batches(1, 2)[0][0])
    assert list(model.state_dict()) == names
    assert not [name for name, _ in model.named_modules() if "_orig_mod" in name]


def test_compiling_the_model_inside_says_that_it_compiles_nothing() -> None:
    model = small_network("vit")
    model.model.compile(backend="eager")
    images = batches(1, 2)[0][0]
    with counting_graphs() as graphs:
        with pytest.warns(UserWarning, match=r"call compile\(\) of the StagedModel") as told:
            model(images)
        assert "\n" not in str(told[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(images)  # said once
        assert graphs() == 0


def test_a_model_without_stages_is_compiled_as_a_whole() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * IMAGE * IMAGE, 16), nn.ReLU(), nn.Linear(16, 10))
    images = batches(1, 2)[0][0]
    plain, model = network(images), staged(network)
    model.compile(backend="eager")
    with counting_graphs() as graphs, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(model(images), plain)
        assert graphs() == 1


def test_what_torch_compile_returns_is_no_model_for_stages() -> None:
    """It would give parameters other names, and its stages would run as they are."""
    network = small_network("vit")
    with pytest.raises(ValueError, match=r"call compile\(\) of the StagedModel"):
        StagedModel(torch.compile(network.model), network.stages)
    whole = torch.compile(network)
    with pytest.raises(ValueError, match=r"call staged\.compile\(\)"):
        SparseSAM(whole, torch.optim.SGD(network.parameters(), lr=0.1))


def test_stages_of_ones_own_are_compiled_by_their_blocks() -> None:
    """A forward that nothing is known of runs as it is, around a block that is compiled."""
    torch.manual_seed(0)
    network = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 2)})

    def first(x: Tensor) -> Tensor:
        return network["a"](x).tanh()

    model = StagedModel(network, [Stage("a", network["a"], first), Stage("b", network["b"], network["b"])])
    x = torch.randn(3, 4)
    plain = model(x)
    model.compile(backend="eager")
    with counting_graphs() as graphs:
        assert torch.equal(model(x), plain)
        assert graphs() == 2
