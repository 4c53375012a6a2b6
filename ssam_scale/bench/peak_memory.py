"""The peak of memory during a step by plan, next to the base optimizer's, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssam_scale.masks import BitMask, Rows
from ssam_scale.perturbation import SparseSAM

from .networks import Setting
from .processes import on_ranks
from .scenarios import Running, Scenario, scenarios
from .step_time import environment


def extra_bytes(work: Callable[[], Any], device: torch.device) -> int | None:
    """The peak of memory during `work`, its result included, over what was taken before it.

    On CUDA: what torch allocates (`torch.cuda.max_memory_allocated`). Otherwise the resident memory of this process:
    Linux is told to forget the peak (`/proc/self/clear_refs`) and asked for it afterwards (VmHWM minus the VmRSS of
    before, in `/proc/self/status`); free memory is given back first, so that none is taken unseen. Where that is not
    possible: None.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, StopIteration):
        work()
        return None
    result = work()
    peak = _status("VmHWM")
    del result
    return max(peak - before, 0)


def mask_bytes(opt: SparseSAM) -> int:
    """What the mask keeps in memory between two refreshes."""
    kept: list[Tensor] = []
    for part in opt.plan.weights.values():
        if isinstance(part, BitMask):
            kept.append(part.packed)
        elif isinstance(part, Rows):
            kept += [part.keep, part.kept, *([part.bits] if part.spans is None else [])]
    return sum(t.nbytes for t in kept)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# An allocator keeps what steps before have used, and finds its sizes in the first ones.
_WARM_UP = 2


def has_one_peak(scenario: Scenario) -> bool:
    """Whether every step is alike; an interval, or a moving cut, has the peak of its most expensive step."""
    return scenario.steps == 1


def _measure(
    rank: int, size: int, device: torch.device, scenario: str, setting: Setting, repeats: int
) -> dict[str, Any]:
    [found] = [w for w in scenarios() if w.name == scenario]  # by name: what builds a mask need not be picklable
    running = Running(found, setting, setting.network())
    for _ in range(_WARM_UP):
        running.step()
    peaks = []
    for _ in range(repeats):
        running.optimizer.zero_grad()  # some leave gradients behind, and clear them first
        peaks.append(extra_bytes(running.step, device))
    known = [peak for peak in peaks if peak is not None]
    return {
        "density": running.shape().perturbed / running.weights,
        "persistent_bytes": _kept_bytes(running),
        "step_bytes": sorted(known)[len(known) // 2] if known else None,
        "threads": torch.get_num_threads(),
    }


def _kept_bytes(running: Running) -> int:
    """What stays between two steps: weights, buffers, the optimizer's state, mask, memory for the backup, the batch."""
    state: Iterable[Any] = itertools.chain.from_iterable(s.values() for s in running.optimizer.state.values())
    kept = [*running.network.parameters(), *running.network.buffers(), *state, *running.batch]
    ours = 0 if running.opt is None else mask_bytes(running.opt) + running.opt.backup_bytes
    return ours + sum(t.nbytes for t in kept if isinstance(t, Tensor))


def bench_peak(setting: Setting, repeats: int, compared: Sequence[Scenario]) -> list[dict[str, Any]]:
    """Rows of the peak of memory during a step, one a plan.

    `persistent_bytes` lie there between steps: weights, buffers, the optimizer's state, the mask, memory for the backup
    of perturbed weights (which is kept on a CPU only), and the batch.
    `step_bytes`: the peak during a step beyond what was taken before it, the median of `repeats` steps
    (`extra_bytes` tells how it is measured). `peak_bytes` is the sum, `peak_over_base` its ratio to the base
    optimizer's; all are None where that cannot be measured.

    Args:
        setting: on what; one that `Setting.check` finds nothing wrong with.
        repeats: steps, after a few that warm up.
        compared: the plans, the base optimizer first; those of which not every step is alike are left out.

    Raises:
        UserError: a process was killed, as one is that asks for more memory than there is.
    """
    rows: list[dict[str, Any]] = []
    common = environment(setting, repeats)
    for scenario in filter(has_one_peak, compared):
        found = on_ranks(1, _measure, scenario.name, setting, repeats)
        step, threads = found["step_bytes"], found.pop("threads")
        peak = None if step is None else found["persistent_bytes"] + step
        base = rows[0]["peak_bytes"] if rows else peak
        over = None if peak is None or base is None else peak / base
        plan = {"model": setting.model, "plan": scenario.name, "fraction": scenario.fraction}
        rows.append({**plan, **found, "peak_bytes": peak, "peak_over_base": over, **common, "threads": threads})
    return rows
