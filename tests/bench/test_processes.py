"""What goes wrong in the processes of a measurement reaches the command."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from ssam_scale.bench.processes import on_ranks
from ssam_scale.errors import UserError


def mistaken(rank: int, *_: Any) -> None:
    if rank == 1:
        raise UserError("DeepSpeed is too old")


def killed(rank: int, *_: Any) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.slow
def test_a_killed_process_is_told_with_its_signal() -> None:
    with pytest.raises(UserError, match=r"^process 1 of 2 was killed by SIGBUS \(a mapped file has become shorter"):
        on_ranks(2, killed)


@pytest.mark.slow
def test_a_users_mistake_stays_one_line() -> None:
    with pytest.raises(UserError, match=r"^DeepSpeed is too old$"):
        on_ranks(2, mistaken)
