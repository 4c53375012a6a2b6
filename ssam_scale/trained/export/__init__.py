"""Handing a network on: each file is read back by what is going to read it before it gets its name."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ssam_scale.data import central_loader, open_images
from ssam_scale.errors import UserError
from ssam_scale.folders import whole_folder, why_not_a_file, why_not_a_new_folder, write_whole
from ssam_scale.trained.network import Trained

from .interface import Format
from .onnx_file import OnnxFile
from .timm_folder import TimmFolder
from .torch_export import TorchExport

FORMATS: dict[str, Format] = {"safetensors": TimmFolder(), "onnx": OnnxFile(), "torch-export": TorchExport()}
"""By what they are called on the command line."""

_IMAGES = 8


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        place: of the file or folder.
        bytes: of all of it.
        images: by how many it was compared.
        of: where these are from, for people.
        difference: the largest between a logit of what was written and ours, relative to the largest logit or 1.
        tolerance: that it may have.
        same: how many images are taken for the same class.
    """

    place: Path
    bytes: int
    images: int
    of: str
    difference: float
    tolerance: float
    same: int

    def __str__(self) -> str:
        return (
            f"{self.place}: {self.bytes:,} bytes; read back, its logits of {self.images} images of {self.of} are "
            f"within {self.difference:.1e} of ours (allowed: {self.tolerance:.0e}), {self.same} of the same class"
        )


def check_export(format: str, output: Path) -> None:
    """Refuse what could not be written, before anything is loaded.

    Raises:
        UserError: there is no such format, what it needs is not installed, or nothing can be put there.
    """
    if format not in FORMATS:
        raise UserError(f"--format {format}: there are {', '.join(FORMATS)}")
    kind = FORMATS[format]
    if kind.is_folder:
        problem = why_not_a_new_folder(output)
    elif output.is_dir():
        problem = "is a folder; name a file in it"
    else:
        problem = why_not_a_file(output)
    if problem is not None:
        raise UserError(f"-o {output}: {problem}")
    kind.check()


def export(trained: Trained, format: str, output: Path, data: Path | None = None) -> Exported:
    """Write a network, and compare what is read back with it.

    Args:
        trained: the network.
        format: one of `FORMATS`.
        output: a file, or a folder that is not there yet, as the format has it.
        data: images to compare by, as `data.val` has them; None: those, or noise where they are not on this machine.

    Raises:
        UserError: it cannot be written, or computes something else when it is read back; nothing is left then.
    """
    check_export(format, output)
    images, of = _images(trained, data)
    kind = FORMATS[format]
    with torch.no_grad():
        ours = trained.network(images)

    def made(place: Path) -> Exported:
        kind.write(trained, place)
        with torch.no_grad():
            theirs = kind.logits(place, images)
        files = [file for file in place.rglob("*") if file.is_file()] if kind.is_folder else [place]
        return _compared(output, sum(file.stat().st_size for file in files), of, ours, theirs, kind.tolerance)

    results: list[Exported] = []
    try:
        if kind.is_folder:
            with whole_folder(output) as place:
                results.append(made(place))
        else:
            write_whole(output, lambda place: results.append(made(place)))
    except OSError as error:
        raise UserError(f"-o {output}: was not written: {error.strerror or error}") from error
    return results[0]


def _compared(output: Path, size: int, of: str, ours: Tensor, theirs: Tensor, tolerance: float) -> Exported:
    difference = float((ours - theirs).abs().max() / max(1.0, float(ours.abs().max())))
    if not difference <= tolerance:  # nor what is no number
        raise UserError(
            f"-o {output}: not written, because read back its logits of {len(ours)} images of {of} differ by "
            f"{difference:.1e} from ours, and {tolerance:.0e} is allowed"
        )
    same = int((ours.argmax(1) == theirs.argmax(1)).sum())
    return Exported(output, size, len(ours), of, difference, tolerance, same)


def _images(trained: Trained, data: Path | None) -> tuple[Tensor, str]:
    """A batch to compare by, [N, 3, side, side], and where it is from."""
    section = trained.config.data
    try:
        found = open_images(data or section.val)
    except UserError as error:
        if data is not None:
            raise
        side = section.eval_resolution
        noise = torch.randn(_IMAGES, 3, side, side, generator=torch.Generator().manual_seed(0))
        return noise, f"noise, for want of real ones ({str(error).partition(';')[0]})"
    if not found.images:
        raise UserError(f"{found.place}: no images in there")
    loader = central_loader(found, section, device=torch.device("cpu"), batch=min(_IMAGES, found.images))
    with closing(iter(loader)) as batches:
        return next(batches).images, found.place
