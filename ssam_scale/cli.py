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
    from ssam_scale.bench.commands import app as bench_app
    from ssam_scale.data.commands import app as data_app
    from ssam_scale.tracking.commands import compare_command

    app.add_typer(data_app, name="data")
    app.add_typer(bench_app, name="bench")
    app.command("compare")(compare_command)
