"""Which SAM is right under FSDP2? Ours and others on the same test, against the step written out for one process.

    python benchmarks/peers.py                  the table, written to benchmarks/results/ too
    python benchmarks/peers.py --also 3.10.1    with a further release of pytorch_optimizer, from PyPI

Two gloo processes train a small ViT under FSDP2 (`fully_shard` on every block and on the model) for five steps in fp32,
with dense SAM around SGD with momentum, each process on its half of the batch. What comes out is compared with
`reference_step` on one process and the whole batch. Each system is used as its own documentation shows.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from ssam_scale import SparseSAM
from ssam_scale.bench.record import provenance, result_path, write
from ssam_scale.models.torchvision_ops import ensure_torchvision
from ssam_scale.perturbation.reference import reference_step
from ssam_scale.sharding import World, join_world

RANKS, STEPS, BATCH, IMAGE, CLASSES = 2, 5, 12, 32, 10
RHO, LR, MOMENTUM = 0.1, 0.05, 0.9

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], None]


# ------------------------------------------------------------------------------------------------------ the systems


class TextbookSAM(torch.optim.Optimizer):
    """Algorithm 1 of the SAM paper (arXiv 2010.01412) in the two calls that most public implementations share.

    Args:
        params: what to perturb and train.
        base_optimizer: class of the base optimizer.
        rho: radius of the perturbation.
        in_place: restore the weights by copying into them, instead of giving every parameter its old tensor back.
        options: of the base optimizer.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        base_optimizer: type[torch.optim.Optimizer],
        rho: float,
        in_place: bool,
        **options: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.in_place = in_place

    def _each(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self) -> None:
        """w ← w + ρ g / ‖g‖."""
        norm = torch.stack([p.grad.norm() for p in self._each() if p.grad is not None]).norm()
        for p in self._each():
            self.state[p]["old"] = p.data.clone()
            p.add_(p.grad * (self.defaults["rho"] / (norm + 1e-12)))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        """Back to w, then a step of the base optimizer."""
        for p in self._each():
            if self.in_place:
                p.copy_(self.state[p]["old"])
            else:
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        self.zero_grad()


def loss_fn(forward: Callable[[Tensor], Tensor], batch: Batch) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(forward(batch[0]), batch[1])


def backward(model: nn.Module, batch: Batch) -> Tensor:
    """Loss and gradients of a batch."""
    loss = loss_fn(model, batch)
    loss.backward()
    return loss


def sparse_sam(model: nn.Module, lr: float) -> Step:
    """Ours: a loss function and the batch."""
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM), rho=RHO, norm="dense")
    return lambda batch: opt.step(loss_fn, batch)


def sparse_sam_closure(model: nn.Module, lr: float) -> Step:
    """Ours: a closure in torch's style."""
    opt = SparseSAM(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM), rho=RHO, norm="dense")
    return lambda batch: opt.step(lambda: backward(model, batch))


def pytorch_optimizer_sam(model: nn.Module, lr: float) -> Step:
    """As in the class's docstring: a backward, then `step` with a closure that does it again."""
    sam = importlib.import_module("pytorch_optimizer").SAM
    opt = sam(model.parameters(), torch.optim.SGD, rho=RHO, lr=lr, momentum=MOMENTUM)

    def step(batch: Batch) -> None:
        opt.zero_grad()

        def closure() -> Tensor:
            opt.zero_grad()
            return backward(model, batch)

        closure()
        opt.step(closure)

    return step


def two_calls(opt: Any, model: nn.Module) -> Step:
    """The other documented use: a backward before each of two calls."""

    def step(batch: Batch) -> None:
        opt.zero_grad()
        backward(model, batch)
        opt.first_step()
        opt.zero_grad()
        backward(model, batch)
        opt.second_step()

    return step


def pytorch_optimizer_two_calls(model: nn.Module, lr: float) -> Step:
    """`first_step` and `second_step`."""
    sam = importlib.import_module("pytorch_optimizer").SAM
    return two_calls(sam(model.parameters(), torch.optim.SGD, rho=RHO, lr=lr, momentum=MOMENTUM), model)


