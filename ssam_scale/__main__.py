"""`ssam-scale` and `python -m ssam_scale`: the command line, or the line that says what it lacks."""

from __future__ import annotations

import importlib.metadata
import re
import sys


def main(argv: list[str] | None = None) -> None:
    """Run `ssam_scale.cli.main.main`; exit with 2 and one line where a package of an extra is not installed."""
    try:
        from ssam_scale.cli.main import main as command

        command(argv)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = extra_of(package)
        if extra is None:  # ours, or one that has to be there
            raise
        asked = sys.argv[1:] if argv is None else argv
        if asked == ["--version"]:
            from ssam_scale.cli.versions import version_lines

            print(*version_lines(), sep="\n")
            return
        lacks = (
            f"{package} is not installed; bash launch/setup.sh installs all that commands need, "
            f"pip install 'ssam_scale[{extra}]' what pip can (docs/install.md)"
        )
        if asked in ([], ["--help"]):
            print(
                "ssam-scale: Sparse Sharpness-Aware Minimization at scale. `from ssam_scale import SparseSAM` works, "
                f"and `ssam-scale --version` says what is there; for the commands, {lacks}"
            )
            return
        print(f"ssam-scale: error: {lacks}", file=sys.stderr)
        sys.exit(2)


def extra_of(module: str) -> str | None:
    """The extra of `pyproject.toml` that brings a module; None where none does."""
    top = module.partition(".")[0]
    distribution = {"cv2": "opencv-python-headless", "PIL": "Pillow", "yaml": "PyYAML"}.get(top, top)
    for requirement in importlib.metadata.requires("ssam_scale") or ():
        wanted = re.fullmatch(r"([\w.-]+).*extra == ['\"](\w+)['\"].*", requirement)
        if wanted and wanted[1].lower() == distribution.lower():
            return wanted[2]
    return None


if __name__ == "__main__":
    main()
