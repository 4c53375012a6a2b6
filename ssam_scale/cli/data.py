"""`ssam-scale data`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ssam_scale.cli.paths import expanded, expanded_images
from ssam_scale.console import console

if TYPE_CHECKING:
    from ssam_scale.data import WriteReport

app = typer.Typer(help="Write and check .beton files.", no_args_is_help=True)

_LISTED = 20

Workers = Annotated[int | None, typer.Option(min=1, help="Threads; by default the cores this process may use.")]


class Order(str, Enum):
    """`write.ClassOrder` for typer, which imports nothing that computes."""

    text = "text"
    natural = "natural"


@app.command("write")
def write_command(
    source: Annotated[
        Path,
        typer.Argument(
            callback=expanded,
            help="One folder of images per class, as ImageNet's; or ImageNet's own tar; or WebDataset's shards "
            "('train-{000..146}.tar'), or parquet files as Hugging Face has them (a folder, or 'train-*.parquet').",
        ),
    ],
    out: Annotated[Path, typer.Argument(callback=expanded, help="The .beton file to write.")],
    classes_of: Annotated[
        Path | None,
        typer.Option(
            metavar="BETON|FOLDER",
            callback=expanded,
            help="Number the classes as this file or folder does: of validation images, the training images'. Some may "
            "be missing.",
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(
            metavar="DEVKIT|TEXT",
            callback=expanded,
            help="Of ImageNet's val tar: ILSVRC2012_devkit_t12.tar.gz, or a text with one class (n01440764) per line.",
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            help="default (own size, half raw), small (own size, JPEG), ffcv-rn50 (500 px, half raw), ffcv-rn18 "
            "(400 px, 90% raw): for the three options that follow."
        ),
    ] = "default",
    max_resolution: Annotated[int | None, typer.Option(min=1, help="Shrink images whose longer side has more.")] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="JPEG quality of what has to be compressed. [90]")
    ] = None,
    jpeg_proportion: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Share kept as JPEG; raw pixels read faster and take more disk. [of the preset]"
        ),
    ] = None,
    workers: Workers = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most this many images, from all classes.")] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave damaged images out and list them.")] = False,
    seed: Annotated[int, typer.Option(help="Decides which images are stored raw.")] = 0,
    exif: Annotated[bool, typer.Option("--exif", help="Turn images as their EXIF orientation says.")] = False,
    shard: Annotated[
        str | None,
        typer.Option(metavar="K/N", help="Write only the K-th of N parts, 1/N to N/N, which `data join` makes one of."),
    ] = None,
    class_order: Annotated[
        Order, typer.Option(help="Of class folders: text, as torchvision's; natural, as timm's: 2 before 10.")
    ] = Order.text,
) -> None:
    """Write labelled images as a .beton file. What was interrupted goes on where it was."""
    from ssam_scale.data import write_beton
    from ssam_scale.data.presets import preset as preset_of
    from ssam_scale.data.shard import Shard

    given = preset_of(preset)
    report = write_beton(
        source,
        out,
        classes_of=classes_of,
        labels=labels,
        max_resolution=given.max_resolution if max_resolution is None else max_resolution,
        quality=given.quality if quality is None else quality,
        jpeg_proportion=given.jpeg_proportion if jpeg_proportion is None else jpeg_proportion,
        workers=workers,
        limit=limit,
        skip_bad=skip_bad,
        seed=seed,
        upright=exif,
        class_order=class_order.value,
        shard=None if shard is None else Shard.parse(shard),
    )
    _print_report(report)


@app.command("join")
def join_command(
    out: Annotated[Path, typer.Argument(callback=expanded, help="The .beton file to write.")],
    shards: Annotated[list[Path], typer.Argument(callback=expanded, help="All files of `data write --shard`.")],
) -> None:
    """Make one .beton file of all shards, byte for byte what one writer would have written."""
    from ssam_scale.data.join import join

    _print_report(join(out, shards))


@app.command("fashion-mnist")
def fashion_mnist_command(
    out: Annotated[Path, typer.Argument(callback=expanded, help="Folder for train.beton and val.beton.")],
    size: Annotated[int, typer.Option(min=8, help="Side of the images in pixels; the originals have 28.")] = 28,
    limit: Annotated[int | None, typer.Option(min=1, help="Only this many training images.")] = None,
    val_limit: Annotated[int | None, typer.Option(min=1, help="Only this many validation images.")] = None,
    idx_folder: Annotated[
        Path | None,
        typer.Option(
            callback=expanded, help="Folder of the four idx.gz files. [that of Debian's dataset-fashion-mnist]"
        ),
    ] = None,
    workers: Workers = None,
) -> None:
    """Write Fashion-MNIST as two .beton files; does nothing where they are there already."""
    from ssam_scale.data.fashion_mnist import FOLDER, prepare_fashion_mnist

    prepared = prepare_fashion_mnist(
        out, idx_folder=idx_folder or FOLDER, size=size, limit=limit, val_limit=val_limit, workers=workers
    )
    _print("Wrote" if prepared.written else "Up to date:", prepared.train, "and", prepared.val)


@app.command("check")
def check_command(
    images: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            callback=expanded_images,
            help="The .beton file to check; or 'a-*.beton', folder:PATH or wds:SHARDS, as data.train may have it.",
        ),
    ],
    add: Annotated[
        bool,
        typer.Option(
            "--add-checksums", help="Of a file that FFCV wrote: note each image's hash, so that damage is noticed."
        ),
    ] = False,
    workers: Workers = None,
) -> None:
    """Check every image of a .beton file, and the file down to its last byte; names those that are damaged."""
    from ssam_scale.data.check import add_checksums, verify
    from ssam_scale.data.opening import open_images
    from ssam_scale.data.progress import progress_of_bytes
    from ssam_scale.data.sources import printable

    with progress_of_bytes(f"Reading {printable(images.name)}", open_images(images).bytes) as advance:
        found = (add_checksums if add else verify)(images, advance, workers)
    verdict = f"the hashes of its images are in {images.name}.json from now on" if add else found.assurance
    stored = ", ".join(f"{count:,} {how}" for how, count in found.counts.items())
    classes = f"{len(found.class_names):,} classes" if found.class_names else "classes unnamed"
    _print(f"{images}: {found.images:,} images ({stored}), {classes}, {found.bytes / 1e6:,.1f} MB; {verdict}")


def _print_report(report: WriteReport) -> None:
    for skipped in report.skipped[:_LISTED]:
        _print(f"skipped {skipped.path}: {skipped.reason}")
    if len(report.skipped) > _LISTED:
        _print(f"… and {len(report.skipped) - _LISTED:,} more")
    if report.emptied:
        few = ", ".join(report.emptied[:3]) + (" and more" if len(report.emptied) > 3 else "")
        _print(f"of {len(report.emptied):,} classes no image is left: {few}")
    if report.turned:
        _print(
            f"{report.turned:,} images say by EXIF that they are shown turned; their pixels are stored as they lie, "
            "which is how torchvision's and timm's ImageFolder read them (--exif turns them)"
        )
    for kind, count in report.kinds.items():
        _print(f"{count:>13,}  {kind}")
    left_out = f", {len(report.skipped):,} damaged images left out" if report.skipped else ""
    size = f"{report.bytes / 1e6:,.1f} MB"
    _print(f"Wrote {report.path}: {report.images:,} images, {len(report.classes):,} classes, {size}{left_out}")


def _print(*words: object) -> None:
    from ssam_scale.data.sources import printable

    console().print(*[printable(str(word)) for word in words], soft_wrap=True)
