"""The step on blocks compiled with `torch.compile`: as exact, and compiled a few times however the cut moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from ssam_scale.sharding import World
from tests.perturbation.test_equivalence import TOLERANCE, Case, largest_difference, train

# What a block is compiled for: its input with a gradient (descent, and the ascent behind the first perturbed block) and
# without (the first perturbed block of the ascent, whose input is detached); with several micro-batches also without
# any graph (the ascent's prefix). All blocks of a ViT are one code, so that none of it is per block.
FORMS = {1: 2, 2: 3}


@dataclass(frozen=True)
class Compiled(Case):
    """A case whose blocks are compiled in place, as a user would do it."""

    compiler: str = "inductor"

    def make_model(self) -> Any:
        model = super().make_model()
        for stage in model.stages:
            stage.block.compile(backend=self.compiler)
        return model

    def plain(self) -> Case:
        """The same case without the compiler."""
        return Case(**{field.name: getattr(self, field.name) for field in fields(Case)})


@contextmanager
def counting_graphs() -> Iterator[Any]:
    """Counts the graphs compiled inside, by calling what is yielded."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


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
