"""`ssam-scale consolidate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ssam_scale.cli.paths import expanded


def consolidate_command(
    checkpoint: Annotated[
        Path, typer.Argument(callback=expanded, help="A checkpoint, such as checkpoints/epoch_0090.")
    ],
    output: Annotated[Path, typer.Argument(callback=expanded, help="The folder that gets one of the same name.")],
) -> None:
    """Write a sharded checkpoint as one of full tensors, whose model.safetensors timm loads. It must fit in memory."""
    from ssam_scale.errors import UserError
    from ssam_scale.train.checkpoint import consolidate

    try:
        print(consolidate(checkpoint, output))
    except ValueError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{output}: was not written: {error}") from error
