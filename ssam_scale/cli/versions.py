"""What `ssam-scale --version` prints, without anything that has to be installed for it."""

from __future__ import annotations

from collections.abc import Iterator

from ssam_scale import __version__


def version_lines() -> Iterator[str]:
    """ssam_scale's version and those of what decides how it computes, from what is installed: nothing is imported."""
    from ssam_scale.tracking.environment import versions

    found = versions()
    yield f"ssam_scale {__version__}"
    for name in ("torch", "torchvision", "timm", "deepspeed", "ffcv", "mlflow"):
        yield f"{name} {found[name]}" if name in found else f"{name}: not installed"
    yield f"Python {found['python']}"
