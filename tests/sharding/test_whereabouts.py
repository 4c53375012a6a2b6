"""Who is to blame for a wait, by what all processes said of themselves."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ssam_scale.ended import status_of_dead, status_words
from ssam_scale.sharding.whereabouts import Sighting, is_lost, verdict_of

SINCE = time.time()
# Behind midnight with the day before it, on which this module may have been imported.
CLOCK = time.strftime("(%Y-%m-%d )?%H:%M:%S", time.localtime(SINCE))


def seen(step: int, order: int, phase: str, *, waits: bool = False, ended: str = "") -> Sighting:
    return Sighting("b", 7, step, order, phase, SINCE, 5, waits, ended)


WAITING = seen(29, 7, "ascent backward", waits=True)
DATA = seen(29, 3, "data")


def verdict(*after: Sighting, silent: tuple[int, ...] = (), gone: dict[int, str] | None = None, size: int = 0) -> str:
    before = {rank: s if rank in silent else replace(s, beat=1) for rank, s in enumerate(after)}
    return verdict_of(before, dict(enumerate(after)), gone or {}, size or len(after))


def test_the_one_that_has_not_come_is_named_with_its_phase() -> None:
    line = verdict(WAITING, WAITING, DATA)
    assert re.fullmatch(rf"rank 2 \(node b\) has not come to step 29: it is in data loading since {CLOCK}", line)


@pytest.mark.parametrize(
    ("late", "line"),
    [
        (seen(28, 12, "evaluation"), "has not come to step 29: it is in evaluation at step 28 since"),
        (
            seen(29, 5, "ascent forward"),
            "has not come to the ascent's backward of step 29: it is in the ascent's forward",
        ),
        (replace(WAITING, waits=False), "has not come to the end of the ascent's backward of step 29: it is in the"),
    ],
    ids=["a step behind", "a phase behind", "in the same phase"],
)
def test_it_is_named_wherever_it_is(late: Sighting, line: str) -> None:
    assert verdict(WAITING, late).startswith(f"rank 1 (node b) {line}")


def test_one_without_a_sign_of_life_comes_before_those_that_wait_for_it() -> None:
    """Others may wait for it elsewhere, and not know for how long yet."""
    line = verdict(WAITING, seen(29, 2, "RefreshMask"), DATA, silent=(2,))
    assert re.fullmatch(r"rank 2 .* since [\d: -]+, and has given no sign of life since: .*", line)


def test_one_that_was_killed_comes_first() -> None:
    gone = {1: "was killed by SIGBUS (…)", 0: "has ended without a word"}
    assert verdict(WAITING, DATA, WAITING, gone=gone, silent=(0, 1)) == (
        "rank 1 (node b) was killed by SIGBUS (…), in data loading of step 29"
    )


def test_one_that_ended_with_a_reason_is_named_with_it_and_those_that_lost_it_are_not() -> None:
    left = replace(WAITING, ended="rank 1 has ended")
    assert verdict(left, replace(DATA, ended="a.beton: cut short")) == "rank 1 (node b) has ended: a.beton: cut short"


def test_one_that_never_spoke_is_named() -> None:
    assert verdict(WAITING, size=3).startswith("ranks 1, 2 never said anything")


def test_collectives_that_do_not_belong_together_are_nobodys_fault() -> None:
    alike = replace(WAITING, waits=True)
    line = "all processes wait for each other, in the ascent's backward of step 29: they came too far apart, or"
    assert verdict(alike, alike).startswith(line)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL (by somebody, or because the memory"),
        (signal.SIGBUS, "was killed by SIGBUS (a mapped file has become shorter"),
        (signal.SIGTERM, "was killed by SIGTERM"),
    ],
    ids=lambda value: value.name if isinstance(value, signal.Signals) else "",
)
def test_how_a_process_ended_is_known_before_its_parent_asks(number: signal.Signals, words: str) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        assert status_of_dead(process.pid) is None
        process.send_signal(number)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        status = status_of_dead(process.pid)
    assert status is not None
    assert status_words(status).startswith(words)
    assert "memory" not in status_words(status) or number == signal.SIGKILL


def test_what_a_library_leaves_unfinished_is_the_loss_that_it_came_of() -> None:
    """As ZeRO's third stage does, which was gathering when the other process died."""
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2048")
    unfinished = RuntimeError("{'id': 0, 'status': 'INFLIGHT'} expected to be released")
    assert is_lost(lost)
    assert not is_lost(unfinished)
    unfinished.__context__ = lost  # raised on the way out
    assert is_lost(unfinished)
    assert not is_lost(ValueError("Connection closed by peer"))