def textbook(model: nn.Module, lr: float) -> Step:
    """Restores by `p.data = old`, as most public implementations do."""
    return two_calls(TextbookSAM(model.parameters(), torch.optim.SGD, RHO, False, lr=lr, momentum=MOMENTUM), model)


def textbook_in_place(model: nn.Module, lr: float) -> Step:
    """The same with its one line corrected: restores by `p.copy_(old)`."""
    return two_calls(TextbookSAM(model.parameters(), torch.optim.SGD, RHO, True, lr=lr, momentum=MOMENTUM), model)


def no_sam(model: nn.Module, lr: float) -> Step:
    """The base optimizer alone: how far from SAM is no SAM at all?"""
    opt = torch.optim.SGD(model.parameters(), lr=lr, momentum=MOMENTUM)

    def step(batch: Batch) -> None:
        backward(model, batch)
        opt.step()
        opt.zero_grad()

    return step


@dataclass(frozen=True)
class System:
    """What is compared.

    Attributes:
        name: of the package or method.
        use: how it is called.
        make: builds its step for a model and a learning rate.
        release: of pytorch_optimizer, if not the installed one.
    """

    name: str
    use: str
    make: Callable[[nn.Module, float], Step]
    release: str | None = None


def systems(also: Iterable[str]) -> list[System]:
    """Every system; `also` are further releases of pytorch_optimizer."""
    ours = f"ssam_scale {metadata.version('ssam_scale')} SparseSAM"
    listed = [System(ours, "step(loss_fn, batch)", sparse_sam), System(ours, "step(closure)", sparse_sam_closure)]
    listed += [
        System("textbook SAM", "first_step, second_step; p.data = old", textbook),
        System("textbook SAM", "first_step, second_step; p.copy_(old)", textbook_in_place),
        System("no SAM", "SGD alone", no_sam),
    ]
    for release in (None, *also):
        name = f"pytorch_optimizer {release or metadata.version('pytorch_optimizer')} SAM"
        listed += [
            System(name, "step(closure)", pytorch_optimizer_sam, release),
            System(name, "first_step, second_step", pytorch_optimizer_two_calls, release),
        ]
    return listed


# ------------------------------------------------------------------------------------------------------ the measurement


def vit() -> nn.Module:
    """A small ViT of four blocks, the same each time."""
    ensure_torchvision()
    import timm

    torch.manual_seed(0)
    options = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=CLASSES, **options)
    return model


def batches() -> list[Batch]:
    """The global batches."""
    generator = torch.Generator().manual_seed(1)
    shape = (BATCH, 3, IMAGE, IMAGE)
    return [
        (torch.randn(shape, generator=generator), torch.randint(CLASSES, (BATCH,), generator=generator))
        for _ in range(STEPS)
    ]


def weights_in_use(model: nn.Module) -> dict[str, Tensor]:
    """The whole weights that a forward would compute with, from FSDP2's own storage and not from what `p` shows."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.reshard()
        module.unshard()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for module in sharded:
        module.reshard()
    return weights


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest absolute difference of any weight."""
    return max(float((a[name] - b[name]).abs().max()) for name in b)


def measure(system: System, world: World) -> dict[str, Any]:
    """What `system` makes of five steps on this process and the others, with a learning rate and with none."""
    result: dict[str, Any] = {}
    for lr in (LR, 0.0):
        plain = vit()
        for block in plain.blocks:  # type: ignore[union-attr]
            fully_shard(block)
        model = fully_shard(plain)
        step = system.make(model, lr)
        seen = [weights_in_use(model)]
        for images, labels in batches():
            step((images.chunk(world.size)[world.rank], labels.chunk(world.size)[world.rank]))
            seen.append(weights_in_use(model))
        if lr:
            result["weights"] = seen[-1]
        else:
            result["drift"] = apart(seen[-1], seen[0])
            result["returned"] = sum(apart(after, before) == 0.0 for before, after in itertools.pairwise(seen))
    return result


