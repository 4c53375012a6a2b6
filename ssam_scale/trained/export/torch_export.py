"""A program of `torch.export`, which is run without the code of the network: `torch.export.load(FILE).module()`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ssam_scale.errors import UserError
from ssam_scale.trained.network import Trained

from .description import described


class TorchExport:
    """A `.pt2` file, for batches of any size. A `Format`."""

    is_folder = False
    tolerance = 1e-5
    """fp32, where operations may be fused, and so summed in another order."""

    def check(self) -> None:
        """Nothing that would not be there."""

    def write(self, trained: Trained, place: Path) -> None:
        """See `Format`; with the description as the extra file `config.json`."""
        side = trained.config.data.eval_resolution
        try:
            program = torch.export.export(
                trained.network,
                (torch.zeros(2, 3, side, side),),  # of one, the size would be a constant
                dynamic_shapes=({0: torch.export.Dim("batch")},),
            )
        except Exception as error:  # of every kind
            raise UserError(f"--format torch-export: {reason(error, trained)}") from error
        torch.export.save(program, place, extra_files={"config.json": json.dumps(described(trained))})

    def logits(self, place: Path, images: Tensor) -> Tensor:
        """By the program."""
        found: Tensor = torch.export.load(place).module()(images)
        return found


def reason(error: Exception, trained: Trained) -> str:
    """Why a network cannot be traced, in a line: what was raised first."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0][:300] if lines else ""
    return f"torch {torch.__version__} does not take {trained.config.model.name} ({type(error).__name__}: {said})"
