"""The command line: parse, call, exit code. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from ssam_scale.errors import UserError

app = typer.Typer(
    name="ssam-scale",
    help="Sparse Sharpness-Aware Minimization at scale.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, e.g. perturbation.rho=0.2 data.batch_size=512.")
]


@app.command("train")
def train_command(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        str | None, typer.Option(help="auto: the newest checkpoint if there is one; or a checkpoint's folder.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the resolved configuration and stop.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything and take one step; record and save nothing.")
    ] = False,
) -> None:
    """Train a model. Under torchrun or deepspeed, every process runs this command."""
    from ssam_scale.config import dump, load

    given = [*(overrides or []), *([f"checkpoint.resume={resume}"] if resume else [])]
    resolved = load(config, given)
    if print_config:
        print(dump(resolved), end="")
        return
    from ssam_scale.sharding import join_world
    from ssam_scale.train import dry_run as try_out
    from ssam_scale.train import train

    with join_world() as world:
        if dry_run:
            done = try_out(resolved, world)
            if world.first:
                print(done)
        else:
            train(resolved, world)


@app.command("cost")
def cost_command(
    config: ConfigFile,
    overrides: Overrides = None,
    gpus: Annotated[list[int] | None, typer.Option(help="GPUs; may be given several times. [1 and 8]")] = None,
    gpus_per_node: Annotated[int, typer.Option(help="GPUs of one node.")] = 8,
    node_bandwidth: Annotated[float, typer.Option(help="GB/s that a GPU sends inside of its node.")] = 300.0,
    network_bandwidth: Annotated[float, typer.Option(help="GB/s that a GPU sends to another node.")] = 25.0,
    scaling: Annotated[
        str, typer.Option(help="weak: a GPU keeps the images that were measured; strong: it shares the batch.")
    ] = "weak",
    images: Annotated[int | None, typer.Option(help="Images of the pass that is measured. [8; 64 on a GPU]")] = None,
    repeats: Annotated[int, typer.Option(help="Measurements, of which the median counts.")] = 5,
    times: Annotated[Path | None, typer.Option(help="Take the times from this file; measure nothing.")] = None,
    save_times: Annotated[Path | None, typer.Option(help="Write the measured times to this file.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Instead, run one process of the largest job here, and compare what it sends."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print rows as JSON.")] = False,
) -> None:
    """Predict time, bytes on the wire and memory of a step: base optimizer, dense SAM, the configured plan."""
    from ssam_scale.cli.cost import show_cost, show_rehearsal
    from ssam_scale.config import load
    from ssam_scale.train.predict_cost import Machines

    machines = Machines(gpus or [1, 8], gpus_per_node, 1e9 * node_bandwidth, 1e9 * network_bandwidth, scaling)
    resolved = load(config, overrides or [])
    if dry_run:
        show_rehearsal(resolved, machines, as_json=as_json)
    else:
        show_cost(resolved, machines, images=images, repeats=repeats, times=times, save=save_times, as_json=as_json)


def main(argv: list[str] | None = None) -> None:
    """Run `ssam-scale` with `argv` (the process's own arguments by default) and exit: 0 done, 2 the user's mistake."""
    try:
        _mount()
        app(args=argv)
    except UserError as error:
        # Most mistakes are seen by every process of a job alike, but a damaged file may be seen by one of them only.
        prefix = "" if os.environ.get("RANK", "0") == "0" else f"process {os.environ['RANK']}: "
        print(f"ssam-scale: {prefix}error: {error}", file=sys.stderr)
        sys.exit(2)


def _mount() -> None:
    from ssam_scale.cli.bench import app as bench_app
    from ssam_scale.cli.compare import compare_command
    from ssam_scale.cli.data import app as data_app

    app.add_typer(data_app, name="data")
    app.add_typer(bench_app, name="bench")
    app.command("compare")(compare_command)
