"""The step on blocks compiled with `torch.compile`: as exact, and compiled a few times however the cut moves."""

from __future__ import annotations

import pytest

from ssam_scale.sharding import World
from tests.support.compiled import FORMS, Compiled, counting_graphs
from tests.support.training import TOLERANCE, largest_difference, train


@pytest.mark.slow
@pytest.mark.parametrize(("accumulation", "compiler"), [(1, "inductor"), (2, "aot_eager")])
def test_compiled_blocks_equal_the_reference_and_are_compiled_once_for_each_form_of_input(
    accumulation: int, compiler: str
) -> None:
    case = Compiled("vit", "moving cut", accumulation=accumulation, compiler=compiler)
    with counting_graphs() as graphs:
        [result] = train(World(), "single", [case])
        assert graphs() == FORMS[accumulation]
    # Fused kernels round elsewhere than the operators one by one: like another order of summation.
    assert largest_difference(case.plain(), result) <= TOLERANCE


@pytest.mark.slow
def test_a_tensor_mask_compiles_each_block_for_its_own_tensors_and_not_anew_in_each_step() -> None:
    case = Compiled("vit", "tensor", compiler="aot_eager")
    with counting_graphs() as graphs:
        [result] = train(World(), "single", [case])
        # For each of four blocks one that leaves out the gradients of its unperturbed tensors; one for the descent; and
        # two for the refresh: its batch has another size, and it is in evaluation mode.
        assert graphs() <= 4 + 1 + 2
    assert largest_difference(case.plain(), result) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("mask", ["row", "late"])
def test_compiled_blocks_compute_all_rows_and_are_compiled_a_few_times_however_long_training_goes(mask: str) -> None:
    case = Compiled("vit", mask, compiler="aot_eager")
    with counting_graphs() as graphs:
        [result] = train(World(), "single", [case])
        # As for a tensor mask; and the ascent in which a row mask looks at all, which is the descent's graph.
        assert graphs() <= 4 + 2 + 2
    assert largest_difference(case.plain(), result) <= TOLERANCE
