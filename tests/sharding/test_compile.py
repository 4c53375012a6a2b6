"""A compiled network on the backends that take one: the same bits as without the compiler, in as few graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ssam_scale.sharding import World
from tests.support.compiled import ENDS, FORMS, Compiled, counting_graphs
from tests.support.ranks import run_ranks
from tests.support.tiers import few
from tests.support.training import train

# aot_eager runs torch's own operators in the graphs that would be compiled.
CASES = [
    Compiled("vit", "moving cut", compiler="aot_eager"),
    Compiled("vit", "element", compiler="aot_eager", accumulation=2, again=True),
]


def _with_and_without(world: World, backend: str, cases: list[Compiled]) -> list[tuple[list[str], int]]:
    """What differs of each case, and its graphs."""
    found = []
    for case in cases:
        with counting_graphs() as graphs:
            [compiled] = train(world, backend, [case])
            taken = graphs()
        [plain] = train(world, backend, [replace(case, compiler="none")])
        differing = [
            f"{what} {name}"
            for what in ("weights", "state")
            for name, value in plain[what].items()
            if not torch.equal(value, compiled[what][name])
        ]
        found.append((differing + (["losses"] if not torch.equal(plain["losses"], compiled["losses"]) else []), taken))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", "zero0", "zero1", "zero2"], "fsdp2", "zero2"))
def test_two_processes(backend: str) -> None:
    for results in run_ranks(2, _with_and_without, backend, CASES):
        assert [differing for differing, _ in results] == [[]] * len(CASES)
        # Wrappers may add a form of input of their own; a graph a step would be the thing to fear.
        assert results[0][1] <= FORMS[1] + ENDS[1] + 1