def measure_all(rank: int, systems: list[System], packages: str | None, port: int, folder: str) -> None:
    """One process of all; writes the results of the first. What raises must do so on every process."""
    torch.set_num_threads(1)
    if packages is not None:
        sys.path.insert(0, packages)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    results = []
    with join_world() as world:
        for system in systems:
            try:
                results.append(measure(system, world))
            except Exception as error:
                results.append({"error": f"{type(error).__name__}: {str(error).splitlines()[0].partition('. ')[0]}"})
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")


def reference() -> dict[str, Tensor]:
    """The weights after five steps of dense SAM, written out, on one process and the whole batches."""
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    everything = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for batch in batches():
        reference_step(model, optimizer, loss_fn, batch, rho=RHO, mask=everything, norm="dense")
    return {name: p.detach() for name, p in model.named_parameters()}


# ------------------------------------------------------------------------------------------------------ the report


def run(systems: list[System], release: str | None, folder: Path) -> list[dict[str, Any]]:
    """The results of systems that use the same release of pytorch_optimizer, on new processes."""
    packages = None
    if release is not None:
        packages = str(folder / release)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", packages]
        subprocess.run([*command, f"pytorch_optimizer=={release}"], check=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    mp.start_processes(measure_all, (systems, packages, port, str(folder)), nprocs=RANKS, start_method="spawn")
    results: list[dict[str, Any]] = torch.load(folder / "results.pt")
    return results


def row(system: System, result: dict[str, Any], expected: dict[str, Tensor]) -> list[str]:
    """The line of one system."""
    if "error" in result:
        return [system.name, system.use, f"raises {result['error']}", "–", "–"]
    difference = apart(result["weights"], expected)
    return [system.name, system.use, f"{difference:.1e}", f"{result['drift']:.1e}", f"{result['returned']} of {STEPS}"]


def raw_of(result: dict[str, Any], expected: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers of one system, or its error, as JSON takes them."""
    if "error" in result:
        return {"error": result["error"]}
    difference = float(apart(result["weights"], expected))
    return {"difference": difference, "drift": float(result["drift"]), "steps_returned": int(result["returned"])}


HEADER = [
    "system",
    "used as",
    f"largest difference of a weight from the reference after {STEPS} steps",
    f"drift of the weights in {STEPS} steps with lr 0",
    "steps after which the weights were back at w, bit for bit",
]


def markdown(rows: list[list[str]]) -> list[str]:
    """The table and what was measured."""
    return [
        "# SAM under FSDP2",
        "",
        f"Two gloo processes, a ViT of four blocks in fp32, {STEPS} steps of {BATCH} samples, dense SAM",
        f"(rho {RHO}) around SGD (lr {LR}, momentum {MOMENTUM}). The reference is the step written out for one",
        "process. Weights are those that a forward would gather and compute with. `no SAM` shows how far from",
        "SAM is none at all.",
        "",
        *("| " + " | ".join(row) + " |" for row in (HEADER, ["---"] * len(HEADER), *rows)),
    ]


def main(arguments: list[str]) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--also", nargs="*", default=[], metavar="RELEASE", help="further releases of pytorch_optimizer"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=result_path(Path(__file__).parent / "results", "peers-fsdp2"),
        help="the Markdown file; a .json of the raw rows is written beside it (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("pytorch_optimizer") is None:
        parser.error("needs pytorch_optimizer: pip install -e '.[bench]'")
    expected = reference()
    table = Table(*HEADER, title=f"Dense SAM under FSDP2 on {RANKS} processes", show_lines=True)
    rows, raw = [], []
    with tempfile.TemporaryDirectory() as folder:
        for release, group in itertools.groupby(systems(options.also), key=lambda system: system.release):
            same = list(group)
            for system, result in zip(same, run(same, release, Path(folder)), strict=True):
                rows.append(row(system, result, expected))
                table.add_row(*rows[-1])
                raw.append({"system": system.name, "used_as": system.use, **raw_of(result, expected)})
    Console().print(table)
    write(options.output, markdown(rows), raw, provenance())


if __name__ == "__main__":
    main(sys.argv[1:])
