"""`ssam-scale train`."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from ssam_scale.cli.paths import expanded, expanded_text
from ssam_scale.errors import UserError

ConfigFile = Annotated[Path, typer.Option("--config", "-c", callback=expanded, help="The run's YAML file.")]
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
        bool,
        typer.Option("--print-config", help="Print the resolved configuration, with where each key is from, and stop."),
    ] = False,
    deepspeed_config: Annotated[
        str | None,
        typer.Option(
            "--deepspeed-config",
            "--deepspeed_config",
            metavar="FILE",
            callback=expanded_text,
            help="A configuration file of DeepSpeed's own, whose keys go below sharding.deepspeed.",
        ),
    ] = None,
    deepspeed: Annotated[
        bool, typer.Option("--deepspeed", help="Check that the backend is a stage of ZeRO, as DeepSpeed's users say.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything and take one step; record and save nothing.")
    ] = False,
) -> None:
    """Train a model. Under torchrun or deepspeed, every process runs this command."""
    from ssam_scale.config.load import dump, load_with_origins

    if resume == "":  # of a variable of the shell that is not set; a run would begin anew
        raise UserError("--resume is empty; give a checkpoint's folder, or auto")
    given = [*(overrides or []), *([f"checkpoint.resume={resume}"] if resume else [])]
    resolved, origins = load_with_origins(config, given, deepspeed_config)
    if deepspeed and not resolved.sharding.backend.startswith("zero"):
        raise UserError(
            f"--deepspeed: sharding.backend is {resolved.sharding.backend}; say which stage of ZeRO: "
            "sharding.backend=zero2, or --deepspeed_config FILE with a stage"
        )
    if print_config:
        from ssam_scale.tracking.redaction import all_without_secrets

        print(dump(resolved, all_without_secrets, origins), end="")
        return
    from ssam_scale import train
    from ssam_scale.launcher import ended_with_launcher
    from ssam_scale.sharding import join_world

    timeout, records = timedelta(seconds=resolved.sharding.timeout_seconds), resolved.checkpoint.directory
    with (
        ended_with_launcher(),
        join_world(timeout, resolved.train.device, None if dry_run else records / "flight_recorder") as world,
    ):
        if dry_run:
            done = train.dry_run(resolved, world)
            if world.first:
                print(done)
        else:
            train.train(resolved, world)
