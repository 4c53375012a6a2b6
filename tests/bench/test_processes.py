"""What goes wrong in the processes of a measurement reaches the command."""

from __future__ import annotations

from typing import Any

import pytest

from ssam_scale.bench.processes import on_ranks
from ssam_scale.errors import UserError


def mistaken(rank: int, *_: Any) -> None:
    if rank == 1:
        raise UserError("DeepSpeed is too old")


@pytest.mark.slow
def test_a_users_mistake_stays_one_line() -> None:
    with pytest.raises(UserError, match=r"^DeepSpeed is too old$"):
        on_ranks(2, mistaken)
