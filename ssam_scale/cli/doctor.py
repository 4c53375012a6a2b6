"""`ssam-scale doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssam_scale.cli.paths import expanded
from ssam_scale.cli.train import Overrides
from ssam_scale.console import console
from ssam_scale.errors import UserError


def doctor_command(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", callback=expanded, help="A run's YAML file: look at what that run needs, too."),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Look at what training needs, line by line: ok, warn or fail, and what mends it. Exit code 1 if anything fails.

    Without a configuration: this installation and machine. With one, also the run's data, folders, room and tracking
    store, as a training does itself before it begins. Under torchrun, deepspeed or srun: of all machines, with their
    versions, clocks and collectives.
    """
    if config is None and overrides:
        raise UserError(f"{overrides[0]}: an override needs a configuration to override: --config FILE")
    from ssam_scale import train
    from ssam_scale.config.load import load
    from ssam_scale.launcher import ended_with_launcher
    from ssam_scale.sharding import join_world
    from ssam_scale.tracking.redaction import without_secrets

    resolved = None if config is None else load(config, overrides or [])
    device = "auto" if resolved is None else resolved.train.device
    with ended_with_launcher(), join_world(device=device) as world:
        findings = train.examine(resolved, world)
        out = console(quiet=not world.first)
        for finding in findings:
            out.print(without_secrets(str(finding)), soft_wrap=True)
    if any(finding.verdict == "fail" for finding in findings):
        raise typer.Exit(1)
