"""An exception inside a step, on one rank alone or on all: the weights are w, and no rank waits for ever.

What happens on one rank alone ends the job: the other ranks cannot finish their collectives. So every such case is a
pair of real processes whose ends are looked at one by one, and every process writes down, when `step` has raised,
whether its own weights are w.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssam_scale import Depth, SparseSAM
from ssam_scale.perturbation import Savings
from ssam_scale.sharding import World, bucketed_all_reduce, join_world
from ssam_scale.sharding.place import place
from tests.support.networks import batches, freeze_batchnorm, loss_fn, part, small_network
from tests.support.processes import daemon, free_port
from tests.support.ranks import run_ranks, start_fresh_rank
from tests.support.tiers import few

ROOT = Path(__file__).parents[2]
BATCH = 8
MESSAGE = "raised on purpose"
COLLECTIVE_TIMEOUT = timedelta(seconds=20)
# An upper bound for a pair of processes: imports, perhaps DeepSpeed's compilation, two steps, the collective timeout.
# Generous, because ending a process in the middle of that compilation leaves a lock that stops every later one.
PAIR_ENDS_WITHIN_S = 600.0

ASCENT = "in the ascent's loss, before the forward"
ASCENDING = "in the backward of a block, in the ascent"
BEFORE = "in the descent's loss, before the forward"
AFTER = "in the descent's loss, after the forward"
BLOCK = "in the forward of a block, in the descent"
BACKWARD = "in the backward of a block, in the descent"
LINGERS = f"{BEFORE}, and the process lives on"


class Failing:
    """A loss function that raises at one point of a step of one micro-batch, once; only where it is `armed`."""

    def __init__(self, where: str, block: nn.Module, *, armed: bool) -> None:
        self._where = where
        self._armed = armed
        self._calls = 0
        block.register_forward_pre_hook(self._before_block)
        block.register_full_backward_pre_hook(self._before_block_backward)

    def __call__(self, forward: Any, batch: Any) -> Tensor:
        self._calls += 1
        if self._calls == 1:
            self._raise_if(ASCENT)
            return loss_fn(forward, batch)
        self._raise_if(BEFORE, LINGERS)
        loss = loss_fn(forward, batch)
        self._raise_if(AFTER)
        return loss

    def _before_block(self, block: nn.Module, inputs: Any) -> None:
        if self._calls == 2:
            self._raise_if(BLOCK)

    def _before_block_backward(self, block: nn.Module, gradients: Any) -> None:
        self._raise_if(ASCENDING if self._calls == 1 else BACKWARD)

    def _raise_if(self, *where: str) -> None:
        if self._armed and self._where in where:
            self._armed = False
            raise ArithmeticError(MESSAGE)


def sparse_sam(world: World, backend: str) -> tuple[SparseSAM, nn.Module]:
    """The optimizer of a new ViT, and the ViT's last block, which is in the suffix of the mask's cut.

    Args:
        world: the processes.
        backend: as `place` takes it, or `hsdp`, which is FSDP2 with a copy of the weights on every process.
    """
    model = freeze_batchnorm(small_network("vit"))
    blocks = [stage.block for stage in model.stages]

    def sgd() -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    kind: Any = "fsdp2" if backend == "hsdp" else backend
    replicas = world.size if backend == "hsdp" else 1
    placed, base = place(model, blocks, kind, world, sgd, replicas=replicas, batch_size=BATCH // world.size)
    savings = Savings(keep_gathered=backend in ("fsdp2", "zero3"))
    return SparseSAM(placed, base, rho=0.5, mask=Depth((0.5, 0.5)), savings=savings), blocks[-1]


@contextmanager
def small_buckets() -> Iterator[None]:
    """So that some of an ascent's are on their way when its backward raises."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bucketed_all_reduce, "_BUCKET_BYTES", 2000)
        yield


class Snapshot:
    """The weights of this process at one time. Taking it and asking it involve no other process."""

    def __init__(self, opt: SparseSAM) -> None:
        self._opt = opt
        self._weights = [w.clone() for w in _weights(opt)]

    def holds(self, other: SparseSAM | None = None) -> bool:
        """Whether these are, bit for bit, the weights of the optimizer now, or of `other`."""
        return all(torch.equal(a, b) for a, b in zip(_weights(other or self._opt), self._weights, strict=True))


def _weights(opt: SparseSAM) -> list[Tensor]:
    """Everything that a perturbation changes on this process."""
    return opt.sharding.resident(list(opt.parameters.by_name.values()))


