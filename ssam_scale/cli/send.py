"""`ssam-scale send`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssam_scale.cli.paths import expanded, expanded_uri


def send_command(
    folders: Annotated[list[Path], typer.Argument(callback=expanded, help="unsent_… beside the checkpoints of a run.")],
    uri: Annotated[
        str | None,
        typer.Option(
            callback=expanded_uri,
            help="The MLflow tracking URI of the run's store, where it has moved or needs a password.",
        ),
    ] = None,
) -> None:
    """Send to MLflow what a run recorded while its tracking store was away. A run that is resumed does so itself."""
    from ssam_scale.tracking.spool import send

    for folder in folders:
        print(f"{folder}: {send(folder, uri)}")
