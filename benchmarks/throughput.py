"""Images per second and model FLOPs utilisation beside timm's plain loop, waits of the host, and a profiler's trace.

    python benchmarks/throughput.py --models resnet50 vit_base_patch16_224 convnext_tiny

Every loop takes the same random batch, on the device already, in turns: timm's plain loop (forward, loss, backward,
step, `zero_grad`; on a GPU in channels_last and bf16 autocast), `SparseSAM` at ρ = 0, dense SAM, and plans.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssam_scale.bench.networks import Setting, setting_of
from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.bench.scenarios import Scenario, scenarios, sgd, sparse_sam
from ssam_scale.cli.table import Columns, markdown
from ssam_scale.clock import timed
from ssam_scale.errors import UserError
from ssam_scale.sharding.device import to_device

PLANS = ["sam", "textbook", "cut 0.5", "cut 0.75, fraction 0.5", "moving cut", "tensor 50%", "row 50%", "element 50%"]
# Dense FLOP/s of bf16 products by name of the GPU, from their data sheets; others are measured by a large product.
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "V100": 125e12}
AT_ONCE = 4  # steps of a measurement
COLUMNS: Columns = {
    "model": ("model", 1, ""),
    "images/s": ("images_per_second", 1.0, ",.1f"),
    "over plain": ("over_plain", 1.0, ".3f"),
    "time / plain": ("time_over_plain", 1.0, ".3f"),
    "iqr": ("time_over_plain_iqr", 1.0, ".3f"),
    "MFU": ("mfu", 1.0, ".3f"),
    "host waits a step": ("host_waits", 1.0, ".3g"),
}


def peak_flops(device: torch.device) -> float:
    """FLOP/s that the device can do at most, in the precision of the loops."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if known := next((peak for key, peak in PEAKS.items() if key in name), None):
            return known
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, dtype=dtype, device=device)
    a @ a
    seconds = []
    for _ in range(5):
        with timed(device) as product:
            a @ a
        seconds.append(product.seconds)
    return 2.0 * size**3 / min(seconds)


def flops_of_base_step(setting: Setting) -> int:
    """Forward and backward of a batch."""
    network = setting.network()
    with FlopCounterMode(display=False) as counter:
        setting.loss_fn(network, setting.batch()).backward()
    return int(counter.get_total_flops())


def plain_loop(setting: Setting) -> Callable[[], Any]:
    """A step as timm's `train.py` takes it, on a model that nothing of ours has touched but to build it."""
    model = to_device(setting.network().model, setting.device)
    optimizer = sgd(model)  # type: ignore[arg-type]
    batch = setting.batch()

    def step() -> None:
        setting.loss_fn(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(scenario: Scenario, setting: Setting) -> Callable[[], Any]:
    """A step of `SparseSAM`."""
    network = copy.deepcopy(setting.network())
    opt = sparse_sam(network, sgd(network), scenario)
    batch = setting.batch()
    return lambda: opt.step(setting.loss_fn, batch)


@contextlib.contextmanager
def counting_waits(device: torch.device) -> Iterator[list[int]]:
    """How often torch says inside that the host waits for the device; nothing where there is no GPU."""
    seen = [0]
    if device.type != "cuda":
        yield seen
        return
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
    seen[0] = sum("synchronizing" in str(warning.message) for warning in caught)


def measure(setting: Setting, repeats: int, plans: list[str], trace: Path | None) -> list[dict[str, Any]]:
    """Rows of one model, one a loop."""
    known = {scenario.name: scenario for scenario in scenarios()}
    loops = {"timm's plain loop": plain_loop(setting), "SparseSAM, ρ = 0": ours(known["base"], setting)}
    loops |= {name: ours(known[name], setting) for name in plans if known[name].mask is not None}
    flops, peak = flops_of_base_step(setting), peak_flops(setting.device)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    waits: dict[str, float] = {}
    for done in range(repeats + 2):
        for name, step in loops.items():
            watched = counting_waits(setting.device) if done == 1 else contextlib.nullcontext([0])
            # Several, as in training: the host prepares the next step while the device is at this one.
            with watched as seen, timed(setting.device) as taken:
                for _ in range(AT_ONCE):
                    step()
            if done == 1:
                waits[name] = seen[0] / AT_ONCE
            elif done > 1:
                seconds[name].append(taken.seconds / AT_ONCE)
    plain = seconds["timm's plain loop"]
    if trace is not None:
        with torch.profiler.profile(record_shapes=False) as profile:
            loops["cut 0.5" if "cut 0.5" in loops else "SparseSAM, ρ = 0"]()
        profile.export_chrome_trace(str(trace / f"trace_{setting.model}.json.gz"))
    rows = []
    for name, each in seconds.items():
        median = statistics.median(each)
        ratios = sorted(s / p for s, p in zip(each, plain, strict=True))
        quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append(
            {
                "model": setting.model,
                "loop": name,
                "batch_size": setting.batch_size,
                "resolution": setting.resolution,
                "precision": setting.precision,
                "seconds": median,
                "all_seconds": each,
                "images_per_second": setting.batch_size / median,
                "over_plain": statistics.median(plain) / median,
                "time_over_plain": median / statistics.median(plain),
                "time_over_plain_iqr": quartiles[2] - quartiles[0],
                # By what the base step must compute: a second pass is no use of the device in this sense.
                "mfu": flops / median / peak,
                "base_step_flops": flops,
                "peak_flops": peak,
                "host_waits": waits[name] if setting.device.type == "cuda" else None,
            }
        )
    return rows


def main() -> None:
    """Measure the models, print the table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet50", "vit_base_patch16_224", "convnext_tiny"])
    parser.add_argument("--plans", nargs="*", default=[plan for plan in PLANS if plan != "textbook"])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="folder of the result")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for model in arguments.models:
        setting = setting_of(model, arguments.resolution, arguments.batch_size)
        rows += measure(setting, arguments.repeats, arguments.plans, arguments.output)
    first = rows[0]
    caption = (
        f"Batches of {first['batch_size']} images of {first['resolution']} × {first['resolution']}, "
        f"{first['precision']}; medians of {arguments.repeats} times {AT_ONCE} steps, taken in turns; MFU by the "
        f"FLOPs of a base step over {first['peak_flops'] / 1e12:.1f} TFLOP/s."
    )
    table = markdown(rows, COLUMNS, "loop")
    print("\n".join(table))
    write(result_path(arguments.output, "throughput"), ["# Throughput", "", caption, "", *table], rows, provenance())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"throughput: error: {error}", file=sys.stderr)
        sys.exit(2)