def fail_alone(backend: str, where: str, folder: Path) -> None:
    """One process of a pair: a step as usual, then one in which rank 1 raises."""
    with small_buckets(), join_world(COLLECTIVE_TIMEOUT) as world:
        opt, block = sparse_sam(world, backend)
        first, second = (part(batch, world.rank, world.size) for batch in batches(2, BATCH))
        opt.step(loss_fn, first)
        before = Snapshot(opt)
        try:
            opt.step(Failing(where, block, armed=world.rank == 1), second)
        except Exception as error:
            record = {"error": repr(error), "restored": before.holds()}
            (folder / f"{world.rank}.json").write_text(json.dumps(record))
            deadline = time.monotonic() + PAIR_ENDS_WITHIN_S
            while where == LINGERS and not (folder / "0.json").exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            raise


def _fail(world: World, backend: str, where: str) -> list[str]:
    """What did not hold after an exception on all ranks."""
    wrong = []
    first, second, third = (part(batch, world.rank, world.size) for batch in batches(3, BATCH))
    with small_buckets():
        (opt, block), (undisturbed, _) = sparse_sam(world, backend), sparse_sam(world, backend)
        for each in (opt, undisturbed):
            each.step(loss_fn, first)
        before = Snapshot(opt)
        with pytest.raises(ArithmeticError, match=MESSAGE):
            opt.step(Failing(where, block, armed=True), second)
        if not before.holds():
            wrong.append("the weights are not w")
        for batch in (second, third):
            for each in (opt, undisturbed):
                each.step(loss_fn, batch)
        if not Snapshot(opt).holds(undisturbed):
            wrong.append("the next steps differ")
    return wrong


# What else ZeRO must bear stands in test_zero.
ALL = [
    *((backend, where) for backend in ("ddp", "fsdp2") for where in (ASCENT, BEFORE, AFTER, BLOCK, BACKWARD)),
    ("hsdp", BLOCK),
    ("ddp", ASCENDING),
    *((f"zero{stage}", BLOCK) for stage in range(4)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "where"), ALL)
def test_after_an_exception_on_all_ranks_the_next_steps_are_as_if_nothing_had_happened(
    backend: str, where: str
) -> None:
    assert run_ranks(2, _fail, backend, where) == [[], []]


# Raised before the descent's forward, this leaves a rank at w + ε while the other one waits in a collective: every
# backend. Where else it happens matters to those whose hooks run around forward and backward. In most cases the process
# that raised ends, which its peer notices at once; in one it lives on, and only the timeout can end the wait.
ALONE = [
    *((backend, BEFORE) for backend in ("ddp", "hsdp", "zero0", "zero1", "zero2", "zero3")),
    ("ddp", ASCENDING),
    ("fsdp2", LINGERS),
    *((backend, where) for backend in ("fsdp2", "zero3") for where in (ASCENT, AFTER, BLOCK)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "where"), ALONE)
def test_one_rank_that_raises_alone_ends_the_job_with_the_weights_at_w_everywhere(
    backend: str, where: str, tmp_path: Path
) -> None:
    port, logs = free_port(), [tmp_path / f"{rank}.log" for rank in range(2)]
    with ExitStack() as stack:
        ranks = []
        for rank, log in enumerate(logs):
            ranks.append(start_fresh_rank(rank, 2, port, log, fail_alone, backend, where, tmp_path))
            stack.callback(ranks[-1].kill)
        deadline = time.monotonic() + PAIR_ENDS_WITHIN_S
        for process in ranks:
            process.join(deadline - time.monotonic())
        check_pair([process.exitcode for process in ranks], logs, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("backend", few(["ddp", "fsdp2", "zero3"], "ddp"))
def test_a_whole_interpreter_ends_likewise(backend: str, tmp_path: Path) -> None:
    """With all that Python, gloo and DeepSpeed do at an interpreter's exit."""
    command = [sys.executable, "-m", "tests.sharding.test_failures", backend, BEFORE, str(tmp_path)]
    path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT)])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    with ExitStack() as stack:
        ranks = []
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path}
            ranks.append(stack.enter_context(daemon(command, log, shared | own)))
        deadline = time.monotonic() + PAIR_ENDS_WITHIN_S
        check_pair([process.wait(deadline - time.monotonic()) for process in ranks], logs, tmp_path)


def check_pair(codes: list[int | None], logs: list[Path], folder: Path) -> None:
    """Both processes have ended, neither as if nothing had happened, and both were at w after the exception."""
    said = [log.read_text() for log in logs]
    assert not {0, None} & set(codes), said
    assert f"ArithmeticError: {MESSAGE}" in said[1]
    for rank in range(2):
        assert (folder / f"{rank}.json").exists(), said[rank]
        record = json.loads((folder / f"{rank}.json").read_text())
        assert record["restored"], f"rank {rank} is not at w after {record['error']}"


if __name__ == "__main__":
    fail_alone(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
