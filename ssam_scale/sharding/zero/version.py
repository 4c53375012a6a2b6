"""Which DeepSpeed this is for, and importing it."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

from ssam_scale.errors import UnsupportedVersionError, UserError

from .extensions import prepare_extensions

# From, up to but without. 0.19.7 fails the tests: stage 3 on four processes is sporadically wrong (2 of 25 runs, none
# of 146 with 0.19.8), and bf16 with float32 accumulation raises where a gradient is not finite.
VERSIONS = ((0, 19, 8), (0, 20, 0))


def check_version(version: str, what: str = "") -> None:
    """Refuse a DeepSpeed that is not one whose internals are known.

    Args:
        version: of it.
        what: what else is wrong with it, which makes any version one that is refused.

    Raises:
        UnsupportedVersionError: it is out of range.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
    if what or not VERSIONS[0] <= numbers < VERSIONS[1]:
        low, high = (".".join(map(str, bound)) for bound in VERSIONS)
        raise UnsupportedVersionError(
            f"DeepSpeed {version} is not supported: at least {low} and below {high} is needed{what}; "
            f"pip install 'deepspeed>={low},<{high}'"
        )


def import_deepspeed(device: torch.device) -> Any:
    """The module `deepspeed`, which computes on such a device.

    Raises:
        UnsupportedVersionError: it is out of range.
        UserError: it cannot be imported, or computes elsewhere.
    """
    version = ""
    with suppress(metadata.PackageNotFoundError):  # one that was not installed may still be there
        version = metadata.version("deepspeed")
        check_version(version)  # before it is imported: an old one may fail in that
    prepare_extensions(version)
    try:
        deepspeed = _imported(device)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"DeepSpeed cannot be imported ({reason}); bash launch/setup.sh installs it") from error
    check_version(deepspeed.__version__)
    if (name := deepspeed.get_accelerator().device_name()) != device.type:
        raise UserError(
            f"DeepSpeed computes on {name}, this run on {device.type}; leave DS_ACCELERATOR unset and say train.device"
        )
    return deepspeed


def _imported(device: torch.device) -> Any:
    # It decides for itself what it computes on, when it is imported: on a GPU if torch sees one.
    told = "DS_ACCELERATOR" in os.environ
    if device.type == "cpu" and not told:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed

        deepspeed.get_accelerator()  # decides, if the import has not
        return deepspeed
    finally:
        if not told:
            os.environ.pop("DS_ACCELERATOR", None)
