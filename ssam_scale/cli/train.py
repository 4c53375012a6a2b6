"""`ssam-scale train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="The run's YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides, e.g. perturbation.rho=0.2 data.batch_size=512.")
]


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

    resolved = load(config, [*(overrides or []), *([f"checkpoint.resume={resume}"] if resume else [])])
    if print_config:
        print(dump(resolved), end="")
        return
    from ssam_scale import train
    from ssam_scale.sharding import join_world

    with join_world(device=resolved.train.device) as world:
        if dry_run:
            done = train.dry_run(resolved, world)
            if world.first:
                print(done)
        else:
            train.train(resolved, world)
